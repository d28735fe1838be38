"""Loading the trunk: fused projections, and errors that name the tensor."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from experts.weights import SafetensorsCheckpoint
from protos.errors import CheckpointError, ConfigurationError, UnsupportedArchitectureError
from router.model.config import ModelConfig
from router.model.decoder import Decoder
from router.model.torch_ops import TorchOps
from router.model.weights import GdnWeights, MoeWeights, TrunkWeights, load_trunk, trunk_tensors
from tests.parity.checkpoints import make_checkpoint

OPS = TorchOps(torch.float32, torch.device("cpu"))
GDN = "model.layers.0.linear_attn."


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    return make_checkpoint(path, text_only=True, num_layers=2, full_attention_interval=2)


@pytest.fixture
def edited(
    original: Path, tmp_path: Path
) -> Callable[[Callable[[dict[str, Tensor]], object]], Path]:
    """`edited(change)`: a copy of the checkpoint whose tensors `change` has edited."""

    def edit(change: Callable[[dict[str, Tensor]], object]) -> Path:
        shutil.copytree(original, tmp_path / "copy")
        file = tmp_path / "copy" / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)
        return tmp_path / "copy"

    return edit


def load(path: Path, dtype: torch.dtype = torch.float32) -> TrunkWeights:
    with SafetensorsCheckpoint(path) as checkpoint:
        return load_trunk(checkpoint, ModelConfig.from_checkpoint(path), OPS, dtype)


def test_projections_of_one_input_are_one_matrix(original: Path) -> None:
    layer = load(original).layers[0]
    tensors = load_file(original / "model.safetensors")
    assert isinstance(layer.mixer, GdnWeights)
    parts = [tensors[f"{GDN}in_proj_{part}.weight"] for part in ("qkv", "z", "b", "a")]
    assert torch.equal(layer.mixer.in_proj.weight, torch.cat(parts))  # type: ignore[attr-defined]
    assert torch.equal(layer.mixer.params.decay, -tensors[f"{GDN}A_log"].exp())
    assert isinstance(layer.mlp, MoeWeights)
    assert layer.mlp.shared_in.out_features == 2 * 32 + 1


def test_bfloat16_keeps_gate_norms_and_decay_in_float32(original: Path) -> None:
    weights = load(original, torch.bfloat16)
    layer = weights.layers[0]
    assert isinstance(layer.mixer, GdnWeights)
    assert isinstance(layer.mlp, MoeWeights)
    assert layer.mixer.in_proj.weight.dtype == torch.bfloat16  # type: ignore[attr-defined]
    assert layer.mlp.gate.weight.dtype == torch.float32  # type: ignore[attr-defined]
    assert layer.input_norm.dtype == layer.mixer.params.decay.dtype == torch.float32
    assert weights.embedding.dtype == torch.bfloat16


def test_the_list_of_trunk_tensors_is_the_checkpoint_without_experts(original: Path) -> None:
    tensors = load_file(original / "model.safetensors")
    listed = {
        name if name == "lm_head.weight" else f"model.{name}": shape
        for name, shape in trunk_tensors(ModelConfig.from_checkpoint(original))
    }
    stored = {name: tuple(t.shape) for name, t in tensors.items() if ".experts." not in name}
    assert listed == stored


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_weights_are_refused_by_name(
    value: float, edited: Callable[[Callable[[dict[str, Tensor]], object]], Path]
) -> None:
    path = edited(lambda tensors: tensors[GDN + "dt_bias"].index_fill_(0, torch.tensor(1), value))
    with pytest.raises(CheckpointError, match=r"layers\.0\.linear_attn\.dt_bias.*NaN or infinity"):
        load(path)


def test_a_missing_tensor_is_named(
    edited: Callable[[Callable[[dict[str, Tensor]], object]], Path],
) -> None:
    path = edited(lambda tensors: tensors.pop(GDN + "out_proj.weight"))
    with pytest.raises(CheckpointError, match=r"layers\.0\.linear_attn\.out_proj\.weight"):
        load(path)


def test_a_misshapen_tensor_is_named_with_both_shapes(
    edited: Callable[[Callable[[dict[str, Tensor]], object]], Path],
) -> None:
    def shorten(tensors: dict[str, Tensor]) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:63].clone()

    path = edited(shorten)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight.*\[63\].*\[64\]"):
        load(path)


def test_an_unsupported_model_is_refused_before_any_tensor_is_read(tmp_path: Path) -> None:
    """There are no tensors in these folders: reading one would be another error."""
    config = {"model_type": "qwen3_next"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedArchitectureError, match="qwen3_next"):
        Decoder.from_checkpoint(tmp_path, dtype=torch.float32, experts=None)
    config = {"model_type": "qwen3_5_text", "hidden_act": "relu"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigurationError, match="num_hidden_layers must be"):
        Decoder.from_checkpoint(tmp_path, dtype=torch.float32, experts=None)
