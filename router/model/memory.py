"""How many bytes a model will take, from its configuration alone, before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from router.model.config import ModelConfig
from router.model.weights import trunk_tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """Bytes of the weights of one model."""

    trunk_bytes: int
    """On every router. A tied head counts twice: ops that pack weights keep a packed copy."""

    expert_bytes: int
    """One routed expert; 0 in a dense model."""

    expert_bytes_per_layer: int
    """All routed experts of one layer, one copy each."""

    total_expert_bytes: int
    """All routed experts of all layers, one copy each; shared among the groups."""


def estimate_memory(config: ModelConfig, dtype: torch.dtype) -> MemoryEstimate:
    """Return what the weights take with matrices in `dtype` (gates and vectors are float32)."""
    trunk = sum(
        prod(shape) * (4 if len(shape) != 2 or name.endswith("mlp.gate.weight") else dtype.itemsize)
        for name, shape in trunk_tensors(config)
    )
    if config.tie_word_embeddings:
        trunk += config.vocab_size * config.hidden_size * dtype.itemsize
    expert = 3 * config.hidden_size * config.moe_intermediate_size * dtype.itemsize
    return MemoryEstimate(
        trunk_bytes=trunk,
        expert_bytes=expert,
        expert_bytes_per_layer=config.num_experts * expert,
        total_expert_bytes=config.num_layers * config.num_experts * expert,
    )


def kv_bytes_per_block(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Return the bytes of one KV block, all full-attention layers together."""
    per_token = 2 * config.num_kv_heads * config.head_dim * dtype.itemsize
    return config.num_full_layers * block_size * per_token


def state_bytes_per_slot(config: ModelConfig, activation_dtype: torch.dtype) -> int:
    """Return the bytes of one state slot, all Gated DeltaNet layers together."""
    conv = config.conv_dim * (config.conv_kernel - 1) * activation_dtype.itemsize
    recurrent = config.linear_value_dim * config.linear_key_head_dim * 4
    return config.num_linear_layers * (conv + recurrent)
