"""What somebody asks a router for that concerns the whole service.

Wishes come from any router (`ClusterService.Scale`, `ApplyPlacement`, `Drain` of a group): each has
a call `next_wish` open at all times, which returns when someone asks it for something. So the
process of `serve` needs no port and no password of its own, a wish takes the way that Ray has
authenticated already, and a router that dies takes nothing with it but its own open call.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from cluster.members import Wish
from cluster.routers import Calls, Router
from protos.errors import ExpertMeshError, RouterLostError


@dataclass(slots=True)
class Wishes:
    """The open calls.

    Args:
        calls: The seam to Ray.
    """

    calls: Calls
    _open: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    """router_id -> (actor, reference); no reference where the actor's call has failed."""

    def references(self, up: Iterable[Router]) -> dict[str, Any]:
        """Return router_id -> the call to wait for, and open those that the routers lack."""
        for router in up:
            actor, _ = self._open.get(router.router_id, (None, None))
            if actor is not router.actor:
                self._open[router.router_id] = router.actor, router.actor.call("next_wish")
        return {name: call for name, (_, call) in self._open.items() if call is not None}

    def take(self, router_id: str) -> Wish | None:
        """Return what the call of this router brought; None where it failed, or the router ends."""
        actor, reference = self._open.pop(router_id)
        try:
            wish: Wish | None = self.calls.result(router_id, reference, RouterLostError)
        except ExpertMeshError:
            # The router died, and `wait` may say so a little later. Its next process gets a call of
            # its own; one more to this one would fail at once, and so on without end.
            self._open[router_id] = actor, None
            return None
        return wish
