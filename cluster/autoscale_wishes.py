"""How long a pool's signals must ask for another number of members before it gets it. Pure.

Signals wander, because requests come at random. A wish for more (a *surge*) is granted when it held
for the upscale delay without a break. A wish for fewer (a *lull*) must last for the longest of

  the downscale delay  `RELUCTANCE` times as long after each time that members had to come back soon
                       after they had left, up to `MAX_REGRETS` times in a row
  the evidence         as long as `EVIDENCE` requests usually take: with one request in ten seconds
                       half a minute without any is chance and no news. At most as long as the delay
                       can become

but the plain delay is enough where nothing runs at all, and that for as long as `IDLE_EVIDENCE`
requests usually take.

Where a queue or a missed latency raised the number although the flow of work did not ask for it
(*pressure*), the members stay until that flow has fallen by `RELIEF`: else they would come and go
for ever. The memory of all this goes from one decision to the next.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cluster.autoscale_signals import Signal, steady_demand

RELIEF = 0.7
"""Part of the load at which pressure ends."""
EVIDENCE = 100.0
"""Requests whose number chance changes by a tenth: less than any margin."""
IDLE_EVIDENCE = 20.0
"""Of so many that usually come none comes by chance once in e^20 times; of 10, once in 22,000."""
RELUCTANCE = 4.0
"""So many times longer members stay after they left too early: from error to error it takes ever
longer, so that there are few of them under a load that does not change."""
SAME_LOAD = 2.0
"""Times the load at which members left: more is another load, and not chance."""
MAX_REGRETS = 2
"""In a row: 4, then 16 times the delay, by default 20 and 80 minutes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Surge:
    """A wish for more, without a break."""

    since_s: float
    least: int
    """That was wished meanwhile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lull:
    """A wish for fewer, without a break."""

    since_s: float
    most: int
    """That was wished meanwhile."""
    evidence_s: float
    """How long `EVIDENCE` requests took when it began; 0: not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolMemory:
    """What a decision leaves for the next one."""

    count: int = -1
    """The number it decided on."""
    surge: Surge | None = None
    lull: Lull | None = None
    pressed_count: int = 0
    """So many were too few ..."""
    pressed_demand: float = 0.0
    """... at this steady demand."""
    left_s: float | None = None
    """When members left; None: since then some have come."""
    left_demand: float = 0.0
    """The steady demand at which they left."""
    regrets: int = 0
    """Times in a row that members had to come back soon; see `_was_soon`."""
    waited_s: float = 0.0
    """How long it had lasted."""

    @property
    def reluctance(self) -> float:
        """How many times the delay a lull must last."""
        return RELUCTANCE**self.regrets


def without_wishes(memory: PoolMemory) -> PoolMemory:
    """Return the memory of a look at which the number was right."""
    return replace(memory, surge=None, lull=None)


def with_surge(memory: PoolMemory, now_s: float, wish: int) -> tuple[PoolMemory, Surge]:
    """Note that `wish` members are wished now, more than there are."""
    surge = memory.surge or Surge(since_s=now_s, least=wish)
    surge = replace(surge, least=min(surge.least, wish))
    return replace(memory, surge=surge, lull=None), surge


def with_lull(
    memory: PoolMemory, now_s: float, wish: int, requests_per_s: float | None
) -> tuple[PoolMemory, Lull]:
    """Note that `wish` members are wished now, fewer than there are; and what usually comes."""
    evidence_s = EVIDENCE / requests_per_s if requests_per_s else 0.0
    lull = memory.lull or Lull(since_s=now_s, most=wish, evidence_s=evidence_s)
    lull = replace(lull, most=max(lull.most, wish))
    return replace(memory, surge=None, lull=lull), lull


def lull_s(memory: PoolMemory, lull: Lull, downscale_delay_s: float, idle_s: float) -> float:
    """Return how long a lull must last.

    Args:
        memory: Of the pool.
        lull: That lasts.
        downscale_delay_s: At least.
        idle_s: Since when nothing runs at all, known for certain.
    """
    if is_idle(lull, downscale_delay_s, idle_s):
        return downscale_delay_s
    longest_s = RELUCTANCE**MAX_REGRETS * downscale_delay_s
    return max(downscale_delay_s * memory.reluctance, min(lull.evidence_s, longest_s))


def is_idle(lull: Lull, downscale_delay_s: float, idle_s: float) -> bool:
    """Return whether nothing runs, and that for longer than it does by chance."""
    longest_s = RELUCTANCE**MAX_REGRETS * downscale_delay_s
    by_chance_s = lull.evidence_s * IDLE_EVIDENCE / EVIDENCE
    return idle_s >= max(downscale_delay_s, min(by_chance_s, longest_s))


def pressure_signal(memory: PoolMemory, count: int, signals: Sequence[Signal]) -> Signal | None:
    """Return what keeps the members that a queue called for; None: none was."""
    pressed = memory.pressed_count
    load = steady_demand(signals)
    if not 0 < pressed < count or not load:
        return None
    relieved = RELIEF * memory.pressed_demand
    need = pressed * load / relieved if relieved else math.inf
    return Signal(
        name="pressure",
        demand=load,
        raises_to=0,
        needs=min(need, pressed + 1),
        text=f"{pressed} were too few at a load of {memory.pressed_demand:.2f}, and it is"
        f" {load:.2f}",
    )


def after_change(
    memory: PoolMemory,
    now_s: float,
    count: int,
    wanted: int,
    signals: Sequence[Signal],
    downscale_delay_s: float,
) -> PoolMemory:
    """Return what is to be remembered of a change from `count` to `wanted`."""
    changed = replace(without_wishes(memory), count=wanted)
    if wanted < count:
        waited_s = now_s - memory.lull.since_s if memory.lull else 0.0
        left_demand = steady_demand(signals)
        return replace(changed, left_s=now_s, left_demand=left_demand, waited_s=waited_s)
    if not count:  # it slept, and what woke it was no error
        return replace(changed, left_s=None)
    if memory.left_s is not None:  # what came before was a step down
        away_s = now_s - memory.left_s
        was_soon = _was_soon(memory, away_s, steady_demand(signals), downscale_delay_s)
        regrets = min(memory.regrets + 1, MAX_REGRETS) if was_soon else 0
        changed = replace(changed, regrets=regrets, left_s=None)
    steady = max((signal.raises_to for signal in signals if signal.is_steady), default=0)
    if steady < wanted:  # the steady load alone would not have raised it so far
        return replace(changed, pressed_count=count, pressed_demand=steady_demand(signals))
    return changed


def _was_soon(memory: PoolMemory, away_s: float, demand: float, downscale_delay_s: float) -> bool:
    """Return whether members who come back now should not have left.

    Under a load that is much the same they should not, where it wanders so far within 16 times as
    long as the lull had lasted in which they left. Another load says nothing of that, unless it is
    there within 4 times: a burst every hour must not keep for ever what it needs for a moment.
    """
    is_same_load = demand <= SAME_LOAD * memory.left_demand
    times = RELUCTANCE**MAX_REGRETS if is_same_load else RELUCTANCE
    return away_s <= times * max(downscale_delay_s, memory.waited_s)
