"""The trunk's kernels in C++ (`experts/native`), for a CPU.

Activations are float32 throughout; in a bfloat16 model they are rounded only where they enter a
matrix product (and so are K, V and the attention's probabilities). A token's bits depend on its own
sequence and the weights alone: not on the batch, the threads, or how a prompt was cut into chunks.

Two kinds of calls: `short` ones keep the interpreter lock, `long` ones give it up (see
`experts.native.kernels`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from experts.native.kernels import DTYPES, Kernels, Library, PackedLinear
from router.engine.batch import Batch
from router.engine.chain import CACHE_BLOCK
from router.model.lazy_zeros import lazy_zeros
from router.model.ops import AttentionParams, GdnParams, GdnState

logger = logging.getLogger(__name__)

_FLOAT32 = torch.float32
_SHORT_STEP_TOKENS = 32
"""Steps of at most as many tokens make short calls."""
_STAGED_TOKENS = 4096
"""Tokens of a cold past that are packed at a time, for one layer."""


@dataclass(frozen=True, slots=True)
class NativeKv:
    """K and V of one layer, in the layout of `kv_layout.h`."""

    blocks: Tensor
    """int32 `[num_blocks, words]`: a block is one row, so it can be copied or stored whole."""
    block_size: int
    num_kv_heads: int
    head_dim: int
    code: int
    address: int

    @property
    def num_bytes(self) -> int:
        """Bytes of all its blocks."""
        return self.blocks.numel() * 4


@dataclass(frozen=True, slots=True)
class _Staging:
    """Where a part of a cold past is packed."""

    shape: tuple[int, int, int]
    """Block size, KV heads, head dim."""
    kv: NativeKv
    cache_blocks: NDArray[np.int32]
    """`[cache blocks, blocks of one]`: all its blocks in order."""


@dataclass(frozen=True, slots=True)
class StepAddresses:
    """Addresses of a step's metadata; `batch` keeps them valid."""

    batch: Batch
    library: Library
    num_sequences: int
    query_start: int
    context_lens: int
    block_tables: int
    max_blocks: int
    state_slots: int


