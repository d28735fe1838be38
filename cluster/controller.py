"""What to do next so that a running service becomes the one that is wanted. Pure.

`step` looks at the service and at the target and returns actions; it is called again whenever
something has happened, and whatever it asked for twice is already under way (`busy`). Knows neither
Ray nor clocks nor sockets: `cluster.scaling` observes and acts.

How the groups change, one change at a time:

    start   new groups begin: a node, a process, imports
    plan    a placement of the next epoch for those that run, with the fewest moves; what starts
            late, or never, holds up nobody and gets a plan of its own
    load    every group loads what the plan gives it, beside what it holds
    connect every router connects to the groups of the plan, beside those it uses
    switch  every router follows the plan from its next call on; no router is asked before all have
            connected, so the plan can still be abandoned until here
    commit  the plan is the placement in force
    trim    groups forget what it does not give them; those that it does not name leave

An expert is dropped, and a group ended, only when every router follows a placement in force that
has the expert elsewhere. So the only copy is never removed, and a call that is sent by the old
placement meets the expert where it was.

Without a request for long, all groups may be wanted to go (`Target.groups` 0): the service sleeps.
First every router is asked to let requests wait; only when all do, and none had any, do the groups
end. They come back as after a death, with a placement of the next epoch, and the routers answer
again when it is in force. A router that refuses to sleep ends the attempt (`cluster.scaling`).

A group that dies has lost its experts: a plan is due at once, for the groups that are left, and
again when its process is back. Calls for its experts wait in the routers meanwhile.

Words: a *target* is what someone wants; a group *holds* a placement of some epoch when it has all
experts that this placement gives it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from experts.moves import replan
from experts.placement import Placement
from experts.planner import Load, num_moves

GATHER_S = 3.0
"""How long a new group waits for others that start beside it, so that one plan is for all."""


class GroupPhase(Enum):
    """What a group is doing, as the controller sees it."""

    STARTING = "STARTING"
    """Waits for a node, or for its process."""
    RUNNING = "RUNNING"
    """Its process answers."""
    LEAVING = "LEAVING"
    """Its process is told to end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupView:
    """One expert group."""

    phase: GroupPhase
    holds: int = 0
    """Epoch of the newest placement that it holds; 0: its process has no experts."""
    joined: int = 0
    """Epoch of the first placement that its process has held. Routers whose calls follow an older
    one know the process before it, which had the same name."""
    trimmed: int = 0
    """Epoch of the newest placement beyond which it holds nothing."""
    busy: bool = False
    """Loads or forgets."""
    since: float = 0.0
    """When its process began to run, on the clock of `Observed.retry_at`."""

    @property
    def is_running(self) -> bool:
        """Whether its process answers."""
        return self.phase is GroupPhase.RUNNING

    def has_experts_of(self, placement: Placement) -> bool:
        """Return whether its process is the one that this placement in force speaks of."""
        return self.holds > 0 and self.joined <= placement.epoch


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterView:
    """One router."""

    is_up: bool
    """It serves."""
    follows: int
    """Epoch of the placement that its calls follow; 0: its process has none yet."""
    connected: int = 0
    """Epoch of the newest placement whose groups it is connected to."""
    busy: bool = False
    """Connects or switches."""
    is_leaving: bool = False
    """It serves what it has, takes nothing new, and does not count."""
    is_asleep: bool = False
    """It lets requests wait, and nothing of it is with the groups."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """The service as it is."""

    placement: Placement | None
    """In force; None in a dense model, which has no groups."""
    plan: Placement | None = None
    """Being brought about."""
    groups: Mapping[str, GroupView]
    """In the order in which they were started."""
    routers: Mapping[str, RouterView]
    """Those that serve or start, by age."""
    order: int = 0
    """Of the target, when the last plan was made."""
    load: Load | None = None
    """`[layers, experts]` pairs, where someone counted."""
    retry_at: float = 0.0
    """A plan failed; none before."""
    start_at: float = 0.0
    """A group could not start, or not stay; no other before, on the same clock."""
    failed: frozenset[str] = frozenset()
    """The groups of that plan: with others it may be tried at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The service as it should be."""

    groups: int
    """0: sleep until somebody wants them again; ignored in a dense model."""
    routers: int
    capacities: Mapping[str, float] = field(default_factory=dict)
    """Relative share of the experts by group id; 1 where none is given."""
    leaving: frozenset[str] = frozenset()
    """Routers that are to go before others, and groups that are to go whatever the number: the
    others are as many as wanted, but for the time in which there are too few of them."""
    order: int = 0
    """Counts the times that someone asked for another placement."""


@dataclass(frozen=True, slots=True)
class StartGroup:
    """Reserve a place and start a group there."""

    group_id: str


@dataclass(frozen=True, slots=True)
class StopGroup:
    """End a group that nobody needs, and give its place back."""

    group_id: str


@dataclass(frozen=True, slots=True)
class BeginPlan:
    """Begin to bring this placement about."""

    placement: Placement


@dataclass(frozen=True, slots=True)
class LoadGroup:
    """Let a group load what the plan gives it."""

    group_id: str


@dataclass(frozen=True, slots=True)
class Trim:
    """Let a group forget what the placement in force does not give it."""

    group_id: str


@dataclass(frozen=True, slots=True)
class Connect:
    """Let a router connect to the groups of the plan."""

    router_id: str


@dataclass(frozen=True, slots=True)
class Switch:
    """Let a router follow the plan from its next call on."""

    router_id: str


@dataclass(frozen=True, slots=True)
class Commit:
    """The plan is the placement in force."""


@dataclass(frozen=True, slots=True)
class Abandon:
    """Forget the plan; where routers follow it already, it is in force."""


@dataclass(frozen=True, slots=True)
class AddRouter:
    """Start one more router."""


@dataclass(frozen=True, slots=True)
class DrainRouter:
    """Let a router finish or hand over its requests, and leave."""

    router_id: str


@dataclass(frozen=True, slots=True)
class Sleep:
    """Ask a router to let requests wait; it refuses where it has any."""

    router_id: str


@dataclass(frozen=True, slots=True)
class Wake:
    """Let a router answer requests again."""

    router_id: str


Action = (
    StartGroup
    | StopGroup
    | BeginPlan
    | LoadGroup
    | Trim
    | Connect
    | Switch
    | Commit
    | Abandon
    | AddRouter
    | DrainRouter
    | Sleep
    | Wake
)


def step(observed: Observed, target: Target, now: float) -> list[Action]:
    """Return what to do now; empty while everything is under way, or done.

    Args:
        observed: The service.
        target: What is wanted of it; at least one router.
        now: Seconds, on the clock of `Observed.retry_at`.
    """
    if observed.placement is None:
        return _number_of_routers(observed, target)
    if target.groups == 0 and observed.plan is None:
        return _fall_asleep(observed) + _number_of_routers(observed, target)
    if target.groups and (wakes := _wake(observed, observed.placement)):
        return wakes
    actions = _number_of_groups(observed, target, now)
    if observed.plan is None:
        actions += _plan_or_clean(observed, observed.placement, target, now)
    else:
        actions += _bring_about(observed, observed.plan)
    return actions + _number_of_routers(observed, target)


def members(observed: Observed, target: Target) -> list[str]:
    """Return the running groups that are to hold experts.

    Those that hold some go first, in the order of the placement; what someone wants to leave goes
    last, and a group that is older stays before one that is newer.
    """
    groups = observed.groups
    placed = observed.placement.groups if observed.placement else ()
    running = [g for g in groups if groups[g].is_running]

    def rank(group_id: str) -> tuple[bool, bool]:
        holds = groups[group_id].holds > 0 and group_id in placed
        return group_id in target.leaving, not holds

    # Sorting is stable: ties stay in the order in which the groups were started.
    return sorted(running, key=rank)[: target.groups]


def is_settled(observed: Observed, target: Target) -> bool:
    """Return whether the service is as wanted: nothing to do and nothing under way."""
    is_asleep = observed.placement is not None and target.groups == 0
    placed = observed.placement.groups if observed.placement and not is_asleep else ()
    return (
        observed.plan is None
        and len(observed.groups) == (target.groups if observed.placement else 0)
        and all(g.is_running and g.holds and not g.busy for g in observed.groups.values())
        and set(placed) == set(observed.groups)
        and len(observed.routers) == target.routers
        and all(r.is_up and not (r.busy or r.is_leaving) for r in observed.routers.values())
        and all(r.is_asleep == is_asleep for r in observed.routers.values())
        and observed.order == target.order
    )


def serves(observed: Observed) -> bool:
    """Return whether every group of the placement in force holds its experts and answers."""
    groups, placement = observed.groups, observed.placement
    return placement is not None and all(
        g in groups and groups[g].is_running and groups[g].has_experts_of(placement)
        for g in placement.groups
    )


def _fall_asleep(observed: Observed) -> list[Action]:
    """Let all routers' requests wait, then end the groups."""
    up = {name: r for name, r in observed.routers.items() if r.is_up}
    if any(r.busy or not r.is_asleep for r in up.values()):
        return [Sleep(name) for name, r in up.items() if not (r.busy or r.is_asleep)]
    groups = observed.groups.items()
    return [StopGroup(g) for g, v in groups if not v.busy and v.phase is not GroupPhase.LEAVING]


