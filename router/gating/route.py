"""A route: one placement, the links to its groups, and the memory that calls along it need.

A route is made beside the one in use and put in its place between two calls
(`ExpertDispatcher.offer`). Groups that both know keep their link. A route sends a call and takes
its answers; what to do when that fails is the dispatcher's.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from experts.native.kernels import Kernels
from experts.placement import Placement
from protos import codec
from protos.errors import (
    GroupLostError,
    StalePlacementError,
    WireFormatError,
    from_status_bytes,
)
from router.gating.choice import first_copies
from router.gating.links import Link
from router.gating.native_calls import NativeCalls
from router.gating.packing import CallOptions, NativePacking, PackedCall, Packing, TorchPacking
from router.gating.transport.base import FrameBuffer
from router.gating.transport.lane import LaneTransport
from router.gating.transport.lanes import LaneSet

MIN_RESULT_BYTES = 16 << 10
"""An error answer always fits."""


@dataclass(frozen=True, slots=True)
class Rows:
    """What a layer asks of its experts; enough to ask again."""

    layer_id: int
    rows: Tensor
    """`[T, hidden]`, float32 or bfloat16."""
    topk_ids: Tensor
    """int32 `[T, top_k]`."""
    topk_weights: Tensor
    """float32 `[T, top_k]`."""


@dataclass(frozen=True, slots=True)
class SentCall:
    """A call in flight along a route."""

    packed: PackedCall
    called: list[int]
    """Group indices that were sent a frame."""


class Route:
    """What calls need as long as one placement is in force.

    Args:
        placement: Which group holds which expert.
        links: One per group, in the order of `placement.groups`.
        options: Of every call.
        kernels: Native kernels, or None for the torch twin.
        load_of_layer: Per layer int64 `[num_experts]`, counted up.
    """

    def __init__(
        self,
        placement: Placement,
        links: Sequence[Link],
        options: CallOptions,
        kernels: Kernels | None,
        load_of_layer: Sequence[Tensor],
    ) -> None:
        num = len(links)
        self.placement = placement
        self._load_of_layer = load_of_layer
        self.links = list(links)
        self.options = options
        self.transports = [link.transport for link in links]
        self.groups_of_layer = list(first_copies(placement).unbind())
        self.frames = [FrameBuffer() for _ in range(num)]
        self.headers = [FrameBuffer(codec.HEADER_BYTES) for _ in range(num)]
        self.results = [FrameBuffer() for _ in range(num)]
        self.packing: Packing
        self.lanes: LaneSet | None = None
        """All of them, where all links are lanes and there are kernels."""
        self.native: NativeCalls | None = None
        if kernels is None:
            self.packing = TorchPacking(options, num)
            return
        library = ctypes.CDLL(str(kernels.path))
        self.packing = NativePacking(library, options, num)
        lanes = [t for t in self.transports if isinstance(t, LaneTransport)]
        if len(lanes) < num:
            return
        self.lanes = LaneSet(library, lanes)
        if options.combine is codec.Combine.SLOTS:
            self.native = NativeCalls(
                options,
                lanes,
                self.groups_of_layer,
                load_of_layer,
                (self.frames, self.headers, self.results),
                MIN_RESULT_BYTES,
            )

    def send(self, call_id: int, rows: Rows, open_timeout_s: float | None = None) -> SentCall:
        """Send every group its rows; does not wait for answers.

        Args:
            call_id: Not used before.
            rows: The tensors must not change before the answers are here.
            open_timeout_s: Bound on opening a connection anew; None: the transport's own.

        Raises:
            GroupLostError: A group went away; nothing stays in flight.
            IndexError: An expert id is out of range or unplaced.
        """
        capacity = self.options.frame_capacity(rows.rows.shape[0])
        for frame in self.frames:
            frame.reserve(capacity)
        call = self.packing.pack(
            call_id,
            rows.layer_id,
            rows.rows,
            rows.topk_ids,
            rows.topk_weights,
            self.groups_of_layer[rows.layer_id],
            self.frames,
            self._load_of_layer[rows.layer_id],
        )
        called = [group for group, pairs in enumerate(call.num_pairs) if pairs]
        lengths = [
            self._frame_bytes(rows_g, pairs_g)
            for rows_g, pairs_g in zip(call.num_rows, call.num_pairs, strict=True)
        ]
        try:
            if open_timeout_s is not None:
                for group in called:
                    self.transports[group].ensure_open(open_timeout_s)
            if self.lanes is not None:
                self.lanes.send(called, self.frames, lengths)
            else:
                for group in called:
                    self.transports[group].send(self.frames[group].view[: lengths[group]])
        except GroupLostError:
            self.hang_up()
            raise
        return SentCall(call, called)

    def receive(self, sent: SentCall, timeout_s: float) -> Tensor:
        """Wait for the answers and sum them: float32 `[T, hidden]`.

        Raises:
            ExpertMeshError: See `ExpertDispatcher.combine`; nothing stays in flight.
        """
        call, called = sent.packed, sent.called
        for group in called:
            expected = self.options.result_bytes(call.num_rows[group], call.num_pairs[group])
            self.results[group].reserve(max(expected, MIN_RESULT_BYTES))
        try:
            if self.lanes is not None:
                self.lanes.receive(called, self.headers, self.results, timeout_s)
            else:
                for group in called:
                    self.transports[group].receive(
                        self.headers[group], self.results[group], timeout_s
                    )
        except BaseException:
            self.hang_up()
            raise
        for group in called:
            self.check_answer(call, group)
        if self.options.combine == codec.Combine.SLOTS:
            return self.packing.sum_slots(call, self.results)
        return self._sum_partial(call, called)

    def check_answer(self, call: PackedCall, group: int) -> None:
        """Raise what is wrong with a received answer, and close what cannot be trusted."""
        options, transport = self.options, self.transports[group]
        try:
            header = codec.unpack_header(self.headers[group].view)
        except WireFormatError as error:
            transport.close()
            raise GroupLostError(group_id=transport.group_id, detail=str(error)) from error
        if header.call_id != call.call_id:
            transport.close()
            raise GroupLostError(
                group_id=transport.group_id,
                detail=f"answered call {header.call_id} instead of {call.call_id}",
            )
        if header.kind == codec.FrameKind.ERROR:
            raise from_status_bytes(bytes(self.results[group].view[: header.payload_bytes]))
        expected = options.result_bytes(call.num_rows[group], call.num_pairs[group])
        if header.kind != codec.FrameKind.RESULT or header.payload_bytes != expected:
            transport.close()
            raise GroupLostError(
                group_id=transport.group_id,
                detail=f"answered kind {header.kind} with {header.payload_bytes} bytes, "
                f"expected {expected}",
            )
        if header.placement_epoch != options.placement_epoch:
            transport.close()
            raise StalePlacementError(
                layer_id=call.layer_id,
                expert_id=-1,
                group_epoch=header.placement_epoch,
                call_epoch=options.placement_epoch,
            )

    def hang_up(self) -> None:
        """Close every connection; the next call opens it anew. Answers under way are lost."""
        for transport in self.transports:
            transport.close()

    def close(self, *except_for: Route) -> None:
        """Close the links for good, but not those that other routes have, too."""
        kept = [link for route in except_for for link in route.links]
        for link in self.links:
            if link not in kept:
                link.close()

    def _sum_partial(self, call: PackedCall, called: list[int]) -> Tensor:
        """Add the groups' partial sums in group order: float32 `[T, hidden]`."""
        options = self.options
        out = torch.zeros(call.num_tokens, options.hidden)
        pair_group = call.pair_group[: call.num_tokens * options.top_k]
        pair_group = pair_group.view(call.num_tokens, options.top_k)
        for group in called:
            num_bytes = options.result_bytes(call.num_rows[group], 0)
            partial = self.results[group].tensor[:num_bytes].view(torch.float32)
            tokens = (pair_group == group).any(dim=1)
            out[tokens] += partial.view(-1, options.hidden)
        return out

    def _frame_bytes(self, num_rows: int, num_pairs: int) -> int:
        return (
            codec.HEADER_BYTES
            + num_pairs * 12
            + num_rows * self.options.hidden * self.options.item_bytes
        )
