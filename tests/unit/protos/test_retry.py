"""When a call is sent again: the whole decision, without a connection and without a wait."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from typing import Any

import grpc
import pytest

from protos.batch_calls import BatchWatch
from protos.calls import Stream
from protos.errors import (
    DeadlineExceededError,
    ExpertMeshError,
    InvalidFieldError,
    NotReadyError,
    SessionBusyError,
    UnreachableError,
)
from protos.generation_calls import Generation
from protos.retry import Attempts, ClientConfig
from protos.routers import LEARN_AFTER_S, LEARN_INTERVAL_S, KnownRouters
from protos.v1 import batch_pb2, generation_pb2

CONFIG = ClientConfig(
    timeout_s=100.0,
    short_timeout_s=30.0,
    max_attempts=3,
    resume_timeout_s=20.0,
    first_backoff_s=1.0,
    max_backoff_s=4.0,
)
JITTER = 1.25


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def routers() -> Iterator[KnownRouters]:
    made = KnownRouters("a:1, b:1", grpc.insecure_channel)
    yield made
    for channel in made.close():
        channel.close()


def failure(code: grpc.StatusCode, details: str = "gone") -> grpc.RpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details)


def raised(error: ExpertMeshError) -> grpc.RpcError:
    trailers = grpc.aio.Metadata(*error.trailers())
    return grpc.aio.AioRpcError(error.code, grpc.aio.Metadata(), trailers, error.message)


GONE = failure(grpc.StatusCode.UNAVAILABLE)
TOO_LATE = failure(grpc.StatusCode.DEADLINE_EXCEEDED)


def generation(n: int = 1) -> Stream[Any]:
    request = generation_pb2.GenerateRequest(sampling=generation_pb2.Sampling(n=n))
    return Generation(request, None, lambda message: (message,))


def watch() -> Stream[Any]:
    return BatchWatch(batch_pb2.WatchBatchRequest(name="x"))


def send(attempts: Attempts, error: grpc.RpcError) -> tuple[str, float]:
    """Let a send fail; return which router it went to, and the wait before the next."""
    address = attempts.next_router().address
    return address, attempts.failed(error)


def test_all_routers_are_asked_before_there_is_a_wait(routers: KnownRouters, clock: Clock) -> None:
    attempts = Attempts(CONFIG, routers, clock=clock)
    sends = [send(attempts, GONE) for _ in range(5)]
    assert [address for address, _ in sends] == ["a:1", "b:1", "a:1", "b:1", "a:1"]
    waits = [wait_s for _, wait_s in sends]
    assert waits[0] == 0.0
    # Rounds 1, 1, 2, 2: 1 s and 2 s, each times 0.75 to 1.25.
    assert all(0.75 <= wait_s <= 1.25 for wait_s in waits[1:3])
    assert all(1.5 <= wait_s <= 2.5 for wait_s in waits[3:])
    with pytest.raises(UnreachableError, match="gone"):  # 3 attempts at each of 2 routers
        send(attempts, GONE)


def test_the_server_may_ask_for_a_longer_wait(routers: KnownRouters, clock: Clock) -> None:
    attempts = Attempts(CONFIG, routers, clock=clock)
    not_ready = raised(NotReadyError("loads", 9.5))
    assert [send(attempts, not_ready)[1] for _ in range(2)] == [0.0, 9.5]


def test_an_error_of_the_request_is_raised_as_it_is(routers: KnownRouters, clock: Clock) -> None:
    attempts = Attempts(CONFIG, routers, clock=clock)
    with pytest.raises(InvalidFieldError, match="top_p"):
        send(attempts, raised(InvalidFieldError("sampling.top_p", "must be at most 1", 2.0)))
    assert routers.current().address == "a:1"


def test_a_deadline_is_over_all_sends(routers: KnownRouters, clock: Clock) -> None:
    attempts = Attempts(CONFIG, routers, clock=clock)
    assert attempts.left_s() == 30.0
    clock.now += 29.5
    assert attempts.left_s() == 0.5
    assert send(attempts, GONE)[1] == 0.0
    with pytest.raises(UnreachableError):  # 0.75 s of backoff at least
        send(attempts, GONE)
    clock.now += 1.0
    assert attempts.left_s() == 0.001


def test_a_stream_that_broke_is_tried_for_longer_than_one_that_never_began(
    routers: KnownRouters, clock: Clock
) -> None:
    attempts = Attempts(CONFIG, routers, generation(), clock=clock)
    attempts.next_router()
    attempts.arrived()
    begun, waits = clock.now, []
    with suppress(UnreachableError):
        for _ in range(100):
            waits.append(send(attempts, GONE)[1])
            clock.now += waits[-1]
    assert CONFIG.max_attempts * 2 < len(waits) < 100
    assert 20.0 - 4.0 * JITTER <= clock.now - begun < 20.0  # resume_timeout_s


def test_what_arrives_makes_the_next_failure_the_first(routers: KnownRouters, clock: Clock) -> None:
    attempts = Attempts(CONFIG, routers, generation(), clock=clock)
    attempts.arrived()
    for _ in range(4):
        assert send(attempts, GONE)[1] == 0.0
        clock.now += 15.0
        assert send(attempts, GONE)[1] > 0.0
        attempts.arrived()


@pytest.mark.parametrize(
    ("config", "n"), [(CONFIG, 2), (ClientConfig(max_attempts=1), 1)], ids=["n=2", "one attempt"]
)
def test_some_streams_cannot_go_on(
    config: ClientConfig, n: int, routers: KnownRouters, clock: Clock
) -> None:
    attempts = Attempts(config, routers, generation(n), clock=clock)
    attempts.next_router()
    attempts.arrived()
    with pytest.raises(UnreachableError):
        attempts.failed(GONE)


def test_a_held_session_is_waited_for_only_after_a_failure(
    routers: KnownRouters, clock: Clock
) -> None:
    held = raised(SessionBusyError("s", "router-0", 0.5))
    with pytest.raises(SessionBusyError):
        send(Attempts(CONFIG, routers, generation(), clock=clock), held)
    attempts = Attempts(CONFIG, routers, generation(), clock=clock)
    send(attempts, GONE)
    for _ in range(3):
        assert send(attempts, held)[1] >= 0.5


def test_a_reset_stream_is_sent_again_but_not_a_cancelled_one(
    routers: KnownRouters, clock: Clock
) -> None:
    attempts = Attempts(CONFIG, routers, generation(), clock=clock)
    assert send(attempts, failure(grpc.StatusCode.CANCELLED, "CANCELLED"))[1] == 0.0
    with pytest.raises(ExpertMeshError, match="by the user"):
        send(attempts, failure(grpc.StatusCode.CANCELLED, "by the user"))


def test_a_watch_outlasts_its_deadline_at_the_same_router(
    routers: KnownRouters, clock: Clock
) -> None:
    attempts = Attempts(CONFIG, routers, watch(), clock=clock)
    for _ in range(3):
        assert attempts.left_s() == BatchWatch.timeout_s
        attempts.arrived()
        clock.now += 1800.0
        assert send(attempts, TOO_LATE) == ("a:1", 0.0)
    assert send(attempts, GONE) == ("a:1", 0.0)
    assert send(attempts, GONE)[0] == "b:1"


def test_a_watch_that_never_began_fails_with_its_deadline(
    routers: KnownRouters, clock: Clock
) -> None:
    with pytest.raises(DeadlineExceededError):
        send(Attempts(CONFIG, routers, watch(), clock=clock), TOO_LATE)


def test_routers_are_asked_for_now_and_then(routers: KnownRouters, clock: Clock) -> None:
    attempts = Attempts(CONFIG, routers, generation(), clock=clock)
    assert not attempts.should_learn()
    clock.now += LEARN_AFTER_S
    due = []
    for _ in range(70):
        if attempts.should_learn():
            due.append(clock.now)
        clock.now += 1.0
    assert [later - earlier for earlier, later in pairwise(due)] == [LEARN_INTERVAL_S] * 2


def test_who_sends_once_does_not_ask_for_routers(routers: KnownRouters, clock: Clock) -> None:
    attempts = Attempts(ClientConfig(max_attempts=1), routers, generation(), clock=clock)
    clock.now += 10 * LEARN_AFTER_S
    assert not attempts.should_learn()
