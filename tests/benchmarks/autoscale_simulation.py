"""`cluster.autoscale.decide` against a plant, over many random load traces: does it stay calm?

Regime: a fluid model of a service (`Plant`), stepped once an interval. Prompts come at a random
rate, wait, are prefilled at a rate that drifts, then decode; groups compute for both and slow both
down when they are full. Members take seconds to minutes to start. Measurements are noisy, averaged
over the look-back, sometimes missing; the measured prefill rate is wrong by up to 30 %.

What is checked in each trace (`Findings`):
  bounds    never outside least .. most, nor below what holds every expert; 0 only when idle
  delays    no change sooner after the one before than its delay; none down while blind
  reaction  a load of 1.3 times what there is, measured and settled, is answered in
            upscale_delay + look-back + 3 intervals
  calm      load constant: at most 3 changes of direction, and in the last third at most one
            change at all (requests come at random: a step down may take long to be sure of)
  rest      load gone: the least number, or 0, within the delays

    python -m tests.benchmarks.autoscale_simulation [--traces 10000] [--seed 1]
"""

from __future__ import annotations

import argparse
import collections
import itertools
import math
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from cluster.autoscale import Bounds, Decision, Memory, Policy, Pool, State, decide
from cluster.autoscale_signals import Load, Targets
from tests.benchmarks.harness import report

SLOTS = 64
"""Sequences of one router."""
MAX_QUEUED = 256
"""Requests that wait at one router; more are refused."""
STALE_INTERVALS = 3
OVERLOAD = 1.3
MAX_TURNS = 3


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


@dataclass(slots=True)
class Plant:
    """The service: tokens that wait, requests that decode."""

    truth: Truth
    waiting: float = 0.0
    decoding: float = 0.0
    group_busy: float = 0.0
    itl_s: float = 0.0
    computed: float = 0.0
    """Prompt tokens, in all."""

    def step(self, arriving: float, seconds: float, routers: int, groups: int, at_s: float) -> None:
        """Let `seconds` pass with `arriving` prompt tokens."""
        truth = self.truth
        drift = 1 + truth.drift * math.sin(2 * math.pi * at_s / truth.drift_period_s)
        room = max(MAX_QUEUED * routers * truth.prompt_tokens - self.waiting, 0.0)
        self.waiting += min(arriving, room)
        free_slots = max(0.0, SLOTS * routers - self.decoding)
        taken = min(
            self.waiting,
            truth.router_tokens_per_s * drift * routers * seconds,
            free_slots * truth.prompt_tokens,
        )
        per_router = self.decoding / routers if routers else 0.0
        itl_s = truth.itl_s * (1 + per_router / 32)
        work = taken / seconds + self.decoding / itl_s
        needed = work * (1 + truth.group_overhead * groups) / truth.group_tokens_per_s
        slowdown = max(1.0, needed / groups) if groups else math.inf
        taken = taken / slowdown if groups else 0.0
        self.group_busy = min(1.0, needed / groups) if groups else 0.0
        self.itl_s = itl_s * slowdown if groups else 0.0
        self.waiting -= taken
        self.computed += taken
        if groups:
            self.decoding *= math.exp(-seconds / (truth.answer_tokens * self.itl_s))
        self.decoding += taken / truth.prompt_tokens

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
    look_back_s: float
    start_s: float
    tokens_per_s: tuple[float, ...]
    """One an interval."""
    constant_from: int
    """Index from which on the load is constant."""


@dataclass(slots=True)
class Findings:
    """What a run showed; `violations` should be empty."""

    violations: list[str] = field(default_factory=list)
    turns: int = 0
    """Changes of direction under constant load, of the pool with more of them."""
    late_changes: int = 0
    """Changes in the last third of the constant load, alike."""
    changes: int = 0
    slowest_reaction_s: float = 0.0
    """Beyond the upscale delay."""
    decisions: int = 0


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
    settle_s = 4 * start_s + 8 * policy.downscale_delay_s + policy.downscale_to_zero_delay_s + 100
    settle_s += 3 * answer_s * MAX_QUEUED / SLOTS
    constant_from = len(levels)
    levels += [last] * math.ceil(settle_s / interval_s)
    return Trace(
        policy=policy,
        truth=truth,
        interval_s=interval_s,
        look_back_s=rng.uniform(5, 20),
        start_s=start_s,
        tokens_per_s=tuple(levels),
        constant_from=constant_from,
    )


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


