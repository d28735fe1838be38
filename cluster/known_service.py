"""What one router knows of the service around it, and what it passes on to `serve`.

News come from `serve`, wishes go there: calls of operators wait in a queue until `serve` asks for
them. Imports no torch. Any thread may call.
"""

from __future__ import annotations

import queue
from collections.abc import Mapping

from cluster.autoscale_log import DecisionLog
from cluster.members import GroupMember, ServiceView, Wish
from cluster.router_status import scaling_status
from protos.v1 import cluster_pb2


class KnownService:
    """The service as one router knows it.

    Args:
        router_id: Its own name.
    """

    def __init__(self, router_id: str) -> None:
        self.router_id = router_id
        self._view: ServiceView | None = None
        self._groups: tuple[GroupMember, ...] = ()
        self._routers: Mapping[str, str] = {}
        self._wishes: queue.SimpleQueue[Wish | None] = queue.SimpleQueue()
        self._decisions = DecisionLog()

    def begin(self, groups: tuple[GroupMember, ...]) -> None:
        """Start with these expert groups and no router."""
        self._groups = groups

    def open(self, address: str) -> None:
        """Say that this router answers at `host:port`; until news come it is the only one."""
        self._routers = {self.router_id: address}

    def learn(self, view: ServiceView) -> None:
        """Learn how the whole service is; what is older than what is known is left out."""
        if self._view is not None and view.version <= self._view.version:
            return
        self._view, self._groups, self._routers = view, view.groups, dict(view.routers)

    @property
    def groups(self) -> tuple[GroupMember, ...]:
        """The expert groups."""
        return self._groups

    @property
    def routers(self) -> Mapping[str, str]:
        """router_id -> gRPC address of every router, this one included."""
        return self._routers

    def is_member(self, group_id: str) -> bool:
        """Return whether the service has this expert group, as far as this router knows."""
        return any(member.group_id == group_id for member in self._groups)

    def scaling(self) -> cluster_pb2.ScalingStatus | None:
        """Return what is wanted of the service, and how far it is; None before any news."""
        return scaling_status(self._view) if self._view else None

    def wish(self, wish: Wish) -> None:
        """Ask the process of `serve` for a change of the service; returns at once."""
        self._wishes.put(wish)

    def next_wish(self) -> Wish | None:
        """Wait until someone asks for a change of the service, and return it; None at the end."""
        return self._wishes.get()

    def end(self) -> None:
        """Let `next_wish` return None."""
        self._wishes.put(None)

    def note_decisions(self, mode: str, decisions: list[bytes]) -> None:
        """Keep decisions of the autoscaler, oldest first, to explain them."""
        found = [cluster_pb2.AutoscaleDecision.FromString(part) for part in decisions]
        self._decisions.add(mode, found)

    def explain_autoscale(self, limit: int) -> cluster_pb2.ExplainAutoscaleResponse:
        """Return the last decisions on the number of members."""
        return self._decisions.explain(limit)
