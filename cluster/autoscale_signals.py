"""What a service's load says about the number of its routers and expert groups. Pure.

A signal turns one measurement into a *demand*: how many members of a pool the load needs, each at
its target use; a fraction. One worked sum: 3,000 uncached prompt tokens a second, and a router
that prefills 2,000 at a target use of 0.8, make a demand of 3,000 / (2,000 * 0.8) = 1.9 routers.

A demand raises the pool when it is more than `RAISE_MARGIN` above the number there is, and keeps
members as long as fewer would be closer to their target use than `KEEP_MARGIN`. Between the two
nothing happens: the band that measurements may wander in.

Three kinds of signals:

  flows    what comes or is computed in a second (`prefill`, `busy`): the same for any number of
           members, so `is_steady`. Requests come at random: measured over n of them a flow wanders
           by 1 / sqrt(n), and both margins grow with that.
  held     what requests hold while they run (`requests`, `kv`, `state slots`): where members leave,
           the batches of the others grow, at worst their steps in proportion, and requests that
           take longer are more at a time. With c members, a demand d and a margin m so many are
           kept that d (1 + m) c / kept <= kept: 2 routers at a demand of 0.6 stay 2, although one
           would be used for 60 % only, if its steps stayed as short.
  queues   what waits (`backlog`, a missed `ttft`, waiting `requests`): it grows for as long as new
           members take to start, and says nothing about how many are needed meanwhile. So queues
           do not raise before all members have started, nor while the groups are full, for which
           no router makes up, nor beyond one router a request.

What batches ask for is in `cluster.autoscale_batches`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

RAISE_MARGIN = 0.1
"""Part by which a demand must exceed the members there are, and a latency its target."""
MOST_RAISE_MARGIN = 0.25
"""The same at most, where few requests come and flows wander by more."""
KEEP_MARGIN = 0.25
"""Part that a demand may grow by after members left, before they would be missed."""
WANDERS_KEPT = 2.0
"""Times that a flow wanders which are kept for at least: more than that it seldom does."""
BUSY_ENOUGH = 0.5
"""Below this part of its target use, more members would not help a missed latency target."""
BLAMED_SHARE = 0.5
"""From this part of the steps' time in dispatch on, a missed latency target is the groups'."""
CLOSE_TO_TARGET = 0.7
"""Above this part of a latency target no member leaves."""
SEATS_FULL = 0.95
"""From this part of the state slots on, requests wait for one of them to end."""
GROUPS_FULL = 0.9
"""From this part of the time in which groups compute on, a queue is theirs and not the routers'."""


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
    requests_per_s: float | None = None
    """That began to answer."""
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
    """Prompt and output, of rows of batches that are not done; None: there is no batch."""
    batch_tokens_per_s: float | None = None
    """That batches get of the members that serve now."""


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
    batch_s: float = 3600.0
    """In which batches are to be done, from now on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """The members of one kind."""

    count: int
    """That there are to be: the last number that was applied, by whomever."""
    ready: int
    """That serve."""
    unknown: int = 0
    """Of those that are ready: no fresh measurement."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Signal:
    """One measurement, and what it asks of one pool."""

    name: str
    demand: float
    """Members at target use."""
    raises_to: int
    """The pool is to have so many at least; 0: no say."""
    needs: float
    """As far as it is concerned, so many members must stay; a fraction."""
    text: str
    """The sum, for people."""
    is_steady: bool = False
    """It measures the load itself, which does not change when members come: not a queue."""

    @property
    def keeps(self) -> int:
        """So many may not become fewer."""
        return math.ceil(round(self.needs, 9))


def wander_of(requests_per_s: float | None, look_back_s: float) -> float:
    """Return by what part a flow wanders from look to look, because requests come at random.

    Args:
        requests_per_s: That usually come; None: not known.
        look_back_s: Over which flows are measured.
    """
    return 1 / math.sqrt(requests_per_s * look_back_s) if requests_per_s else 0.0


def router_signals(
    load: Load, targets: Targets, pool: Pool, wander: float, *, is_settled: bool
) -> list[Signal]:
    """Return what the load asks of the routers.

    Args:
        load: Measured.
        targets: Wanted.
        pool: The routers; what is used is used of those that are ready.
        wander: From `wander_of`.
        is_settled: All members have started: queues count.
    """
    count = pool.count
    signals = []
    hinders = _hinders_queues(load, is_settled=is_settled)
    rate = load.prefill_tokens_per_s
    if rate:
        if load.prompt_tokens_per_s is not None:
            demand = load.prompt_tokens_per_s / (rate * targets.prefill_use)
            text = (
                f"{load.prompt_tokens_per_s:,.0f} prompt tokens/s come, a router prefills"
                f" {rate:,.0f}/s, target {targets.prefill_use:.0%} of it"
            )
            signals.append(_flow("prefill", demand, count, text, wander))
        if load.waiting_tokens is not None:
            signals.append(_backlog(load, targets, rate, count, hinders))
    if load.num_requests is not None:
        demand = load.num_requests / targets.ongoing_requests
        text = f"{load.num_requests:,.0f} requests, target {targets.ongoing_requests:g} a router"
        signals.append(_held("requests", demand, count, text, hinders))
    for name, usage in (("kv", load.kv_usage), ("state slots", load.state_slot_usage)):
        if usage is not None:
            text = f"{usage:.0%} used, target {targets.kv_usage:.0%}"
            signals.append(_held(name, pool.ready * usage / targets.kv_usage, count, text))
    elsewhere = ", lost elsewhere" if is_blamed_on_groups(load) else ""
    waits_s = load.waiting_tokens / (rate * count) if rate and load.waiting_tokens else 0.0
    return signals + _latency(
        load, targets, count, signals, elsewhere, saves_s=waits_s, is_settled=is_settled
    )


