"""Observes a running service every few seconds, decides, and hands the decisions to its owner.

A thread of its own asks one router for the status of all members; a router that does not answer is
passed over for the next one. Every wait has a bound, so a decision comes at its time, with what is
known then. The owner takes decisions with `take` in the thread that may call Ray.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from cluster.autoscale import Bounds, Decision, Memory, Policy, State, decide
from cluster.autoscale_batches import BatchPace, BatchWork
from cluster.autoscale_signals import Load, Targets
from cluster.autoscale_window import StatusWindow
from cluster.config import AutoscaleSection
from protos.errors import ConfigurationError, ExpertMeshError
from protos.v1 import cluster_pb2

log = logging.getLogger(__name__)

STALE_INTERVALS = 3
"""A member that is silent for longer is unknown."""
STOP_TIMEOUT_S = 10.0

Ask = Callable[[str], cluster_pb2.ClusterStatus]


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """What `serve` knows without asking: members there are to be, addresses, work that waits."""

    groups: int
    num_routers: int
    routers: Mapping[str, str]
    """router_id -> gRPC address of those that have one."""
    batches: BatchWork | None = None
    """That were submitted and have not ended; None: there is none."""


class AutoscaleLoop:
    """Decides every `interval_s` from `start` to `close`.

    Args:
        section: What is wanted.
        policy: From `policy_of`.
        membership: Called in the loop's thread.
        ask: Returns the status of the service from a router's address, or raises.
        expert_bytes: Of one copy of all experts: groups must be enough to hold it.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        section: AutoscaleSection,
        policy: Policy,
        membership: Callable[[], Membership],
        ask: Ask,
        *,
        expert_bytes: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._section = section
        self._policy = policy
        self._membership = membership
        self._ask = ask
        self._clock = clock
        self._expert_bytes = expert_bytes
        self._memory = Memory()
        self._silent: dict[str, float] = {}
        """Address -> when it last did not answer."""
        self._window = StatusWindow(
            look_back_s=section.look_back_period_s, stale_s=STALE_INTERVALS * section.interval_s
        )
        self._pace = BatchPace()
        self._decisions: queue.SimpleQueue[Decision] = queue.SimpleQueue()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="autoscale", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def take(self) -> list[Decision]:
        """Return the decisions since the last call, oldest first."""
        found = []
        while not self._decisions.empty():
            found.append(self._decisions.get_nowait())
        return found

    def close(self) -> None:
        """End; waits for the question under way, but not for long."""
        self._ended.set()
        self._thread.join(STOP_TIMEOUT_S)

    def decide_once(self) -> Decision:
        """Observe and decide."""
        membership = self._membership()
        status = self._observe(membership)
        now_s = self._clock()
        if status is not None:
            self._window.add(now_s, status)
        policy = replace(
            self._policy, min_groups_by_memory=self._window.groups_to_hold(self._expert_bytes)
        )
        routers, groups = self._window.pools(now_s, membership.num_routers, membership.groups)
        self._pace.note(now_s, membership.batches, routers.ready, groups.ready)
        decision = decide(
            State(
                now_s=now_s,
                policy=policy,
                routers=routers,
                groups=groups,
                load=self._load(now_s, membership.batches),
                memory=self._memory,
            )
        )
        self._memory = decision.memory
        return decision

    def _load(self, now_s: float, batches: BatchWork | None) -> Load:
        load = self._window.load(now_s)
        if batches is None:
            return load
        pace = self._pace.tokens_per_s(now_s)
        return replace(load, batch_tokens=batches.tokens_left, batch_tokens_per_s=pace)

    def _run(self) -> None:
        """Decide until the end; a decision that fails is no reason to stop: outermost loop."""
        while not self._ended.wait(self._section.interval_s):
            try:
                self._decisions.put(self.decide_once())
            except Exception:
                log.exception("autoscale.failed")

    def _observe(self, membership: Membership) -> cluster_pb2.ClusterStatus | None:
        """Ask the routers one after the other until one answers, within `interval_s`.

        Who did not answer is asked last: an address that swallows questions takes the whole time.
        """
        deadline = self._clock() + self._section.interval_s
        silent = {a: at for a, at in self._silent.items() if a in membership.routers.values()}
        self._silent = silent
        for router_id, address in sorted(
            membership.routers.items(), key=lambda router: silent.get(router[1], -math.inf)
        ):
            if self._ended.is_set() or self._clock() >= deadline:
                break
            try:
                status = self._ask(address)
                silent.pop(address, None)
                return status
            except ExpertMeshError as error:
                silent[address] = self._clock()
                log.info("autoscale.no_answer router=%s why=%s", router_id, error.message)
        return None


def policy_of(
    section: AutoscaleSection,
    *,
    routers: int,
    groups: int,
    max_num_seqs: int,
) -> Policy:
    """Return the policy of a service; bounds that are not set are the numbers it starts with.

    Args:
        section: As configured.
        routers: At the start.
        groups: At the start; 0: a dense model.
        max_num_seqs: Sequences that one router runs at the same time.

    Raises:
        ConfigurationError: A least number above the most, or a start outside of both.
    """
    return Policy(
        routers=_bounds("routers", section.min_routers, section.max_routers, routers),
        groups=_bounds("groups", section.min_groups, section.max_groups, groups)
        if groups
        else Bounds(least=0, most=0),
        targets=Targets(
            backlog_s=section.target_backlog_s,
            ongoing_requests=section.target_ongoing_requests or math.ceil(0.8 * max_num_seqs),
            kv_usage=section.max_kv_usage,
            group_busy=section.target_group_busy,
            ttft_s=_seconds(section.target_ttft_ms),
            itl_s=_seconds(section.target_itl_ms),
            batch_s=section.target_batch_s,
        ),
        upscale_delay_s=section.upscale_delay_s,
        downscale_delay_s=section.downscale_delay_s,
        downscale_to_zero_delay_s=section.downscale_to_zero_delay_s,
        look_back_s=section.look_back_period_s,
    )


def _bounds(what: str, least: int | None, most: int | None, start: int) -> Bounds:
    bounds = Bounds(
        least=min(start, most or start) if least is None else least,
        most=max(start, least or 0) if most is None else most,
    )
    if not bounds.least <= start <= bounds.most:
        raise ConfigurationError(
            f"autoscale.min_{what}",
            f"to autoscale.max_{what} ({bounds.least} to {bounds.most}) must contain the number at"
            " the start",
            start,
        )
    return bounds


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1e3