def _wake(observed: Observed, placement: Placement) -> list[Action]:
    """Let routers answer again whose groups are there."""
    if not serves(observed):
        return []
    return [
        Wake(name)
        for name, r in observed.routers.items()
        if r.is_up and r.is_asleep and not r.busy and r.follows >= placement.epoch
    ]


def _number_of_groups(observed: Observed, target: Target, now: float) -> list[Action]:
    there = [g for g, view in observed.groups.items() if view.phase is not GroupPhase.LEAVING]
    excess = sum(g not in target.leaving for g in there) - target.groups
    # Newest first. Those that hold experts leave when a placement without them is in force.
    placements = (observed.placement, observed.plan)
    named = {group for placement in placements if placement for group in placement.groups}
    idle = [g for g in there if not (observed.groups[g].busy or observed.groups[g].holds)]
    useless = [g for g in idle if g not in named]
    going = [g for g in useless if g in target.leaving]
    going += [g for g in useless[::-1] if g not in target.leaving][: max(0, excess)]
    actions: list[Action] = [StopGroup(g) for g in going]
    if excess < 0 and now >= observed.start_at:
        actions += [StartGroup(name) for name in _free_names(observed.groups, target, -excess)]
    return actions


def _free_names(taken: Mapping[str, GroupView], target: Target, count: int) -> list[str]:
    """Return names for new groups: those first that have a share of their own."""
    numbered = (f"group-{i}" for i in range(len(taken) + len(target.capacities) + count))
    names = dict.fromkeys([*target.capacities, *numbered])
    return [name for name in names if name not in taken][:count]