class NativeOps:
    """`Ops` in C++.

    Args:
        kernels: The library; its thread pool gets as many threads as torch has.
        dtype: Of matrices and KV cache.
    """

    name = "native"
    activation_dtype = _FLOAT32
    device = torch.device("cpu")

    def __init__(self, kernels: Kernels, dtype: torch.dtype) -> None:
        kernels.set_num_threads(torch.get_num_threads())
        self._kernels = kernels
        self._dtype = dtype
        self.long, self._short = kernels.long, kernels.short
        self._conv_weights: dict[int, tuple[GdnParams, Tensor]] = {}
        self._staging: _Staging | None = None
        logger.info(
            "ops_chosen name=native isa=%s dtype=%s threads=%d",
            kernels.isa,
            dtype,
            kernels.num_threads,
        )

    def _library(self, num_tokens: int) -> Library:
        return self._short if num_tokens <= _SHORT_STEP_TOKENS else self.long

    def prepare_linear(self, weight: Tensor) -> PackedLinear:
        """Pack; the original is not kept."""
        return self._kernels.pack_linear(weight, self._dtype)

    def begin_step(self, batch: Batch) -> StepAddresses:
        """Look up the addresses once."""
        return StepAddresses(
            batch,
            self._library(batch.num_tokens),
            batch.num_sequences,
            batch.query_start.data_ptr(),
            batch.context_lens.data_ptr(),
            batch.block_tables.data_ptr(),
            batch.block_tables.shape[1],
            batch.state_slots.data_ptr(),
        )

    def linear(self, x: Tensor, weight: PackedLinear) -> Tensor:
        """See `Ops.linear`."""
        return self._kernels.linear(x, weight)

    def embed(self, token_ids: Tensor, weight: Tensor) -> Tensor:
        """See `Ops.embed`."""
        count, width = token_ids.shape[0], weight.shape[1]
        out = torch.empty(count, width)
        self._library(count).embed(
            *(token_ids.data_ptr(), count, weight.data_ptr(), DTYPES[weight.dtype], width),
            out.data_ptr(),
        )
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `Ops.rms_norm`."""
        rows, width = x.shape
        out = torch.empty(rows, width)
        self._library(rows).rms_norm(
            x.data_ptr(), rows, width, weight.data_ptr(), eps, out.data_ptr()
        )
        return out

    def add_rms_norm(self, residual: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `Ops.add_rms_norm`."""
        rows, width = residual.shape
        out = torch.empty(rows, width)
        self._library(rows).add_rms_norm(
            *(residual.data_ptr(), delta.data_ptr(), rows, width),
            *(weight.data_ptr(), eps, out.data_ptr()),
        )
        return out

    def swiglu(self, gate_up: Tensor, intermediate_size: int) -> Tensor:
        """See `Ops.swiglu`."""
        rows, columns = gate_up.shape
        out = torch.empty(rows, intermediate_size)
        self._library(rows).swiglu(
            gate_up.data_ptr(), rows, columns, intermediate_size, out.data_ptr()
        )
        return out

    def gate_topk(self, logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """See `Ops.gate_topk`."""
        rows, num_experts = logits.shape
        topk_ids = torch.empty(rows, top_k, dtype=torch.int32)
        topk_weights = torch.empty(rows, top_k)
        self._library(rows).gate_topk(
            *(logits.data_ptr(), rows, num_experts, top_k),
            *(topk_ids.data_ptr(), topk_weights.data_ptr()),
        )
        return topk_ids, topk_weights

    def add_shared(self, routed: Tensor, shared: Tensor, gate: Tensor) -> Tensor:
        """See `Ops.add_shared`; overwrites `routed`."""
        rows, width = routed.shape
        columns = gate.shape[1]
        self._library(rows).add_shared(
            *(routed.data_ptr(), shared.data_ptr(), gate.data_ptr() + 4 * (columns - 1), columns),
            *(rows, width),
        )
        return routed

    def conv_weight(self, params: GdnParams) -> Tensor:
        """Return the conv weight as the kernel reads it, `[taps, channels]`; made once."""
        found = self._conv_weights.get(id(params))
        if found is None:
            found = params, params.conv_weight.t().contiguous()
            self._conv_weights[id(params)] = found
        return found[1]

    def gated_delta_net(
        self, mixed: Tensor, params: GdnParams, state: GdnState, step: StepAddresses
    ) -> Tensor:
        """See `Ops.gated_delta_net`."""
        p = params
        out = torch.empty(mixed.shape[0], p.num_value_heads * p.value_head_dim)
        step.library.gated_delta_net(
            *(mixed.data_ptr(), step.query_start, step.context_lens, step.state_slots),
            *(
                step.num_sequences,
                self.conv_weight(p).data_ptr(),
                p.decay.data_ptr(),
                p.dt_bias.data_ptr(),
            ),
            *(p.norm_weight.data_ptr(), p.num_key_heads, p.num_value_heads, p.key_head_dim),
            *(p.value_head_dim, p.conv_kernel, p.eps),
            *(state.conv.data_ptr(), state.recurrent.data_ptr(), out.data_ptr()),
        )
        return out

    def attention(
        self,
        qkv: Tensor,
        params: AttentionParams,
        cos_sin: Tensor,
        kv: NativeKv,
        step: StepAddresses,
    ) -> Tensor:
        """See `Ops.attention`."""
        p = params
        out = torch.empty(qkv.shape[0], p.num_heads * p.head_dim)
        if step.batch.cold is not None:
            self._attend_in_sections(qkv, params, cos_sin, kv, step.batch, out)
            return out
        step.library.attention(
            *(qkv.data_ptr(), cos_sin.data_ptr(), kv.address, kv.code, kv.block_size),
            *(step.query_start, step.context_lens, step.block_tables, step.num_sequences),
            *(step.max_blocks, p.num_heads, p.num_kv_heads, p.head_dim, p.rotary_dim),
            *(p.scale, p.eps, p.q_norm.data_ptr(), p.k_norm.data_ptr(), out.data_ptr()),
        )
        return out

    def _attend_in_sections(
        self,
        qkv: Tensor,
        params: AttentionParams,
        cos_sin: Tensor,
        kv: NativeKv,
        batch: Batch,
        out: Tensor,
    ) -> None:
        """Attend to the cold past, then to the blocks: the bits of a past that is all in blocks."""
        p = params
        assert batch.cold is not None  # the caller has looked
        assert batch.num_sequences == 1, "a cold past has its batch for itself"
        tokens = batch.num_tokens
        local_context = int(batch.context_lens[0]) - batch.cold.num_tokens
        work = torch.empty(
            tokens * self.long.attention_work(kv.code, p.num_heads, p.head_dim), dtype=_FLOAT32
        )

        def run(phase: int, cache: NativeKv, table: int, keys: int) -> None:
            self.long.attention_section(
                *(phase, qkv.data_ptr(), cos_sin.data_ptr(), cache.address, kv.code),
                *(kv.block_size, tokens, local_context, table, keys, p.num_heads, p.num_kv_heads),
                *(p.head_dim, p.rotary_dim, p.scale, p.eps, p.q_norm.data_ptr()),
                *(p.k_norm.data_ptr(), work.data_ptr(), out.data_ptr()),
            )

        own = batch.block_tables.data_ptr()
        staging = self._staging_like(kv)
        run(0, kv, own, 0)
        most = _STAGED_TOKENS // CACHE_BLOCK
        for section in batch.cold.next_layer():
            for start in range(0, section.shape[0], most):
                part = section[start : start + most]
                for blocks, values in zip(staging.cache_blocks, part, strict=False):
                    self.write_kv([staging.kv], blocks, CACHE_BLOCK, values)
                table = staging.cache_blocks.ctypes.data
                run(1, staging.kv, table, part.shape[0] * CACHE_BLOCK)
        run(2, kv, own, 0)

    def _staging_like(self, kv: NativeKv) -> _Staging:
        """Return blocks for a part of a cold past, in the layout of `kv`; all layers share them."""
        shape = kv.block_size, kv.num_kv_heads, kv.head_dim
        if self._staging is None or self._staging.shape != shape:
            count = _STAGED_TOKENS // kv.block_size
            blocks = self.allocate_kv(count, *shape, self._dtype)
            table = np.arange(count, dtype=np.int32).reshape(_STAGED_TOKENS // CACHE_BLOCK, -1)
            self._staging = _Staging(shape, blocks, table)
        return self._staging

    def allocate_kv(
        self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> NativeKv:
        """See `Ops.allocate_kv`. A block size that is a multiple of 16 wastes nothing."""
        code = DTYPES[dtype]
        num_bytes = self.long.kv_block_bytes(code, block_size, num_kv_heads, head_dim)
        blocks = lazy_zeros((num_blocks, num_bytes // 4), torch.int32, self.device)
        return NativeKv(blocks, block_size, num_kv_heads, head_dim, code, blocks.data_ptr())

    def read_kv(
        self,
        layers: Sequence[NativeKv],
        blocks: NDArray[np.int32],
        num_tokens: int,
        out: NDArray[np.uint8],
    ) -> None:
        """See `Ops.read_kv`. Gives up the interpreter lock and stays out of the thread pool."""
        caches = np.array([kv.address for kv in layers], dtype=np.int64)
        kv = layers[0]
        self.long.kv_read(
            *(caches.ctypes.data, len(caches)),
            *(kv.code, kv.block_size, kv.num_kv_heads, kv.head_dim),
            *(blocks.ctypes.data, num_tokens, out.ctypes.data),
        )

    def write_kv(
        self,
        layers: Sequence[NativeKv],
        blocks: NDArray[np.int32],
        num_tokens: int,
        values: NDArray[np.uint8],
    ) -> None:
        """See `Ops.write_kv`. Gives up the interpreter lock and stays out of the thread pool."""
        caches = np.array([kv.address for kv in layers], dtype=np.int64)
        kv = layers[0]
        self.long.kv_write(
            *(caches.ctypes.data, len(caches)),
            *(kv.code, kv.block_size, kv.num_kv_heads, kv.head_dim),
            *(blocks.ctypes.data, num_tokens, values.ctypes.data),
        )
