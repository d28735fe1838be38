"""What a service's load says about the number of its routers and expert groups. Pure.

A signal turns one measurement into a *demand*: how many members of a pool the load needs, each at
its target use; a fraction. One worked sum: 3,000 uncached prompt tokens a second, and a router
that prefills 2,000 at a target use of 0.8, make a demand of 3,000 / (2,000 * 0.8) = 1.9 routers.

A demand raises the pool when it is more than `RAISE_MARGIN` above the number there is, and keeps
members as long as fewer would be closer to their target use than `KEEP_MARGIN`. Between the two
nothing happens: the band that measurements may wander in.

Backlogs grow for as long as new members take to start, and say nothing about how many are needed
meanwhile; those signals wait until all members have started.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

RAISE_MARGIN = 0.1
"""Part by which a demand must exceed the members there are."""
KEEP_MARGIN = 0.25
"""Part that a demand may grow by after members left, before they would be missed."""
BUSY_ENOUGH = 0.5
"""Below this part of its target use, more members would not help a missed latency target."""
BLAMED_SHARE = 0.5
"""From this part of the steps' time in dispatch on, a missed latency target is the groups'."""
CLOSE_TO_TARGET = 0.7
"""Above this part of a latency target no member leaves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a service was doing over the last seconds; None: not known.

    Sums are over all routers, extrapolated where one of them did not answer.
    """

    prompt_tokens_per_s: float | None = None
    """Uncached prompt tokens that came: computed, or waiting now and not before."""
    waiting_tokens: float | None = None
    """Of prompts, not computed yet and not cached."""
    prefill_tokens_per_s: float | None = None
    """Of one router that does nothing else."""
    num_requests: float | None = None
    """Running and waiting."""
    kv_usage: float | None = None
    """Part of the KV blocks that sequences own, mean over routers."""
    state_slot_usage: float | None = None
    """The same of state slots."""
    dispatch_share: float | None = None
    """Part of the steps' time in which routers wait for expert groups."""
    group_busy: float | None = None
    """Part of the time in which a group computes, mean over groups."""
    ttft_s: float | None = None
    """Time to first token, 95th percentile of the last seconds; None: nothing finished either."""
    itl_s: float | None = None
    """Time between two tokens, alike."""
    batch_tokens: float | None = None
    """Of batches, not begun yet; None: no batch runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """How much a member is to be used, and how long a client is to wait."""

    backlog_s: float = 2.0
    """Seconds of prefill that may wait."""
    backlog_drain_s: float = 30.0
    """In which a longer backlog is to be worked off."""
    prefill_use: float = 0.8
    """Part of a router's prefill rate."""
    ongoing_requests: float = 51.0
    """Running and waiting, of one router."""
    kv_usage: float = 0.85
    """Of KV blocks, and of state slots."""
    group_busy: float = 0.7
    """Part of the time in which a group computes."""
    ttft_s: float | None = None
    """95th percentile; None: any."""
    itl_s: float | None = None
    """95th percentile; None: any."""
    batch_drain_s: float = 600.0
    """In which the waiting rows of batches are to be worked off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Signal:
    """One measurement, and what it asks of one pool."""

    name: str
    demand: float
    """Members at target use."""
    raises_to: int
    """The pool is to have so many at least; 0: no say."""
    keeps: int
    """So many may not become fewer."""
    text: str
    """The sum, for people."""
    is_steady: bool = False
    """It measures the load itself, which does not change when members come: not a queue."""


def router_signals(load: Load, targets: Targets, count: int, *, is_settled: bool) -> list[Signal]:
    """Return what the load asks of the routers.

    Args:
        load: Measured.
        targets: Wanted.
        count: Routers that there are to be now.
        is_settled: All members have started: backlogs count.
    """
    signals = []
    rate = load.prefill_tokens_per_s
    if rate:
        if load.prompt_tokens_per_s is not None:
            demand = load.prompt_tokens_per_s / (rate * targets.prefill_use)
            text = (
                f"{load.prompt_tokens_per_s:,.0f} prompt tokens/s come, a router prefills"
                f" {rate:,.0f}/s, target {targets.prefill_use:.0%} of it"
            )
            signals.append(_proportional("prefill", demand, count, text, is_steady=True))
        if load.waiting_tokens is not None:
            signals.append(_backlog(load, targets, rate, count, is_settled=is_settled))
        if load.batch_tokens:
            demand = load.batch_tokens / (rate * targets.prefill_use * targets.batch_drain_s)
            text = (
                f"{load.batch_tokens:,.0f} tokens of batches wait, to be done in"
                f" {targets.batch_drain_s:g} s"
            )
            signals.append(_proportional("batch", demand, count, text))
    if load.num_requests is not None:
        demand = load.num_requests / targets.ongoing_requests
        text = f"{load.num_requests:,.0f} requests, target {targets.ongoing_requests:g} a router"
        signals.append(_proportional("requests", demand, count, text, may_raise=is_settled))
    for name, usage in (("kv", load.kv_usage), ("state slots", load.state_slot_usage)):
        if usage is not None:
            text = f"{usage:.0%} used, target {targets.kv_usage:.0%}"
            signals.append(_proportional(name, count * usage / targets.kv_usage, count, text))
    return signals


def group_signals(load: Load, targets: Targets, count: int) -> list[Signal]:
    """Return what the load asks of the expert groups."""
    if load.group_busy is None:
        return []
    demand = count * load.group_busy / targets.group_busy
    text = f"busy {load.group_busy:.0%} of the time, target {targets.group_busy:.0%}"
    return [_proportional("busy", demand, count, text, is_steady=True)]


def latency_signals(
    load: Load, targets: Targets, count: int, demand: float, *, is_blamed: bool, is_settled: bool
) -> list[Signal]:
    """Return what missed latency targets ask of a pool: one member more, where that can help.

    Args:
        load: Measured.
        targets: Wanted.
        count: Members that there are to be now.
        demand: The largest of the pool's other signals.
        is_blamed: The time goes by in this pool.
        is_settled: All members have started.
    """
    signals = []
    for name, seen_s, target_s in (
        ("ttft", load.ttft_s, targets.ttft_s),
        ("itl", load.itl_s, targets.itl_s),
    ):
        if seen_s is None or target_s is None:
            continue
        text = f"p95 {seen_s * 1e3:,.0f} ms, target {target_s * 1e3:,.0f} ms"
        is_missed = seen_s > target_s
        if is_missed and not is_blamed:
            text += ", lost elsewhere"
        elif is_missed and demand < BUSY_ENOUGH * count:
            text += f", but the members are used for {demand:.1f} of {count}: more would not help"
        does_raise = is_missed and is_blamed and is_settled and demand >= BUSY_ENOUGH * count
        signals.append(
            Signal(
                name=name,
                demand=count * min(seen_s / target_s, 1.0),
                raises_to=count + 1 if does_raise else 0,
                keeps=count if seen_s > CLOSE_TO_TARGET * target_s else 0,
                text=text,
            )
        )
    return signals


def steady_demand(signals: Sequence[Signal]) -> float:
    """Return the demand that members who come do not change; the largest where none is such."""
    steady = [signal.demand for signal in signals if signal.is_steady]
    return max(steady or [signal.demand for signal in signals], default=0.0)


def is_blamed_on_groups(load: Load) -> bool:
    """Return whether most of a step's time goes by in the expert groups."""
    return (load.dispatch_share or 0.0) >= BLAMED_SHARE


