"""What a checkpoint's `config.json` says about the text model, checked before anything is loaded.

Reads the Qwen3.5 family: `qwen3_5_moe` (mixture of experts) and `qwen3_5` (dense), as released
(multimodal, the text model under `text_config`) or text only (`*_text`, flat). A value that the
model code cannot honour is an error that names its dotted path; nothing is guessed or clamped.
A key that the released format may leave out has the format's own default, written here once.

Source: transformers 5.23 `configuration_qwen3_5_moe.py`, `configuration_qwen3_5.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from protos.errors import (
    CheckpointError,
    ConfigurationError,
    UnsupportedArchitectureError,
    Violation,
)

FULL_ATTENTION = "full_attention"
LINEAR_ATTENTION = "linear_attention"

SUPPORTED_MODEL_TYPES = ("qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5", "qwen3_5_text")

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding, `rope_parameters` of the checkpoint."""

    rope_type: str
    """`default` or `yarn`."""

    theta: float
    rotary_dim: int
    """Components of a head that are rotated: `int(head_dim * partial_rotary_factor)`, even."""

    mrope_section: tuple[int, int, int]
    """Frequencies per axis (time, height, width), interleaved; for text all axes are equal."""

    factor: float = 1.0
    """YaRN: how much longer the context is than in pre-training."""

    original_max_position_embeddings: int = 0
    """YaRN: context of the pre-training, tokens."""

    attention_factor: float = 1.0
    """Scale of cos and sin; 1 without YaRN."""

    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The sizes and constants of one text model."""

    model_type: str
    """One of `SUPPORTED_MODEL_TYPES`, as the checkpoint says."""

    num_layers: int
    hidden_size: int
    vocab_size: int
    layer_types: tuple[str, ...]
    """Per layer `full_attention` or `linear_attention` (Gated DeltaNet)."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeConfig

    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    conv_kernel: int

    num_experts: int
    """0 in a dense model."""

    top_k: int
    moe_intermediate_size: int
    shared_intermediate_size: int
    intermediate_size: int
    """Width of the dense MLP; 0 in a mixture of experts."""

    tie_word_embeddings: bool
    rms_norm_eps: float
    max_position_embeddings: int
    dtype: torch.dtype | None
    """What the checkpoint declares, if it is float32 or bfloat16."""

    eos_token_ids: tuple[int, ...] = ()
    """From `generation_config.json`, else from the model's config."""

    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """The whole `config.json`, overrides applied."""

    @property
    def is_moe(self) -> bool:
        """Whether the model has routed experts."""
        return self.num_experts > 0

    @property
    def rotary_dim(self) -> int:
        """Components of a head that are rotated."""
        return self.rope.rotary_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the Gated DeltaNet convolution: q, k and v."""
        return 2 * self.linear_num_key_heads * self.linear_key_head_dim + self.linear_value_dim

    @property
    def linear_value_dim(self) -> int:
        """Width of a Gated DeltaNet layer's output."""
        return self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def num_full_layers(self) -> int:
        """Full-attention layers: those with KV blocks."""
        return self.layer_types.count(FULL_ATTENTION)

    @property
    def num_linear_layers(self) -> int:
        """Gated DeltaNet layers: those with state slots."""
        return self.layer_types.count(LINEAR_ATTENTION)

    @property
    def max_context_tokens(self) -> int:
        """Longest context that the position embedding is made for."""
        if self.rope.rope_type != "yarn":
            return self.max_position_embeddings
        stretched = int(self.rope.factor * self.rope.original_max_position_embeddings)
        return max(self.max_position_embeddings, stretched)

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, overrides: Mapping[str, Any] | None = None
    ) -> ModelConfig:
        """Read `config.json` and `generation_config.json` of a checkpoint folder.

        Args:
            path: The folder.
            overrides: Merged into `config.json`, nested as there (YaRN is switched on this way).

        Raises:
            CheckpointError: No readable `config.json`.
            UnsupportedArchitectureError: Another `model_type`.
            ConfigurationError: Values that cannot be served, all of them, by dotted path.
        """
        folder = Path(path)
        raw = _read_json(folder, "config.json")
        generation = {}
        if (folder / "generation_config.json").is_file():
            generation = _read_json(folder, "generation_config.json")
        return cls.from_dict(raw, overrides, generation)

    @classmethod
    def from_dict(
        cls,
        raw: Mapping[str, Any],
        overrides: Mapping[str, Any] | None = None,
        generation: Mapping[str, Any] | None = None,
    ) -> ModelConfig:
        """Check a `config.json` that is already in memory; see `from_checkpoint`."""
        _refuse_misplaced(raw, overrides or {})
        raw = _merge(raw, overrides or {})
        model_type = raw.get("model_type")
        if model_type not in SUPPORTED_MODEL_TYPES:
            raise UnsupportedArchitectureError(str(model_type), SUPPORTED_MODEL_TYPES)
        is_flat = model_type.endswith("_text")
        text = raw if is_flat else raw.get("text_config")
        if not isinstance(text, Mapping):
            raise ConfigurationError("text_config", "must be an object", text)
        fields = _Fields(text, "" if is_flat else "text_config.")
        config = _build(cls, fields, raw, model_type, generation or {})
        if fields.violations:
            raise ConfigurationError(violations=fields.violations)
        return config


