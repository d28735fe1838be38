"""The last decisions of the autoscaler, as every router keeps and shows them.

Two rings: of all decisions, and of those that change something, so that a quiet hour does not push
out the change that it began with.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import deque
from collections.abc import Iterable

from cluster.autoscale import Decision, PoolDecision
from cluster.autoscale_signals import Load
from protos.v1 import cluster_pb2

NUM_KEPT = 64
"""Decisions in each ring."""


class DecisionLog:
    """Any thread may add and read."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._mode = "off"
        self._all: deque[cluster_pb2.AutoscaleDecision] = deque(maxlen=NUM_KEPT)
        self._changes: deque[cluster_pb2.AutoscaleDecision] = deque(maxlen=NUM_KEPT)

    def add(self, mode: str, decisions: Iterable[cluster_pb2.AutoscaleDecision]) -> None:
        """Take decisions, oldest first; those known already are passed over."""
        with self._lock:
            self._mode = mode
            newest_s = self._all[-1].unix_s if self._all else 0.0
            for decision in decisions:
                if decision.unix_s <= newest_s:
                    continue
                self._all.append(decision)
                if changes_something(decision):
                    self._changes.append(decision)

    def explain(self, limit: int) -> cluster_pb2.ExplainAutoscaleResponse:
        """Return the last `limit` decisions and the last `limit` changes, oldest first, each once.

        Args:
            limit: 0: all that are kept.
        """
        with self._lock:
            last = list(self._all)[-limit:]
            oldest_s = last[0].unix_s if last else 0.0
            changes = [change for change in self._changes if change.unix_s < oldest_s]
            return cluster_pb2.ExplainAutoscaleResponse(
                mode=self._mode, decisions=[*changes[-limit:], *last]
            )


def changes_something(decision: cluster_pb2.AutoscaleDecision) -> bool:
    """Return whether a decision wants another number of members."""
    return any(pool.wanted != pool.count for pool in (decision.routers, decision.groups))


def decision_message(decision: Decision, unix_s: float) -> cluster_pb2.AutoscaleDecision:
    """Return a decision as it is sent."""
    load = {
        item.name: value
        for item in dataclasses.fields(Load)
        if (value := getattr(decision.load, item.name)) is not None
    }
    return cluster_pb2.AutoscaleDecision(
        unix_s=unix_s,
        routers=_pool_message(decision.routers),
        groups=_pool_message(decision.groups),
        load=cluster_pb2.AutoscaleLoad(**load),
    )


def _pool_message(pool: PoolDecision) -> cluster_pb2.PoolDecision:
    return cluster_pb2.PoolDecision(
        count=pool.count,
        wanted=pool.wanted,
        ready=pool.ready,
        reason=pool.reason,
        signals=[
            cluster_pb2.AutoscaleSignal(
                name=signal.name,
                demand=signal.demand,
                raises_to=signal.raises_to,
                keeps=signal.keeps,
                text=signal.text,
            )
            for signal in pool.signals
        ],
    )
