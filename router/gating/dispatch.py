"""Dispatch of token rows to expert groups, and the sum of what comes back.

`dispatch` packs and sends and does not wait, so the shared expert is computed while the groups
work; `combine` waits for every group and sums in top-k order in float32. The sum depends neither on
which group answered first nor on how many groups there are: groups return one row per (token, slot)
pair and the router alone adds (`Combine.SLOTS`, the default). `Combine.PARTIAL` lets each group add
its own pairs first: fewer bytes when a token meets one group several times, but the bits then
depend on the placement. Figures: tests/benchmarks/combine_modes.py.

Experts are pure functions of weights and rows, so a call may be sent again, anywhere. A dispatcher
with patience does that when a group is lost or does not hold an expert: the call waits until the
group answers again, or until another placement is offered that says where its experts are. Its
owner offers placements from another thread; they come into force between two calls.

A dispatcher belongs to one thread, has one call in flight and works in host memory. It must not
know sequences, blocks or the trunk.
"""

from __future__ import annotations

import ctypes
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from experts.load import LoadCounters
from experts.native.kernels import Kernels
from experts.placement import Placement
from protos import codec
from protos.errors import GroupLostError, InternalError, StalePlacementError
from protos.tls import Access
from router.gating.links import Dialer, Link, TransportName
from router.gating.native_calls import (
    BAD_ANSWER,
    BAD_EXPERT,
    RESCUE,
    SEND_FAILED,
    DispatchPlan,
)
from router.gating.packing import CallOptions
from router.gating.route import Route, Rows, SentCall
from router.gating.transport.base import Transport

log = logging.getLogger(__name__)

DISPATCH_TIMEOUT_S = 120.0
"""Longest wait for one layer's answers before a group counts as lost."""
OPEN_TIMEOUT_S = 1.0
"""Longest wait for a connection that broke; then a patient dispatcher looks for news."""
RETRY_INTERVAL_S = 0.2
"""How often a patient dispatcher asks a lost group again without news."""
RETRIED = (GroupLostError, StalePlacementError)
"""What another copy, another connection or another placement may mend."""


@dataclass(frozen=True, slots=True)
class DispatchHandle:
    """A call in flight: what `combine` needs to know."""

    rows: Rows
    sent: SentCall | GroupLostError
    """Or why not all of it was sent; `combine` deals with it."""


