"""From top-k choices to frames and back: the arithmetic of dispatch and combine.

`NativePacking` runs the calls of `experts/native/dispatch.cpp`; `TorchPacking` is the slow twin and
the fallback where no compiler was. Both fill the same buffers, byte for byte.

A *pair* is one (token, top-k slot). Each group receives its pairs in (token, slot) order and the
rows they use once each, so a token that visits three experts of a group crosses the wire once.
Legend: T tokens, K top-k, P pairs of a group, R rows of a group.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from protos import codec
from router.gating.transport.base import FrameBuffer


@dataclass(slots=True)
class PackedCall:
    """Where the pairs of one dispatch went. Reused by the packing; valid until its next `pack`."""

    call_id: int
    layer_id: int
    num_tokens: int
    topk_weights: Tensor
    """float32 `[T, K]`."""
    pair_group: Tensor
    """int32 `[T * K]` (at least): group index of each pair."""
    pair_index: Tensor
    """int32 `[T * K]` (at least): row of each pair in its group's result."""
    num_rows: list[int]
    """Rows of each group; 0 means that the group is not called."""
    num_pairs: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class CallOptions:
    """What every frame of a dispatcher says in the same way."""

    hidden: int
    top_k: int
    wire_dtype: codec.DType
    """dtype of the rows and of slot results."""
    combine: codec.Combine
    placement_epoch: int
    deadline_ms: int

    @property
    def item_bytes(self) -> int:
        """Bytes of one element on the wire."""
        return 4 if self.wire_dtype == codec.DType.FLOAT32 else 2

    def frame_capacity(self, num_tokens: int) -> int:
        """Bytes of the largest forward frame that `num_tokens` tokens can make."""
        per_token = self.top_k * 12 + self.hidden * self.item_bytes
        return codec.HEADER_BYTES + num_tokens * per_token

    def result_bytes(self, num_rows: int, num_pairs: int) -> int:
        """Payload bytes of the answer to a frame."""
        if self.combine == codec.Combine.SLOTS:
            return num_pairs * self.hidden * self.item_bytes
        return num_rows * self.hidden * 4


class Packing(Protocol):
    """Frames out of top-k choices, sums out of results."""

    def pack(
        self,
        call_id: int,
        layer_id: int,
        rows: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        group_of_expert: Tensor,
        frames: list[FrameBuffer],
        load: Tensor,
    ) -> PackedCall:
        """Write one forward frame per called group into `frames` (large enough) and count `load`.

        Args:
            rows: `[T, D]` float32 or bfloat16.
            topk_ids: int32 `[T, K]`, contiguous.
            topk_weights: float32 `[T, K]`, contiguous.
            group_of_expert: int32 `[num_experts]` of this layer.
            load: int64 `[num_experts]` of this layer, increased by the tokens of each expert.

        Raises:
            IndexError: An expert id is out of range or has no group; nothing was counted.
        """
        ...

    def sum_slots(self, call: PackedCall, results: list[FrameBuffer]) -> Tensor:
        """Sum slot results in top-k order: float32 `[T, D]`."""
        ...


def _check_call(rows: Tensor, topk_ids: Tensor, topk_weights: Tensor, options: CallOptions) -> None:
    shape = (rows.shape[0], options.top_k)
    if (
        rows.shape[1] != options.hidden
        or topk_ids.shape != shape
        or topk_weights.shape != shape
        or topk_ids.dtype != torch.int32
        or topk_weights.dtype != torch.float32
        or rows.dtype not in (torch.float32, torch.bfloat16)
        or not (topk_ids.is_contiguous() and topk_weights.is_contiguous())
        or (rows.shape[0] and rows.stride(1) != 1)
    ):
        raise ValueError(
            f"dispatch wants rows [T, {options.hidden}] and contiguous int32/float32 "
            f"[T, {options.top_k}], got {tuple(rows.shape)} {rows.dtype}, "
            f"{tuple(topk_ids.shape)} {topk_ids.dtype}, "
            f"{tuple(topk_weights.shape)} {topk_weights.dtype}"
        )