def group_signals(
    load: Load, targets: Targets, pool: Pool, wander: float, *, is_settled: bool
) -> list[Signal]:
    """Return what the load asks of the expert groups.

    Args:
        load: Measured.
        targets: Wanted.
        pool: The groups; what is used is used of those that are ready.
        wander: From `wander_of`.
        is_settled: All members have started.
    """
    if load.group_busy is None:
        return []
    demand = pool.ready * load.group_busy / targets.group_busy
    text = f"busy {load.group_busy:.0%} of the time, target {targets.group_busy:.0%}"
    signals = [_flow("busy", demand, pool.count, text, wander)]
    elsewhere = "" if is_blamed_on_groups(load) else ", lost elsewhere"
    # Twice as many groups halve what they take of it; what takes more is not for groups to save,
    # nor is a wait for a router's seat: if they are why seats are full, they are busy.
    has_seats = (load.state_slot_usage or 0.0) < SEATS_FULL
    saves_s = (load.ttft_s or 0.0) * (load.dispatch_share or 0.0) / 2 if has_seats else 0.0
    return signals + _latency(
        load, targets, pool.count, signals, elsewhere, saves_s=saves_s, is_settled=is_settled
    )


def steady_demand(signals: Sequence[Signal]) -> float:
    """Return the demand that members who come do not change; the largest where none is such."""
    steady = [signal.demand for signal in signals if signal.is_steady]
    return max(steady or [signal.demand for signal in signals], default=0.0)


def is_blamed_on_groups(load: Load) -> bool:
    """Return whether most of a step's time goes by in the expert groups."""
    return (load.dispatch_share or 0.0) >= BLAMED_SHARE


def _latency(
    load: Load,
    targets: Targets,
    count: int,
    signals: Sequence[Signal],
    elsewhere: str,
    *,
    saves_s: float,
    is_settled: bool,
) -> list[Signal]:
    """Return what missed latency targets ask of a pool: one member more, where that can help.

    Args:
        load: Measured.
        targets: Wanted.
        count: Members that there are to be now.
        signals: The pool's other signals.
        elsewhere: Says that the time does not go by in this pool; empty: it does.
        is_settled: All members have started.
        saves_s: Of the time to the first token: what more members of this pool can save at most.
    """
    demand = max((signal.demand for signal in signals), default=0.0)
    found = []
    for name, seen_s, target_s, saved_s in (
        ("ttft", load.ttft_s, targets.ttft_s, saves_s),
        ("itl", load.itl_s, targets.itl_s, math.inf),
    ):
        if seen_s is None or target_s is None:
            continue
        text = f"p95 {seen_s * 1e3:,.0f} ms, target {target_s * 1e3:,.0f} ms"
        hinders = elsewhere or hinders_idle(demand, count)
        if not hinders and seen_s - saved_s > target_s:
            hinders = ", but the rest of it takes longer: more would not help"
        is_missed = seen_s > (1 + RAISE_MARGIN) * target_s
        found.append(
            Signal(
                name=name,
                demand=count * min(seen_s / target_s, 1.0),
                raises_to=count + 1 if is_missed and is_settled and not hinders else 0,
                needs=count if seen_s > CLOSE_TO_TARGET * target_s else 0,
                text=text + hinders if is_missed else text,
            )
        )
    return found


def hinders_idle(demand: float, count: int) -> str:
    """Return that the members are used too little for more of them to help; empty: they are not."""
    if demand >= BUSY_ENOUGH * count:
        return ""
    return f", but the members are used for {demand:.1f} of {count}: more would not help"


def _hinders_queues(load: Load, *, is_settled: bool) -> str:
    """Return why more routers would not shorten a queue now; empty: they would."""
    if not is_settled:
        return "; counts when all members have started"
    if load.group_busy is not None and load.group_busy >= GROUPS_FULL:
        return "; the groups are full: more routers would not help"
    return ""


def _backlog(load: Load, targets: Targets, rate: float, count: int, hinders: str) -> Signal:
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
        return Signal(name="backlog", demand=coming, raises_to=0, needs=0, text=text)
    demand = coming + load.waiting_tokens / (rate * targets.backlog_drain_s)
    raises_to = max(count + 1, math.ceil(demand))
    if load.num_requests is not None and load.num_requests < raises_to:
        raises_to = math.ceil(load.num_requests)
        if raises_to <= count and not hinders:
            hinders = "; each request has a router of its own: more would not help"
    return Signal(
        name="backlog",
        demand=demand,
        raises_to=0 if hinders else raises_to,
        needs=count,
        text=text + hinders,
    )


def _flow(name: str, demand: float, count: int, text: str, wander: float) -> Signal:
    """What comes in a second; the band is wider where it wanders more."""
    return Signal(
        name=name,
        demand=demand,
        raises_to=raises_to_of(demand, count, min(wander, MOST_RAISE_MARGIN)),
        needs=demand * (1 + max(KEEP_MARGIN, WANDERS_KEPT * wander)),
        text=text,
        is_steady=True,
    )


def _held(name: str, demand: float, count: int, text: str, hinders: str = "") -> Signal:
    """What fewer members would hold longer, and so more of at a time."""
    raises_to = raises_to_of(demand, count, RAISE_MARGIN)
    return Signal(
        name=name,
        demand=demand,
        raises_to=0 if hinders else raises_to,
        needs=math.sqrt(demand * (1 + KEEP_MARGIN) * count),
        text=text + hinders if raises_to else text,
    )


def raises_to_of(demand: float, count: int, margin: float) -> int:
    """Return how many members a demand asks for; 0: it is within the margin of what there is."""
    is_over = demand > count * (1 + max(margin, RAISE_MARGIN))
    return math.ceil(round(demand, 9)) if is_over else 0