def run(trace: Trace, rng: random.Random) -> Findings:
    """Step plant and `decide` through a trace, and check every decision."""
    policy, truth, interval_s = trace.policy, trace.truth, trace.interval_s
    routers = Members(policy.routers.least, trace.start_s)
    groups = Members(max(policy.groups.least, policy.min_groups_by_memory), trace.start_s)
    plant, memory, found = Plant(truth), Memory(), Findings()
    watch = _Watch(trace, found)
    seen: collections.deque[tuple[float, float, float]] = collections.deque(
        maxlen=max(2, math.ceil(trace.look_back_s / interval_s))
    )
    missed: list[int] = [0] * 64
    for index, level in enumerate(trace.tokens_per_s):
        now_s = index * interval_s
        ready = routers.ready(now_s), groups.ready(now_s)
        arriving = _poisson(rng, level * interval_s, truth.prompt_tokens)
        plant.step(arriving, interval_s, *ready, now_s)
        seen.append((now_s, plant.computed + plant.waiting, plant.group_busy))
        for member in range(sum(ready)):
            missed[member] = missed[member] + 1 if rng.random() < truth.missing else 0
        unknown = [n >= STALE_INTERVALS for n in missed[: sum(ready)]]
        state = State(
            now_s=now_s,
            policy=policy,
            routers=Pool(count=routers.count, ready=ready[0], unknown=sum(unknown[: ready[0]])),
            groups=Pool(count=groups.count, ready=ready[1], unknown=sum(unknown[ready[0] :])),
            load=_measure(plant, seen, ready[0], rng),
            memory=memory,
        )
        decision = decide(state)
        memory = decision.memory
        watch.look(index, state, decision, plant)
        routers.set(decision.routers.wanted, now_s)
        groups.set(decision.groups.wanted, now_s)
    watch.end(routers.count, groups.count)
    found.decisions = len(trace.tokens_per_s)
    return found


def _poisson(rng: random.Random, mean_tokens: float, tokens: float) -> float:
    """Tokens of a random number of requests with this mean; normal where there are many."""
    mean = mean_tokens / tokens
    return max(0.0, rng.gauss(mean, min(math.sqrt(mean), 0.3 * mean))) * tokens


def _measure(
    plant: Plant,
    seen: Sequence[tuple[float, float, float]],
    routers: int,
    rng: random.Random,
) -> Load:
    truth = plant.truth

    def noisy(value: float) -> float:
        return value * math.exp(rng.gauss(0, truth.noise)) if truth.noise else value

    (from_s, came_before, _), (to_s, came, _) = seen[0], seen[-1]
    requests = plant.requests()
    kv = plant.decoding * (truth.prompt_tokens + truth.answer_tokens / 2)
    waits_s = plant.waiting / (truth.router_tokens_per_s * max(routers, 1))
    return Load(
        prompt_tokens_per_s=noisy((came - came_before) / (to_s - from_s))
        if to_s > from_s
        else None,
        waiting_tokens=noisy(plant.waiting) if requests else 0.0,
        prefill_tokens_per_s=noisy(truth.router_tokens_per_s * truth.rate_bias),
        num_requests=requests,
        kv_usage=min(1.0, kv / (truth.kv_tokens * max(routers, 1))),
        state_slot_usage=min(1.0, plant.decoding / (SLOTS * max(routers, 1))),
        dispatch_share=plant.group_busy,
        group_busy=min(1.0, noisy(statistics.fmean(busy for _, _, busy in seen))),
        ttft_s=noisy(waits_s + truth.prompt_tokens / truth.router_tokens_per_s)
        if requests
        else None,
        itl_s=noisy(plant.itl_s) if plant.decoding > 1 else None,
    )