class TorchPacking:
    """The slow, obvious twin."""

    def __init__(self, options: CallOptions, num_groups: int) -> None:
        self._options = options
        self._num_groups = num_groups

    def pack(
        self,
        call_id: int,
        layer_id: int,
        rows: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        group_of_expert: Tensor,
        frames: list[FrameBuffer],
        load: Tensor,
    ) -> PackedCall:
        """See `Packing.pack`."""
        options = self._options
        _check_call(rows, topk_ids, topk_weights, options)
        flat_ids = topk_ids.flatten().long()
        if flat_ids.numel() and (flat_ids.min() < 0 or flat_ids.max() >= len(group_of_expert)):
            raise IndexError("an expert id is out of range")
        pair_group = group_of_expert[flat_ids]
        if bool((pair_group < 0).any()):
            raise IndexError("an expert has no group")
        load += torch.bincount(flat_ids, minlength=len(load))
        pair_index = torch.zeros_like(pair_group)
        token_of_pair = torch.arange(len(rows)).repeat_interleave(options.top_k)
        num_rows, num_pairs = [0] * self._num_groups, [0] * self._num_groups
        wire_dtype = codec.torch_dtype(options.wire_dtype)
        for group in range(self._num_groups):
            mine = (pair_group == group).nonzero()[:, 0]
            if not len(mine):
                continue
            pair_index[mine] = torch.arange(len(mine), dtype=torch.int32)
            tokens, row_of_pair = torch.unique(token_of_pair[mine], return_inverse=True)
            num_rows[group], num_pairs[group] = len(tokens), len(mine)
            parts = (
                row_of_pair.to(torch.int32),
                topk_ids.flatten()[mine],
                topk_weights.flatten()[mine],
                rows[tokens].to(wire_dtype),
            )
            payload = torch.cat([part.contiguous().view(torch.uint8).flatten() for part in parts])
            header = codec.FrameHeader(
                kind=codec.FrameKind.FORWARD,
                combine=options.combine,
                call_id=call_id,
                placement_epoch=options.placement_epoch,
                layer_id=layer_id,
                dtype=options.wire_dtype,
                version=codec.FRAME_VERSION,
                num_rows=len(tokens),
                hidden=options.hidden,
                num_pairs=len(mine),
                deadline_ms=options.deadline_ms,
                compute_us=0,
                queue_us=0,
                payload_bytes=len(payload),
            )
            frames[group].view[: codec.HEADER_BYTES] = codec.pack_header(header)
            end = codec.HEADER_BYTES + len(payload)
            frames[group].tensor[codec.HEADER_BYTES : end] = payload
        return PackedCall(
            call_id, layer_id, len(rows), topk_weights, pair_group, pair_index, num_rows, num_pairs
        )

    def sum_slots(self, call: PackedCall, results: list[FrameBuffer]) -> Tensor:
        """See `Packing.sum_slots`."""
        options = self._options
        dtype = codec.torch_dtype(options.wire_dtype)
        slots = torch.zeros(call.num_tokens * options.top_k, options.hidden)
        for group, num_pairs in enumerate(call.num_pairs):
            if num_pairs:
                num_bytes = options.result_bytes(0, num_pairs)
                result = results[group].tensor[:num_bytes].view(dtype).view(num_pairs, -1)
                mine = call.pair_group == group
                slots[mine] = result[call.pair_index[mine].long()].float()
        slots = slots.view(call.num_tokens, options.top_k, options.hidden)
        out = torch.zeros(call.num_tokens, options.hidden)
        for slot in range(options.top_k):
            out += call.topk_weights[:, slot, None] * slots[:, slot]
        return out


