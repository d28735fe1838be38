"""The routers of a running service: watched, and started again when one dies.

A router's life is a row of calls into its actor, each of which ends a phase:

    PREPARE (imports) -> LOAD (trunk) -> START (port) -> CHECK (one token) -> UP
       ^                                                                      |
       +--- WAITING (backoff) <--- its process died, or a call failed --------+---> GIVEN_UP
                                     it was drained, or is told to: DRAIN, STOP +---> LEFT

The service walks all routers to UP at its start; from then on this file walks those that died, or
are added, one call at a time, while the others serve. Nothing here blocks: the owner waits for the
references and says which one finished. A router comes back at its old address, so that clients find
it again.

When it starts again, and when it is given up: `cluster.restarts`. Waiting for a node, or for
experts, is no fault of a router and counts for nothing. The service ends when no router is left;
as long as others serve, one that was given up is tried again every `GIVEN_UP_S`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from cluster.members import ProcessFacts, RouterReady
from cluster.restarts import FIRST_BACKOFF_S, Restarts, next_step
from protos.errors import DeadlineExceededError, ExpertMeshError, RouterLostError

log = logging.getLogger(__name__)

GIVEN_UP_S = 300.0
"""After a router was given up until it is tried once more: what was in its way may be gone."""
STOP_TIMEOUT_S = 30.0
"""How long a router gets to close its port, and to say that it is drained, before it is killed."""


class RouterPhase(Enum):
    """What a router is doing; the value is the actor's method that ends the phase."""

    PREPARE = "prepare"
    LOAD = "load"
    LOADED = "waits for the experts"
    START = "start"
    CHECK = "check"
    UP = "wait"
    DRAIN = "drain"
    STOP = "stop"
    WAITING = ""
    GIVEN_UP = "gave up"
    LEFT = "left"


class Calls(Protocol):
    """What this file needs of `RayCluster`."""

    def result(self, name: str, reference: Any, lost: type[ExpertMeshError]) -> Any:
        """Return a finished call's value, or raise its error; `lost` if its process ended."""
        ...

    def kill(self, actor: Any) -> None:
        """End a process."""
        ...


class RouterRecipe(Protocol):
    """How the service makes a router; every method returns at once."""

    def spawn_router(self, router_id: str) -> Any:
        """Create the actor."""
        ...

    def call_load(self, router: Router) -> Any:
        """Start loading the trunk; returns the reference."""
        ...

    def can_start(self) -> bool:
        """Return whether there are expert groups to connect to."""
        ...

    def call_start(self, router: Router) -> Any:
        """Start opening the port; returns the reference."""
        ...

    def router_died(self, router: Router) -> None:
        """Tell whoever must know at once that the process of a router that was up has ended."""
        ...

    def routers_changed(self) -> None:
        """Tell the routers that are up who else serves."""
        ...

    def router_leaves(self, router: Router) -> None:
        """Take note that a router was asked, by someone else, to leave."""
        ...

    def router_left(self, router: Router) -> None:
        """Give the place of a router back."""
        ...


@dataclass(slots=True)
class Router:
    """One router, through all its processes."""

    router_id: str
    index: int
    actor: Any = None
    facts: ProcessFacts | None = None
    """Of the process that runs, or ran last."""
    ready: RouterReady | None = None
    """What it said when its port was open; kept over a restart."""
    place: Any = None
    """Its reservation."""
    follows: int = 0
    """Epoch of the placement that its process follows; 0: none yet, or a dense model."""
    connected: int = 0
    """Epoch of the newest placement whose groups its process is connected to."""
    is_asleep: bool = False
    """Its process lets requests wait."""
    work: Any = None
    """The reference of a connect or a switch that is under way, or of falling asleep or waking."""
    phase: RouterPhase = RouterPhase.PREPARE
    pending: Any = None
    """The reference that ends the phase."""
    was_up: bool = False
    restarts: Restarts = field(default_factory=Restarts)
    retry_at: float = 0.0
    deadline: float = float("inf")
    """By when it must be up again, or have left; the wait for experts does not count."""

    @property
    def port(self) -> int | None:
        """The port it had, or None before its first start."""
        return int(self.ready.address.rpartition(":")[2]) if self.ready else None


