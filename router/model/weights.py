"""Loads the trunk: which tensors it has, their shapes, and how projections of one input are fused.

Reads through a `TensorSource` (`experts.weights.SafetensorsCheckpoint`), which finds the prefix,
checks shape and finiteness and names what is wrong. Every matrix is packed by the ops as soon as it
is read, so no more than one layer's fused projection exists twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from router.model.config import FULL_ATTENTION, ModelConfig
from router.model.ops import AttentionParams, GdnParams, LinearWeight, Ops

Shape = tuple[int, ...]


class TensorSource(Protocol):
    """Where tensors come from."""

    def get(self, name: str, *, shape: Shape, dtype: torch.dtype) -> Tensor:
        """Return the tensor of this name below the text prefix, or `lm_head.weight`.

        Raises:
            CheckpointError: Missing, of another shape, or not finite; it names the tensor.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionWeights:
    """A full-attention mixer."""

    in_proj: LinearWeight
    """q (with its output gate), k, v."""
    out_proj: LinearWeight
    params: AttentionParams


@dataclass(frozen=True, slots=True, kw_only=True)
class GdnWeights:
    """A Gated DeltaNet mixer."""

    in_proj: LinearWeight
    """q, k, v, then z, b, a."""
    out_proj: LinearWeight
    params: GdnParams


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeWeights:
    """A mixture-of-experts layer without its routed experts."""

    gate: LinearWeight
    """`[E, D]`, apart from the rest so that dispatch starts before the shared expert, and float32:
    rounded logits would choose other experts where two are close, and that is what shows in bf16.
    """
    shared_in: LinearWeight
    """`[2F + 1, D]`: the shared expert's gate and up projection, then its scalar gate."""
    shared_out: LinearWeight


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseWeights:
    """A dense MLP."""

    gate_up: LinearWeight
    down: LinearWeight


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """One transformer layer of the trunk."""

    input_norm: Tensor
    post_norm: Tensor
    mixer: AttentionWeights | GdnWeights
    mlp: MoeWeights | DenseWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class TrunkWeights:
    """Everything but the routed experts."""

    dtype: torch.dtype
    """Of the matrices and of the KV cache."""
    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor
    head: LinearWeight


