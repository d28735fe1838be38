"""How long a wish must last, and what is remembered of a change."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.autoscale_signals import Signal
from cluster.autoscale_wishes import (
    Lull,
    PoolMemory,
    after_change,
    is_idle,
    lull_s,
    pressure_signal,
    with_lull,
    with_surge,
    without_wishes,
)

MEMORY = PoolMemory(count=2)
DELAY_S = 10.0


def steady(demand: float, *, raises_to: int = 0) -> Signal:
    return Signal(
        name="busy", demand=demand, raises_to=raises_to, needs=demand, text="", is_steady=True
    )


def test_a_surge_counts_the_least_and_a_lull_the_most_that_was_wished() -> None:
    memory, _ = with_surge(MEMORY, 1.0, 5)
    memory, _ = with_surge(memory, 2.0, 3)
    memory, surge = with_surge(memory, 3.0, 4)
    assert (surge.since_s, surge.least) == (1.0, 3)
    memory, lull = with_lull(memory, 4.0, 0, None)
    assert memory.surge is None
    memory, lull = with_lull(memory, 5.0, 1, None)
    assert (lull.since_s, lull.most, lull.evidence_s) == (4.0, 1, 0.0)
    assert with_surge(memory, 6.0, 3)[0].lull is None
    assert without_wishes(memory) == MEMORY


def test_a_lull_lasts_as_long_as_a_hundred_requests_took_before_it() -> None:
    memory, lull = with_lull(MEMORY, 0.0, 1, 4.0)
    assert lull_s(memory, lull, DELAY_S, -1.0) == 25.0  # 100 / 4
    _, lull = with_lull(memory, 1.0, 1, 0.1)
    assert lull_s(memory, lull, DELAY_S, -1.0) == 25.0, "what comes during it does not count"
    _, busy = with_lull(MEMORY, 0.0, 1, 400.0)
    assert lull_s(memory, busy, DELAY_S, -1.0) == DELAY_S


def test_few_requests_make_it_at_most_sixteen_delays() -> None:
    _, lull = with_lull(MEMORY, 0.0, 1, 0.001)
    assert lull_s(MEMORY, lull, DELAY_S, -1.0) == 160.0


@pytest.mark.parametrize(("idle_s", "seconds"), [(10.0, 125.0), (24.9, 125.0), (25.0, DELAY_S)])
def test_twenty_requests_that_do_not_come_are_enough(idle_s: float, seconds: float) -> None:
    """A pause of one delay is nothing where a request in 1.25 s is usual."""
    _, lull = with_lull(MEMORY, 0.0, 1, 0.8)
    assert lull_s(MEMORY, lull, DELAY_S, idle_s) == seconds
    assert is_idle(lull, DELAY_S, idle_s) is (seconds == DELAY_S)


def changed(memory: PoolMemory, now_s: float, count: int, wanted: int) -> PoolMemory:
    return after_change(memory, now_s, count, wanted, [steady(wanted, raises_to=wanted)], DELAY_S)


def test_members_that_come_back_soon_stay_four_times_longer_each_time() -> None:
    memory, now_s, lull = MEMORY, 0.0, Lull(since_s=0.0, most=1, evidence_s=0.0)
    delays = []
    for _ in range(4):
        delays.append(lull_s(memory, lull, DELAY_S, -1.0))
        memory = changed(memory, now_s, 2, 1)
        now_s += 3 * DELAY_S
        memory = changed(memory, now_s, 1, 2)
    assert delays == [DELAY_S, 4 * DELAY_S, 16 * DELAY_S, 16 * DELAY_S]
    assert lull_s(memory, lull, DELAY_S, DELAY_S) == DELAY_S, "where nothing runs it is certain"


@pytest.mark.parametrize(("back_for", "times"), [(2.0, 16), (2.1, 4)], ids=["same", "burst"])
def test_members_that_come_back_late_were_right_to_leave(back_for: float, times: int) -> None:
    """Who comes back for the load at which they left has longer to show that it was an error."""

    def back(memory: PoolMemory, now_s: float) -> int:
        signals = [steady(back_for, raises_to=2)]
        return after_change(memory, now_s, 1, 2, signals, DELAY_S).regrets

    memory = changed(replace(MEMORY, regrets=1), 0.0, 2, 1)
    assert back(memory, times * DELAY_S) == 2
    assert back(memory, times * DELAY_S + 1.0) == 0
    waited, _ = with_lull(replace(MEMORY, regrets=1), 0.0, 1, 1.0)
    memory = changed(waited, 20.0, 2, 1)
    assert back(memory, 20.0 + times * 20.0) == 2
    assert back(memory, 20.0 + times * 20.0 + 1.0) == 0


def test_waking_up_is_no_return_of_members_that_left_too_early() -> None:
    asleep = changed(replace(MEMORY, regrets=1), 0.0, 2, 0)
    awake = changed(asleep, 1.0, 0, 2)
    assert (awake.regrets, awake.left_s, awake.pressed_count) == (1, None, 0)


def test_a_climb_in_several_steps_is_one_return() -> None:
    memory = changed(MEMORY, 0.0, 2, 1)
    memory = changed(memory, 10.0, 1, 2)
    memory = changed(memory, 20.0, 2, 4)
    assert memory.regrets == 1


def test_pressure_keeps_what_a_queue_called_for_until_the_load_is_seven_tenths() -> None:
    memory = after_change(MEMORY, 0.0, 2, 5, [steady(1.0)], DELAY_S)
    assert (memory.pressed_count, memory.pressed_demand, memory.count) == (2, 1.0, 5)
    for load, keeps in ((2.0, 3), (1.0, 3), (0.71, 3), (0.7, 2), (0.35, 1)):
        pressure = pressure_signal(memory, 5, [steady(load)])
        assert pressure is not None
        assert pressure.keeps == keeps, load
        assert pressure.text == f"2 were too few at a load of 1.00, and it is {load:.2f}"
    assert pressure_signal(memory, 2, [steady(1.0)]) is None, "they have left"
    assert pressure_signal(memory, 5, [steady(0.0)]) is None, "there is no load"


def test_a_load_that_raises_by_itself_is_no_pressure() -> None:
    assert changed(MEMORY, 0.0, 2, 3).pressed_count == 0
