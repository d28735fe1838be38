"""When a member's process starts again, and when it is given up."""

from __future__ import annotations

from cluster.restarts import MAX_QUICK_DEATHS, QUICK_S, Restarts, next_step


def test_the_first_restart_is_at_once_and_each_further_one_waits_twice_as_long() -> None:
    restarts = Restarts()
    delays = []
    for number in range(MAX_QUICK_DEATHS):
        restarts.is_up(10.0 * number)
        delays.append(restarts.died(10.0 * number + 0.9 * QUICK_S))
    assert delays == [0.0, 1.0, 2.0, 4.0, None]


def test_starts_that_fail_count_as_quick_deaths() -> None:
    restarts = Restarts()
    assert [restarts.died(100.0 * n) for n in range(MAX_QUICK_DEATHS)] == [0.0, 1.0, 2.0, 4.0, None]


def test_a_process_that_stayed_up_starts_at_once_again() -> None:
    restarts = Restarts()
    assert [restarts.died(0.0) for _ in range(3)] == [0.0, 1.0, 2.0]
    restarts.is_up(1.0)
    assert restarts.died(1.0 + QUICK_S) == 0.0
    assert [restarts.died(7.0) for _ in range(2)] == [0.0, 1.0], "counted from there"


def test_people_read_what_comes_next() -> None:
    assert next_step(0.0) == "it starts again now"
    assert next_step(2.0) == "it starts again in 2 s"
    assert next_step(None) == "5 times in a row; it is given up"
