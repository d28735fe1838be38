"""The engine's numbers, its clock and its thread."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from protos.errors import (
    DeadlineExceededError,
    DrainingError,
    EngineStoppedError,
    InternalError,
)
from router.engine.batch import Batch
from router.engine.engine import Engine
from router.engine.request import FinishReason, StepOutput
from tests.unit.router.engine_harness import (
    VOCAB,
    Outputs,
    assert_all_free,
    assert_as_expected,
    config_of,
    request_of,
    run,
)
from tests.unit.router.hash_model import HashModel

# Numbers and time.


def test_timings_follow_the_clock() -> None:
    now = 0.0
    outputs = Outputs()
    model = HashModel(VOCAB)
    engine = Engine(model, config_of(max_num_seqs=1), clock=lambda: now)

    def second(batch: Batch) -> None:
        nonlocal now
        now += 1.0

    model.before_forward = second
    engine.submit(request_of("a", [1], max_tokens=3, ignore_eos=True), outputs)
    engine.submit(request_of("b", [1], max_tokens=2, ignore_eos=True), outputs)
    run(engine)
    # "a" has its tokens at 1, 2 and 3; "b" is admitted at 3 and has its tokens at 4 and 5.
    a, b = outputs.last["a", 0].timings, outputs.last["b", 0].timings
    assert a is not None
    assert b is not None
    assert (a.queued_s, a.prefill_s, a.decode_s, a.time_to_first_token_s) == (0.0, 1.0, 2.0, 1.0)
    assert (b.queued_s, b.prefill_s, b.decode_s, b.time_to_first_token_s) == (3.0, 1.0, 1.0, 4.0)
    assert engine.stats().step_s == 5.0


def test_stats_count_what_is_held_and_done() -> None:
    outputs = Outputs()
    model = HashModel(VOCAB)
    model.dispatch_s = 2.5
    engine = Engine(model, config_of(max_num_seqs=1, max_num_batched_tokens=3))
    engine.submit(request_of("a", [1] * 5, max_tokens=2, ignore_eos=True), outputs)
    engine.submit(request_of("b", [1] * 5, max_tokens=2, ignore_eos=True), outputs)
    assert engine.stats().num_waiting == 2
    engine.step()
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.steps) == (1, 1, 1)
    assert (stats.num_blocks_used, stats.num_state_slots_used) == (2, 1)
    assert (stats.prompt_tokens, stats.generation_tokens) == (3, 0)
    run(engine)
    stats = engine.stats()
    assert (stats.prompt_tokens, stats.generation_tokens) == (10, 4)
    assert stats.dispatch_s == 2.5
    assert outputs.progress["a", 0] == [3, 5]


# The thread.


class Waiter(Outputs):
    """Outputs that a test can wait for."""

    def __init__(self, num_sequences: int) -> None:
        super().__init__()
        self.num_sequences = num_sequences
        self.done = threading.Event()
        self.first = threading.Event()

    def __call__(self, output: StepOutput) -> None:
        super().__call__(output)
        self.first.set()
        if len(self.last) == self.num_sequences:
            self.done.set()


class CountingEngine(Engine):
    """Counts calls of `step`, with or without work."""

    calls = 0

    def step(self) -> bool:
        self.calls += 1
        return super().step()


def test_the_thread_serves_sleeps_when_idle_and_drains() -> None:
    engine = CountingEngine(HashModel(VOCAB), config_of())
    engine.start()
    for round_ in range(5):
        waiter = Waiter(3)
        requests = [request_of(f"{round_}-{i}", [i, 1], max_tokens=6) for i in range(3)]
        for request in requests:
            engine.submit(request, waiter)
        assert waiter.done.wait(30)
        assert_as_expected(requests, waiter)
    late = Waiter(1)
    request = request_of("late", [1], max_tokens=40, ignore_eos=True)
    engine.submit(request, late)
    engine.stop(drain=True)
    assert_as_expected([request], late)
    assert_all_free(engine)
    # A spinning engine would have made thousands of empty steps while the test thread worked.
    assert engine.calls <= engine.stats().steps + 6 * 3
    with pytest.raises(EngineStoppedError):
        engine.submit(request_of("x", [1]), late)
    engine.stop()


def test_a_draining_engine_refuses_and_finishes() -> None:
    outputs = Outputs()
    engine = Engine(HashModel(VOCAB), config_of())
    request = request_of("a", [1], max_tokens=5)
    engine.submit(request, outputs)
    engine.drain()
    with pytest.raises(DrainingError):
        engine.submit(request_of("b", [1]), outputs)
    run(engine)
    assert_as_expected([request], outputs)


def test_stop_without_drain_ends_live_requests_with_an_error() -> None:
    model = HashModel(VOCAB)
    inside, go_on = threading.Event(), threading.Event()

    def wait(batch: Batch) -> None:
        inside.set()
        assert go_on.wait(30)

    model.before_forward = wait
    engine = Engine(model, config_of(max_num_seqs=1))
    engine.start()
    waiter = Waiter(2)
    engine.submit(request_of("running", [1], ignore_eos=True), waiter)
    engine.submit(request_of("waiting", [1]), waiter)
    assert inside.wait(30)
    stopper = threading.Thread(target=engine.stop, kwargs={"drain": False})
    stopper.start()
    go_on.set()
    stopper.join(30)
    for name in ("running", "waiting"):
        assert isinstance(waiter.last[name, 0].error, EngineStoppedError)
    assert_all_free(engine)


def test_an_engine_that_breaks_fails_every_request_and_refuses_new_ones() -> None:
    engine = Engine(HashModel(VOCAB), config_of())

    def broken(now: float) -> Any:
        raise RuntimeError("a bug")

    engine._scheduler.schedule = broken  # type: ignore[method-assign]
    engine.start()
    waiter = Waiter(1)
    engine.submit(request_of("a", [1]), waiter)
    assert waiter.done.wait(30)
    error = waiter.last["a", 0].error
    assert isinstance(error, InternalError)
    assert "RuntimeError: a bug" in str(error)
    with pytest.raises(EngineStoppedError):
        engine.submit(request_of("b", [1]), waiter)
    engine.stop()


def test_outputs_of_a_step_can_be_delivered_at_once() -> None:
    calls: list[int] = []
    outputs = Outputs()

    def deliver(pairs: list[Any]) -> None:
        calls.append(len(pairs))
        for sink, output in pairs:
            sink(output)

    engine = Engine(HashModel(VOCAB), config_of(), deliver=deliver)
    requests = [request_of(f"r{i}", [i], max_tokens=4, ignore_eos=True) for i in range(3)]
    for request in requests:
        engine.submit(request, outputs)
    run(engine)
    assert calls == [3, 3, 3, 3]
    assert_as_expected(requests, outputs)


# Sleep.


def test_requests_wait_while_the_engine_sleeps_and_run_as_ever_afterwards() -> None:
    now, asked = 0.0, list[int]()
    outputs = Outputs()
    engine = Engine(HashModel(VOCAB), config_of(), clock=lambda: now)
    assert engine.sleep(lambda: asked.append(1))
    request = request_of("a", [1, 2], max_tokens=4, ignore_eos=True)
    engine.submit(request, outputs)
    engine.submit(request_of("late", [1], max_tokens=4, deadline=5.0), outputs)
    engine.submit(request_of("left", [1], max_tokens=4), outputs)
    assert len(asked) == 3
    assert not engine.step()
    stats = engine.stats()
    assert (stats.num_waiting, stats.num_running, stats.steps) == (3, 0, 0)
    assert stats.is_asleep
    engine.cancel("left")
    now = 5.0
    assert not engine.step()
    assert outputs.last["left", 0].finish_reason is FinishReason.CANCELLED
    assert isinstance(outputs.last["late", 0].error, DeadlineExceededError)
    assert engine.sleep(lambda: None), "asking twice changes nothing, whoever waits"
    engine.wake()
    run(engine)
    assert_as_expected([request], outputs)
    assert_all_free(engine)
    assert not engine.stats().is_asleep


def test_an_engine_with_a_live_request_does_not_sleep() -> None:
    outputs = Outputs()
    engine = Engine(HashModel(VOCAB), config_of())
    engine.submit(request_of("a", [1], max_tokens=2, ignore_eos=True), outputs)
    assert not engine.sleep(lambda: None), "it waits"
    engine.step()
    assert not engine.sleep(lambda: None), "it runs"
    run(engine)
    assert engine.sleep(lambda: None)


def test_the_thread_wakes_for_what_came_while_it_slept() -> None:
    engine = Engine(HashModel(VOCAB), config_of())
    asked, ended = threading.Event(), threading.Event()

    def sink(output: StepOutput) -> None:
        if output.finish_reason is not None:
            ended.set()

    engine.start()
    assert engine.sleep(asked.set)
    engine.submit(request_of("a", [1], max_tokens=2, ignore_eos=True), sink)
    assert asked.wait(0), "by the one who submits"
    assert engine.stats().steps == 0
    engine.wake()
    assert ended.wait(30)
    engine.stop()
