from __future__ import annotations

import random
import threading

import pytest

from router.state.breaker import BreakerSettings, BreakerState, CircuitBreaker


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def breaker(clock: Clock, **settings: float) -> CircuitBreaker:
    chosen = BreakerSettings(jitter=0.0, **settings)  # type: ignore[arg-type]
    return CircuitBreaker("redis://h:1/0", chosen, clock=clock, generator=random.Random(7))


def fail(subject: CircuitBreaker, times: int = 1) -> None:
    for _ in range(times):
        assert subject.allow()
        subject.failed()


def test_three_failures_in_a_row_open_it() -> None:
    subject = breaker(Clock())
    fail(subject, 2)
    assert subject.allow()
    subject.succeeded(0.1)
    fail(subject, 2)
    assert subject.state is BreakerState.CLOSED
    fail(subject)
    assert subject.state is BreakerState.OPEN
    assert [subject.allow() for _ in range(3)] == [False] * 3
    assert subject.num_opened == 1


def test_probes_wait_1_2_4_to_30_seconds() -> None:
    clock = Clock()
    subject = breaker(clock)
    fail(subject, 3)
    waits = []
    for _ in range(7):
        waits.append(subject.retry_after_s)
        clock.now_s += waits[-1] - 0.001
        assert not subject.allow()
        clock.now_s += 0.002
        assert subject.state is BreakerState.HALF_OPEN
        fail(subject)
    assert waits == pytest.approx([1, 2, 4, 8, 16, 30, 30])


def test_a_good_probe_closes_it_and_waits_begin_anew() -> None:
    clock = Clock()
    subject = breaker(clock)
    fail(subject, 3)
    clock.now_s += 1.5
    fail(subject)
    clock.now_s += 2.5
    assert subject.allow()
    subject.succeeded(0.1)
    assert subject.state is BreakerState.CLOSED
    assert subject.retry_after_s == 0.0
    fail(subject, 3)
    assert subject.retry_after_s == pytest.approx(1.0)


def test_only_one_probe_goes_and_a_lost_one_counts_as_failed() -> None:
    clock = Clock()
    subject = breaker(clock, probe_timeout_s=5.0)
    fail(subject, 3)
    clock.now_s += 1.0
    assert [subject.allow() for _ in range(3)] == [True, False, False]
    clock.now_s += 5.0
    assert subject.state is BreakerState.OPEN
    assert subject.retry_after_s == pytest.approx(2.0)


def test_a_late_report_changes_nothing_while_open() -> None:
    subject = breaker(Clock())
    assert subject.allow()
    assert subject.allow()
    fail(subject, 3)
    subject.succeeded(0.1)
    subject.failed()
    assert subject.state is BreakerState.OPEN
    assert subject.retry_after_s == pytest.approx(1.0)
    assert subject.num_opened == 1


def test_p95_over_budget_opens_it() -> None:
    """Window 64 judges from 22 calls on; of 22, p95 is the 21st: two slow ones are over."""
    clock = Clock()
    subject = breaker(clock, budget_s=0.5)
    for _ in range(20):
        subject.succeeded(0.1)
    subject.succeeded(0.6)
    assert subject.state is BreakerState.CLOSED
    subject.succeeded(0.6)
    assert subject.state is BreakerState.OPEN
    clock.now_s += 1.0
    assert subject.allow()
    subject.succeeded(0.6)  # a slow probe is a failed one
    assert subject.state is BreakerState.OPEN
    assert subject.retry_after_s == pytest.approx(2.0)
    clock.now_s += 2.0
    assert subject.allow()
    subject.succeeded(0.4)
    assert subject.state is BreakerState.CLOSED


def test_one_slow_call_among_many_does_not_open_it() -> None:
    subject = breaker(Clock(), budget_s=0.5)
    for number in range(200):
        subject.succeeded(9.0 if number % 25 == 24 else 0.1)
    assert subject.state is BreakerState.CLOSED


def test_jitter_spreads_the_waits() -> None:
    waits = set()
    for seed in range(20):
        subject = CircuitBreaker("h", clock=Clock(), generator=random.Random(seed))
        fail(subject, 3)
        waits.add(round(subject.retry_after_s, 6))
    assert len(waits) > 10
    assert all(0.75 <= wait <= 1.25 for wait in waits)


def test_threads_get_one_probe_between_them() -> None:
    clock = Clock()
    subject = breaker(clock)
    fail(subject, 3)
    clock.now_s += 1.0
    barrier = threading.Barrier(8)
    allowed: list[bool] = []

    def ask() -> None:
        barrier.wait()
        allowed.append(subject.allow())

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(allowed) == [False] * 7 + [True]
