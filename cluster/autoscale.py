"""Decides how many routers and expert groups a service should have. Pure: no clock, Ray or gRPC.

`decide(state) -> decision`: the state is what there is, what was measured and what earlier
decisions remembered; the decision says two numbers, why, and what to remember. The same state
gives the same decision, so a trace can be replayed (`expertmesh autoscale simulate`).

What keeps the numbers calm, beside the margins of `cluster.autoscale_signals`:

  delays     a wish must hold without a break for `upscale_delay_s` or `downscale_delay_s`; then it
             is the least (up) or the most (down) that was wished meanwhile that counts. A change
             of the number, whoever made it, begins both again.
  doubt      few requests tell little, and members that left too early stay longer the next time;
             what a queue called for stays until the load falls (`cluster.autoscale_wishes`).
  starting   while members start, backlogs do not count, and only those that start may leave:
             what they would change of the load of the others has not been seen.
  blindness  a member whose measurement is missing or old ends every wish for fewer.

Never below `least`, nor, for groups, below what holds a copy of every expert. Only a pool whose
`least` is 0 ever has none: after `downscale_to_zero_delay_s` without a request, until the next.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from cluster.autoscale_batches import batch_signals
from cluster.autoscale_signals import (
    Load,
    Pool,
    Signal,
    Targets,
    group_signals,
    is_blamed_on_groups,
    router_signals,
    wander_of,
)
from cluster.autoscale_wishes import (
    PoolMemory,
    after_change,
    is_idle,
    lull_s,
    pressure_signal,
    with_lull,
    with_surge,
    without_wishes,
)

USUAL_DELAYS = 4.0
"""Downscale delays over which it is measured how many requests usually come."""

Direction = Literal["up", "down", "hold"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """How many members a pool may have."""

    least: int
    """0: none after a long idle time."""
    most: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What is wanted; does not change while a service runs."""

    routers: Bounds
    groups: Bounds
    min_groups_by_memory: int = 1
    """Groups that hold one copy of every expert; beats `groups.most`."""
    targets: Targets = field(default_factory=Targets)
    upscale_delay_s: float = 5.0
    downscale_delay_s: float = 300.0
    downscale_to_zero_delay_s: float = 900.0
    look_back_s: float = 10.0
    """Over which rates are measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What a decision leaves for the next one."""

    routers: PoolMemory = field(default_factory=PoolMemory)
    groups: PoolMemory = field(default_factory=PoolMemory)
    idle_since_s: float | None = None
    """Since when there was nothing to do, known for certain."""
    usual_requests_per_s: float | None = None
    """That begin; None: never known."""
    at_s: float = 0.0
    """When it was left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """All that a decision rests on."""

    now_s: float
    """Seconds on any clock that only grows."""
    policy: Policy
    routers: Pool
    groups: Pool
    load: Load
    memory: Memory = field(default_factory=Memory)


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolDecision:
    """What one pool should have, and why."""

    count: int
    """That there were to be so far."""
    wanted: int
    ready: int
    reason: str
    signals: tuple[Signal, ...] = ()

    @property
    def direction(self) -> Direction:
        """Which way it goes."""
        if self.wanted == self.count:
            return "hold"
        return "up" if self.wanted > self.count else "down"


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What to do, why, and what to remember."""

    at_s: float
    routers: PoolDecision
    groups: PoolDecision
    load: Load
    memory: Memory

    @property
    def is_hold(self) -> bool:
        """Whether nothing is to change."""
        return self.routers.direction == self.groups.direction == "hold"


