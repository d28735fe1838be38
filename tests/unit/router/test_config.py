"""`ModelConfig`: what is read, and how each refusal reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from protos.errors import CheckpointError, ConfigurationError, UnsupportedArchitectureError
from router.model import memory
from router.model.config import ModelConfig
from router.model.weights import trunk_tensors

MOE_TEXT: dict[str, Any] = {
    "model_type": "qwen3_5_moe_text",
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 20,
    "max_position_embeddings": 1000,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.5},
}


def changed(**changes: Any) -> dict[str, Any]:
    return MOE_TEXT | changes


def without(*keys: str) -> dict[str, Any]:
    return {key: value for key, value in MOE_TEXT.items() if key not in keys}


def test_a_flat_text_config_is_read() -> None:
    config = ModelConfig.from_dict(MOE_TEXT)
    assert config.is_moe
    assert config.layer_types == (("linear_attention",) * 3 + ("full_attention",)) * 2
    assert (config.num_full_layers, config.num_linear_layers) == (2, 6)
    assert config.rotary_dim == 8
    assert config.conv_dim == 2 * 2 * 8 + 4 * 8
    assert config.conv_kernel == 4
    assert not config.tie_word_embeddings


def test_a_multimodal_config_is_read_from_its_text_part() -> None:
    raw = {
        "model_type": "qwen3_5_moe",
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
        "text_config": changed(tie_word_embeddings=False),
        "vision_config": {"depth": 1},
    }
    config = ModelConfig.from_dict(raw)
    assert config.hidden_size == 32
    assert config.tie_word_embeddings  # the outer key decides
    assert config.dtype == torch.bfloat16


def test_a_dense_model_has_no_experts() -> None:
    raw = without("num_experts", "num_experts_per_tok", "moe_intermediate_size")
    config = ModelConfig.from_dict(raw | {"model_type": "qwen3_5_text", "intermediate_size": 48})
    assert not config.is_moe
    assert (config.intermediate_size, config.num_experts, config.top_k) == (48, 0, 0)


def test_the_end_tokens_of_the_generation_config_come_first(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(changed(eos_token_id=3)))
    assert ModelConfig.from_checkpoint(tmp_path).eos_token_ids == (3,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert ModelConfig.from_checkpoint(tmp_path).eos_token_ids == (7, 9)


def test_overrides_switch_on_yarn() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1000}
    config = ModelConfig.from_dict(MOE_TEXT, {"rope_parameters": yarn})
    assert config.rope.rope_type == "yarn"
    assert config.rope.theta == 1e7  # merged, not replaced
    assert config.rope.attention_factor == pytest.approx(1.1386294)  # 0.1 ln 4 + 1
    assert config.max_context_tokens == 4000
    assert ModelConfig.from_dict(MOE_TEXT).max_context_tokens == 1000


def test_an_override_in_the_older_spelling_keeps_the_rest_of_the_rope() -> None:
    scaling = {"type": "yarn", "factor": 4.0}
    rope = ModelConfig.from_dict(MOE_TEXT, {"rope_scaling": scaling}).rope
    expected = ModelConfig.from_dict(
        MOE_TEXT, {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}
    ).rope
    assert rope == expected
    assert rope.theta == 1e7


def test_an_override_of_the_text_model_outside_text_config_is_refused() -> None:
    """There nobody would read it, and the output would rot beyond the old window."""
    raw = {"model_type": "qwen3_5_moe", "text_config": MOE_TEXT}
    yarn = {"rope_type": "yarn", "factor": 4.0}
    with pytest.raises(ConfigurationError, match=r"give it as text_config\.rope_parameters"):
        ModelConfig.from_dict(raw, {"rope_parameters": yarn})
    with pytest.raises(ConfigurationError, match=r"text_config\.max_position_embeddings"):
        ModelConfig.from_dict(raw, {"max_position_embeddings": 8})
    inside = ModelConfig.from_dict(raw, {"text_config": {"rope_parameters": yarn}})
    assert inside.max_context_tokens == 4000


def test_a_factor_without_yarn_is_refused_not_ignored() -> None:
    with pytest.raises(ConfigurationError, match=r"rope_parameters\.factor is only read with"):
        ModelConfig.from_dict(MOE_TEXT, {"rope_parameters": {"factor": 4.0}})


def test_the_window_of_a_million_tokens() -> None:
    raw = changed(max_position_embeddings=262_144)
    assert ModelConfig.from_dict(raw).max_context_tokens == 262_144
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 262_144}
    config = ModelConfig.from_dict(raw, {"rope_parameters": yarn})
    assert config.max_context_tokens >= 1_010_000
    assert config.rope.factor == 4.0


def test_the_older_rope_keys_are_read() -> None:
    raw = without("rope_parameters") | {
        "rope_theta": 5e5,
        "partial_rotary_factor": 0.25,
        "rope_scaling": {"type": "yarn", "factor": 2.0},
    }
    rope = ModelConfig.from_dict(raw).rope
    assert (rope.rope_type, rope.theta, rope.rotary_dim) == ("yarn", 5e5, 4)
    assert rope.original_max_position_embeddings == 1000  # defaults to the model's own


def test_another_architecture_is_refused_with_what_is_supported() -> None:
    with pytest.raises(UnsupportedArchitectureError) as caught:
        ModelConfig.from_dict({"model_type": "llama"})
    assert "'llama'" in str(caught.value)
    assert "qwen3_5_moe" in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "path", "rule"),
    [
        (without("hidden_size"), "hidden_size", "must be an integer >= 1"),
        (changed(hidden_size=True), "hidden_size", "must be an integer >= 1"),
        (changed(num_hidden_layers=0), "num_hidden_layers", "must be an integer >= 1"),
        (changed(linear_conv_kernel_dim=1), "linear_conv_kernel_dim", "must be an integer >= 2"),
        (changed(rms_norm_eps=-1), "rms_norm_eps", "must be a number > 0"),
        (changed(hidden_act="gelu"), "hidden_act", 'must be "silu"'),
        (changed(attention_bias=True), "attention_bias", "must be false"),
        (changed(attn_output_gate=False), "attn_output_gate", "must be true"),
        (changed(norm_topk_prob=False), "norm_topk_prob", "must be true"),
        (changed(mlp_only_layers=[1]), "mlp_only_layers", "must be []"),
        (changed(num_experts_per_tok=7), "num_experts_per_tok", "must be <= num_experts (6)"),
        (
            changed(num_attention_heads=5),
            "num_attention_heads",
            "must be a multiple of num_key_value_heads (2)",
        ),
        (
            changed(linear_num_value_heads=3),
            "linear_num_value_heads",
            "must be a multiple of linear_num_key_heads (2)",
        ),
        (changed(layer_types=["mamba"] * 8), "layer_types", "must be a list of full_attention"),
        (
            changed(layer_types=["full_attention"]),
            "layer_types",
            "must have num_hidden_layers (8) entries",
        ),
        (without("rope_parameters"), "rope_parameters.rope_theta", "must be a number > 0"),
        (
            changed(rope_parameters={"rope_theta": 1e4, "rope_type": "longrope"}),
            "rope_parameters.rope_type",
            "must be default or yarn",
        ),
        (
            changed(rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.07}),
            "rope_parameters.partial_rotary_factor",
            "must rotate an even number of 2..16 components, not 1",
        ),
        (
            changed(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}),
            "rope_parameters.factor",
            "must be a number > 0",
        ),
        (changed(rope_parameters={}), "rope_parameters.rope_theta", "must be a number > 0"),
        (
            changed(quantization_config={"quant_method": "fp8"}),
            "quantization_config",
            "must be absent",
        ),
    ],
)
def test_a_value_that_cannot_be_served_is_named(raw: dict[str, Any], path: str, rule: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        ModelConfig.from_dict(raw)
    assert [violation.field for violation in caught.value.violations] == [path]
    assert rule in caught.value.violations[0].rule


def test_all_violations_are_in_one_error_by_dotted_path() -> None:
    raw = {
        "model_type": "qwen3_5_moe",
        "text_config": changed(hidden_act="gelu", vocab_size="many")
        | {"rope_parameters": {"rope_theta": 0}},
    }
    with pytest.raises(ConfigurationError) as caught:
        ModelConfig.from_dict(raw)
    assert {violation.field for violation in caught.value.violations} == {
        "text_config.hidden_act",
        "text_config.vocab_size",
        "text_config.rope_parameters.rope_theta",
    }
    assert '"many"' in str(caught.value)


def test_a_folder_without_a_config_is_a_checkpoint_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        ModelConfig.from_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        ModelConfig.from_checkpoint(tmp_path)


def test_memory_of_the_35b_model_is_the_published_arithmetic() -> None:
    """The table of reference/ep-serving.md, section 4.2: computed from the config alone."""
    config = ModelConfig.from_dict(
        changed(
            vocab_size=248320,
            hidden_size=2048,
            num_hidden_layers=40,
            num_attention_heads=16,
            num_key_value_heads=2,
            head_dim=256,
            linear_num_key_heads=16,
            linear_num_value_heads=32,
            linear_key_head_dim=128,
            linear_value_head_dim=128,
            num_experts=256,
            num_experts_per_tok=8,
            moe_intermediate_size=512,
            shared_expert_intermediate_size=512,
        )
    )
    estimate = memory.estimate_memory(config, torch.bfloat16)
    assert estimate.expert_bytes == 6 * 2**20
    assert estimate.expert_bytes_per_layer == 1.5 * 2**30
    assert estimate.total_expert_bytes == 60 * 2**30
    assert memory.kv_bytes_per_block(config, 16, torch.bfloat16) == 16 * 20 * 2**10
    conv_bytes = 30 * 8192 * 3 * 2
    assert memory.state_bytes_per_slot(config, torch.bfloat16) == 60 * 2**20 + conv_bytes
    parameters = sum(torch.Size(shape).numel() for _, shape in trunk_tensors(config))
    assert parameters * 2 <= estimate.trunk_bytes <= parameters * 2.02
