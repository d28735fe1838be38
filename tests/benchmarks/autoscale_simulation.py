"""`cluster.autoscale.decide` against a plant, over many random load traces: does it stay calm?

Regime: the service and the load of `tests.benchmarks.autoscale_plant`. Measurements are noisy,
averaged over the look-back, sometimes missing; the measured prefill rate is wrong by up to 30 %.

What is checked in each trace (`Findings`):
  bounds    never outside least .. most, nor below what holds every expert; 0 only when nothing ran
            for the whole delay
  delays    no change sooner after the one before than its delay; none down while blind
  reaction  a load of 1.3 times what there is, measured and settled, is answered in
            upscale_delay + look-back + 3 intervals
  calm      load constant: at most 3 changes of direction, and in the last third at most one
            change at all, where steps down one after the other count as one (requests come at
            random, and each step down takes long to be sure of; they end at the least)
  rest      load gone: the least number, or 0, within the delays

The stretch of constant load begins when the queue of before is worked off (`_Backlog`), and is long
enough for the slowest climb and for 300 requests (`settle_s`): in less nothing can be known of it.
Members always answer in it, because missing answers rightly put off every step down. A pool that
sleeps in it is not held to be calm: where requests are so rare that nothing runs for the delay, the
load is not constant, and each sleep is checked by itself (bounds).

`mean_members` tells what the calm costs: routers and groups wanted, mean over all decisions.

    python -m tests.benchmarks.autoscale_simulation [--traces 10000] [--seed 1] [--jobs 2]
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import itertools
import math
import random
import time
from dataclasses import dataclass, field

from cluster.autoscale import Decision, Memory, State, decide
from cluster.autoscale_signals import Pool
from tests.benchmarks.autoscale_plant import (
    Members,
    Moment,
    Plant,
    Trace,
    draw_trace,
    measure,
    poisson,
)
from tests.benchmarks.harness import report

STALE_INTERVALS = 3
OVERLOAD = 1.3
MAX_TURNS = 3
SHRINKS = 0.9
"""Of a queue that is being worked off no more is left after a minute or two starts."""


@dataclass(slots=True)
class Findings:
    """What a run showed; `violations` should be empty."""

    violations: list[str] = field(default_factory=list)
    turns: int = 0
    """Changes of direction under constant load, of the pool with more of them."""
    late_changes: int = 0
    """Changes in the last third of the constant load, alike; all steps down are one."""
    changes: int = 0
    slowest_reaction_s: float = 0.0
    """Beyond the upscale delay."""
    decisions: int = 0
    members: int = 0
    """Routers and groups there were to be, added up over the decisions."""


def run(trace: Trace, rng: random.Random) -> Findings:
    """Step plant and `decide` through a trace, and check every decision."""
    policy, truth, interval_s = trace.policy, trace.truth, trace.interval_s
    routers = Members(policy.routers.least, trace.start_s)
    groups = Members(max(policy.groups.least, policy.min_groups_by_memory), trace.start_s)
    plant, memory, found = Plant(truth), Memory(), Findings()
    watch = _Watch(trace, found)
    seen: collections.deque[Moment] = collections.deque(
        maxlen=max(2, math.ceil(trace.policy.look_back_s / interval_s))
    )
    missed: list[int] = [0] * 64
    backlog = _Backlog(trace)
    for index in itertools.count():
        now_s = index * interval_s
        is_constant = index >= len(trace.tokens_per_s)
        level = trace.last_tokens_per_s if is_constant else trace.tokens_per_s[index]
        ready = routers.ready(now_s), groups.ready(now_s)
        arriving = poisson(rng, level * interval_s / truth.prompt_tokens) * truth.prompt_tokens
        plant.step(arriving, interval_s, *ready, now_s)
        seen.append(plant.moment(now_s, ready[0], seen[-1].begun if seen else 0.0))
        for member in range(sum(ready)):
            is_missing = not is_constant and rng.random() < truth.missing
            missed[member] = missed[member] + 1 if is_missing else 0
        unknown = [n >= STALE_INTERVALS for n in missed[: sum(ready)]]
        state = State(
            now_s=now_s,
            policy=policy,
            routers=Pool(count=routers.count, ready=ready[0], unknown=sum(unknown[: ready[0]])),
            groups=Pool(count=groups.count, ready=ready[1], unknown=sum(unknown[ready[0] :])),
            load=measure(plant, seen, ready[0], rng),
            memory=memory,
        )
        decision = decide(state)
        memory = decision.memory
        watch.look(state, decision, plant)
        found.members += decision.routers.wanted + decision.groups.wanted
        routers.set(decision.routers.wanted, now_s)
        groups.set(decision.groups.wanted, now_s)
        if is_constant and backlog.is_settled(now_s, plant.waiting):
            break
    watch.end(backlog.gone_at_s, now_s, routers.count, groups.count)
    found.decisions = index + 1
    return found


class _Backlog:
    """Finds when the queue is worked off that a trace left when its load became constant.

    While it lasts the load on the members is not constant: they are rightly kept, and it may take
    longer than any stretch of given length (64 slots, 256 waiting, answers of 30 s). Under load it
    counts as gone, too, when it shrinks no more: the load is as much as the service can do.
    """

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._look_s = max(60.0, 2 * trace.start_s)
        self._before: tuple[float, float] | None = None
        self.gone_at_s = math.inf

    def is_settled(self, now_s: float, waiting: float) -> bool:
        """Note how much waits; return whether the trace is over."""
        trace = self._trace
        if math.isinf(self.gone_at_s):
            self._before = self._before or (now_s, waiting)
            since_s, more = self._before
            one_interval = trace.last_tokens_per_s * trace.interval_s
            is_gone = waiting <= max(one_interval, 0.5 * trace.truth.prompt_tokens)
            if not is_gone and one_interval and now_s - since_s >= self._look_s:
                is_gone, self._before = waiting > SHRINKS * more, (now_s, waiting)
            if is_gone:
                self.gone_at_s = now_s
        return now_s >= self.gone_at_s + trace.settle_s


class _Watch:
    """Checks each decision, and the whole at the end."""

    def __init__(self, trace: Trace, found: Findings) -> None:
        self._trace = trace
        self._found = found
        self._changed_s = {"routers": -math.inf, "groups": -math.inf}
        self._steps: dict[str, list[tuple[float, int]]] = {"routers": [], "groups": []}
        self._slept_s: dict[str, float] = {}
        self._worked_s = 0.0
        self._over_since_s: float | None = None

    def look(self, state: State, decision: Decision, plant: Plant) -> None:
        """Check one decision."""
        policy = state.policy
        ranges = {
            "routers": (max(1, policy.routers.least), policy.routers.most),
            "groups": (
                max(policy.groups.least, policy.min_groups_by_memory),
                max(policy.groups.most, policy.min_groups_by_memory),
            ),
        }
        if plant.requests():
            self._worked_s = state.now_s
        idle_s = state.now_s - self._worked_s
        for name, pool, chosen in (
            ("routers", state.routers, decision.routers),
            ("groups", state.groups, decision.groups),
        ):
            least, most = ranges[name]
            may_sleep = (
                name == "groups"
                and policy.groups.least == 0
                and not plant.requests()
                and (pool.count == 0 or idle_s >= policy.downscale_to_zero_delay_s)
            )
            if not least <= chosen.wanted <= most and not (chosen.wanted == 0 and may_sleep):
                self._say(state.now_s, f"{name} {chosen.wanted} outside {least} .. {most}")
            if chosen.wanted == pool.count:
                continue
            self._check_change(name, pool.count, chosen.wanted, state)
            self._changed_s[name] = state.now_s
            self._steps[name].append((state.now_s, 1 if chosen.wanted > pool.count else -1))
            if chosen.wanted == 0:
                self._slept_s[name] = state.now_s
            self._found.changes += 1
        self._check_reaction(state, decision)

    def _check_change(self, name: str, before: int, after: int, state: State) -> None:
        policy = state.policy
        since_s = state.now_s - self._changed_s[name]
        is_wake, is_sleep = before == 0, after == 0
        if after < before and state.routers.unknown + state.groups.unknown:
            self._say(state.now_s, f"{name} {before} -> {after} while blind")
        delay_s = policy.upscale_delay_s if after > before else policy.downscale_delay_s
        delay_s = policy.downscale_to_zero_delay_s if is_sleep else delay_s
        if since_s < delay_s and not is_wake and not (is_sleep and not math.isinf(since_s)):
            self._say(state.now_s, f"{name} {before} -> {after} after {since_s:.1f} s")

    def _check_reaction(self, state: State, decision: Decision) -> None:
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
        if late_s > trace.policy.look_back_s + 3 * trace.interval_s:
            self._say(state.now_s, f"overload not answered for {state.now_s - since_s:.1f} s")

    def end(self, constant_from_s: float, end_s: float, routers: int, groups: int) -> None:
        """Check the stretch of constant load."""
        trace, policy = self._trace, self._trace.policy
        quiet_from_s = end_s - (end_s - constant_from_s) / 3
        for name, steps in self._steps.items():
            if self._slept_s.get(name, -math.inf) >= constant_from_s and trace.last_tokens_per_s:
                continue
            late = [(at_s, way) for at_s, way in steps if at_s >= constant_from_s]
            turns = sum(a[1] != b[1] for a, b in itertools.pairwise(late))
            self._found.turns = max(self._found.turns, turns)
            if turns > MAX_TURNS:
                self._say(end_s, f"{name} turned {turns} times under constant load")
            ways = [way for at_s, way in late if at_s >= quiet_from_s]
            late_changes = ways.count(1) + (-1 in ways)
            self._found.late_changes = max(self._found.late_changes, late_changes)
            if late_changes > 1:
                self._say(late[-1][0], f"{name} still changes under constant load")
        if trace.last_tokens_per_s == 0:
            rest = policy.groups.least and max(policy.groups.least, policy.min_groups_by_memory)
            if (routers, groups) != (max(1, policy.routers.least), rest):
                self._say(end_s, f"{routers} routers, {groups} groups at rest, not {rest}")

    def _say(self, at_s: float, what: str) -> None:
        self._found.violations.append(f"{at_s:.0f} s: {what}")


def simulate(seed: int) -> Findings:
    """Draw and run the trace of a seed."""
    rng = random.Random(seed)
    return run(draw_trace(rng), rng)


def main() -> None:
    """Run all traces and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--traces", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    arguments = parser.parse_args()
    begin = time.perf_counter()
    seeds = range(arguments.seed, arguments.seed + arguments.traces)
    with concurrent.futures.ProcessPoolExecutor(arguments.jobs) as processes:
        runs = list(zip(seeds, processes.map(simulate, seeds, chunksize=20), strict=True))
    seconds = time.perf_counter() - begin
    broken = [(seed, found.violations[0]) for seed, found in runs if found.violations]
    for seed, violation in broken[:20]:
        print(f"seed {seed}: {violation}")
    turns = collections.Counter(found.turns for _, found in runs)
    late = collections.Counter(found.late_changes for _, found in runs)
    decisions = sum(found.decisions for _, found in runs)
    report(
        "autoscale_simulation",
        {"traces": arguments.traces, "first_seed": arguments.seed, "jobs": arguments.jobs},
        {
            "is_met": not broken,
            "traces_with_violations": len(broken),
            "seconds": round(seconds, 1),
            "decisions": decisions,
            "changes": sum(found.changes for _, found in runs),
            "turns_under_constant_load": {str(n): turns[n] for n in sorted(turns)},
            "changes_in_last_third": {str(n): late[n] for n in sorted(late)},
            "slowest_reaction_beyond_delay_s": max(f.slowest_reaction_s for _, f in runs),
            "mean_members": sum(found.members for _, found in runs) / decisions,
        },
    )


if __name__ == "__main__":
    main()
