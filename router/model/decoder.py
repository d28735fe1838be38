"""The trunk, layer by layer.

    x <- embed(token_ids)
    each layer:  x <- x + mixer(norm(x));  x <- x + mlp(norm(x))
    logits <- head(norm(x)) of the wanted rows

The mixer is full attention (KV blocks) or Gated DeltaNet (state slots). The residual addition is
part of the following norm. Only rows whose logits are wanted go through the last layer's MLP: the
caches of all tokens are complete once its mixer has run.

Source: transformers 5.23 `Qwen3_5MoeTextModel`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from experts.weights import SafetensorsCheckpoint
from protos.errors import ConfigurationError
from router.engine.batch import Batch
from router.model import memory
from router.model.cache_io import DecoderCacheIo
from router.model.config import FULL_ATTENTION, ModelConfig
from router.model.lazy_zeros import lazy_zeros
from router.model.moe import DenseLayer, Experts, HostExperts, MoeLayer
from router.model.native_ops import NativeOps
from router.model.native_step import NativeStep, calls_natively
from router.model.ops import GdnState, KvLayer, Ops, choose_ops
from router.model.rope import RotaryTable
from router.model.weights import (
    AttentionWeights,
    DenseWeights,
    LayerWeights,
    TrunkWeights,
    load_trunk,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Caches:
    """The KV blocks and state slots of all layers."""

    layers: tuple[KvLayer | GdnState, ...]
    """Per layer, as its mixer needs it."""

    num_blocks: int
    block_size: int
    num_state_slots: int


class Decoder:
    """The text model without its routed experts, on one device. Not thread-safe.

    Args:
        config: Sizes.
        weights: Packed by `ops`.
        ops: The kernels.
        experts: The routed experts; None in a dense model.
    """

    def __init__(
        self, config: ModelConfig, weights: TrunkWeights, ops: Ops, experts: Experts | None
    ) -> None:
        if config.is_moe and experts is None:
            raise ConfigurationError("experts", "must be given for a mixture of experts", None)
        self.config = config
        self.ops = ops
        self.dtype = weights.dtype
        self._weights = weights
        if experts is not None and ops.device.type != "cpu":
            experts = HostExperts(experts, ops.device)
        self._mlps = [self._mlp(i, layer, experts) for i, layer in enumerate(weights.layers)]
        self._rotary = RotaryTable(config.rope, ops.device)
        self._experts = experts
        self._native: tuple[Caches, NativeStep] | None = None
        # One flat row per layer: the loop of `forward` looks nothing up.
        self._layers = [
            (
                isinstance(layer.mixer, AttentionWeights),
                layer.input_norm,
                layer.mixer.in_proj,
                layer.mixer.params,
                layer.mixer.out_proj,
                layer.post_norm,
                mlp.forward,
            )
            for layer, mlp in zip(weights.layers, self._mlps, strict=True)
        ]

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype,
        experts: Experts | None,
        ops: Ops | None = None,
        config: ModelConfig | None = None,
    ) -> Decoder:
        """Load the trunk of a checkpoint folder.

        Args:
            path: The folder.
            dtype: Of matrices and KV cache.
            experts: The routed experts; None in a dense model.
            ops: The kernels; None chooses the best for the CPU.
            config: Already read (and perhaps overridden) configuration.

        Raises:
            UnsupportedArchitectureError, ConfigurationError: Before any tensor is read.
            CheckpointError: Names the tensor at fault.
        """
        config = config or ModelConfig.from_checkpoint(path)
        ops = ops or choose_ops(dtype, torch.device("cpu"))
        with SafetensorsCheckpoint(path) as checkpoint:
            weights = load_trunk(checkpoint, config, ops, dtype)
        return cls(config, weights, ops, experts)

    def _mlp(
        self, layer_id: int, layer: LayerWeights, experts: Experts | None
    ) -> MoeLayer | DenseLayer:
        if isinstance(layer.mlp, DenseWeights):
            return DenseLayer(layer.mlp, self.ops)
        assert experts is not None  # checked by the constructor
        return MoeLayer(layer_id, layer.mlp, self.ops, experts, self.config.top_k)

    def kv_bytes_per_block(self, block_size: int) -> int:
        """Return the bytes of one KV block, all layers together."""
        return memory.kv_bytes_per_block(self.config, block_size, self.dtype)

    @property
    def state_bytes_per_slot(self) -> int:
        """Bytes of one state slot, all layers together."""
        return memory.state_bytes_per_slot(self.config, self.ops.activation_dtype)

    def allocate_caches(self, num_blocks: int, block_size: int, num_state_slots: int) -> Caches:
        """Allocate KV blocks and state slots for every layer.

        Args:
            num_blocks: KV blocks per full-attention layer.
            block_size: Tokens per block.
            num_state_slots: State slots per Gated DeltaNet layer.
        """
        return Caches(
            layers=tuple(
                self._allocate_kv(num_blocks, block_size)
                if kind == FULL_ATTENTION
                else self._allocate_state(num_state_slots)
                for kind in self.config.layer_types
            ),
            num_blocks=num_blocks,
            block_size=block_size,
            num_state_slots=num_state_slots,
        )

    def cache_io(self, caches: Caches) -> DecoderCacheIo:
        """Return what copies cached values in and out of `caches`."""
        return DecoderCacheIo(self.config, self.ops, self.dtype, caches.layers)

    def _allocate_kv(self, num_blocks: int, block_size: int) -> KvLayer:
        config = self.config
        return self.ops.allocate_kv(
            num_blocks, block_size, config.num_kv_heads, config.head_dim, self.dtype
        )

    def _allocate_state(self, num_slots: int) -> GdnState:
        config, device = self.config, self.ops.device
        dk, dv = config.linear_key_head_dim, config.linear_value_head_dim
        conv_shape = (num_slots, config.conv_dim, config.conv_kernel - 1)
        recurrent_shape = (num_slots, config.linear_num_value_heads, dk, dv)
        return GdnState(
            conv=lazy_zeros(conv_shape, self.ops.activation_dtype, device),
            recurrent=lazy_zeros(recurrent_shape, torch.float32, device),
        )

    def forward(self, batch: Batch, caches: Caches) -> Tensor:
        """Run one step and update the caches.

        Args:
            batch: At least one token.
            caches: Made by `allocate_caches`.

        Returns:
            Logits float32 `[L, vocab_size]` of `batch.logit_rows`.
        """
        native = self._native_step(caches)
        if native is not None and batch.cold is None:  # a cold past comes between the layers
            cos_sin = self._rotary.rows(batch.positions, batch.max_context_len - 1)
            return native.run(batch, cos_sin)
        return self._forward_by_layer(batch, caches)

    def _native_step(self, caches: Caches) -> NativeStep | None:
        """Return the native step over these caches; None where layers go one by one."""
        if self._native is not None and self._native[0] is caches:
            return self._native[1]
        ops, experts = self.ops, self._experts
        if not isinstance(ops, NativeOps) or not (experts is None or calls_natively(experts)):
            return None
        step = NativeStep(self.config, self._weights, ops, caches.layers, experts)
        self._native = caches, step
        return step

    def _forward_by_layer(self, batch: Batch, caches: Caches) -> Tensor:
        """Run one step kernel by kernel: the slow twin of `NativeStep`, and other ops' way."""
        ops, weights, eps = self.ops, self._weights, self.config.rms_norm_eps
        linear, add_rms_norm = ops.linear, ops.add_rms_norm
        gated_delta_net, attention = ops.gated_delta_net, ops.attention
        batch = batch if ops.device.type == "cpu" else batch.to(ops.device)
        step = ops.begin_step(batch)
        cos_sin = self._rotary.rows(batch.positions, batch.max_context_len - 1)
        residual = ops.embed(batch.token_ids, weights.embedding)
        delta: Tensor | None = None
        last = len(self._layers) - 1
        for i, (is_full, input_norm, w_in, params, w_out, post_norm, mlp) in enumerate(
            self._layers
        ):
            if delta is None:
                x = ops.rms_norm(residual, input_norm, eps)
            else:
                x = add_rms_norm(residual, delta, input_norm, eps)
            x = linear(x, w_in)
            cache = caches.layers[i]
            x = (
                attention(x, params, cos_sin, cache, step)  # type: ignore[arg-type]
                if is_full
                else gated_delta_net(x, params, cache, step)  # type: ignore[arg-type]
            )
            if i == last and batch.logit_rows.shape[0] != batch.token_ids.shape[0]:
                if batch.logit_rows.shape[0] == 0:
                    return residual.new_empty(0, self.config.vocab_size, dtype=torch.float32)
                x = x.index_select(0, batch.logit_rows)
                residual = residual.index_select(0, batch.logit_rows)
            delta = mlp(add_rms_norm(residual, linear(x, w_out), post_norm, eps))
        assert delta is not None  # a model has layers
        x = add_rms_norm(residual, delta, weights.final_norm, eps)
        return linear(x, weights.head).float()
