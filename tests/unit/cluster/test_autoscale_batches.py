"""How fast batches go, what their rest asks for, and that it stays calm until they are done."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest

from cluster.autoscale import Bounds, Memory, Policy, State, decide
from cluster.autoscale_batches import LEAST_S, SPAN_S, BatchPace, BatchWork
from cluster.autoscale_signals import Pool, Signal, Targets
from tests.unit.cluster.test_autoscale import IDLE, POLICY, Loop

TARGET_S = 1000.0
BATCH = replace(
    IDLE,
    num_requests=40.0,
    dispatch_share=0.6,
    group_busy=0.5,
    batch_tokens=300_000.0,
    batch_tokens_per_s=100.0,
)
"""3,000 s of work, and the time goes by in the groups."""


def policy(least: int = 1, most: int = 8) -> Policy:
    return replace(POLICY, groups=Bounds(least=least, most=most), targets=Targets(batch_s=TARGET_S))


def batch_of(signals: tuple[Signal, ...]) -> Signal:
    [found] = [signal for signal in signals if signal.name == "batch"]
    return found


def test_the_rest_at_the_measured_pace_asks_for_groups_in_proportion() -> None:
    # 2 groups take 300,000 / 100 = 3,000 s; for 1,000 s: 2 * 3 = 6, and at most twice at once
    loop = Loop(policy(), groups=2)
    decision = loop.hold(BATCH, 6)
    assert (decision.groups.wanted, decision.routers.wanted) == (4, 1)
    assert batch_of(decision.groups.signals).demand == pytest.approx(2 * 2 * 3 / 2)
    assert decision.groups.reason.startswith(
        "batch: 300,000 tokens of batches are left, 3,000 s at 100/s, the pace with 2,"
        " target 1000 s"
    )
    assert batch_of(decision.routers.signals).text.endswith(", lost elsewhere")


def test_routers_are_asked_where_the_time_goes_by_in_them() -> None:
    decision = Loop(policy()).hold(replace(BATCH, dispatch_share=0.2), 6)
    assert (decision.routers.wanted, decision.groups.wanted) == (2, 1)


def test_a_pace_that_is_not_measured_asks_for_nothing_and_lets_nobody_go() -> None:
    loop = Loop(policy(), groups=3)
    unknown = replace(BATCH, batch_tokens=9e9, batch_tokens_per_s=None, group_busy=0.1)
    decision = loop.hold(unknown, 500)
    assert (loop.changes, loop.groups) == (0, 3)
    assert "not measured yet" in batch_of(decision.groups.signals).text


def test_members_that_are_hardly_used_get_no_company() -> None:
    decision = Loop(policy(), groups=2).hold(replace(BATCH, group_busy=0.3), 100)
    assert decision.groups.wanted == 2
    assert "used for 0.9 of 2: more would not help" in batch_of(decision.groups.signals).text


def test_nobody_is_asked_for_while_members_start() -> None:
    assert Loop(policy(), groups=2).hold(BATCH, 100, starting=1).groups.wanted == 2


def test_a_batch_that_is_soon_done_keeps_what_it_needs() -> None:
    # 4 groups take 500 s: 4 * 500 / 1,000 = 2 and a quarter more of it: 3
    soon = replace(BATCH, batch_tokens=50_000.0, group_busy=0.2)
    assert Loop(policy(), groups=4).hold(soon, 100).groups.wanted == 3


def test_the_pace_is_from_commit_to_now_and_begins_anew_with_other_members() -> None:
    pace = BatchPace()

    def note(now_s: float, done: int, groups: int = 2) -> float | None:
        pace.note(now_s, BatchWork(tokens_left=1.0, tokens_done=done), 1, groups)
        return pace.tokens_per_s(now_s)

    assert [note(0, 0), note(10, 500), note(12, 700)] == [None] * 3
    assert note(10 + LEAST_S, 700) == pytest.approx(200 / (LEAST_S / 2))
    assert note(60, 1500) == pytest.approx(1000 / 50)
    assert note(85, 1500) == pytest.approx(1000 / 50), "two commits in 50 s: the third may be due"
    assert note(160, 1500) == pytest.approx(1000 / 100), "it is late"
    assert note(170, 1600, groups=3) is None
    assert [note(180, 1700, 3), note(200, 1900, 3)] == [None, None]
    assert note(220, 2100, 3) == pytest.approx(400 / 40)
    pace.note(230, None, 1, 3)
    assert pace.tokens_per_s(230) is None, "the batches have ended"


def test_the_pace_forgets_what_is_long_ago() -> None:
    pace = BatchPace()
    pace.note(0, BatchWork(tokens_left=1.0, tokens_done=0), 1, 1)
    done = 0
    for second in range(1, 1001):
        done += 100 if second <= 500 else 10
        pace.note(second, BatchWork(tokens_left=1.0, tokens_done=done), 1, 1)
    assert 1000 - pace._commits[0][0] == pytest.approx(SPAN_S, abs=2)
    assert pace.tokens_per_s(1000) == pytest.approx(10, rel=0.02)


@dataclass
class Factory:
    """Groups that compute a batch: parts are committed in bursts, new groups start slowly."""

    tokens_left: float
    per_group: float
    part_tokens: int = 4000
    start_s: float = 40.0
    num_groups: int = 1
    ready_at: list[float] = field(default_factory=lambda: [0.0])
    computed: float = 0.0
    done: int = 0

    def step(self, now_s: float, seconds: float) -> int:
        """Compute; return how many groups serve."""
        ready = sum(at <= now_s for at in self.ready_at)
        # an overhead of 5 % for each further group: not quite in proportion
        rate = ready * self.per_group / (1 + 0.05 * (ready - 1))
        self.computed = min(self.tokens_left, self.computed + rate * seconds)
        is_over = self.computed >= self.tokens_left
        burst = 3 * self.part_tokens  # parts of three clients end together
        self.done = int(self.computed if is_over else self.computed // burst * burst)
        return ready

    def scale(self, now_s: float, wanted: int) -> None:
        more = wanted - self.num_groups
        self.ready_at = [*self.ready_at, *[now_s + self.start_s] * more][:wanted]
        self.num_groups = wanted


@pytest.mark.parametrize("per_group", [80.0, 400.0, 1500.0])
def test_a_batch_is_worked_off_near_its_target_without_turning(per_group: float) -> None:
    """9,000 s of work for one group, a target of 1,800 s, and the groups are full all along."""
    factory = Factory(tokens_left=9000 * per_group, per_group=per_group)
    batch_policy = replace(
        policy(most=12), targets=Targets(batch_s=1800.0), downscale_delay_s=300.0
    )
    pace, memory, counts = BatchPace(), Memory(), [1]
    now_s = 0.0
    while factory.done < factory.tokens_left:
        now_s += 2.0
        assert now_s < 9000
        ready = factory.step(now_s, 2.0)
        left = factory.tokens_left - factory.done
        pace.note(now_s, BatchWork(tokens_left=left, tokens_done=factory.done), 1, ready)
        # As busy as their target: of `busy` alone there would never be more of them.
        load = replace(
            BATCH,
            group_busy=0.7,
            batch_tokens=left,
            batch_tokens_per_s=pace.tokens_per_s(now_s),
        )
        decision = decide(
            State(
                now_s=now_s,
                policy=batch_policy,
                routers=Pool(count=1, ready=1),
                groups=Pool(count=factory.num_groups, ready=ready),
                load=load,
                memory=memory,
            )
        )
        memory = decision.memory
        if decision.groups.wanted != factory.num_groups:
            factory.scale(now_s, decision.groups.wanted)
            counts.append(factory.num_groups)
    assert counts == sorted(counts), "never fewer: they are used until the end"
    assert 5 <= counts[-1] <= 7  # 9,000 / 1,800 = 5, and the overhead
    assert len(counts) <= 6
    assert 1800 < now_s < 1.6 * 1800