class NativePacking:
    """The same in one native call each, without the interpreter lock."""

    def __init__(self, library: ctypes.CDLL, options: CallOptions, num_groups: int) -> None:
        self._options = options
        self._pack = library.em_dispatch_pack
        self._pack.restype = ctypes.c_int64
        self._pack.argtypes = (
            [ctypes.c_void_p] * 2
            + [ctypes.c_int64] * 2
            + [ctypes.c_void_p]
            + [ctypes.c_int64] * 2
            + [ctypes.c_void_p]
            + [ctypes.c_int64] * 2
            + [ctypes.c_int32] * 3
            + [ctypes.c_uint64] * 2
            + [ctypes.c_uint32] * 2
            + [ctypes.c_void_p] * 6
        )
        self._sum = library.em_combine_slots
        self._sum.restype = None
        self._sum.argtypes = (
            [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 3 + [ctypes.c_int32] + [ctypes.c_void_p] * 2
        )
        self._num_groups = num_groups
        self._frame_addresses = (ctypes.c_void_p * num_groups)()
        self._result_addresses = (ctypes.c_void_p * num_groups)()
        self._num_rows = (ctypes.c_int64 * num_groups)()
        self._num_pairs = (ctypes.c_int64 * num_groups)()
        self._reserve(256)

    def _reserve(self, num_pairs: int) -> None:
        self._pair_group = torch.empty(num_pairs, dtype=torch.int32)
        self._pair_index = torch.empty(num_pairs, dtype=torch.int32)
        self._pair_group_address = self._pair_group.data_ptr()
        self._pair_index_address = self._pair_index.data_ptr()

    def pack(
        self,
        call_id: int,
        layer_id: int,
        rows: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        group_of_expert: Tensor,
        frames: list[FrameBuffer],
        load: Tensor,
    ) -> PackedCall:
        """See `Packing.pack`."""
        options = self._options
        _check_call(rows, topk_ids, topk_weights, options)
        num_tokens = rows.shape[0]
        if num_tokens * options.top_k > len(self._pair_group):
            self._reserve(2 * num_tokens * options.top_k)
        for group, frame in enumerate(frames):
            self._frame_addresses[group] = frame.address
        is_float32 = rows.dtype == torch.float32
        status = self._pack(
            topk_ids.data_ptr(),
            topk_weights.data_ptr(),
            num_tokens,
            options.top_k,
            group_of_expert.data_ptr(),
            len(group_of_expert),
            self._num_groups,
            rows.data_ptr(),
            rows.stride(0) * (4 if is_float32 else 2),
            options.hidden,
            codec.DType.FLOAT32 if is_float32 else codec.DType.BFLOAT16,
            options.wire_dtype,
            options.combine,
            call_id,
            options.placement_epoch,
            layer_id,
            options.deadline_ms,
            self._frame_addresses,
            self._pair_group_address,
            self._pair_index_address,
            self._num_rows,
            self._num_pairs,
            load.data_ptr(),
        )
        if status < 0:
            pair = -status - 1
            expert_id = int(topk_ids.flatten()[pair])
            raise IndexError(f"expert {expert_id} of layer {layer_id} is out of range or unplaced")
        return PackedCall(
            call_id,
            layer_id,
            num_tokens,
            topk_weights,
            self._pair_group,
            self._pair_index,
            self._num_rows[:],
            self._num_pairs[:],
        )

    def sum_slots(self, call: PackedCall, results: list[FrameBuffer]) -> Tensor:
        """See `Packing.sum_slots`."""
        for group, result in enumerate(results):
            self._result_addresses[group] = result.address
        out = torch.empty(call.num_tokens, self._options.hidden)
        self._sum(
            self._pair_group_address,
            self._pair_index_address,
            call.topk_weights.data_ptr(),
            call.num_tokens,
            self._options.top_k,
            self._options.hidden,
            self._options.wire_dtype,
            self._result_addresses,
            out.data_ptr(),
        )
        return out
