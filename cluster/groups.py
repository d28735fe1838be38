"""The processes of the expert groups: started, watched, started again when one dies, ended.

    PREPARE (a node, imports) -> UP (its process runs) -> STOP -> LEFT
       ^                          |
       +--- WAITING (backoff) <---+---> GIVEN_UP

What a group holds is not decided here (`cluster.controller`); here is only that a process which
ended holds nothing any more. Nothing here blocks: the owner waits for the references and says which
one finished. When a process starts again, and when it is given up: `cluster.restarts`.

A group that does not come up within `start_timeout_s`, for the first time or again, is ended and
forgotten, and its place given back; `trouble` says why. Most likely its node does not come: that is
no fault of the group, and the others serve. So is one that dies too often while others serve: its
node may be broken. The controller asks for another place.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from cluster.controller import GroupPhase, GroupView
from cluster.members import GroupMember, ProcessFacts
from cluster.restarts import FIRST_BACKOFF_S, MAX_QUICK_DEATHS, Restarts, next_step
from cluster.routers import Calls
from protos.errors import DeadlineExceededError, ExpertMeshError, GroupLostError

log = logging.getLogger(__name__)

STOP_TIMEOUT_S = 30.0
"""How long a group gets to close its port before it is killed."""


class ProcessPhase(Enum):
    """What a group's process is doing; the value is the actor's method that ends the phase."""

    PREPARE = "prepare"
    UP = "wait"
    STOP = "stop"
    WAITING = ""
    GIVEN_UP = "gave up"


class GroupRecipe(Protocol):
    """How the service makes a group; every method returns at once."""

    def reserve_group(self) -> Any:
        """Ask for a place for one group."""
        ...

    def release(self, place: Any) -> None:
        """Give a place back."""
        ...

    def spawn_group(self, group_id: str, place: Any) -> Any:
        """Create the actor in its place; it runs when there is a node."""
        ...

    def group_died(self, group_id: str) -> None:
        """Take note that a group's process has ended, and its experts with it."""
        ...


@dataclass(slots=True)
class Group:
    """One expert group, through all its processes."""

    group_id: str
    capacity: float
    """Relative share of the experts."""
    place: Any
    actor: Any = None
    facts: ProcessFacts | None = None
    """Of the process that runs, or ran last."""
    address: str = ""
    """Of its gRPC server; empty before its process has loaded experts."""
    compute: str = ""
    """How it computes, or did last: native, deepspeed or torch."""
    holds: int = 0
    """See `GroupView`."""
    joined: int = 0
    """See `GroupView`."""
    trimmed: int = 0
    """See `GroupView`."""
    work: Any = None
    """The reference of a load or a trim that is under way."""
    phase: ProcessPhase = ProcessPhase.PREPARE
    pending: Any = None
    """The reference that ends the phase."""
    was_up: bool = False
    restarts: Restarts = field(default_factory=Restarts)
    retry_at: float = 0.0
    deadline: float = float("inf")
    """By when its process must run, or have stopped."""

    def view(self) -> GroupView:
        """Return what the controller sees."""
        if self.phase is ProcessPhase.UP:
            phase = GroupPhase.RUNNING
        else:
            phase = GroupPhase.LEAVING if self.phase is ProcessPhase.STOP else GroupPhase.STARTING
        return GroupView(
            phase=phase,
            holds=self.holds,
            joined=self.joined,
            trimmed=self.trimmed,
            busy=self.work is not None,
            since=self.restarts.up_since_s or 0.0,
        )

    def member(self) -> GroupMember:
        """Return what routers need to know; its process has loaded experts."""
        assert self.facts is not None
        return GroupMember(
            group_id=self.group_id,
            grpc_address=self.address,
            node_id=self.facts.node_id,
            pid=self.facts.pid,
            capacity=self.capacity,
        )


