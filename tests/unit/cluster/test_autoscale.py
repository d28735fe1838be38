"""How many routers and groups there should be: each rule by itself, with its sum."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from cluster.autoscale import Bounds, Decision, Memory, Policy, State, decide
from cluster.autoscale_signals import Load, Pool, Targets

IDLE = Load(
    prompt_tokens_per_s=0.0,
    waiting_tokens=0.0,
    prefill_tokens_per_s=2000.0,
    num_requests=0.0,
    kv_usage=0.0,
    state_slot_usage=0.0,
    dispatch_share=0.2,
    group_busy=0.0,
)
POLICY = Policy(
    routers=Bounds(least=1, most=4),
    groups=Bounds(least=1, most=8),
    upscale_delay_s=5.0,
    downscale_delay_s=60.0,
    downscale_to_zero_delay_s=100.0,
)
INTERVAL_S = 2.0


class Loop:
    """Asks again every `INTERVAL_S` and applies what was decided at once."""

    def __init__(self, policy: Policy = POLICY, *, routers: int = 1, groups: int = 1) -> None:
        self.policy = policy
        self.now_s = 0.0
        self.routers, self.groups = routers, groups
        self.memory = Memory()
        self.changes = 0

    def ask(self, load: Load, *, starting: int = 0, unknown: int = 0) -> Decision:
        decision = decide(
            State(
                now_s=self.now_s,
                policy=self.policy,
                routers=Pool(count=self.routers, ready=self.routers, unknown=unknown),
                groups=Pool(count=self.groups, ready=self.groups - starting),
                load=load,
                memory=self.memory,
            )
        )
        self.memory = decision.memory
        self.changes += not decision.is_hold
        self.routers, self.groups = decision.routers.wanted, decision.groups.wanted
        self.now_s += INTERVAL_S
        return decision

    def hold(self, load: Load, seconds: float, **flags: int) -> Decision:
        """Ask now and until so much time has passed; the last decision."""
        end_s = self.now_s + seconds
        decision = self.ask(load, **flags)
        while self.now_s <= end_s:
            decision = self.ask(load, **flags)
        return decision


def test_a_load_within_the_band_changes_nothing() -> None:
    loop = Loop(routers=2, groups=2)
    # 3,200 / (2,000 * 0.8) = 2.0 routers; 2 * 0.7 / 0.7 = 2.0 groups
    decision = loop.hold(
        replace(IDLE, prompt_tokens_per_s=3200, num_requests=9, group_busy=0.7), 500
    )
    assert loop.changes == 0
    assert decision.routers.signals[0].demand == pytest.approx(2.0)
    assert decision.routers.reason == (
        "prefill: 3,200 prompt tokens/s come, a router prefills 2,000/s, target 80% of it"
    )


def test_more_prompt_tokens_than_routers_prefill_add_routers_after_the_delay() -> None:
    loop = Loop()
    busy = replace(IDLE, prompt_tokens_per_s=4500, num_requests=9)
    assert loop.ask(busy).routers.reason.startswith("3 are wished for 0 of 5 s; prefill: 4,500")
    assert (loop.routers, loop.ask(busy).is_hold) == (1, True)
    assert loop.hold(busy, INTERVAL_S).routers.wanted == 3  # 4,500 / 1,600 = 2.8
    assert loop.groups == 1


@pytest.mark.parametrize(("tokens_per_s", "routers"), [(3500, 2), (3550, 3)])
def test_a_load_must_be_a_tenth_above_what_there_is(tokens_per_s: float, routers: int) -> None:
    # 2 * 1.1 routers take 2.2 * 1,600 = 3,520
    load = replace(IDLE, prompt_tokens_per_s=tokens_per_s, num_requests=9)
    assert Loop(routers=2).hold(load, 6).routers.wanted == routers


def test_one_measurement_within_the_band_begins_the_delay_again() -> None:
    loop = Loop()
    busy = replace(IDLE, prompt_tokens_per_s=4500, num_requests=9)
    for _ in range(20):
        assert loop.ask(busy).is_hold
        assert loop.ask(busy).is_hold
        assert loop.ask(replace(busy, prompt_tokens_per_s=1600)).is_hold


def test_a_backlog_is_worked_off_beside_what_keeps_coming() -> None:
    loop = Loop()
    late = replace(IDLE, prompt_tokens_per_s=1600, waiting_tokens=90_000, num_requests=9)
    decision = loop.hold(late, 6)
    # 1,600 / 1,600 + 90,000 / (2,000 * 30 s) = 2.5
    assert (decision.routers.wanted, decision.routers.direction) == (3, "up")
    assert "90,000 waiting tokens are 45.0 s of prefill, target 2 s" in decision.routers.reason


def test_a_backlog_does_not_count_while_members_start() -> None:
    loop = Loop()
    late = replace(IDLE, prompt_tokens_per_s=1600, waiting_tokens=90_000, num_requests=9)
    assert loop.hold(late, 100, starting=1).routers.wanted == 1


def test_kv_slots_and_requests_add_routers() -> None:
    full = replace(IDLE, num_requests=9, prefill_tokens_per_s=None)
    for name, load in (
        ("kv", replace(full, kv_usage=1.0)),
        ("state slots", replace(full, state_slot_usage=1.0)),
        ("requests", replace(full, num_requests=100)),
    ):
        decision = Loop().hold(load, 6)
        assert decision.routers.wanted == 2, name
        assert decision.routers.reason.startswith(f"{name}: ")


def test_busy_groups_get_company_and_idle_ones_leave_after_the_longer_delay() -> None:
    loop = Loop()
    assert loop.hold(replace(IDLE, num_requests=9, group_busy=1.0), 6).groups.wanted == 2
    half = replace(IDLE, num_requests=9, group_busy=0.25)
    assert loop.hold(half, 58).groups.reason.startswith("1 are wished for 58 of 60 s; busy: busy 2")
    assert loop.ask(half).groups.wanted == 1


def test_members_stay_where_fewer_would_be_near_their_target() -> None:
    loop = Loop(groups=2)
    # 2 * 0.3 / 0.7 = 0.86: one would do, but at 86 % of its target, more than 80 %
    assert loop.hold(replace(IDLE, num_requests=9, group_busy=0.3), 500).groups.wanted == 2


def test_the_most_and_the_least_hold() -> None:
    policy = replace(POLICY, groups=Bounds(least=2, most=3))
    loop = Loop(policy, groups=2)
    decision = loop.hold(replace(IDLE, num_requests=9, group_busy=1.0), 30)
    assert decision.groups.wanted == 3
    assert decision.groups.reason.endswith("; 3 is the most")
    assert loop.hold(IDLE, 500).groups.wanted == 2
    loop.groups = 1  # somebody else took one away
    assert loop.ask(IDLE).groups.reason == "the least there may be"
    assert loop.groups == 2


def test_never_fewer_groups_than_hold_every_expert() -> None:
    policy = replace(POLICY, min_groups_by_memory=3, groups=Bounds(least=1, most=2))
    loop = Loop(policy, groups=3)
    loop.hold(IDLE, 1000)
    assert (loop.groups, loop.changes) == (3, 0)


@pytest.mark.parametrize("what", ["a member", "requests", "busy time"])
def test_what_is_not_measured_is_kept(what: str) -> None:
    loop = Loop(routers=2, groups=2)
    load = {
        "a member": IDLE,
        "requests": replace(IDLE, num_requests=None),
        "busy time": replace(IDLE, group_busy=None),
    }[what]
    decision = loop.hold(load, 1000, unknown=what == "a member")
    assert loop.changes == 0
    assert "1 would do, but 1 measurements are missing" in decision.routers.reason
    loop.hold(IDLE, 58)
    assert loop.changes == 0, "the delay begins when all is measured again"
    assert loop.ask(IDLE).routers.wanted == 1


def test_while_members_start_only_those_leave() -> None:
    """A node that never comes keeps nobody for ever."""
    loop = Loop(groups=4)
    light = replace(IDLE, num_requests=9, group_busy=0.1)
    assert loop.hold(light, 58, starting=2).is_hold
    decision = loop.ask(light, starting=2)
    assert decision.groups.wanted == 2, "1 is wished, but 2 serve"
    assert loop.hold(light, 58).is_hold, "the delay begins again"
    assert loop.ask(light).groups.wanted == 1


def test_routers_leave_while_a_group_starts_that_the_load_asks_for() -> None:
    loop = Loop(routers=2, groups=2)
    # the one that serves, always busy, makes 1 / 0.7 = 1.4
    full = replace(IDLE, num_requests=9, group_busy=1.0)
    assert loop.hold(full, 60, starting=1).routers.wanted == 1
    assert loop.groups == 2


def test_idle_groups_go_to_sleep_where_they_may_and_wake_at_the_first_request() -> None:
    policy = replace(POLICY, groups=Bounds(least=0, most=4), min_groups_by_memory=2)
    loop = Loop(policy, groups=3)
    assert loop.hold(IDLE, 96).groups.wanted == 2
    decision = loop.hold(IDLE, 2)
    assert (decision.groups.wanted, decision.groups.reason) == (0, "idle for 100 s")
    assert loop.hold(IDLE, 1000).groups.reason == "asleep until the first request"
    decision = loop.ask(replace(IDLE, num_requests=1, group_busy=None))
    assert (decision.groups.wanted, decision.groups.reason) == (2, "a request came")
    assert loop.routers == 1


def test_a_request_ends_idleness() -> None:
    policy = replace(POLICY, groups=Bounds(least=0, most=4))
    loop = Loop(policy)
    for _ in range(5):
        assert loop.hold(IDLE, 90).groups.wanted == 1
        loop.ask(replace(IDLE, num_requests=1))


@pytest.mark.parametrize("tokens_per_s", [5.0, None])
def test_requests_between_two_looks_keep_groups_awake(tokens_per_s: float | None) -> None:
    policy = replace(POLICY, groups=Bounds(least=0, most=4))
    loop = Loop(policy)
    loop.hold(replace(IDLE, prompt_tokens_per_s=tokens_per_s), 500)
    assert (loop.groups, loop.changes) == (1, 0)


def test_pressure_without_any_steady_load_ends() -> None:
    loop = Loop()
    loop.hold(replace(IDLE, num_requests=200), 6)
    assert loop.routers == 4, "200 / 51 = 3.9"
    assert loop.hold(IDLE, 60).routers.wanted == 1


def test_a_missed_latency_target_adds_one_member_where_the_time_goes_by() -> None:
    policy = replace(POLICY, targets=Targets(itl_s=0.05))
    slow = replace(IDLE, num_requests=30, itl_s=0.08, group_busy=0.6, prompt_tokens_per_s=1200)
    in_groups = Loop(policy).hold(replace(slow, dispatch_share=0.8), 6)
    assert (in_groups.groups.wanted, in_groups.routers.wanted) == (2, 1)
    assert in_groups.groups.reason == "itl: p95 80 ms, target 50 ms; for 6 s"
    in_routers = Loop(policy).hold(replace(slow, dispatch_share=0.1), 6)
    assert (in_routers.groups.wanted, in_routers.routers.wanted) == (1, 2)


def test_a_target_missed_by_less_than_a_tenth_is_chance() -> None:
    policy = replace(POLICY, targets=Targets(itl_s=0.05))
    slow = replace(IDLE, num_requests=30, group_busy=0.6, dispatch_share=0.8)
    assert Loop(policy).hold(replace(slow, itl_s=0.054), 100).groups.wanted == 1
    assert Loop(policy).hold(replace(slow, itl_s=0.056), 6).groups.wanted == 2


def test_members_that_are_not_used_do_not_help_a_missed_target() -> None:
    policy = replace(POLICY, targets=Targets(ttft_s=0.5))
    slow = replace(IDLE, num_requests=1, ttft_s=2.0)
    loop = Loop(policy)
    decision = loop.hold(slow, 100)
    assert loop.changes == 0
    assert "more would not help" in decision.routers.signals[-1].text


def test_what_a_queue_called_for_stays_until_the_steady_load_falls() -> None:
    loop = Loop()
    steady = replace(IDLE, prompt_tokens_per_s=1000, num_requests=9)  # 0.6 routers
    loop.hold(replace(steady, waiting_tokens=20_000), 6)
    assert loop.routers == 2
    decision = loop.hold(steady, 1000)
    assert decision.routers.reason == "pressure: 1 were too few at a load of 0.62, and it is 0.62"
    assert loop.hold(replace(steady, prompt_tokens_per_s=600), 61).routers.wanted == 1


def test_what_is_used_is_used_of_the_groups_that_serve() -> None:
    loop = Loop(groups=2)
    # the one that serves, always busy, makes 1 / 0.7 = 1.4: the second is on its way
    loop.hold(replace(IDLE, num_requests=9, group_busy=1.0), 100, starting=1)
    assert loop.groups == 2


@pytest.mark.parametrize(("num_requests", "routers"), [(20, 1), (21, 2)])
def test_what_fewer_routers_would_hold_longer_keeps_them(num_requests: int, routers: int) -> None:
    # one for two: twice the batch, steps of up to twice the time: d 1.25 * 2 <= 1, d = 20.4 / 51
    load = replace(IDLE, num_requests=num_requests, prompt_tokens_per_s=1.0)
    assert Loop(routers=2).hold(load, 200).routers.wanted == routers


def test_few_requests_widen_the_band_both_ways() -> None:
    # 0.9 requests/s in 10 s: 9, which wander by a third: 25 % up (the most), 67 % down
    few = replace(IDLE, num_requests=2, requests_per_s=0.9)
    loop = Loop()
    assert loop.hold(replace(few, prompt_tokens_per_s=1600 * 1.24), 200).routers.wanted == 1
    assert loop.hold(replace(few, prompt_tokens_per_s=1600 * 1.26), 200).routers.wanted == 2
    assert loop.hold(replace(few, prompt_tokens_per_s=1600 * 0.61), 200).routers.wanted == 2
    assert loop.hold(replace(few, prompt_tokens_per_s=1600 * 0.59), 200).routers.wanted == 1


def test_a_lull_lasts_as_long_as_a_hundred_requests() -> None:
    loop = Loop(groups=2)
    load = replace(IDLE, num_requests=1, requests_per_s=0.5, group_busy=0.1)
    assert loop.hold(load, 198).groups.reason.startswith("1 are wished for 198 of 200 s")
    assert loop.ask(load).groups.wanted == 1


def test_how_many_usually_come_is_forgotten_slowly() -> None:
    loop = Loop()
    loop.ask(replace(IDLE, requests_per_s=1.0))
    assert loop.memory.usual_requests_per_s == 1.0
    loop.ask(replace(IDLE, requests_per_s=None))
    loop.hold(replace(IDLE, requests_per_s=0.0), 238)  # 4 delays of 60 s after the first
    assert loop.memory.usual_requests_per_s == pytest.approx(1 / math.e, rel=0.02)


def test_what_ran_before_nothing_ran_keeps_nobody() -> None:
    loop = Loop(groups=8)
    # 8 * 0.3 / 0.7 = 3.4, and 10 requests wander: 1.63 times that is kept; 100 take 100 s
    loop.hold(replace(IDLE, num_requests=3, group_busy=0.3, requests_per_s=1.0), 38)
    assert loop.hold(IDLE, 58).groups.reason.startswith("6 are wished for 98 of 100 s; busy")
    assert loop.ask(IDLE).groups.wanted == 1, "idle for 60 s"


def test_a_queue_of_full_groups_raises_no_routers() -> None:
    late = replace(IDLE, prompt_tokens_per_s=1000, waiting_tokens=90_000, num_requests=200)
    loop = Loop(replace(POLICY, groups=Bounds(least=1, most=1)))
    decision = loop.hold(replace(late, group_busy=0.95), 100)
    assert loop.changes == 0
    for name in ("backlog", "requests"):
        (text,) = (s.text for s in decision.routers.signals if s.name == name)
        assert text.endswith("; the groups are full: more routers would not help")
    assert loop.hold(replace(late, group_busy=0.85), 6).routers.wanted == 4


def test_a_backlog_brings_at_most_a_router_a_request() -> None:
    late = replace(IDLE, prompt_tokens_per_s=1600, waiting_tokens=90_000, num_requests=2)
    loop = Loop()
    assert loop.hold(late, 6).routers.wanted == 2, "the tokens alone ask for 3"
    decision = loop.hold(late, 100)
    assert loop.routers == 2
    assert decision.routers.signals[1].text.endswith(
        "; each request has a router of its own: more would not help"
    )


def test_a_prompt_that_takes_longer_than_the_target_by_itself_raises_nothing() -> None:
    policy = replace(POLICY, targets=Targets(ttft_s=1.0))
    slow = replace(IDLE, num_requests=30, ttft_s=1.8, prompt_tokens_per_s=1200)
    loop = Loop(policy)
    # 1,500 waiting tokens are 0.75 s of 2,000/s: without them it would still be 1.05 s
    decision = loop.hold(replace(slow, waiting_tokens=1500), 100)
    assert loop.changes == 0
    assert decision.routers.reason.endswith("the rest of it takes longer: more would not help")
    assert loop.hold(replace(slow, waiting_tokens=1700), 6).routers.wanted == 2


@pytest.mark.parametrize(("dispatch_share", "groups"), [(0.6, 1), (0.7, 2)])
def test_groups_save_at_most_half_of_what_they_take_of_the_first_token(
    dispatch_share: float, groups: int
) -> None:
    policy = replace(POLICY, targets=Targets(ttft_s=4.0))
    # 6 s, of which they take 3.6 or 4.2 s, could be 4.2 or 3.9 s
    slow = replace(IDLE, num_requests=9, group_busy=0.6, ttft_s=6.0)
    decision = Loop(policy).hold(replace(slow, dispatch_share=dispatch_share), 6)
    assert decision.groups.wanted == groups


@pytest.mark.parametrize(("seats", "groups"), [(0.9, 2), (1.0, 1)])
def test_groups_do_not_shorten_a_wait_for_seats(seats: float, groups: int) -> None:
    policy = replace(POLICY, routers=Bounds(least=1, most=1), targets=Targets(ttft_s=4.0))
    slow = replace(IDLE, num_requests=90, group_busy=0.6, ttft_s=6.0, dispatch_share=0.7)
    decision = Loop(policy).hold(replace(slow, state_slot_usage=seats), 6)
    assert decision.groups.wanted == groups


def test_a_change_by_somebody_else_begins_the_delays_again() -> None:
    loop = Loop(groups=4)
    loop.hold(IDLE, 50)
    loop.groups = 5
    loop.hold(IDLE, 58)
    assert loop.changes == 0
    assert loop.ask(IDLE).groups.wanted == 1


def test_a_dense_model_has_no_groups() -> None:
    loop = Loop(replace(POLICY, groups=Bounds(least=0, most=0)), groups=0)
    assert loop.hold(replace(IDLE, num_requests=5, group_busy=None), 200).groups.wanted == 0


def test_a_downscale_delay_of_nothing_is_none() -> None:
    loop = Loop(replace(POLICY, downscale_delay_s=0.0), groups=2)
    load = replace(IDLE, num_requests=1, requests_per_s=0.1)
    loop.ask(load)
    assert loop.ask(load).groups.count == 1