class _Fields:
    """Typed reads of one JSON object; violations pile up so that one error names them all.

    A read that fails returns a harmless in-range value, so that later checks can go on; the
    config made from it is never returned.
    """

    def __init__(
        self, values: Mapping[str, Any], prefix: str, violations: list[Violation] | None = None
    ) -> None:
        self.values = values
        self.prefix = prefix
        self.violations: list[Violation] = [] if violations is None else violations

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def fail(self, key: str, rule: str) -> None:
        value = self.values.get(key)
        if not isinstance(value, (str, int, float, bool, type(None))):
            value = json.dumps(value, default=str)
        self.violations.append(Violation(self.prefix + key, rule, value))

    def integer(self, key: str, default: int | None = None, *, low: int = 1) -> int:
        value = self.values.get(key)
        value = default if value is None else value
        if type(value) is not int or value < low:
            self.fail(key, f"must be an integer >= {low}")
            return max(low, 2)
        return value

    def number(self, key: str, default: float | None = None, *, low: float = 0.0) -> float:
        """Read a finite number > `low`."""
        value = self.values.get(key)
        value = default if value is None else value
        if type(value) not in (int, float) or not math.isfinite(value) or not value > low:  # type: ignore[arg-type,operator]
            self.fail(key, f"must be a number > {low:g}")
            return low + 1.0
        return float(value)  # type: ignore[arg-type]

    def boolean(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        value = default if value is None else value
        if type(value) is not bool:
            self.fail(key, "must be true or false")
            return default
        return value

    def require(self, key: str, only: Any) -> None:
        """Allow the key to be absent or to have the one value that the model code implements."""
        if self.has(key) and self.values[key] != only:
            self.fail(key, f"must be {json.dumps(only)}, nothing else is implemented")

    def child(self, key: str) -> _Fields:
        """Read an object; an absent one is empty."""
        value = self.values.get(key)
        value = {} if value is None else value
        if not isinstance(value, Mapping):
            self.fail(key, "must be an object")
            value = {}
        return _Fields(value, f"{self.prefix}{key}.", self.violations)


def _build(
    cls: type[ModelConfig],
    text: _Fields,
    raw: Mapping[str, Any],
    model_type: str,
    generation: Mapping[str, Any],
) -> ModelConfig:
    is_moe = "moe" in model_type
    head_dim = text.integer("head_dim", 256)
    num_layers = text.integer("num_hidden_layers")
    config = cls(
        model_type=model_type,
        num_layers=num_layers,
        hidden_size=text.integer("hidden_size"),
        vocab_size=text.integer("vocab_size"),
        layer_types=_layer_types(text, num_layers),
        num_heads=text.integer("num_attention_heads"),
        num_kv_heads=text.integer("num_key_value_heads"),
        head_dim=head_dim,
        rope=_rope(text, head_dim),
        linear_num_key_heads=text.integer("linear_num_key_heads", 16),
        linear_num_value_heads=text.integer("linear_num_value_heads", 32),
        linear_key_head_dim=text.integer("linear_key_head_dim", 128),
        linear_value_head_dim=text.integer("linear_value_head_dim", 128),
        conv_kernel=text.integer("linear_conv_kernel_dim", 4, low=2),
        num_experts=text.integer("num_experts") if is_moe else 0,
        top_k=text.integer("num_experts_per_tok") if is_moe else 0,
        moe_intermediate_size=text.integer("moe_intermediate_size") if is_moe else 0,
        shared_intermediate_size=(text.integer("shared_expert_intermediate_size") if is_moe else 0),
        intermediate_size=0 if is_moe else text.integer("intermediate_size"),
        tie_word_embeddings=_tied(text, raw),
        rms_norm_eps=text.number("rms_norm_eps", 1e-6),
        max_position_embeddings=text.integer("max_position_embeddings", 32768),
        dtype=_declared_dtype(raw, text),
        eos_token_ids=_eos_token_ids(generation, text.values, raw),
        raw=raw,
    )
    if config.num_heads % config.num_kv_heads:
        rule = f"must be a multiple of num_key_value_heads ({config.num_kv_heads})"
        text.fail("num_attention_heads", rule)
    if config.linear_num_value_heads % config.linear_num_key_heads:
        rule = f"must be a multiple of linear_num_key_heads ({config.linear_num_key_heads})"
        text.fail("linear_num_value_heads", rule)
    if config.top_k > config.num_experts:
        text.fail("num_experts_per_tok", f"must be <= num_experts ({config.num_experts})")
    _require_implemented(text, raw)
    return config


def _refuse_misplaced(raw: Mapping[str, Any], overrides: Mapping[str, Any]) -> None:
    """Refuse overrides of the text model that stand beside `text_config`, where nobody reads them.

    Raises:
        ConfigurationError: Names the path that was meant.
    """
    inner = raw.get("text_config")
    if not isinstance(inner, Mapping):
        return
    text_keys = {*inner, "rope_parameters", "rope_scaling"} - set(raw)
    violations = [
        Violation(key, f"is the text model's: give it as text_config.{key}", json.dumps(value))
        for key, value in overrides.items()
        if key in text_keys
    ]
    if violations:
        raise ConfigurationError(violations=violations)


def _require_implemented(text: _Fields, raw: Mapping[str, Any]) -> None:
    """Refuse settings that would change the mathematics or the weights' format."""
    text.require("hidden_act", "silu")
    text.require("attention_bias", False)
    text.require("attn_output_gate", True)
    text.require("norm_topk_prob", True)
    text.require("decoder_sparse_step", 1)
    text.require("mlp_only_layers", [])
    if raw.get("quantization_config") or text.values.get("quantization_config"):
        top = _Fields(raw, "", text.violations)
        owner = top if raw.get("quantization_config") else text
        owner.fail("quantization_config", "must be absent, quantised weights are not implemented")


def _layer_types(text: _Fields, num_layers: int) -> tuple[str, ...]:
    if not text.has("layer_types"):
        interval = text.integer("full_attention_interval", 4)
        return tuple(
            LINEAR_ATTENTION if (i + 1) % interval else FULL_ATTENTION for i in range(num_layers)
        )
    types = text.values["layer_types"]
    known = (FULL_ATTENTION, LINEAR_ATTENTION)
    if not isinstance(types, list) or any(item not in known for item in types):
        text.fail("layer_types", f"must be a list of {FULL_ATTENTION} and {LINEAR_ATTENTION}")
        return (FULL_ATTENTION,) * num_layers
    if len(types) != num_layers:
        text.fail("layer_types", f"must have num_hidden_layers ({num_layers}) entries")
    return tuple(types)


def _rope(text: _Fields, head_dim: int) -> RopeConfig:
    """Read `rope_parameters`, or the older `rope_scaling` with `rope_theta` beside it.

    Where both are given (a checkpoint has the one, an override the other) the older one wins key
    by key.
    """
    key = "rope_scaling" if text.has("rope_scaling") else "rope_parameters"
    legacy = {
        name: text.values[name]
        for name in ("rope_theta", "partial_rotary_factor")
        if text.has(name)
    }
    if text.has(key) or not legacy:
        rope = text.child(key)
        rope.values = {**legacy, **text.child("rope_parameters").values, **rope.values}
        if key == "rope_scaling" and "type" in text.child(key).values:
            rope.values.pop("rope_type", None)
    else:
        rope = _Fields(legacy, text.prefix, text.violations)
    rope_type = rope.values.get("rope_type") or rope.values.get("type") or "default"
    rotary_dim = int(head_dim * rope.number("partial_rotary_factor", 0.25))
    if rotary_dim < 2 or rotary_dim % 2 or rotary_dim > head_dim:
        rule = f"must rotate an even number of 2..{head_dim} components, not {rotary_dim}"
        rope.fail("partial_rotary_factor", rule)
    section = rope.values.get("mrope_section", [11, 11, 10])
    if (
        not isinstance(section, (list, tuple))
        or len(section) != 3
        or any(type(item) is not int or item < 0 for item in section)
    ):
        rope.fail("mrope_section", "must be three integers >= 0")
        section = (0, 0, 0)
    rope.require("mrope_interleaved", True)
    theta = rope.number("rope_theta")
    if rope_type not in ("default", "yarn"):
        rope.fail("rope_type", "must be default or yarn, nothing else is implemented")
    if rope_type != "yarn":
        if rope.has("factor"):
            rope.fail("factor", "is only read with rope_type yarn, which is not given")
        return RopeConfig(
            rope_type="default", theta=theta, rotary_dim=rotary_dim, mrope_section=tuple(section)
        )
    original = rope.integer(
        "original_max_position_embeddings", text.integer("max_position_embeddings", 32768)
    )
    factor = rope.number("factor")
    return RopeConfig(
        rope_type="yarn",
        theta=theta,
        rotary_dim=rotary_dim,
        mrope_section=tuple(section),
        factor=factor,
        original_max_position_embeddings=original,
        attention_factor=_yarn_attention_factor(rope, factor),
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        truncate=rope.boolean("truncate", True),
    )


def _yarn_attention_factor(rope: _Fields, factor: float) -> float:
    """Scale of cos and sin.

    Source: YaRN (arXiv 2309.00071), section 3.4; `mscale` as DeepSeek has it.
    """
    if rope.has("attention_factor"):
        return rope.number("attention_factor")

    def magnitude(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    mscale, mscale_all_dim = rope.values.get("mscale"), rope.values.get("mscale_all_dim")
    if mscale and mscale_all_dim:
        return magnitude(rope.number("mscale")) / magnitude(rope.number("mscale_all_dim"))
    return magnitude(1.0)


def _tied(text: _Fields, raw: Mapping[str, Any]) -> bool:
    """In a multimodal config the outer key decides; the inner one counts if it stands alone."""
    if raw.get("tie_word_embeddings") is not None:
        return _Fields(raw, "", text.violations).boolean("tie_word_embeddings", False)
    return text.boolean("tie_word_embeddings", False)


def _declared_dtype(raw: Mapping[str, Any], text: _Fields) -> torch.dtype | None:
    for values in (text.values, raw):
        for key in ("dtype", "torch_dtype"):
            if values.get(key) is not None:
                return _DTYPES.get(str(values[key]).removeprefix("torch."))
    return None


def _eos_token_ids(*sources: Mapping[str, Any]) -> tuple[int, ...]:
    for source in sources:
        value = source.get("eos_token_id")
        if value is not None:
            return tuple(value) if isinstance(value, list) else (int(value),)
    return ()


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = _merge(old, value) if both else value  # type: ignore[arg-type]
    return merged


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        value = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(str(folder), f"{name} cannot be read: {error}") from error
    except json.JSONDecodeError as error:
        raise CheckpointError(str(folder), f"{name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(str(folder), f"{name} must hold an object")
    return value