@dataclass(slots=True)
class Groups:
    """Watches over the processes of all groups.

    Args:
        calls: The seam to Ray.
        recipe: The service.
        progress: Takes a sentence for the user.
        start_timeout_s: From asking for a place to a process that runs there.
        clock: Monotonic seconds.
    """

    calls: Calls
    recipe: GroupRecipe
    progress: Callable[[str], None]
    start_timeout_s: float
    clock: Callable[[], float] = time.monotonic
    all: dict[str, Group] = field(default_factory=dict)
    """In the order in which they were started."""
    trouble: str = ""
    """Why the last group that was to start did not; empty after one did."""

    @property
    def given_up(self) -> list[str]:
        """The groups that die too often."""
        return [g.group_id for g in self.all.values() if g.phase is ProcessPhase.GIVEN_UP]

    def watch(self) -> None:
        """Begin: every group is up."""
        for group in self.all.values():
            self._enter_up(group)

    def references(self) -> dict[str, Any]:
        """Return group_id -> the reference to wait for."""
        return {g.group_id: g.pending for g in self.all.values() if g.pending is not None}

    def start(self, group_id: str, capacity: float) -> None:
        """Start a group that there was not."""
        group = Group(group_id, capacity, self.recipe.reserve_group())
        self.all[group_id] = group
        self._spawn(group)

    def stop(self, group_id: str) -> None:
        """End a group and give its place back."""
        group = self.all[group_id]
        if group.phase is not ProcessPhase.UP:
            self._forget(group)
            return
        group.deadline = self.clock() + STOP_TIMEOUT_S
        group.phase, group.pending = ProcessPhase.STOP, group.actor.call(ProcessPhase.STOP.value)

    def end(self, group_id: str, error: ExpertMeshError) -> None:
        """End a process that answers no more; it starts again."""
        self._died(self.all[group_id], error)

    def tick(self) -> None:
        """Start the groups whose backoff is over, and end starts that take too long."""
        now = self.clock()
        for group in list(self.all.values()):
            if group.phase is ProcessPhase.WAITING and now >= group.retry_at:
                self._spawn(group)
            elif now < group.deadline:
                continue
            elif group.phase is ProcessPhase.STOP:
                self._left(group)
            else:
                self._not_started(group, DeadlineExceededError("the start", self.start_timeout_s))

    def finished(self, group_id: str) -> None:
        """Take the result of the reference of this group, which has finished or failed."""
        group = self.all[group_id]
        reference, group.pending = group.pending, None
        try:
            value = self.calls.result(group_id, reference, GroupLostError)
        except ExpertMeshError as error:
            if group.phase is not ProcessPhase.STOP:
                self._died(group, error)
                return
            value = None
        if group.phase is ProcessPhase.PREPARE:
            group.facts = value
            self.trouble = ""
            self._enter_up(group)
        elif group.phase is ProcessPhase.STOP:
            self._left(group)
        else:
            self._died(group, GroupLostError(group_id, "stopped"))

    def _spawn(self, group: Group) -> None:
        now = self.clock()
        group.phase = ProcessPhase.PREPARE
        group.deadline = min(group.deadline, now + self.start_timeout_s)
        try:
            group.actor = self.recipe.spawn_group(group.group_id, group.place)
            group.pending = group.actor.call(ProcessPhase.PREPARE.value)
        except ExpertMeshError as error:
            if now >= group.deadline:
                self._not_started(group, error)
            else:  # one of the same name has just left, and Ray still knows it
                group.phase, group.retry_at = ProcessPhase.WAITING, now + FIRST_BACKOFF_S

    def _enter_up(self, group: Group) -> None:
        group.phase, group.deadline = ProcessPhase.UP, float("inf")
        group.restarts.is_up(self.clock())
        group.was_up = True
        group.pending = group.actor.call(ProcessPhase.UP.value)

    def _died(self, group: Group, error: ExpertMeshError) -> None:
        """Note a death, or a start that failed, and plan what comes next."""
        if not group.was_up:
            self._not_started(group, error)
            return
        what = "died" if group.phase is ProcessPhase.UP else "did not come back"
        log.warning("group_died group=%s phase=%s", group.group_id, group.phase.name)
        delay_s = group.restarts.died(self.clock())
        if delay_s is None and self._others_serve(group):
            self._not_started(group, error, f"{what}, {MAX_QUICK_DEATHS} times in a row")
            return
        self._end_process(group)
        self.recipe.group_died(group.group_id)
        if delay_s is None:
            group.phase = ProcessPhase.GIVEN_UP
        else:
            group.phase, group.retry_at = ProcessPhase.WAITING, self.clock() + delay_s
        self.progress(f"{group.group_id} {what} ({error.message}); {next_step(delay_s)}")

    def _others_serve(self, group: Group) -> bool:
        others = (other for other in self.all.values() if other is not group)
        return any(other.phase is ProcessPhase.UP and other.holds for other in others)

    def _not_started(
        self, group: Group, error: ExpertMeshError, what: str = "did not start"
    ) -> None:
        """Forget a group that does not come up, or does not stay up, in its place."""
        group.was_up = False
        self._end_process(group)
        self.recipe.group_died(group.group_id)
        self.trouble = f"{group.group_id} {what}: {error.message}"
        self.progress(self.trouble)
        self._forget(group)

    def _left(self, group: Group) -> None:
        self._forget(group)
        self.progress(f"{group.group_id} left")

    def _end_process(self, group: Group) -> None:
        group.pending = group.work = None
        group.holds = group.joined = group.trimmed = 0
        group.address, group.deadline = "", float("inf")
        if group.actor is not None:
            self.calls.kill(group.actor)
            group.actor = None

    def _forget(self, group: Group) -> None:
        self._end_process(group)
        self.recipe.release(group.place)
        del self.all[group.group_id]
