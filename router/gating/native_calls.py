"""Dispatch and combine inside a native step: what `experts/native/dispatch.h` has to know.

The lanes, the buffers and the counters are the route's; here their addresses stand side by side, so
that a step of the trunk calls the expert groups in every layer without the interpreter.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from router.gating.packing import CallOptions, PackedCall
from router.gating.transport.base import FrameBuffer
from router.gating.transport.lane import LaneTransport

BAD_EXPERT, SEND_FAILED, RECEIVE_FAILED, BAD_ANSWER = 1, 2, 3, 4
"""Values of `failure`."""

RESCUE = ctypes.CFUNCTYPE(
    ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, *[ctypes.c_void_p] * 3
)
"""`(layer_id, rows, num_tokens, topk_ids, topk_weights, out) -> 1 or 0`."""


class DispatchPlan(ctypes.Structure):
    """`em::Dispatch`: what a native step knows of its calls, wherever they go."""

    _fields_ = (
        [
            (name, ctypes.c_int64)
            for name in (
                *("num_groups", "num_experts", "top_k", "hidden", "wire_dtype", "epoch"),
                *("deadline_ms", "timeout_ms"),
            )
        ]
        + [
            (name, ctypes.c_void_p)
            for name in (
                *("group_of_expert", "load", "frames", "headers", "results", "result_bytes"),
                *("fds", "status", "num_rows", "num_pairs", "pair_group", "pair_index"),
            )
        ]
        + [("rescue", RESCUE)]
        + [
            (name, ctypes.c_int64)
            for name in (
                *("by_rescue", "call_id", "failure", "failed_group", "failed_detail"),
                "wait_ns",
            )
        ]
    )


class NativeCalls:
    """The calls along one route whose groups all have lanes.

    Args:
        options: Of every call; `Combine.SLOTS`.
        lanes: One per group.
        groups_of_layer: Per layer int32 `[num_experts]`: group index of each expert.
        load_of_layer: Per layer int64 `[num_experts]`, counted up.
        buffers: Frames, headers and results, one of each per group.
        min_result_bytes: Room that an error answer may need.
    """

    def __init__(
        self,
        options: CallOptions,
        lanes: Sequence[LaneTransport],
        groups_of_layer: Sequence[Tensor],
        load_of_layer: Sequence[Tensor],
        buffers: tuple[list[FrameBuffer], list[FrameBuffer], list[FrameBuffer]],
        min_result_bytes: int,
    ) -> None:
        self._options = options
        self._lanes = lanes
        self._frames, self._headers, self._results = buffers
        self._min_result_bytes = min_result_bytes
        num, layers = len(lanes), len(groups_of_layer)
        self._kept = groups_of_layer, load_of_layer
        self._groups = (ctypes.c_void_p * layers)(*(t.data_ptr() for t in groups_of_layer))
        self._loads = (ctypes.c_void_p * layers)(*(t.data_ptr() for t in load_of_layer))
        self._frame_addresses = (ctypes.c_void_p * num)()
        self._header_addresses = (ctypes.c_void_p * num)()
        self._result_addresses = (ctypes.c_void_p * num)()
        self._result_bytes = (ctypes.c_int64 * num)()
        self._fds = (ctypes.c_int32 * num)()
        self.status = (ctypes.c_int32 * num)()
        """errno of each group after `RECEIVE_FAILED`."""
        self._num_rows = (ctypes.c_int64 * num)()
        self._num_pairs = (ctypes.c_int64 * num)()
        self._pairs = torch.empty(2, 0, dtype=torch.int32)
        self._plan = DispatchPlan(
            num_groups=num,
            num_experts=len(groups_of_layer[0]),
            top_k=options.top_k,
            hidden=options.hidden,
            wire_dtype=int(options.wire_dtype),
            epoch=options.placement_epoch,
            deadline_ms=options.deadline_ms,
            timeout_ms=options.deadline_ms,
            group_of_expert=ctypes.addressof(self._groups),
            load=ctypes.addressof(self._loads),
            frames=ctypes.addressof(self._frame_addresses),
            headers=ctypes.addressof(self._header_addresses),
            results=ctypes.addressof(self._result_addresses),
            result_bytes=ctypes.addressof(self._result_bytes),
            fds=ctypes.addressof(self._fds),
            status=ctypes.addressof(self.status),
            num_rows=ctypes.addressof(self._num_rows),
            num_pairs=ctypes.addressof(self._num_pairs),
        )

    @property
    def is_open(self) -> bool:
        """Whether every lane has a connection."""
        return all(lane.is_open for lane in self._lanes)

    def fill(self, plan: DispatchPlan, num_tokens: int) -> None:
        """Let `plan` describe calls of up to `num_tokens` rows over these lanes, which are open.

        Leaves alone what a step adds up: `call_id`, `wait_ns`, and who rescues it.
        """
        options, own = self._options, self._plan
        for group, lane in enumerate(self._lanes):
            self._fds[group] = lane.fileno()
        frame_bytes = options.frame_capacity(num_tokens)
        result_bytes = options.result_bytes(0, num_tokens * options.top_k)
        result_bytes = max(result_bytes, self._min_result_bytes)
        for group, (frame, header, result) in enumerate(
            zip(self._frames, self._headers, self._results, strict=True)
        ):
            frame.reserve(frame_bytes)
            result.reserve(result_bytes)
            self._frame_addresses[group] = frame.address
            self._header_addresses[group] = header.address
            self._result_addresses[group] = result.address
            self._result_bytes[group] = len(result.view)
        if num_tokens * options.top_k > self._pairs.shape[1]:
            self._pairs = torch.empty(2, 2 * num_tokens * options.top_k, dtype=torch.int32)
            own.pair_group, own.pair_index = (row.data_ptr() for row in self._pairs)
        own.call_id, own.wait_ns, own.rescue = plan.call_id, plan.wait_ns, plan.rescue
        ctypes.memmove(ctypes.byref(plan), ctypes.byref(own), ctypes.sizeof(own))

    def failed_call(self, layer_id: int, call_id: int) -> PackedCall:
        """Return the call that failed, as the checks of an answer want it."""
        return PackedCall(
            call_id=call_id,
            layer_id=layer_id,
            num_tokens=0,
            topk_weights=torch.empty(0),
            pair_group=self._pairs[0],
            pair_index=self._pairs[1],
            num_rows=self._num_rows[:],
            num_pairs=self._num_pairs[:],
        )