def trunk_tensors(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    """List every trunk tensor and its shape, names below the text prefix, in layer order."""
    hidden, vocab = config.hidden_size, config.vocab_size
    yield "embed_tokens.weight", (vocab, hidden)
    for i, kind in enumerate(config.layer_types):
        layer = f"layers.{i}."
        yield layer + "input_layernorm.weight", (hidden,)
        yield layer + "post_attention_layernorm.weight", (hidden,)
        mixer = _attention_tensors if kind == FULL_ATTENTION else _gdn_tensors
        yield from ((layer + name, shape) for name, shape in mixer(config))
        yield from ((layer + name, shape) for name, shape in _mlp_tensors(config))
    yield "norm.weight", (hidden,)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (vocab, hidden)


def _attention_tensors(config: ModelConfig) -> list[tuple[str, Shape]]:
    hidden, size = config.hidden_size, config.head_dim
    q, kv = config.num_heads * size, config.num_kv_heads * size
    return [
        ("self_attn.q_proj.weight", (2 * q, hidden)),
        ("self_attn.k_proj.weight", (kv, hidden)),
        ("self_attn.v_proj.weight", (kv, hidden)),
        ("self_attn.o_proj.weight", (hidden, q)),
        ("self_attn.q_norm.weight", (size,)),
        ("self_attn.k_norm.weight", (size,)),
    ]


def _gdn_tensors(config: ModelConfig) -> list[tuple[str, Shape]]:
    hidden, heads = config.hidden_size, config.linear_num_value_heads
    return [
        ("linear_attn.in_proj_qkv.weight", (config.conv_dim, hidden)),
        ("linear_attn.in_proj_z.weight", (config.linear_value_dim, hidden)),
        ("linear_attn.in_proj_b.weight", (heads, hidden)),
        ("linear_attn.in_proj_a.weight", (heads, hidden)),
        ("linear_attn.out_proj.weight", (hidden, config.linear_value_dim)),
        ("linear_attn.conv1d.weight", (config.conv_dim, 1, config.conv_kernel)),
        ("linear_attn.A_log", (heads,)),
        ("linear_attn.dt_bias", (heads,)),
        ("linear_attn.norm.weight", (config.linear_value_head_dim,)),
    ]


def _mlp_tensors(config: ModelConfig) -> list[tuple[str, Shape]]:
    hidden = config.hidden_size
    if not config.is_moe:
        inter = config.intermediate_size
        return [
            ("mlp.gate_proj.weight", (inter, hidden)),
            ("mlp.up_proj.weight", (inter, hidden)),
            ("mlp.down_proj.weight", (hidden, inter)),
        ]
    shared = config.shared_intermediate_size
    return [
        ("mlp.gate.weight", (config.num_experts, hidden)),
        ("mlp.shared_expert.gate_proj.weight", (shared, hidden)),
        ("mlp.shared_expert.up_proj.weight", (shared, hidden)),
        ("mlp.shared_expert_gate.weight", (1, hidden)),
        ("mlp.shared_expert.down_proj.weight", (hidden, shared)),
    ]


def load_trunk(
    source: TensorSource, config: ModelConfig, ops: Ops, dtype: torch.dtype
) -> TrunkWeights:
    """Read and pack the trunk.

    Args:
        source: The checkpoint.
        config: Its configuration.
        ops: Packs the matrices; the weights work with these ops only.
        dtype: Of matrices and KV cache, float32 or bfloat16. Norms and the vectors of Gated
            DeltaNet are float32 always.

    Raises:
        CheckpointError: A tensor is missing, has another shape, or holds NaN or infinity.
    """
    return _TrunkReader(source, config, ops, dtype).trunk()


class _TrunkReader:
    def __init__(
        self, source: TensorSource, config: ModelConfig, ops: Ops, dtype: torch.dtype
    ) -> None:
        self._source = source
        self._config = config
        self._ops = ops
        self._dtype = dtype
        self._shapes = dict(trunk_tensors(config))

    def trunk(self) -> TrunkWeights:
        config = self._config
        embedding = self._matrix("embed_tokens.weight").to(self._ops.device)
        head = embedding if config.tie_word_embeddings else self._matrix("lm_head.weight")
        return TrunkWeights(
            dtype=self._dtype,
            embedding=embedding,
            head=self._ops.prepare_linear(head),
            layers=tuple(self._layer(i) for i in range(config.num_layers)),
            final_norm=self._vector("norm.weight"),
        )

    def _matrix(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        return self._source.get(name, shape=self._shapes[name], dtype=dtype or self._dtype)

    def _vector(self, name: str) -> Tensor:
        return self._matrix(name, torch.float32).to(self._ops.device)

    def _linear(self, prefix: str, *names: str) -> LinearWeight:
        """Read projections of one input and pack them as one, below each other."""
        parts = [self._matrix(f"{prefix}{name}.weight") for name in names]
        return self._ops.prepare_linear(parts[0] if len(parts) == 1 else torch.cat(parts))

    def _layer(self, layer_id: int) -> LayerWeights:
        layer = f"layers.{layer_id}."
        is_full = self._config.layer_types[layer_id] == FULL_ATTENTION
        return LayerWeights(
            input_norm=self._vector(layer + "input_layernorm.weight"),
            post_norm=self._vector(layer + "post_attention_layernorm.weight"),
            mixer=self._attention(layer) if is_full else self._gdn(layer),
            mlp=self._moe(layer) if self._config.is_moe else self._dense(layer),
        )

    def _attention(self, layer: str) -> AttentionWeights:
        config, prefix = self._config, layer + "self_attn."
        return AttentionWeights(
            in_proj=self._linear(prefix, "q_proj", "k_proj", "v_proj"),
            out_proj=self._linear(prefix, "o_proj"),
            params=AttentionParams(
                q_norm=self._vector(prefix + "q_norm.weight"),
                k_norm=self._vector(prefix + "k_norm.weight"),
                num_heads=config.num_heads,
                num_kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                rotary_dim=config.rotary_dim,
                scale=config.head_dim**-0.5,
                eps=config.rms_norm_eps,
            ),
        )

    def _gdn(self, layer: str) -> GdnWeights:
        config, prefix = self._config, layer + "linear_attn."
        return GdnWeights(
            in_proj=self._linear(prefix, "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),
            out_proj=self._linear(prefix, "out_proj"),
            params=GdnParams(
                conv_weight=self._vector(prefix + "conv1d.weight").squeeze(1).contiguous(),
                decay=-self._vector(prefix + "A_log").exp(),
                dt_bias=self._vector(prefix + "dt_bias"),
                norm_weight=self._vector(prefix + "norm.weight"),
                num_key_heads=config.linear_num_key_heads,
                num_value_heads=config.linear_num_value_heads,
                key_head_dim=config.linear_key_head_dim,
                value_head_dim=config.linear_value_head_dim,
                conv_kernel=config.conv_kernel,
                eps=config.rms_norm_eps,
            ),
        )

    def _moe(self, layer: str) -> MoeWeights:
        mlp = layer + "mlp."
        shared = ("shared_expert.gate_proj", "shared_expert.up_proj", "shared_expert_gate")
        return MoeWeights(
            gate=self._ops.prepare_linear(self._matrix(mlp + "gate.weight", torch.float32)),
            shared_in=self._linear(mlp, *shared),
            shared_out=self._linear(mlp, "shared_expert.down_proj"),
        )

    def _dense(self, layer: str) -> DenseWeights:
        mlp = layer + "mlp."
        return DenseWeights(
            gate_up=self._linear(mlp, "gate_proj", "up_proj"),
            down=self._linear(mlp, "down_proj"),
        )
