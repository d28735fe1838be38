"""The statuses of the last seconds, as the load and the pools that `decide` rests on. No clock.

A member that did not answer is taken as it was at its last answer, until that is `stale_s` old;
from then on it is unknown. Sums are extrapolated from the members that are known.
"""

from __future__ import annotations

import itertools
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic

from cluster.autoscale_signals import Load, Pool
from cluster.rates import (
    LOST,
    Status,
    first_token_percentile,
    group_rates,
    member_id,
    router_rates,
    token_percentile,
)
from protos.v1 import cluster_pb2

READY = "READY"
LATENCY_PERCENT = 95.0


@dataclass(frozen=True, slots=True)
class _Seen(Generic[Status]):
    at_s: float
    status: Status


@dataclass(slots=True)
class StatusWindow:
    """Collects statuses.

    Args:
        look_back_s: Rates are over the last so many seconds.
        stale_s: Answers older than this count no more.
    """

    look_back_s: float
    stale_s: float
    _routers: dict[str, deque[_Seen[cluster_pb2.RouterStatus]]] = field(default_factory=dict)
    _groups: dict[str, deque[_Seen[cluster_pb2.GroupStatus]]] = field(default_factory=dict)
    _enough: int = 1
    """Groups that held all experts when there were groups last."""

    def add(self, now_s: float, status: cluster_pb2.ClusterStatus) -> None:
        """Take a status."""
        self._note(self._routers, now_s, status.routers)
        self._note(self._groups, now_s, status.groups)

    def pools(self, now_s: float, routers: int, groups: int) -> tuple[Pool, Pool]:
        """Return the pools.

        Args:
            now_s: On the clock of `add`.
            routers: That there are to be.
            groups: That there are to be.
        """
        return self._pool(self._routers, now_s, routers), self._pool(self._groups, now_s, groups)

    def load(self, now_s: float) -> Load:
        """Return the load; figures that no member gave are None."""
        routers = [seen for seen in self._routers.values() if self._is_known(seen, now_s)]
        groups = [seen for seen in self._groups.values() if self._is_known(seen, now_s)]
        if not routers:
            return Load(group_busy=self._busy(groups))
        whole = len(self._routers) / len(routers)
        last = [seen[-1].status for seen in routers]
        pairs = [(seen[0].status, seen[-1].status) for seen in routers]
        rates = [
            found
            for seen in routers
            if (found := router_rates(*_ends(seen), seen[-1].at_s - seen[0].at_s)) is not None
        ]
        prefill = [router.prefill_tokens_per_s for router in last if router.prefill_tokens_per_s]
        return Load(
            prompt_tokens_per_s=whole * sum(rate.arriving_tokens_per_s for rate in rates)
            if len(rates) == len(routers)
            else None,
            waiting_tokens=whole * sum(router.waiting_tokens for router in last),
            prefill_tokens_per_s=statistics.fmean(prefill) if prefill else None,
            num_requests=whole
            * sum(r.requests_running + r.requests_waiting + r.route_streams for r in last),
            requests_per_s=whole * sum(rate.requests_per_s for rate in rates)
            if len(rates) == len(routers)
            else None,
            kv_usage=_mean([(r.kv_blocks_used, r.kv_blocks_total) for r in last]),
            state_slot_usage=_mean([(r.state_slots_used, r.state_slots_total) for r in last]),
            dispatch_share=statistics.fmean(rate.dispatch_share for rate in rates)
            if rates
            else None,
            group_busy=self._busy(groups),
            ttft_s=first_token_percentile(pairs, LATENCY_PERCENT),
            itl_s=token_percentile(pairs, LATENCY_PERCENT),
        )

    def groups_to_hold(self, expert_bytes: int) -> int:
        """Return how many groups hold one copy of all experts, whichever of them they are.

        The smallest are counted first, of those that have said what they can hold: who is still
        starting must not make the others too few. Where they cannot together, that is every group.
        Of a service that sleeps, as many as before.
        """
        if not self._groups:
            return self._enough
        self._enough = self._count_to_hold(expert_bytes)
        return self._enough

    def _count_to_hold(self, expert_bytes: int) -> int:
        said = [seen[-1].status.capacity_bytes for seen in self._groups.values() if seen]
        held = list(itertools.accumulate(sorted(filter(None, said))))
        enough = next((n for n, total in enumerate(held, 1) if total >= expert_bytes), None)
        return max(1, len(self._groups) if enough is None else enough)

    def _note(
        self, members: dict[str, deque[_Seen[Status]]], now_s: float, statuses: Sequence[Status]
    ) -> None:
        """Append what answered; forget what is no member any more, or another process's."""
        for gone in members.keys() - {member_id(status) for status in statuses}:
            del members[gone]
        for status in statuses:
            seen = members.setdefault(member_id(status), deque())
            if status.state == LOST:
                continue
            if seen and seen[-1].status.pid != status.pid:
                seen.clear()
            seen.append(_Seen(now_s, status))
            while len(seen) > 2 and seen[1].at_s <= now_s - self.look_back_s:
                seen.popleft()

    def _is_known(self, seen: deque[_Seen[Status]], now_s: float) -> bool:
        return bool(seen) and now_s - seen[-1].at_s <= self.stale_s

    def _pool(self, members: dict[str, deque[_Seen[Status]]], now_s: float, count: int) -> Pool:
        known = [seen for seen in members.values() if self._is_known(seen, now_s)]
        ready = sum(seen[-1].status.state == READY for seen in known)
        unknown = sum(bool(seen) for seen in members.values()) - len(known)
        return Pool(count=count, ready=min(count, ready + unknown), unknown=unknown)

    def _busy(self, groups: Sequence[deque[_Seen[cluster_pb2.GroupStatus]]]) -> float | None:
        found = [
            rates.busy
            for seen in groups
            if (rates := group_rates(*_ends(seen), seen[-1].at_s - seen[0].at_s)) is not None
        ]
        return statistics.fmean(found) if found else None


def _ends(seen: deque[_Seen[Status]]) -> tuple[Status, Status]:
    return seen[0].status, seen[-1].status


def _mean(parts: Sequence[tuple[int, int]]) -> float | None:
    shares = [used / whole for used, whole in parts if whole]
    return statistics.fmean(shares) if shares else None