def _plan_or_clean(
    observed: Observed, placement: Placement, target: Target, now: float
) -> list[Action]:
    """Begin a change that is due, or remove what the last one left."""
    groups, routers = observed.groups, observed.routers
    chosen = members(observed, target)
    lost = [
        g for g in placement.groups if g not in groups or not groups[g].has_experts_of(placement)
    ]
    is_behind = any(r.is_up and r.follows < placement.epoch for r in routers.values())
    is_ordered = observed.order < target.order
    if not chosen:
        return []
    may_try = now >= observed.retry_at or observed.failed != frozenset(chosen)
    if lost or is_behind or is_ordered or set(chosen) != set(placement.groups):
        if _gathers(observed, placement, chosen, now) and not (lost or is_behind):
            return []
        if not may_try or any(groups[g].busy for g in chosen):
            return []
        capacities = {g: target.capacities.get(g, 1.0) for g in _in_order(placement, chosen)}
        plan = replan(placement, capacities, observed.load, lost, even=is_ordered)
        is_same = not num_moves(placement, plan) and plan.groups == placement.groups
        if not is_same or lost or is_behind or is_ordered:
            return [BeginPlan(plan)]
    # A router that starts has been sent the placement in force, or one before: it must catch up.
    if any(0 < r.follows < placement.epoch for r in routers.values()):
        return []
    actions: list[Action] = []
    for group_id, view in groups.items():
        if not view.is_running or view.busy:
            continue
        if group_id in placement.groups:
            if view.holds and view.trimmed < placement.epoch:
                actions.append(Trim(group_id))
        elif view.holds:
            actions.append(StopGroup(group_id))
    return actions


def _gathers(observed: Observed, placement: Placement, chosen: list[str], now: float) -> bool:
    """Return whether new groups wait for others that start: a moment, but not for a slow node."""
    is_starting = any(g.phase is GroupPhase.STARTING for g in observed.groups.values())
    came = [observed.groups[g].since for g in chosen if g not in placement.groups]
    return is_starting and bool(came) and now - max(came) < GATHER_S


def _in_order(placement: Placement, chosen: list[str]) -> list[str]:
    """Return the groups that the placement names first, in its order."""
    kept = [g for g in placement.groups if g in chosen]
    return kept + [g for g in chosen if g not in kept]


def _bring_about(observed: Observed, plan: Placement) -> list[Action]:
    """Take the next steps of a plan."""
    groups, epoch = observed.groups, plan.epoch
    if any(g not in groups or not groups[g].is_running for g in plan.groups):
        return [Abandon()]
    loading = [g for g in plan.groups if groups[g].holds < epoch]
    if loading:
        return [LoadGroup(g) for g in loading if not groups[g].busy]
    up = {name: r for name, r in observed.routers.items() if r.is_up}
    away = [name for name, r in up.items() if r.connected < epoch]
    if away:
        return [Connect(name) for name in away if not up[name].busy]
    behind = [name for name, r in up.items() if r.follows < epoch]
    if behind:
        return [Switch(name) for name in behind if not up[name].busy]
    # One that starts was sent the placement before: it is asked when it is up.
    if any(0 < r.follows < epoch for r in observed.routers.values()):
        return []
    return [Commit()]


def _number_of_routers(observed: Observed, target: Target) -> list[Action]:
    names = [name for name, router in observed.routers.items() if not router.is_leaving]
    missing = target.routers - len(names)
    if missing >= 0:
        return [AddRouter()] * missing

    def stays(name: str) -> tuple[bool, bool]:
        return name not in target.leaving, observed.routers[name].is_up

    newest_first = names[::-1]
    return [DrainRouter(name) for name in sorted(newest_first, key=stays)[:-missing]]
