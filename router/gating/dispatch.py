"""Dispatch of token rows to expert groups, and the sum of what comes back.

`dispatch` packs and sends and does not wait, so the shared expert is computed while the groups
work; `combine` waits for every group and sums in top-k order in float32. The sum depends neither on
which group answered first nor on how many groups there are: groups return one row per (token, slot)
pair and the router alone adds (`Combine.SLOTS`, the default). `Combine.PARTIAL` lets each group add
its own pairs first: fewer bytes when a token meets one group several times, but the bits then
depend on the placement. Figures: tests/benchmarks/combine_modes.py.

A dispatcher belongs to one thread, has one call in flight and works in host memory. It must not
know sequences, blocks or the trunk.
"""

from __future__ import annotations

import ctypes
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import grpc
import torch
from torch import Tensor

from experts.calls import MAX_MESSAGE_BYTES
from experts.load import LoadCounters
from experts.native.kernels import Kernels
from experts.placement import Placement
from protos import codec
from protos.errors import (
    ConfigurationError,
    GroupLostError,
    InternalError,
    StalePlacementError,
    UnsupportedFeatureError,
    WireFormatError,
    from_status_bytes,
)
from protos.tls import Access
from router.gating.choice import first_copies
from router.gating.native_calls import BAD_ANSWER, BAD_EXPERT, SEND_FAILED, NativeCalls
from router.gating.packing import CallOptions, NativePacking, PackedCall, Packing, TorchPacking
from router.gating.transport.base import FrameBuffer, Transport
from router.gating.transport.grpc_stream import GrpcStreamTransport
from router.gating.transport.lane import LaneTransport
from router.gating.transport.lanes import LaneSet

log = logging.getLogger(__name__)

TransportName = Literal["auto", "lane", "grpc"]
DISPATCH_TIMEOUT_S = 120.0
"""Longest wait for one layer's answers before a group counts as lost."""
GRPC_READY_TIMEOUT_S = 2.0
"""How long a group without a lane gets to show that it answers gRPC."""


@dataclass(slots=True)
class DispatchHandle:
    """A call in flight: what `combine` needs to know."""

    call: PackedCall
    called: list[int]
    """Group indices that were sent a frame."""