def decide(state: State) -> Decision:
    """Return how many routers and expert groups there should be now."""
    load, targets = state.load, state.policy.targets
    blind = state.routers.unknown + state.groups.unknown
    blind += load.num_requests is None
    blind += load.group_busy is None and state.groups.ready > 0
    is_settled = all(pool.ready >= pool.count for pool in (state.routers, state.groups))
    idle_since_s = _idle_since(state) if not blind else None
    usual_requests_per_s = _usual_requests_per_s(state)
    wander = wander_of(usual_requests_per_s, state.policy.look_back_s)
    circumstances = _Circumstances(
        now_s=state.now_s,
        policy=state.policy,
        usual_requests_per_s=usual_requests_per_s,
        num_blind=blind,
        has_work=bool(load.num_requests or load.batch_tokens),
        idle_s=-1.0 if idle_since_s is None else state.now_s - idle_since_s,
    )
    decisions, is_groups_fault = [], is_blamed_on_groups(load)
    for pool, limits, memory, signals, is_blamed in (
        (
            state.routers,
            _range(state.policy.routers, floor=1),
            state.memory.routers,
            router_signals(load, targets, state.routers, wander, is_settled=is_settled),
            not is_groups_fault,
        ),
        (
            state.groups,
            _range(state.policy.groups, floor=state.policy.min_groups_by_memory),
            state.memory.groups,
            group_signals(load, targets, state.groups, wander, is_settled=is_settled),
            is_groups_fault,
        ),
    ):
        signals += batch_signals(
            load, targets, pool, signals, is_blamed=is_blamed, is_settled=is_settled
        )
        decisions.append(_decide_pool(pool, limits, memory, signals, circumstances))
    (routers, router_memory), (groups, group_memory) = decisions
    return Decision(
        at_s=state.now_s,
        routers=routers,
        groups=groups,
        load=load,
        memory=Memory(
            routers=router_memory,
            groups=group_memory,
            idle_since_s=idle_since_s,
            usual_requests_per_s=usual_requests_per_s,
            at_s=state.now_s,
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Circumstances:
    """What is the same for both pools."""

    now_s: float
    policy: Policy
    usual_requests_per_s: float | None
    num_blind: int
    has_work: bool
    idle_s: float
    """Negative: not idle, or not known to be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Range:
    """How many members a pool may have while there is work."""

    least: int
    most: int
    may_sleep: bool
    """It may have none while there is no work."""


def _range(bounds: Bounds, *, floor: int) -> _Range:
    """Raise the bounds to the floor, but for a pool that never has any: a dense model's groups."""
    if bounds.most == 0:
        return _Range(least=0, most=0, may_sleep=False)
    return _Range(
        least=max(bounds.least, floor),
        most=max(bounds.most, floor),
        may_sleep=bounds.least == 0,
    )


def _idle_since(state: State) -> float | None:
    """Requests may be over between two looks: the prompt tokens that came tell of those, too."""
    load = state.load
    is_known = load.num_requests is not None and load.prompt_tokens_per_s is not None
    if not is_known or load.num_requests or load.prompt_tokens_per_s:
        return None
    if load.waiting_tokens or load.batch_tokens:
        return None
    since = state.memory.idle_since_s
    return state.now_s if since is None else since


def _usual_requests_per_s(state: State) -> float | None:
    """Return the mean over some `USUAL_DELAYS` downscale delays, the latest counting most."""
    now, before = state.load.requests_per_s, state.memory.usual_requests_per_s
    if now is None or before is None:
        return before if now is None else now
    policy, passed_s = state.policy, state.now_s - state.memory.at_s
    mean_s = max(USUAL_DELAYS * policy.downscale_delay_s, policy.look_back_s)
    kept = math.exp(-passed_s / mean_s)
    return now + (before - now) * kept


def _decide_pool(
    pool: Pool,
    limits: _Range,
    memory: PoolMemory,
    signals: Sequence[Signal],
    around: _Circumstances,
) -> tuple[PoolDecision, PoolMemory]:
    """Return the decision of one pool, and its memory."""
    if pool.count != memory.count:  # the first decision, or somebody else changed it
        memory = PoolMemory(count=pool.count)
    pressure = pressure_signal(memory, pool.count, signals)
    signals = [*signals, pressure] if pressure else signals
    wanted, reason, memory = _wanted(pool, limits, memory, signals, around)
    if wanted != pool.count:
        memory = after_change(
            memory, around.now_s, pool.count, wanted, signals, around.policy.downscale_delay_s
        )
    decision = PoolDecision(
        count=pool.count, wanted=wanted, ready=pool.ready, reason=reason, signals=tuple(signals)
    )
    return decision, memory


def _wanted(
    pool: Pool,
    limits: _Range,
    memory: PoolMemory,
    signals: Sequence[Signal],
    around: _Circumstances,
) -> tuple[int, str, PoolMemory]:
    """Return the number, the reason, and the memory of wishes; the rules in order."""
    count, policy, now_s = pool.count, around.policy, around.now_s
    calm = without_wishes(memory)
    if count == 0 and limits.may_sleep and not around.has_work:
        return 0, "asleep until the first request", calm
    if count < limits.least:
        why = "a request came" if around.has_work and count == 0 else "the least there may be"
        return limits.least, why, calm
    if limits.may_sleep and around.idle_s >= policy.downscale_to_zero_delay_s:
        return 0, f"idle for {around.idle_s:.0f} s", calm

    wish, why = _wish(count, limits, signals)
    if wish > count:
        memory, surge = with_surge(memory, now_s, wish)
        held_s = now_s - surge.since_s
        if held_s < policy.upscale_delay_s:
            return count, _not_yet(surge.least, held_s, policy.upscale_delay_s, why), memory
        return surge.least, f"{why}; for {held_s:.0f} s", memory
    if wish < count:
        if around.num_blind:
            return count, f"{wish} would do, but {around.num_blind} measurements are missing", calm
        memory, lull = with_lull(memory, now_s, wish, around.usual_requests_per_s)
        held_s = now_s - lull.since_s
        delay_s = lull_s(memory, lull, policy.downscale_delay_s, around.idle_s)
        if held_s < delay_s:
            return count, _not_yet(lull.most, held_s, delay_s, why), memory
        # Nothing to do is no matter of chance: what was wished before it does not count.
        fewer = wish if is_idle(lull, policy.downscale_delay_s, around.idle_s) else lull.most
        # A node that never comes must not keep what it was asked for with; who serves stays as
        # long as others start.
        fewer = max(fewer, pool.ready) if pool.ready < count else fewer
        return fewer, f"{why}; for {held_s:.0f} s", memory
    return count, why, calm


def _wish(count: int, limits: _Range, signals: Sequence[Signal]) -> tuple[int, str]:
    """Return the number that the signals ask for now, and the signal that decides."""
    if not signals:
        return min(count, limits.most), "nothing is measured"
    raising = max(signals, key=lambda signal: signal.raises_to)
    keeping = max(signals, key=lambda signal: signal.needs)
    if raising.raises_to > count:
        wish = min(raising.raises_to, limits.most)
        at_most = f"; {limits.most} is the most" if raising.raises_to > limits.most else ""
        return max(wish, min(count, limits.most)), f"{raising.name}: {raising.text}{at_most}"
    wish = min(max(keeping.keeps, limits.least), count, limits.most)
    return wish, f"{keeping.name}: {keeping.text}"


def _not_yet(wish: int, held_s: float, delay_s: float, why: str) -> str:
    return f"{wish} are wished for {held_s:.0f} of {delay_s:g} s; {why}"