def _backlog(load: Load, targets: Targets, rate: float, count: int, *, is_settled: bool) -> Signal:
    """What waits beyond the target is worked off beside what keeps coming."""
    assert load.waiting_tokens is not None  # the caller looked
    waits_s = load.waiting_tokens / (rate * max(count, 1))
    coming = (load.prompt_tokens_per_s or 0.0) / (rate * targets.prefill_use)
    allowed_s = min(targets.backlog_s, targets.ttft_s or math.inf)
    text = (
        f"{load.waiting_tokens:,.0f} waiting tokens are {waits_s:.1f} s of prefill,"
        f" target {allowed_s:g} s"
    )
    if waits_s <= allowed_s:
        return Signal(name="backlog", demand=coming, raises_to=0, keeps=0, text=text)
    demand = coming + load.waiting_tokens / (rate * targets.backlog_drain_s)
    return Signal(
        name="backlog",
        demand=demand,
        raises_to=max(count + 1, math.ceil(demand)) if is_settled else 0,
        keeps=count,
        text=text if is_settled else f"{text}; counts when all members have started",
    )


def _proportional(
    name: str,
    demand: float,
    count: int,
    text: str,
    *,
    may_raise: bool = True,
    is_steady: bool = False,
) -> Signal:
    is_over = may_raise and demand > count * (1 + RAISE_MARGIN)
    return Signal(
        name=name,
        demand=demand,
        raises_to=math.ceil(round(demand, 9)) if is_over else 0,
        keeps=math.ceil(round(demand * (1 + KEEP_MARGIN), 9)),
        text=text,
        is_steady=is_steady,
    )
