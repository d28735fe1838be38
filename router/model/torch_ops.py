"""The trunk's kernels in plain torch: any device, float32 or bfloat16, and the slow twin of the
rest.

Batched over ragged sequences: tokens of sequences that add one token (decode) and of those that add
several (prefill) form two groups, each one call per operation. On CUDA, flash-linear-attention and
flash-attn take the place of the delta rule and of the attention, where they are installed.

Bits: a token's result may depend on who shares the batch, because matrix libraries choose their
blocking by shape. `NativeOps` does not have this weakness.
"""

from __future__ import annotations

import importlib
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from router.engine.batch import Batch
from router.engine.chain import CACHE_BLOCK
from router.gating.gate import choose_topk
from router.model import attention, gated_delta_net, norm
from router.model.lazy_zeros import lazy_zeros
from router.model.ops import L2_EPS, AttentionParams, GdnParams, GdnState
from router.model.streamed_attention import attend_in_sections

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TorchLinear:
    """A weight as it is."""

    weight: Tensor

    @property
    def out_features(self) -> int:
        """N."""
        return self.weight.shape[0]


@dataclass(frozen=True, slots=True)
class TorchKv:
    """K and V of one layer, `[num_blocks * block_size, num_kv_heads, head_dim]`."""

    k: Tensor
    v: Tensor
    block_size: int

    @property
    def num_bytes(self) -> int:
        """Bytes of all its blocks."""
        return 2 * self.k.numel() * self.k.itemsize

    def slots_of(self, blocks: NDArray[np.int32], num_tokens: int) -> Tensor:
        """Return where the first tokens of some blocks lie, int64 `[num_tokens]`."""
        tokens = np.arange(num_tokens)
        slots = blocks[tokens // self.block_size].astype(np.int64) * self.block_size
        return torch.from_numpy(slots + tokens % self.block_size).to(self.k.device)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """Sequences of a step that are computed side by side, padded to the longest."""

    sequences: Tensor
    """int64 `[N]`: which of the batch."""
    slots: Tensor
    """int64 `[N]`: their state slots."""
    tokens: Tensor
    """int64 `[n]`: rows of their tokens in the batch."""
    padded: Tensor
    """int64 `[n]`: where these rows stand in `[N * max_len]`."""
    max_len: int
    max_context_len: int
    is_whole_batch: bool
    """Every token of the batch is in this group, and no padding is needed."""

    def pad(self, x: Tensor) -> Tensor:
        """Move the group's rows of `[T, ...]` to `[N, max_len, ...]`, zeros between."""
        count = self.sequences.shape[0]
        if self.is_whole_batch:
            return x.view(count, self.max_len, *x.shape[1:])
        rows = x.index_select(0, self.tokens)
        if rows.shape[0] == count * self.max_len:
            return rows.view(count, self.max_len, *x.shape[1:])
        out = x.new_zeros(count * self.max_len, *x.shape[1:])
        out.index_copy_(0, self.padded, rows)
        return out.view(count, self.max_len, *x.shape[1:])

    def unpad(self, x: Tensor) -> Tensor:
        """Take the group's rows out of `[N, max_len, ...]`."""
        rows = x.reshape(-1, *x.shape[2:])
        return rows if self.is_whole_batch else rows.index_select(0, self.padded)


def _merge(groups: list[_Group], parts: list[Tensor], num_tokens: int) -> Tensor:
    """Bring the groups' rows back into the batch's order, `[T, ...]`."""
    if groups[0].is_whole_batch:
        return parts[0]
    out = parts[0].new_empty(num_tokens, *parts[0].shape[1:])
    for group, rows in zip(groups, parts, strict=True):
        out.index_copy_(0, group.tokens, rows)
    return out


@dataclass(slots=True)
class TorchStep:
    """What all layers of a step share; parts that depend on a layer's sizes are made at first
    use."""

    batch: Batch
    slots: Tensor
    fresh_slots: Tensor | None
    """State slots that start from zero."""
    groups: list[_Group]
    sequence_of_token: Tensor
    lengths: Tensor
    conv_rows: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    key_slots: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    new_slots: dict[int, Tensor] = field(default_factory=dict)

    def rows_of_conv(self, num_taps: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return token, state and tail rows of `gated_delta_net.causal_conv`."""
        rows = self.conv_rows.get(num_taps)
        if rows is None:
            past = num_taps - 1
            start = self.batch.query_start.long()
            index = torch.arange(start.shape[0] - 1, device=start.device)
            tokens = torch.arange(self.batch.num_tokens, device=start.device)
            offsets = torch.arange(past, device=start.device)
            first = start[:-1] + index * past
            last = start[1:] + index * past
            rows = self.conv_rows[num_taps] = (
                tokens + (self.sequence_of_token + 1) * past,
                (first[:, None] + offsets).view(-1),
                (last[:, None] + offsets).view(-1),
            )
        return rows

    def slots_of_new_keys(self, block_size: int) -> Tensor:
        """Return where each token's K and V go, int64 `[T]`."""
        slots = self.new_slots.get(block_size)
        if slots is None:
            batch = self.batch
            positions = batch.positions - batch.num_cold_tokens
            block = batch.block_tables[self.sequence_of_token, positions // block_size]
            slots = self.new_slots[block_size] = block.long() * block_size + positions % block_size
        return slots

    def slots_of_context(self, group: _Group, index: int, block_size: int) -> Tensor:
        """Return where the K and V of a group's contexts lie, int64 `[N, max_context_len]`.

        Entries behind a context's end repeat its last token: always finite, always masked.
        """
        slots = self.key_slots.get((index, block_size))
        if slots is None:
            batch = self.batch
            end = (batch.context_lens + self.lengths).index_select(0, group.sequences).long()
            positions = torch.arange(group.max_context_len, device=end.device)
            positions = torch.minimum(positions, end[:, None] - 1)
            tables = batch.block_tables.index_select(0, group.sequences).long()
            block = tables.gather(1, positions // block_size)
            slots = self.key_slots[index, block_size] = block * block_size + positions % block_size
        return slots


class TorchOps:
    """`Ops` in torch."""

    name = "torch"

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.activation_dtype = dtype
        self.device = device
        self._fla = self._flash = None
        if device.type == "cuda":
            self._fla = _optional("fla.ops.gated_delta_rule")
            self._flash = _optional("flash_attn") if dtype == torch.bfloat16 else None
        logger.info(
            "ops_chosen name=torch device=%s dtype=%s delta_rule=%s attention=%s",
            device,
            dtype,
            "fla" if self._fla else "torch",
            "flash_attn" if self._flash else "sdpa",
        )

    def prepare_linear(self, weight: Tensor) -> TorchLinear:
        """Keep the weight as it is."""
        return TorchLinear(weight.to(self.device).contiguous())

    def begin_step(self, batch: Batch) -> TorchStep:
        """Sort the sequences into decode and prefill and index their tokens."""
        batch = batch.to(self.device)
        start = batch.query_start.tolist()
        context = batch.context_lens.tolist()
        slots = batch.state_slots.long()
        lengths = [b - a for a, b in itertools.pairwise(start)]
        decode = [s for s, length in enumerate(lengths) if length == 1]
        prefill = [s for s, length in enumerate(lengths) if length > 1]
        groups = [
            self._group(members, start, lengths, context, slots)
            for members in (decode, prefill)
            if members
        ]
        fresh = [s for s, context_len in enumerate(context) if context_len == 0]
        owner = [s for s, length in enumerate(lengths) for _ in range(length)]
        return TorchStep(
            batch=batch,
            slots=slots,
            fresh_slots=slots[self._index(fresh)] if fresh else None,
            groups=groups,
            sequence_of_token=self._index(owner),
            lengths=batch.query_start[1:] - batch.query_start[:-1],
        )

    def _group(
        self,
        members: list[int],
        start: list[int],
        lengths: list[int],
        context: list[int],
        slots: Tensor,
    ) -> _Group:
        max_len = max(lengths[s] for s in members)
        tokens = [row for s in members for row in range(start[s], start[s + 1])]
        padded = [n * max_len + i for n, s in enumerate(members) for i in range(lengths[s])]
        sequences = self._index(members)
        return _Group(
            sequences=sequences,
            slots=slots.index_select(0, sequences),
            tokens=self._index(tokens),
            padded=self._index(padded),
            max_len=max_len,
            max_context_len=max(context[s] + lengths[s] for s in members),
            is_whole_batch=len(members) * max_len == len(tokens) == start[-1],
        )

    def _index(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def linear(self, x: Tensor, weight: TorchLinear) -> Tensor:
        """See `Ops.linear`."""
        matrix = weight.weight
        return F.linear(x if x.dtype == matrix.dtype else x.to(matrix.dtype), matrix)

    def embed(self, token_ids: Tensor, weight: Tensor) -> Tensor:
        """See `Ops.embed`; float32, because the residual is a sum of many small terms."""
        return F.embedding(token_ids, weight).float()

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `Ops.rms_norm`."""
        return norm.rms_norm(x, weight, eps).to(self.activation_dtype)

    def add_rms_norm(self, residual: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `Ops.add_rms_norm`."""
        residual += delta
        return norm.rms_norm(residual, weight, eps).to(self.activation_dtype)

    def gated_delta_net(
        self, mixed: Tensor, params: GdnParams, state: GdnState, step: TorchStep
    ) -> Tensor:
        """See `Ops.gated_delta_net`."""
        heads, dv = params.num_value_heads, params.value_head_dim
        key_dim = params.num_key_heads * params.key_head_dim
        value_dim = heads * dv
        if step.fresh_slots is not None:
            state.conv.index_fill_(0, step.fresh_slots, 0)
            state.recurrent.index_fill_(0, step.fresh_slots, 0)
        qkv, z, b, a = torch.split(mixed, [2 * key_dim + value_dim, value_dim, heads, heads], dim=1)
        rows = step.rows_of_conv(params.conv_kernel)
        qkv = gated_delta_net.causal_conv(qkv, state.conv, params.conv_weight, step.slots, *rows)
        q, k, v = torch.split(qkv, [key_dim, key_dim, value_dim], dim=1)
        shape = (-1, params.num_key_heads, params.key_head_dim)
        q = gated_delta_net.l2_normalize(q.reshape(shape), L2_EPS) * params.key_head_dim**-0.5
        k = gated_delta_net.l2_normalize(k.reshape(shape), L2_EPS)
        v = v.reshape(-1, heads, dv)
        repeat = heads // params.num_key_heads
        if repeat > 1:
            q, k = q.repeat_interleave(repeat, dim=1), k.repeat_interleave(repeat, dim=1)
        g = params.decay * F.softplus(a.float() + params.dt_bias)
        out = self._delta_rule(q, k, v, g, b.float().sigmoid(), state.recurrent, step)
        z = z.reshape(-1, heads, dv)
        out = norm.gated_rms_norm(out, z, params.norm_weight, params.eps)
        return out.to(mixed.dtype).reshape(-1, value_dim)

    def _delta_rule(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        memory: Tensor,
        step: TorchStep,
    ) -> Tensor:
        """Apply the delta rule to `[T, H, d]`, one call per group of sequences; update `memory`."""
        parts = []
        for group in step.groups:
            before = memory.index_select(0, group.slots)
            inputs = [group.pad(x) for x in (q, k, v, g, beta)]
            if self._fla is not None:
                found, after = self._fla_delta_rule(group, inputs, before)
            elif group.max_len == 1:
                q1, k1, v1, g1, beta1 = (x.squeeze(1) for x in inputs)
                found, after = gated_delta_net.recurrent_delta_rule(q1, k1, v1, g1, beta1, before)
                found = found.unsqueeze(1)
            else:
                qs, ks, vs, gs, betas = (x.transpose(1, 2) for x in inputs)
                found, after = gated_delta_net.chunked_delta_rule(qs, ks, vs, gs, betas, before)
                found = found.transpose(1, 2)
            memory.index_copy_(0, group.slots, after)
            parts.append(group.unpad(found))
        return _merge(step.groups, parts, v.shape[0])

    def _fla_delta_rule(
        self, group: _Group, inputs: list[Tensor], before: Tensor
    ) -> tuple[Tensor, Tensor]:
        q, k, v, g, beta = inputs
        rule: Callable[..., tuple[Tensor, Tensor]] = (
            self._fla.fused_recurrent_gated_delta_rule  # type: ignore[union-attr]
            if group.max_len == 1
            else self._fla.chunk_gated_delta_rule  # type: ignore[union-attr]
        )
        half = (
            torch.bfloat16 if group.max_len > 1 else torch.float32
        )  # fla's chunks want tensor cores
        found, after = rule(
            q.to(half),
            k.to(half),
            v.to(half),
            g=g,
            beta=beta.to(half),
            scale=1.0,
            initial_state=before,
            output_final_state=True,
        )
        return found.float(), after

    def attention(
        self,
        qkv: Tensor,
        params: AttentionParams,
        cos_sin: Tensor,
        kv: TorchKv,
        step: TorchStep,
    ) -> Tensor:
        """See `Ops.attention`."""
        heads, kv_heads, size = params.num_heads, params.num_kv_heads, params.head_dim
        q_gate, k, v = torch.split(qkv, [2 * heads * size, kv_heads * size, kv_heads * size], dim=1)
        q, gate = torch.split(q_gate.reshape(-1, heads, 2 * size), size, dim=-1)
        q = norm.rms_norm(q.float(), params.q_norm, params.eps)
        k = norm.rms_norm(k.reshape(-1, kv_heads, size).float(), params.k_norm, params.eps)
        q = attention.apply_rotary(q, cos_sin).to(kv.k.dtype)
        k = attention.apply_rotary(k, cos_sin).to(kv.k.dtype)
        new_slots = step.slots_of_new_keys(kv.block_size)
        kv.k.index_copy_(0, new_slots, k)
        kv.v.index_copy_(0, new_slots, v.reshape(-1, kv_heads, size).to(kv.v.dtype))
        if step.batch.cold is not None:
            out = self._attend_in_sections(q, kv, step.batch, params.scale)
            return (out * torch.sigmoid(gate)).to(qkv.dtype).reshape(-1, heads * size)
        parts = []
        for index, group in enumerate(step.groups):
            context = step.slots_of_context(group, index, kv.block_size)
            keys, values = kv.k[context], kv.v[context]
            if self._flash is not None:
                found = self._flash_attend(group, q, keys, values, params.scale, step)
            else:
                positions = group.pad(step.batch.positions)
                found = group.unpad(
                    attention.attend(group.pad(q), keys, values, positions, params.scale)
                )
            parts.append(found)
        out = _merge(step.groups, parts, q.shape[0])
        return (out * torch.sigmoid(gate)).to(qkv.dtype).reshape(-1, heads * size)

    def _attend_in_sections(self, q: Tensor, kv: TorchKv, batch: Batch, scale: float) -> Tensor:
        """Attend to the cold past, then to the blocks, `[T, Hq, hd]`."""
        assert batch.cold is not None  # the caller has looked
        assert batch.num_sequences == 1, "a cold past has its batch for itself"
        count = batch.max_context_len - batch.num_cold_tokens
        slots = kv.slots_of(batch.block_tables[0].cpu().numpy(), count)
        shape = -1, 2, CACHE_BLOCK, *kv.k.shape[1:]

        def sections() -> Iterator[tuple[Tensor, Tensor]]:
            for section in batch.cold.next_layer():  # type: ignore[union-attr]
                values = torch.from_numpy(section).view(kv.k.dtype).view(shape).to(self.device)
                yield values[:, 0].flatten(0, 1), values[:, 1].flatten(0, 1)

        out = attend_in_sections(q, sections(), kv.k[slots], kv.v[slots], scale)
        return out.to(kv.k.dtype)

    def _flash_attend(
        self,
        group: _Group,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        scale: float,
        step: TorchStep,
    ) -> Tensor:
        """Attend with flash-attn; its causal mask is aligned to each sequence's last key."""
        lengths = step.lengths.index_select(0, group.sequences)
        contexts = step.batch.context_lens.index_select(0, group.sequences) + lengths
        inside = torch.arange(keys.shape[1], device=keys.device) < contexts[:, None]
        found: Tensor = self._flash.flash_attn_varlen_func(  # type: ignore[union-attr]
            q.index_select(0, group.tokens),
            keys[inside],
            values[inside],
            cu_seqlens_q=F.pad(lengths.cumsum(0), (1, 0)).int(),
            cu_seqlens_k=F.pad(contexts.cumsum(0), (1, 0)).int(),
            max_seqlen_q=group.max_len,
            max_seqlen_k=group.max_context_len,
            softmax_scale=scale,
            causal=True,
        )
        return found

    def allocate_kv(
        self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> TorchKv:
        """Allocate blocks of zeros (padding is read before it is masked and must be finite)."""
        shape = (num_blocks * block_size, num_kv_heads, head_dim)
        k = lazy_zeros(shape, dtype, self.device)
        return TorchKv(k, lazy_zeros(shape, dtype, self.device), block_size)

    def read_kv(
        self,
        layers: Sequence[TorchKv],
        blocks: NDArray[np.int32],
        num_tokens: int,
        out: NDArray[np.uint8],
    ) -> None:
        """See `Ops.read_kv`."""
        slots = layers[0].slots_of(blocks, num_tokens)
        tensors = [tensor for kv in layers for tensor in (kv.k, kv.v)]
        for tensor, part in zip(tensors, out.reshape(len(tensors), -1), strict=True):
            rows = tensor.index_select(0, slots).view(torch.uint8)
            np.copyto(part, rows.flatten().cpu().numpy())

    def write_kv(
        self,
        layers: Sequence[TorchKv],
        blocks: NDArray[np.int32],
        num_tokens: int,
        values: NDArray[np.uint8],
    ) -> None:
        """See `Ops.write_kv`."""
        slots = layers[0].slots_of(blocks, num_tokens)
        tensors = [tensor for kv in layers for tensor in (kv.k, kv.v)]
        for tensor, part in zip(tensors, values.reshape(len(tensors), -1), strict=True):
            rows = torch.from_numpy(part.copy()).view(tensor.dtype)
            tensor.index_copy_(0, slots, rows.view(-1, *tensor.shape[1:]).to(self.device))

    def swiglu(self, gate_up: Tensor, intermediate_size: int) -> Tensor:
        """See `Ops.swiglu`."""
        gate = gate_up[:, :intermediate_size]
        return F.silu(gate) * gate_up[:, intermediate_size : 2 * intermediate_size]

    def gate_topk(self, logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """See `Ops.gate_topk`."""
        return choose_topk(logits, top_k)

    def add_shared(self, routed: Tensor, shared: Tensor, gate: Tensor) -> Tensor:
        """See `Ops.add_shared`."""
        weight = torch.sigmoid(gate[:, -1:].float())
        return torch.addcmul(routed, weight, shared.float())


def _optional(module: str) -> Any | None:
    try:
        return importlib.import_module(module)
    except ImportError:
        return None