@dataclass(slots=True)
class Routers:
    """Watches over routers that are up.

    Args:
        calls: The seam to Ray.
        recipe: The service.
        progress: Takes a sentence for the user.
        start_timeout_s: From spawning a router to its first token.
        clock: Monotonic seconds.
    """

    calls: Calls
    recipe: RouterRecipe
    progress: Callable[[str], None]
    start_timeout_s: float
    clock: Callable[[], float] = time.monotonic
    all: dict[str, Router] = field(default_factory=dict)
    trouble: str = ""
    """Why the last router that was to serve does not; empty after one did."""

    @property
    def up(self) -> list[Router]:
        """The routers that serve."""
        return [router for router in self.all.values() if router.phase is RouterPhase.UP]

    @property
    def is_over(self) -> bool:
        """Whether no router serves or ever will."""
        return all(r.phase in (RouterPhase.LEFT, RouterPhase.GIVEN_UP) for r in self.all.values())

    @property
    def given_up(self) -> list[str]:
        """The routers that die too often."""
        return [r.router_id for r in self.all.values() if r.phase is RouterPhase.GIVEN_UP]

    def addresses(self) -> dict[str, str]:
        """Return router_id -> address of all but those that left; some may be down."""
        return {
            router.router_id: router.ready.address
            for router in list(self.all.values())  # other threads ask, too
            if router.ready is not None and router.phase is not RouterPhase.LEFT
        }

    def watch(self) -> None:
        """Begin: every router is up."""
        for router in self.all.values():
            router.was_up = True
            self._enter_up(router)

    def add(self) -> str:
        """Start one more router, at the next `tick`; return its id."""
        taken = {r.index for r in self.all.values() if r.phase is not RouterPhase.LEFT}
        index = next(i for i in range(len(taken) + 1) if i not in taken)
        router_id = f"router-{index}"
        self.all.pop(router_id, None)
        self.all[router_id] = Router(router_id, index, phase=RouterPhase.WAITING)
        return router_id

    def drain(self, router_id: str, timeout_s: float) -> None:
        """Let a router finish what runs, or hand it over after `timeout_s`, and leave."""
        router = self.all[router_id]
        if router.phase is RouterPhase.UP:
            router.phase = RouterPhase.DRAIN
            router.deadline = self.clock() + timeout_s + STOP_TIMEOUT_S
            router.pending = router.actor.call(RouterPhase.DRAIN.value, timeout_s)
        else:
            self._leave(router)

    def end(self, router_id: str, error: ExpertMeshError) -> None:
        """End a process that answers no more; it starts again, unless it was to leave."""
        router = self.all[router_id]
        if router.phase in (RouterPhase.DRAIN, RouterPhase.STOP):
            self._leave(router)
        else:
            self._died(router, error)

    def references(self) -> dict[str, Any]:
        """Return router_id -> the reference to wait for."""
        return {r.router_id: r.pending for r in self.all.values() if r.pending is not None}

    def tick(self) -> None:
        """Start the routers whose backoff is over, and end starts that take too long."""
        now = self.clock()
        for router in self.all.values():
            if router.phase is RouterPhase.WAITING:
                if now >= router.retry_at:
                    self._spawn(router)
            elif router.phase is RouterPhase.GIVEN_UP:
                if now >= router.retry_at and self.up:
                    self._spawn(router)
            elif router.phase is RouterPhase.LOADED:
                self._start_loaded(router)
            elif now < router.deadline:
                continue
            elif router.phase is RouterPhase.PREPARE:
                waited = f"{self.start_timeout_s:g} s"
                self.trouble = f"{router.router_id} has no node after {waited}; it goes on waiting"
                self.progress(self.trouble)
                self._wait(router)
            elif router.phase in (RouterPhase.DRAIN, RouterPhase.STOP):
                self._leave(router)
            else:
                self._died(router, DeadlineExceededError("the start", self.start_timeout_s))

    def finished(self, router_id: str) -> None:
        """Take the result of the reference of this router, which has finished or failed."""
        router = self.all[router_id]
        reference, router.pending = router.pending, None
        try:
            value = self.calls.result(router_id, reference, RouterLostError)
        except ExpertMeshError as error:
            if router.phase not in (RouterPhase.DRAIN, RouterPhase.STOP):
                self._died(router, error)
                return
            value = None
        self._advance(router, value)

    def begin_again(self, router_id: str) -> None:
        """Let a router that starts do so anew: what it starts with is there no more."""
        router = self.all[router_id]
        if router.phase in (RouterPhase.START, RouterPhase.CHECK):
            self._wait(router)

    def _spawn(self, router: Router) -> None:
        now = self.clock()
        router.phase = RouterPhase.PREPARE
        router.deadline = min(router.deadline, now + self.start_timeout_s)
        try:
            router.actor = self.recipe.spawn_router(router.router_id)
            router.pending = router.actor.call(RouterPhase.PREPARE.value)
        except ExpertMeshError as error:
            if now >= router.deadline:
                self._died(router, error)
            else:  # the one before has just ended, and Ray still knows it
                router.phase, router.retry_at = RouterPhase.WAITING, now + FIRST_BACKOFF_S

    def _wait(self, router: Router) -> None:
        """Start again, for no fault of the router."""
        self._end_process(router)
        router.phase, router.retry_at = RouterPhase.WAITING, self.clock()

    def _advance(self, router: Router, value: Any) -> None:
        if router.phase is RouterPhase.PREPARE:
            router.facts = value
            router.phase, router.pending = RouterPhase.LOAD, self.recipe.call_load(router)
        elif router.phase is RouterPhase.LOAD:
            router.phase = RouterPhase.LOADED
            self._start_loaded(router)
        elif router.phase is RouterPhase.START:
            router.ready = value
            router.phase = RouterPhase.CHECK
            router.pending = router.actor.call(RouterPhase.CHECK.value)
        elif router.phase is RouterPhase.CHECK:
            assert router.ready is not None  # START came before
            is_new, router.was_up = not router.was_up, True
            self._enter_up(router)
            self.trouble = ""
            back = "serves" if is_new else "is back"
            self.progress(f"{router.router_id} {back} at {router.ready.address}")
            self.recipe.routers_changed()
        elif router.phase in (RouterPhase.UP, RouterPhase.DRAIN):
            if router.phase is RouterPhase.UP:
                self.recipe.router_leaves(router)
            router.deadline = self.clock() + STOP_TIMEOUT_S
            router.phase = RouterPhase.STOP
            router.pending = router.actor.call(RouterPhase.STOP.value)
        else:
            self._leave(router)

    def _start_loaded(self, router: Router) -> None:
        """Go on where there are experts; else `tick` does when they are back."""
        if self.recipe.can_start():
            router.deadline = self.clock() + self.start_timeout_s
            router.phase, router.pending = RouterPhase.START, self.recipe.call_start(router)

    def _leave(self, router: Router) -> None:
        router.phase = RouterPhase.LEFT
        if self.trouble.startswith(f"{router.router_id} "):
            self.trouble = ""
        self._end_process(router)
        self.recipe.router_left(router)
        self.progress(f"{router.router_id} was drained and left")
        self.recipe.routers_changed()

    def _enter_up(self, router: Router) -> None:
        router.phase, router.deadline = RouterPhase.UP, float("inf")
        router.restarts.is_up(self.clock())
        router.pending = router.actor.call(RouterPhase.UP.value)

    def _died(self, router: Router, error: ExpertMeshError) -> None:
        """Note a death, or a start that failed, and plan what comes next."""
        was_up = router.phase is RouterPhase.UP
        self._end_process(router)
        if was_up:
            self.recipe.router_died(router)
        log.warning("router_died router=%s phase=%s", router.router_id, router.phase.name)
        what = "died" if was_up else "did not come back" if router.was_up else "did not start"
        delay_s = router.restarts.died(self.clock())
        if delay_s is None:
            router.phase, router.retry_at = RouterPhase.GIVEN_UP, self.clock() + GIVEN_UP_S
        else:
            router.phase, router.retry_at = RouterPhase.WAITING, self.clock() + delay_s
        said = f"{router.router_id} {what} ({error.message}); {next_step(delay_s)}"
        self.trouble = self.trouble if was_up else said
        self.progress(said)

    def _end_process(self, router: Router) -> None:
        router.pending, router.deadline = None, float("inf")
        router.work, router.follows, router.connected = None, 0, 0
        router.is_asleep = False
        if router.actor is not None:
            self.calls.kill(router.actor)
            router.actor = None
