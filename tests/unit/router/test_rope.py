"""The rotary table against transformers' own embedding module."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from router.model.config import ModelConfig
from router.model.rope import RotaryTable, mrope_axes
from tests.unit.router.test_config import MOE_TEXT

ROPES: dict[str, dict[str, Any]] = {
    "default": {"mrope_section": [2, 1, 1]},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 250},
    "yarn_untruncated": {
        "rope_type": "yarn",
        "factor": 3.5,
        "original_max_position_embeddings": 100,
        "truncate": False,
        "beta_fast": 8,
        "beta_slow": 2,
        "attention_factor": 0.7,
    },
}


def ours_and_theirs(**rope: Any) -> tuple[RotaryTable, Any]:
    import transformers
    from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import (
        Qwen3_5MoeTextRotaryEmbedding,
    )

    parameters = {
        "rope_type": "default",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.5,
        "mrope_section": [2, 1, 1],
        **rope,
    }
    raw = MOE_TEXT | {"rope_parameters": parameters}
    config = transformers.Qwen3_5MoeTextConfig(**{**raw, "rope_parameters": dict(parameters)})
    table = RotaryTable(ModelConfig.from_dict(raw).rope, torch.device("cpu"))
    return table, Qwen3_5MoeTextRotaryEmbedding(config)


@pytest.mark.parametrize("rope", ROPES)
def test_text_rows_equal_the_oracle(rope: str) -> None:
    table, oracle = ours_and_theirs(**ROPES[rope])
    positions = torch.tensor([0, 1, 2, 63, 999, 4095, 4096, 10_000])
    cos, sin = oracle(torch.zeros(1), positions.expand(3, 1, -1))
    rows = table.rows(positions, 10_000)
    torch.testing.assert_close(rows, torch.cat((cos[0, :, :4], sin[0, :, :4]), dim=1))


@pytest.mark.parametrize("factor", [1.0, 2.0, 4.0])
def test_yarn_rows_equal_the_oracle_up_to_a_million_positions(factor: float) -> None:
    """The released sizes: theta 1e7, a window of 262,144 stretched by the factor."""
    rope = {"factor": factor, "original_max_position_embeddings": 262_144, "rope_theta": 1e7}
    table, oracle = ours_and_theirs(rope_type="yarn", **rope)
    positions = torch.tensor([0, 1, 127, 128, 4096, 262_143, 262_144, 524_289, 999_999, 1_009_999])
    cos, sin = oracle(torch.zeros(1), positions.expand(3, 1, -1))
    rows = table.rows(positions, 1_009_999)
    expected = torch.cat((cos[0, :, :4], sin[0, :, :4]), dim=1)
    assert torch.equal(rows, expected)


def test_each_frequency_takes_its_own_axis() -> None:
    table, oracle = ours_and_theirs()
    positions = torch.tensor([[5, 6, 7, 8], [1, 2, 3, 4], [40, 50, 60, 70]])
    cos, sin = oracle(torch.zeros(1), positions.unsqueeze(1))
    rows = table.rows(positions, 70)
    torch.testing.assert_close(rows, torch.cat((cos[0, :, :4], sin[0, :, :4]), dim=1))


def test_the_axes_are_interleaved() -> None:
    rope = ModelConfig.from_dict(MOE_TEXT).rope
    rope = dataclasses.replace(rope, rotary_dim=64, mrope_section=(11, 11, 10))
    axes = mrope_axes(rope)
    assert axes.tolist()[:7] == [0, 1, 2, 0, 1, 2, 0]
    assert axes.bincount().tolist() == [11, 11, 10]


def test_a_row_has_the_same_bits_however_the_table_grew() -> None:
    whole, grown = ours_and_theirs()[0], ours_and_theirs()[0]
    positions = torch.arange(20_000)
    expected = whole.rows(positions, 19_999)
    for most in (0, 10, 4096, 9000):
        grown.rows(torch.tensor([most]), most)
    assert torch.equal(grown.rows(positions, 19_999), expected)
