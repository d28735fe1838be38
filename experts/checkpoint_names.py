"""Which tensors a Qwen3.5 checkpoint has, by the released names, relative to the text prefix.

The table that `weights.py` compares a checkpoint with: what is missing and what nobody asked for
follow from it. It knows names; the shapes of the trunk are checked by who reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PREFIXES = ("model.language_model.", "model.")
"""Released multimodal checkpoints use the first, text-only ones the second."""
IGNORED_PREFIXES = ("mtp.", "model.visual.", "visual.", "model.mtp.")
"""Known parts of a checkpoint that nothing here reads."""

_LINEAR_ATTENTION = (
    "linear_attn.in_proj_qkv.weight",
    "linear_attn.in_proj_z.weight",
    "linear_attn.in_proj_b.weight",
    "linear_attn.in_proj_a.weight",
    "linear_attn.out_proj.weight",
    "linear_attn.conv1d.weight",
    "linear_attn.A_log",
    "linear_attn.dt_bias",
    "linear_attn.norm.weight",
)
_FULL_ATTENTION = (
    "self_attn.q_proj.weight",
    "self_attn.k_proj.weight",
    "self_attn.v_proj.weight",
    "self_attn.o_proj.weight",
    "self_attn.q_norm.weight",
    "self_attn.k_norm.weight",
)
_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
_DENSE = ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")
_SPARSE = (
    "mlp.gate.weight",
    "mlp.shared_expert.gate_proj.weight",
    "mlp.shared_expert.up_proj.weight",
    "mlp.shared_expert.down_proj.weight",
    "mlp.shared_expert_gate.weight",
)
FUSED_EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


def split_expert_names(expert_id: int) -> tuple[str, str, str]:
    """Return one expert's gate, up and down names in the per-expert layout."""
    stem = f"mlp.experts.{expert_id}"
    return f"{stem}.gate_proj.weight", f"{stem}.up_proj.weight", f"{stem}.down_proj.weight"


def layer_types(text_config: Mapping[str, Any]) -> list[str]:
    """Return each layer's attention kind; without a list every fourth layer attends fully."""
    listed = text_config.get("layer_types")
    if listed is not None:
        return list(listed)
    every = text_config.get("full_attention_interval", 4)
    return [
        "linear_attention" if (layer_id + 1) % every else "full_attention"
        for layer_id in range(text_config["num_hidden_layers"])
    ]


def trunk_names(text_config: Mapping[str, Any]) -> set[str]:
    """Return the names of everything but the routed experts and `lm_head.weight`."""
    names = {"embed_tokens.weight", "norm.weight"}
    feed_forward = _SPARSE if text_config.get("num_experts") else _DENSE
    for layer_id, kind in enumerate(layer_types(text_config)):
        attention = _FULL_ATTENTION if kind == "full_attention" else _LINEAR_ATTENTION
        for leaf in (*_NORMS, *attention, *feed_forward):
            names.add(f"layers.{layer_id}.{leaf}")
    return names