class ExpertDispatcher:
    """One router's access to the routed experts.

    Args:
        placement: Which group holds which expert.
        transports: One per group, in the order of `placement.groups`.
        options: hidden size, top-k, dtypes and combine mode of every call.
        kernels: Native kernels, or None for the torch twin.
        timeout_s: Bound on one layer's wait.
        channels: Closed with the dispatcher.
    """

    def __init__(
        self,
        placement: Placement,
        transports: Sequence[Transport],
        options: CallOptions,
        kernels: Kernels | None = None,
        timeout_s: float = DISPATCH_TIMEOUT_S,
        channels: Sequence[grpc.Channel] = (),
    ) -> None:
        self.placement = placement
        self.transports = transports
        self.options = options
        self.load = LoadCounters(placement.num_layers, placement.num_experts)
        self.dispatch_s = 0.0
        self._timeout_s = timeout_s
        num = len(transports)
        self._groups_of_layer = list(first_copies(placement).unbind())
        self._load_of_layer = list(torch.from_numpy(self.load.counts).unbind())
        self._frames = [FrameBuffer() for _ in range(num)]
        self._headers = [FrameBuffer(codec.HEADER_BYTES) for _ in range(num)]
        self._results = [FrameBuffer() for _ in range(num)]
        self._channels = channels
        self._call_id = 0
        self._in_flight = False
        self._packing: Packing
        self._lanes: LaneSet | None = None
        self._native: NativeCalls | None = None
        if kernels is None:
            self._packing = TorchPacking(options, num)
        else:
            library = ctypes.CDLL(str(kernels.path))
            self._packing = NativePacking(library, options, num)
            lanes = [t for t in transports if isinstance(t, LaneTransport)]
            if len(lanes) == num:
                self._lanes = LaneSet(library, lanes)
                if options.combine is codec.Combine.SLOTS:
                    self._native = NativeCalls(
                        options,
                        lanes,
                        self._groups_of_layer,
                        self._load_of_layer,
                        (self._frames, self._headers, self._results),
                        MIN_RESULT_BYTES,
                    )

    @classmethod
    def connect(
        cls,
        placement: Placement,
        group_addresses: Mapping[str, str],
        *,
        router_id: str,
        hidden: int,
        top_k: int,
        dtype: torch.dtype,
        transport: TransportName = "auto",
        combine: codec.Combine = codec.Combine.SLOTS,
        kernels: Kernels | None = None,
        timeout_s: float = DISPATCH_TIMEOUT_S,
        access: Access | None = None,
    ) -> ExpertDispatcher:
        """Open a transport to every group of the placement.

        Args:
            group_addresses: group_id -> `host:port` of the group's gRPC server.
            transport: `lane`, `grpc`, or `auto`: a lane, or a gRPC stream to a group that answers
                gRPC only (its lane port is behind a firewall, say, or it demands TLS and is on
                another host, where a lane would carry plain tensors).
            access: TLS towards the groups; None: plain.

        Raises:
            GroupLostError: A group cannot be reached.
            ConfigurationError: `lane` to a group on another host that demands TLS.
        """
        options = CallOptions(
            hidden=hidden,
            top_k=top_k,
            wire_dtype=codec.dtype_of_torch(dtype),
            combine=combine,
            placement_epoch=placement.epoch,
            deadline_ms=int(timeout_s * 1000),
        )
        transports: list[Transport] = []
        channels: list[grpc.Channel] = []
        access = access or Access()
        for group_id in placement.groups:
            channel = access.channel(
                group_addresses[group_id],
                [
                    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
                    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ],
            )
            channels.append(channel)
            if transport == "grpc":
                transports.append(GrpcStreamTransport(group_id, channel))
            else:
                lane = LaneTransport(group_id, channel, router_id)
                transports.append(lane)
                try:
                    lane.open()
                except GroupLostError as error:
                    if transport == "auto" and _answers(channel):
                        log.warning("event=no_lane group=%s reason=%r", group_id, str(error))
                        transports[-1] = GrpcStreamTransport(group_id, channel)
                        continue
                    for opened in channels:
                        opened.close()
                    for made in transports:
                        made.close()
                    if isinstance(error.__cause__, UnsupportedFeatureError):
                        raise ConfigurationError(
                            "experts.transport",
                            f"must be auto or grpc: group {group_id} demands TLS and is on another"
                            " host, where a lane would carry plain tensors",
                            transport,
                        ) from error
                    raise
        return cls(placement, transports, options, kernels, timeout_s, channels)

    def dispatch(
        self, layer_id: int, rows: Tensor, topk_ids: Tensor, topk_weights: Tensor
    ) -> DispatchHandle:
        """Send every group its rows of this layer; does not wait.

        Args:
            rows: `[T, hidden]`, float32 or bfloat16; rounded to the wire dtype.
            topk_ids: int32 `[T, top_k]`.
            topk_weights: float32 `[T, top_k]`.

        Raises:
            GroupLostError: A group went away; nothing stays in flight.
            IndexError: An expert id is out of range or unplaced.
        """
        if self._in_flight:
            self._reset()
        capacity = self.options.frame_capacity(rows.shape[0])
        for frame in self._frames:
            frame.reserve(capacity)
        self._call_id += 1
        call = self._packing.pack(
            self._call_id,
            layer_id,
            rows,
            topk_ids,
            topk_weights,
            self._groups_of_layer[layer_id],
            self._frames,
            self._load_of_layer[layer_id],
        )
        called = [group for group, pairs in enumerate(call.num_pairs) if pairs]
        lengths = [
            self._frame_bytes(rows_g, pairs_g)
            for rows_g, pairs_g in zip(call.num_rows, call.num_pairs, strict=True)
        ]
        self._in_flight = True
        try:
            if self._lanes is not None:
                self._lanes.send(called, self._frames, lengths)
            else:
                for group in called:
                    self.transports[group].send(self._frames[group].view[: lengths[group]])
        except GroupLostError:
            self._reset()
            raise
        return DispatchHandle(call, called)

    def _frame_bytes(self, num_rows: int, num_pairs: int) -> int:
        return (
            codec.HEADER_BYTES
            + num_pairs * 12
            + num_rows * self.options.hidden * self.options.item_bytes
        )

    def combine(self, handle: DispatchHandle) -> Tensor:
        """Wait for the answers and sum them: float32 `[T, hidden]`.

        Raises:
            GroupLostError: A group went away, was silent, or answered garbage; its connection is
                closed.
            StalePlacementError: A group answered for another placement epoch.
            ExpertMeshError: What a group answered as its error.
        """
        call, options = handle.call, self.options
        started = time.perf_counter()
        for group in handle.called:
            expected = options.result_bytes(call.num_rows[group], call.num_pairs[group])
            self._results[group].reserve(max(expected, MIN_RESULT_BYTES))
        try:
            if self._lanes is not None:
                self._lanes.receive(handle.called, self._headers, self._results, self._timeout_s)
            else:
                for group in handle.called:
                    self.transports[group].receive(
                        self._headers[group], self._results[group], self._timeout_s
                    )
        except BaseException:
            self._reset()
            raise
        finally:
            self.dispatch_s += time.perf_counter() - started
        self._in_flight = False
        for group in handle.called:
            self._check_answer(call, group)
        if options.combine == codec.Combine.SLOTS:
            return self._packing.sum_slots(call, self._results)
        return self._sum_partial(call, handle.called)

    @property
    def has_native_calls(self) -> bool:
        """Whether a native step can call the groups by itself (`begin_native`)."""
        return self._native is not None

    def begin_native(self, num_tokens: int) -> int:
        """Return the address of the `em::Dispatch` for one native step of up to `num_tokens` rows.

        Raises:
            GroupLostError: A group cannot be reached.
        """
        assert self._native is not None  # the caller asked `has_native_calls`
        if self._in_flight:
            self._reset()
        address = self._native.begin(num_tokens, self._call_id)
        self._in_flight = True
        return address

    def end_native(self, failed_layer: int) -> None:
        """Take up what a native step has done.

        Args:
            failed_layer: Where it stopped because of an expert group; -1: nowhere.

        Raises:
            ExpertMeshError, IndexError: As `dispatch` and `combine` would have.
        """
        assert self._native is not None
        plan = self._native.plan
        self._call_id = plan.call_id
        self.dispatch_s += plan.wait_ns / 1e9
        plan.wait_ns = 0
        if failed_layer < 0:
            self._in_flight = False
            return
        if plan.failure == BAD_ANSWER:
            self._in_flight = False  # every group has answered
            self._check_answer(self._native.failed_call(failed_layer), plan.failed_group)
        failure = self._lost(failed_layer, plan.failure, plan.failed_group, plan.failed_detail)
        self._reset()
        raise failure

    def _lost(self, layer_id: int, kind: int, group: int, detail: int) -> Exception:
        """Close what a native step found broken and return what it is."""
        assert self._native is not None
        assert self._lanes is not None
        if kind == BAD_EXPERT:
            slot = f"top-k slot {detail % self.options.top_k}"
            return IndexError(f"an expert of layer {layer_id}, {slot}, is out of range or unplaced")
        if kind == SEND_FAILED:
            return self._lanes.lost(group, detail, "send: ")
        statuses = enumerate(self._native.status)
        lost = [self._lanes.lost(g, status) for g, status in statuses if status]
        return lost[0] if lost else InternalError(f"a native step failed in layer {layer_id}")

    def _check_answer(self, call: PackedCall, group: int) -> None:
        """Raise what is wrong with a received answer, and close what cannot be trusted."""
        options, transport = self.options, self.transports[group]
        try:
            header = codec.unpack_header(self._headers[group].view)
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
            raise from_status_bytes(bytes(self._results[group].view[: header.payload_bytes]))
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

    def _sum_partial(self, call: PackedCall, called: list[int]) -> Tensor:
        """Add the groups' partial sums in group order: float32 `[T, hidden]`."""
        options = self.options
        out = torch.zeros(call.num_tokens, options.hidden)
        pair_group = call.pair_group[: call.num_tokens * options.top_k]
        pair_group = pair_group.view(call.num_tokens, options.top_k)
        for group in called:
            num_bytes = options.result_bytes(call.num_rows[group], 0)
            partial = self._results[group].tensor[:num_bytes].view(torch.float32)
            tokens = (pair_group == group).any(dim=1)
            out[tokens] += partial.view(-1, options.hidden)
        return out

    def _reset(self) -> None:
        """Forget the call in flight: answers still under way die with their connections."""
        for transport in self.transports:
            transport.close()
        self._in_flight = False

    def close(self) -> None:
        """Close every connection and channel."""
        self._reset()
        for channel in self._channels:
            channel.close()


def _answers(channel: grpc.Channel) -> bool:
    try:
        grpc.channel_ready_future(channel).result(GRPC_READY_TIMEOUT_S)
    except grpc.FutureTimeoutError:
        return False
    return True


MIN_RESULT_BYTES = 16 << 10
"""An error answer always fits."""