class ExpertDispatcher:
    """One router's access to the routed experts.

    Args:
        placement: Which group holds which expert.
        transports: One per group, in the order of `placement.groups`.
        options: hidden size, top-k, dtypes and combine mode of every call.
        kernels: Native kernels, or None for the torch twin.
        timeout_s: Bound on one layer's wait for an answer.
        patience_s: Bound on one layer's wait for a group that is lost or does not hold an expert;
            0 raises at once.
        dialer: Connects to the groups of placements to come.
    """

    def __init__(
        self,
        placement: Placement,
        transports: Sequence[Transport | Link],
        options: CallOptions,
        kernels: Kernels | None = None,
        timeout_s: float = DISPATCH_TIMEOUT_S,
        patience_s: float = 0.0,
        dialer: Dialer | None = None,
    ) -> None:
        self.load = LoadCounters(placement.num_layers, placement.num_experts)
        self.dispatch_s = 0.0
        self._kernels = kernels
        self._timeout_s = timeout_s
        self._patience_s = patience_s
        self._open_timeout_s = OPEN_TIMEOUT_S if patience_s else None
        self._dialer = dialer
        self._load_of_layer = list(torch.from_numpy(self.load.counts).unbind())
        links = [t if isinstance(t, Link) else Link("", t) for t in transports]
        self._route = self._new_route(placement, links, options)
        self._call_id = 0
        self._num_tokens = 0
        self._plan = DispatchPlan(rescue=RESCUE(self._rescue))
        self._failure: Exception | None = None
        # Guards what other threads touch: the route to come, and whether a call is in flight.
        self._news = threading.Condition()
        self._next: Route | None = None
        self._in_flight = False
        self._is_closed = False

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
        patience_s: float = 0.0,
        access: Access | None = None,
    ) -> ExpertDispatcher:
        """Open a link to every group of the placement.

        Args:
            group_addresses: group_id -> `host:port` of the group's gRPC server.
            transport: See `Dialer`.
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
        dialer = Dialer(router_id=router_id, transport=transport, access=access or Access())
        links = dialer.links(placement.groups, group_addresses)
        return cls(placement, links, options, kernels, timeout_s, patience_s, dialer)

    @property
    def placement(self) -> Placement:
        """The placement in force."""
        return self._route.placement

    @property
    def transports(self) -> Sequence[Transport]:
        """One per group of the placement in force, in their order."""
        return self._route.transports

    @property
    def options(self) -> CallOptions:
        """What every call says."""
        return self._route.options

    # What any thread may call.

    def prepare(self, placement: Placement, group_addresses: Mapping[str, str]) -> Route:
        """Connect to the groups of a placement to come, beside those in use.

        Raises:
            GroupLostError: A group cannot be reached; nothing has changed.
        """
        assert self._dialer is not None  # only a dispatcher that `connect` made gets placements
        with self._news:
            newest = self._next or self._route  # its links last until the new route is offered
        links = self._dialer.links(placement.groups, group_addresses, newest.links)
        options = replace(self._route.options, placement_epoch=placement.epoch)
        return self._new_route(placement, links, options)

    def offer(self, route: Route) -> None:
        """Use this route from the next call on; at once where none is in flight.

        The links that it does not share with the one before are closed then.
        """
        with self._news:
            superseded, self._next = self._next, route
            if superseded is not None:
                superseded.close(route, self._route)
            if not self._in_flight:
                self._adopt()
            self._news.notify_all()

    def discard(self, route: Route) -> None:
        """Close what a route that is never offered does not share with the one in use."""
        with self._news:
            route.close(self._route, *([self._next] if self._next else []))

    def wait_adopted(self, epoch: int, timeout_s: float) -> bool:
        """Wait until calls follow the placement of this epoch or a later one; whether they do."""
        with self._news:
            return self._news.wait_for(lambda: self.placement.epoch >= epoch, timeout_s)

    def give_up(self) -> None:
        """Let a call that waits for a group fail now, and later ones at once."""
        with self._news:
            self._is_closed = True
            self._news.notify_all()

    # The one thread that calls.

    def dispatch(
        self, layer_id: int, rows: Tensor, topk_ids: Tensor, topk_weights: Tensor
    ) -> DispatchHandle:
        """Send every group its rows of this layer; does not wait.

        Args:
            rows: `[T, hidden]`, float32 or bfloat16; rounded to the wire dtype.
            topk_ids: int32 `[T, top_k]`.
            topk_weights: float32 `[T, top_k]`.

        Raises:
            GroupLostError: A group went away, and there is no patience; nothing stays in flight.
            IndexError: An expert id is out of range or unplaced.
        """
        self._begin_call()
        asked = Rows(layer_id, rows, topk_ids, topk_weights)
        try:
            return DispatchHandle(asked, self._send(asked))
        except GroupLostError as error:
            if self._patience_s:
                return DispatchHandle(asked, error)
            self._end_call()
            raise
        except BaseException:
            self._end_call()
            raise

    def combine(self, handle: DispatchHandle) -> Tensor:
        """Wait for the answers and sum them: float32 `[T, hidden]`.

        Raises:
            GroupLostError: A group went away, was silent, or answered garbage, for longer than the
                dispatcher's patience; its connection is closed.
            StalePlacementError: A group does not hold an expert, likewise.
            ExpertMeshError: What a group answered as its error.
        """
        started = time.perf_counter()
        try:
            if isinstance(handle.sent, GroupLostError):
                raise handle.sent
            return self._route.receive(handle.sent, self._timeout_s)
        except RETRIED as error:
            return self._again(error, handle.rows)
        finally:
            self.dispatch_s += time.perf_counter() - started
            self._end_call()

    @property
    def has_native_calls(self) -> bool:
        """Whether a native step can call the groups by itself (`begin_native`)."""
        return self._route.native is not None

    def begin_native(self, num_tokens: int) -> int:
        """Return the address of the `em::Dispatch` for one native step of up to `num_tokens` rows.

        Raises:
            GroupLostError: A group cannot be reached, and there is no patience.
        """
        self._begin_call()
        self._num_tokens = num_tokens
        self._plan.call_id, self._plan.failure = self._call_id, 0
        self._failure = None
        if self._route.native is not None:
            try:
                for transport in self.transports:
                    transport.ensure_open(self._open_timeout_s)
            except GroupLostError:
                if not self._patience_s:
                    self._end_call()
                    raise
        self._fill_plan()
        return ctypes.addressof(self._plan)

    def end_native(self, failed_layer: int) -> None:
        """Take up what a native step has done.

        Args:
            failed_layer: Where it stopped because of an expert group; -1: nowhere.

        Raises:
            ExpertMeshError, IndexError: As `dispatch` and `combine` would have.
        """
        plan = self._plan
        self._call_id = max(self._call_id, plan.call_id)
        self.dispatch_s += plan.wait_ns / 1e9
        plan.wait_ns = 0
        self._end_call()
        if failed_layer >= 0:
            raise self._failure or InternalError(f"a native step failed in layer {failed_layer}")

    def close(self) -> None:
        """Close every connection and channel; a call that waits for a group fails."""
        self.give_up()
        with self._news:
            if self._next is not None:
                self._next.close(self._route)
                self._next = None
        self._route.close()

    def _new_route(
        self, placement: Placement, links: Sequence[Link], options: CallOptions
    ) -> Route:
        return Route(placement, links, options, self._kernels, self._load_of_layer)

    def _begin_call(self) -> None:
        with self._news:
            if self._in_flight:
                self._route.hang_up()  # abandoned: answers under way die with their connections
            self._adopt()
            self._in_flight = True

    def _end_call(self) -> None:
        with self._news:
            self._in_flight = False
            self._adopt()

    def _adopt(self) -> None:
        """Put the route to come in force; no call is in flight, or the one that is starts over."""
        if self._next is None:
            return
        before, self._route, self._next = self._route, self._next, None
        before.close(self._route)
        log.info("event=placement_adopted epoch=%d", self.placement.epoch)
        self._news.notify_all()

    def _send(self, rows: Rows) -> SentCall:
        self._call_id += 1
        return self._route.send(self._call_id, rows, self._open_timeout_s)

    def _again(self, error: Exception, rows: Rows) -> Tensor:
        """Send a failed call again until it is answered.

        At once, then whenever another placement is offered, and every `RETRY_INTERVAL_S`.

        Raises:
            ExpertMeshError: The last failure, after `patience_s` or `give_up`.
        """
        if not self._patience_s:
            raise error
        log.warning("event=call_failed layer=%d reason=%r", rows.layer_id, str(error))
        started = time.monotonic()
        is_first = True
        while True:
            with self._news:
                if not is_first and self._next is None and not self._is_closed:
                    self._news.wait(RETRY_INTERVAL_S)
                self._adopt()
                has_patience = time.monotonic() - started < self._patience_s
                if self._is_closed or not has_patience:
                    raise error
            is_first = False
            try:
                answer = self._route.receive(self._send(rows), self._timeout_s)
            except RETRIED as failure:
                error = failure
                continue
            waited_s = time.monotonic() - started
            log.info("event=call_answered layer=%d waited_s=%.2f", rows.layer_id, waited_s)
            return answer

    def _fill_plan(self) -> None:
        """Let the plan's next layers go along the route, natively where its lanes are open."""
        native = self._route.native
        if native is not None and native.is_open:
            native.fill(self._plan, self._num_tokens)
        self._plan.by_rescue = native is None or not native.is_open

    def _rescue(
        self, layer_id: int, rows: int, num_tokens: int, ids: int, weights: int, out: int
    ) -> int:
        """Compute a layer of a native step whose own call failed; native code calls this.

        Returns:
            1; or 0 where it failed for good, as `_failure` says.
        """
        started = time.perf_counter()
        try:
            options = self.options
            asked = Rows(
                layer_id,
                _floats(rows, num_tokens, options.hidden),
                _ints(ids, num_tokens, options.top_k),
                _floats(weights, num_tokens, options.top_k),
            )
            _floats(out, num_tokens, options.hidden).copy_(self._rescued(asked))
            self._plan.call_id = self._call_id
            self._fill_plan()
        except Exception as error:  # it must not unwind through native code
            self._failure = error
            return 0
        finally:
            self.dispatch_s += time.perf_counter() - started
        return 1

    def _rescued(self, rows: Rows) -> Tensor:
        if not self._plan.by_rescue:
            self._call_id = self._plan.call_id
            failure = self._native_failure(rows.layer_id)
            if isinstance(failure, RETRIED):
                return self._again(failure, rows)
            raise failure
        try:
            return self._route.receive(self._send(rows), self._timeout_s)
        except RETRIED as error:
            return self._again(error, rows)

    def _native_failure(self, layer_id: int) -> Exception:
        """Close what a native call found broken and return what it is."""
        route, plan = self._route, self._plan
        assert route.native is not None
        assert route.lanes is not None
        kind, group, detail = plan.failure, plan.failed_group, plan.failed_detail
        failure: Exception = InternalError(f"a native step failed in layer {layer_id}")
        if kind == BAD_ANSWER:  # every group has answered
            try:
                route.check_answer(route.native.failed_call(layer_id, plan.call_id), group)
            except Exception as error:
                return error
        elif kind == BAD_EXPERT:
            slot = f"top-k slot {detail % route.options.top_k}"
            failure = IndexError(
                f"an expert of layer {layer_id}, {slot}, is out of range or unplaced"
            )
        elif kind == SEND_FAILED:
            failure = route.lanes.lost(group, detail, "send: ")
        else:
            statuses = enumerate(route.native.status)
            lost = [route.lanes.lost(g, status) for g, status in statuses if status]
            failure = lost[0] if lost else failure
        route.hang_up()
        return failure


def _floats(address: int, rows: int, columns: int) -> Tensor:
    """Return native memory as a float32 tensor `[rows, columns]`."""
    memory = (ctypes.c_float * (rows * columns)).from_address(address)
    return torch.frombuffer(memory, dtype=torch.float32).view(rows, columns)


def _ints(address: int, rows: int, columns: int) -> Tensor:
    """Return native memory as an int32 tensor `[rows, columns]`."""
    memory = (ctypes.c_int32 * (rows * columns)).from_address(address)
    return torch.frombuffer(memory, dtype=torch.int32).view(rows, columns)
