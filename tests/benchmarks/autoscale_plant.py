"""A simulated service and random load for it: what `autoscale_simulation` lets `decide` rule.

A fluid model (`Plant`), stepped once an interval: prompts come at random, wait, are prefilled at a
rate that drifts, then decode; groups compute for both and slow both down when they are full.
Members take seconds to minutes to start.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from cluster.autoscale import Bounds, Policy
from cluster.autoscale_signals import Load, Targets
from cluster.autoscale_wishes import MAX_REGRETS, RELUCTANCE

SLOTS = 64
"""Sequences of one router."""
LONGEST_LULL_DELAYS = RELUCTANCE**MAX_REGRETS
MAX_QUEUED = 256
"""Requests that wait at one router; more are refused."""


@dataclass(slots=True)
class Members:
    """A pool whose members take time to start."""

    count: int
    start_s: float
    starting: list[float] = field(default_factory=list)
    """When each of them will serve."""

    def ready(self, now_s: float) -> int:
        """Return how many serve."""
        self.starting = [at_s for at_s in self.starting if at_s > now_s]
        return self.count - len(self.starting)

    def set(self, count: int, now_s: float) -> None:
        """Ask for another number; the ones that start leave first."""
        new = count - self.count
        self.count = count
        if new > 0:
            self.starting += [now_s + self.start_s] * new
        else:
            self.starting = self.starting[: max(0, len(self.starting) + new)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """How the simulated service is; drawn for each trace."""

    router_tokens_per_s: float
    group_tokens_per_s: float
    group_overhead: float
    """Part by which each further group makes the same work longer."""
    prompt_tokens: float
    answer_tokens: float
    itl_s: float
    kv_tokens: float
    """Of one router."""
    drift: float
    drift_period_s: float
    rate_bias: float
    """Measured prefill rate / real one."""
    noise: float
    missing: float
    """Chance that a member does not answer in one interval."""


@dataclass(frozen=True, slots=True)
class Moment:
    """What there was to measure at one look."""

    at_s: float
    came: float
    """Requests, in all."""
    begun: float
    group_busy: float
    ttft_s: float
    """0: no request began."""
    itl_s: float
    """0: none decodes."""


@dataclass(slots=True)
class Plant:
    """The service: tokens that wait, requests that decode."""

    truth: Truth
    waiting: float = 0.0
    decoding: float = 0.0
    group_busy: float = 0.0
    itl_s: float = 0.0
    begun: float = 0.0
    """Requests whose prompt is computed, in all."""

    def step(self, arriving: float, seconds: float, routers: int, groups: int, at_s: float) -> None:
        """Let `seconds` pass with `arriving` prompt tokens.

        Requests begin evenly over the step and end at random, so what decodes follows
        `d decoding / dt = begin - decoding / life`, which is solved exactly: many an answer is
        shorter than a step, and does not hold its slot until the end of it.
        """
        truth = self.truth
        drift = 1 + truth.drift * math.sin(2 * math.pi * at_s / truth.drift_period_s)
        room = max(MAX_QUEUED * routers * truth.prompt_tokens - self.waiting, 0.0)
        self.waiting += min(arriving, room)
        if not groups or not routers:
            self.group_busy = self.itl_s = 0.0
            return
        itl_s = truth.itl_s * (1 + self.decoding / routers / 32)
        free_slots = max(0.0, SLOTS * routers - self._decoding_after(seconds, itl_s, begin=0.0))
        begin = min(
            self.waiting / truth.prompt_tokens,
            truth.router_tokens_per_s * drift * routers * seconds / truth.prompt_tokens,
            free_slots / self._share_left(seconds, itl_s),
        )
        work = begin * truth.prompt_tokens / seconds + self.decoding / itl_s
        needed = work * (1 + truth.group_overhead * groups) / truth.group_tokens_per_s
        slowdown = max(1.0, needed / groups)
        begin /= slowdown
        self.group_busy = min(1.0, needed / groups)
        self.itl_s = itl_s * slowdown
        self.waiting = max(0.0, self.waiting - begin * truth.prompt_tokens)
        self.begun += begin
        self.decoding = self._decoding_after(seconds, self.itl_s, begin=begin)

    def _decoding_after(self, seconds: float, itl_s: float, *, begin: float) -> float:
        stays = math.exp(-seconds / (self.truth.answer_tokens * itl_s))
        return self.decoding * stays + begin * self._share_left(seconds, itl_s)

    def _share_left(self, seconds: float, itl_s: float) -> float:
        """Part of the requests that began evenly over a step and are not over at its end."""
        lives = seconds / (self.truth.answer_tokens * itl_s)
        return (1 - math.exp(-lives)) / lives

    def moment(self, at_s: float, routers: int, began_before: float) -> Moment:
        """Return what there is to measure now."""
        truth = self.truth
        waits_s = self.waiting / (truth.router_tokens_per_s * max(routers, 1))
        alone_s = truth.prompt_tokens / truth.router_tokens_per_s
        return Moment(
            at_s=at_s,
            came=self.begun + self.waiting / truth.prompt_tokens,
            begun=self.begun,
            group_busy=self.group_busy,
            ttft_s=waits_s + alone_s if self.begun > began_before else 0.0,
            itl_s=self.itl_s if self.decoding > 0.5 else 0.0,
        )

    def requests(self) -> float:
        """Return how many run and wait; a remainder of a request is none."""
        number = self.decoding + self.waiting / self.truth.prompt_tokens
        return number if number > 0.5 else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """One run: policy, plant, and prompt tokens per second over time."""

    policy: Policy
    truth: Truth
    interval_s: float
    start_s: float
    tokens_per_s: tuple[float, ...]
    """One an interval, of the part in which the load changes."""
    last_tokens_per_s: float
    """From then on."""
    settle_s: float
    """How long this load stays, from when the queue of before is worked off."""


def draw_trace(rng: random.Random) -> Trace:
    """Draw a trace."""
    least = rng.choice((1, 1, 1, 2))
    policy = Policy(
        routers=Bounds(least=least, most=least + rng.randint(0, 8)),
        groups=Bounds(least=rng.choice((0, 1, 1, 2)), most=rng.randint(2, 12)),
        min_groups_by_memory=rng.choice((1, 1, 2, 3)),
        targets=Targets(ttft_s=rng.choice((None, None, 1.0)), itl_s=rng.choice((None, None, 0.1))),
        upscale_delay_s=rng.uniform(0, 20),
        downscale_delay_s=rng.uniform(10, 60),
        downscale_to_zero_delay_s=rng.uniform(20, 100),
        look_back_s=rng.uniform(5, 20),
    )
    rate = 10 ** rng.uniform(2.5, 4.5)
    truth = Truth(
        router_tokens_per_s=rate,
        group_tokens_per_s=rate * rng.uniform(0.3, 3),
        group_overhead=rng.uniform(0, 0.1),
        prompt_tokens=10 ** rng.uniform(1.5, 3.5),
        answer_tokens=10 ** rng.uniform(1, 2.7),
        itl_s=rng.uniform(0.005, 0.05),
        kv_tokens=10 ** rng.uniform(4.5, 6),
        drift=rng.uniform(0, 0.1),
        drift_period_s=rng.uniform(100, 2000),
        rate_bias=rng.uniform(0.7, 1.3),
        noise=rng.uniform(0, 0.1),
        missing=rng.choice((0.0, 0.02, 0.1)),
    )
    interval_s, start_s = rng.uniform(1, 5), rng.choice((5.0, 15.0, 60.0))
    answer_s = 3 * truth.answer_tokens * truth.itl_s
    capacity = min(
        rate * policy.routers.most,
        truth.group_tokens_per_s * policy.groups.most,
        SLOTS * policy.routers.most * truth.prompt_tokens / answer_s,
    )
    levels: list[float] = []
    for _ in range(rng.randint(2, 5)):
        levels += _segment(rng, capacity, rng.randint(10, 60), levels[-1] if levels else 0.0)
    last = rng.choice((0.0, rng.uniform(0.02, 0.5), rng.uniform(0.1, 1.2))) * capacity
    settle_s = 8 * policy.downscale_delay_s + policy.downscale_to_zero_delay_s + 100
    settle_s += 12 * answer_s + _climb_s(policy, start_s)
    if last:
        settle_s += min(300 * truth.prompt_tokens / last, 32 * policy.downscale_delay_s)
    else:
        settle_s += LONGEST_LULL_DELAYS * policy.downscale_delay_s
    return Trace(
        policy=policy,
        truth=truth,
        interval_s=interval_s,
        start_s=start_s,
        tokens_per_s=tuple(levels),
        last_tokens_per_s=last,
        settle_s=settle_s,
    )


def _climb_s(policy: Policy, start_s: float) -> float:
    """Return how long it takes from the least to the most of one kind and then of the other.

    Members that are always busy ask for `1 / group_busy` times as many, which then must start.
    """
    times_more = math.prod(
        max(bounds.most, policy.min_groups_by_memory) / max(bounds.least, 1)
        for bounds in (policy.routers, policy.groups)
    )
    steps = math.ceil(math.log(times_more) / math.log(1 / policy.targets.group_busy))
    return steps * (start_s + policy.upscale_delay_s + policy.look_back_s)


def _segment(rng: random.Random, capacity: float, length: int, before: float) -> list[float]:
    """Draw a stretch of load: constant, a ramp, a wave, a burst of ten times, or nothing."""
    level = rng.uniform(0.02, 1.0) * capacity
    kind = rng.choice(("constant", "ramp", "wave", "burst", "nothing"))
    if kind == "constant":
        return [level] * length
    if kind == "ramp":
        return [before + (level - before) * i / length for i in range(length)]
    if kind == "wave":
        return [level * (1 + 0.5 * math.sin(i / 5)) for i in range(length)]
    if kind == "burst":
        return [level / 10] * (length // 2) + [level] * (length - length // 2)
    return [0.0] * length


def poisson(rng: random.Random, mean: float) -> int:
    """Draw how many requests come where so many do on average; rounded normal where many."""
    if mean > 50:
        return max(0, round(rng.gauss(mean, math.sqrt(mean))))
    number, left = 0, rng.expovariate(1.0)
    while left < mean:
        number, left = number + 1, left + rng.expovariate(1.0)
    return number


def measure(
    plant: Plant,
    seen: Sequence[Moment],
    routers: int,
    rng: random.Random,
) -> Load:
    truth = plant.truth

    def noisy(value: float) -> float:
        return value * math.exp(rng.gauss(0, truth.noise)) if truth.noise else value

    first, last = seen[0], seen[-1]
    seconds = last.at_s - first.at_s
    requests = plant.requests()
    kv = plant.decoding * (truth.prompt_tokens + truth.answer_tokens / 2)
    return Load(
        prompt_tokens_per_s=noisy((last.came - first.came) * truth.prompt_tokens / seconds)
        if seconds
        else None,
        waiting_tokens=noisy(plant.waiting) if requests else 0.0,
        prefill_tokens_per_s=noisy(truth.router_tokens_per_s * truth.rate_bias),
        num_requests=requests,
        requests_per_s=(last.begun - first.begun) / seconds if seconds else None,
        kv_usage=min(1.0, kv / (truth.kv_tokens * max(routers, 1))),
        state_slot_usage=min(1.0, plant.decoding / (SLOTS * max(routers, 1))),
        dispatch_share=plant.group_busy,
        group_busy=min(1.0, noisy(statistics.fmean(moment.group_busy for moment in seen))),
        ttft_s=noisy(max(moment.ttft_s for moment in seen)) or None,
        itl_s=noisy(max(moment.itl_s for moment in seen)) or None,
    )