class _Watch:
    """Checks each decision, and the whole at the end."""

    def __init__(self, trace: Trace, found: Findings) -> None:
        self._trace = trace
        self._found = found
        self._changed_s = {"routers": -math.inf, "groups": -math.inf}
        self._steps: dict[str, list[tuple[int, int]]] = {"routers": [], "groups": []}
        self._over_since_s: float | None = None
        self._blind_s = -math.inf

    def look(self, index: int, state: State, decision: Decision, plant: Plant) -> None:
        """Check one decision."""
        policy = state.policy
        if state.routers.unknown + state.groups.unknown:
            self._blind_s = state.now_s
        ranges = {
            "routers": (max(1, policy.routers.least), policy.routers.most),
            "groups": (
                max(policy.groups.least, policy.min_groups_by_memory),
                max(policy.groups.most, policy.min_groups_by_memory),
            ),
        }
        for name, pool, chosen in (
            ("routers", state.routers, decision.routers),
            ("groups", state.groups, decision.groups),
        ):
            least, most = ranges[name]
            may_sleep = name == "groups" and policy.groups.least == 0
            if not least <= chosen.wanted <= most and not (
                chosen.wanted == 0 and may_sleep and not plant.requests()
            ):
                self._say(index, f"{name} {chosen.wanted} outside {least} .. {most}")
            if chosen.wanted == pool.count:
                continue
            self._check_change(index, name, pool.count, chosen.wanted, state)
            self._changed_s[name] = state.now_s
            self._steps[name].append((index, 1 if chosen.wanted > pool.count else -1))
            self._found.changes += 1
        self._check_reaction(index, state, decision)

    def _check_change(self, index: int, name: str, before: int, after: int, state: State) -> None:
        policy = state.policy
        since_s = state.now_s - self._changed_s[name]
        is_wake, is_sleep = before == 0, after == 0
        if after < before and state.routers.unknown + state.groups.unknown:
            self._say(index, f"{name} {before} -> {after} while blind")
        delay_s = policy.upscale_delay_s if after > before else policy.downscale_delay_s
        delay_s = policy.downscale_to_zero_delay_s if is_sleep else delay_s
        if since_s < delay_s and not is_wake and not (is_sleep and not math.isinf(since_s)):
            self._say(index, f"{name} {before} -> {after} after {since_s:.1f} s")

    def _check_reaction(self, index: int, state: State, decision: Decision) -> None:
        """Measured load far above what settled routers are to take must be answered in time."""
        trace, load, policy = self._trace, state.load, state.policy
        rate, coming = load.prefill_tokens_per_s, load.prompt_tokens_per_s
        is_settled = all(p.ready >= p.count for p in (state.routers, state.groups))
        is_over = (
            rate is not None
            and coming is not None
            and coming > OVERLOAD * state.routers.count * rate * policy.targets.prefill_use
            and state.routers.count < policy.routers.most
            and is_settled
        )
        if not is_over:
            self._over_since_s = None
            return
        since_s = state.now_s if self._over_since_s is None else self._over_since_s
        self._over_since_s = None if decision.routers.wanted > state.routers.count else since_s
        late_s = state.now_s - since_s - policy.upscale_delay_s
        self._found.slowest_reaction_s = max(self._found.slowest_reaction_s, late_s)
        if late_s > trace.look_back_s + 3 * trace.interval_s:
            self._say(index, f"overload not answered for {state.now_s - since_s:.1f} s")

    def end(self, routers: int, groups: int) -> None:
        """Check the constant stretch at the end of the trace."""
        trace, policy = self._trace, self._trace.policy
        length = len(trace.tokens_per_s)
        blind_ago_s = length * trace.interval_s - self._blind_s
        if blind_ago_s < 4 * policy.downscale_delay_s + policy.downscale_to_zero_delay_s:
            return  # what was not measured was rightly kept
        quiet_from = length - (length - trace.constant_from) // 3
        for name, steps in self._steps.items():
            late = [(index, way) for index, way in steps if index >= trace.constant_from]
            turns = sum(a[1] != b[1] for a, b in itertools.pairwise(late))
            self._found.turns = max(self._found.turns, turns)
            if turns > MAX_TURNS:
                self._say(length, f"{name} turned {turns} times under constant load")
            late_changes = sum(index >= quiet_from for index, _ in late)
            self._found.late_changes = max(self._found.late_changes, late_changes)
            if late_changes > 1:
                self._say(late[-1][0], f"{name} still changes under constant load")
        if trace.tokens_per_s[-1] == 0:
            rest = policy.groups.least and max(policy.groups.least, policy.min_groups_by_memory)
            if (routers, groups) != (max(1, policy.routers.least), rest):
                self._say(length, f"{routers} routers, {groups} groups at rest, not {rest}")

    def _say(self, index: int, what: str) -> None:
        self._found.violations.append(f"step {index}: {what}")


def simulate(seed: int) -> Findings:
    """Draw and run the trace of a seed."""
    rng = random.Random(seed)
    return run(draw_trace(rng), rng)


def main() -> None:
    """Run all traces and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--traces", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    begin = time.perf_counter()
    runs = [
        (seed, simulate(seed)) for seed in range(arguments.seed, arguments.seed + arguments.traces)
    ]
    seconds = time.perf_counter() - begin
    broken = [(seed, found.violations[0]) for seed, found in runs if found.violations]
    for seed, violation in broken[:20]:
        print(f"seed {seed}: {violation}")
    turns = collections.Counter(found.turns for _, found in runs)
    late = collections.Counter(found.late_changes for _, found in runs)
    decisions = sum(found.decisions for _, found in runs)
    report(
        "autoscale_simulation",
        {"traces": arguments.traces, "first_seed": arguments.seed},
        {
            "is_met": not broken,
            "traces_with_violations": len(broken),
            "decisions": decisions,
            "changes": sum(found.changes for _, found in runs),
            "turns_under_constant_load": {str(n): turns[n] for n in sorted(turns)},
            "changes_in_last_third": {str(n): late[n] for n in sorted(late)},
            "slowest_reaction_beyond_delay_s": max(f.slowest_reaction_s for _, f in runs),
            "us_per_step": 1e6 * seconds / decisions,
        },
    )


if __name__ == "__main__":
    main()
