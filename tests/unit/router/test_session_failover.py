"""A failover of the store to a replica that lags: a turn that it lost goes on with the same tokens
where the session stands as it began; else the client is told so. A real primary and its replica.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import pytest

from protos.errors import SessionFencedError
from protos.resume import Received
from protos.v1 import generation_pb2
from router.state.embedded import EmbeddedServer, Role
from router.state.endpoint import Endpoint
from tests.eventually import eventually
from tests.ports import free_port
from tests.unit.router.gateway_service import PROMPT, TEXT, GatewayService
from tests.unit.router.hash_script import HashScript
from tests.unit.router.session_service import (
    Messages,
    create,
    ids_of,
    router,
    run_turn,
    take,
    tokens_of,
    turn_request,
)
from tests.unit.state.proxy import Proxy
from tests.unit.state.test_session_faults import HOST, in_step
from tests.unit.state.turns import redis_of

DRAWN: dict[str, Any] = {"temperature": 0.8, "max_tokens": 12, "ignore_eos": True}
"""Without a seed: the router draws one, and `Accepted` names it."""


class Pair:
    """A primary and its replica, behind one address that leads to the primary at first."""

    def __init__(self, call: Callable[[Coroutine[Any, Any, Any]], Any]) -> None:
        self._call = call
        port = free_port()
        self.primary = EmbeddedServer.start(
            Role.META,
            extra=f"port {port}\nbind {HOST}\nprotected-mode no\nrepl-diskless-sync-delay 0",
        )
        self.replica = EmbeddedServer.start(Role.META, extra=f"replicaof {HOST} {port}")
        self._proxy = Proxy(self.primary)
        call(self._proxy.__aenter__())
        self.endpoint: Endpoint = self._proxy.endpoint

    def lose_what_follows(self) -> None:
        """Let the replica have all until now, and nothing more."""

        async def part() -> None:
            await in_step(self.primary)
            async with redis_of(self.replica) as redis:
                await redis.execute_command("REPLICAOF", "NO", "ONE")

        self._call(part())

    def fail_over(self) -> None:
        """Lead to the replica from now on."""

        async def turn_over() -> None:
            self._proxy.lead_to(self.replica)

        self._call(turn_over())

    def close(self) -> None:
        self._call(self._proxy.__aexit__())
        self.primary.close()
        self.replica.close()


@contextmanager
def running_loop() -> Iterator[Callable[[Coroutine[Any, Any, Any]], Any]]:
    """Run an event loop in a thread; yields what runs a coroutine in it."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def call(coroutine: Coroutine[Any, Any, Any]) -> Any:
        done: Future[Any] = asyncio.run_coroutine_threadsafe(coroutine, loop)
        return done.result(60)

    async def cancel_rest() -> None:
        rest = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    try:
        yield call
    finally:
        call(cancel_rest())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    with running_loop() as call:
        made = Pair(call)
        yield made
        made.close()


@contextmanager
def settling_router(pair: Pair, engine: str) -> Iterator[GatewayService]:
    """Run a router; at its end it has let go of all sessions before its store is closed."""
    with router(pair, engine, HashScript()) as service:  # type: ignore[arg-type]
        yield service
        eventually(lambda: service.servicer._turns.is_settled, 20)  # type: ignore[union-attr]


def lost_stream(
    service: GatewayService, request: generation_pb2.GenerateRequest, num_tokens: int
) -> tuple[Messages, Received]:
    """Take so many tokens of a turn and lose its stream; also what a client keeps of it."""
    service.model.stop_after(num_tokens)
    stream = service.client.messages(request)
    received = Received(request)
    held = take(stream, num_tokens)
    for message in held:
        received.take(message)
    stream.close()  # type: ignore[attr-defined]
    # Released before the gateway knows, the model may bring the turn to its end.
    eventually(lambda: service.servicer._live.get("", request.request_id) is None)
    service.model.stop_after(None)
    eventually(service.is_idle)
    return held, received


def undisturbed(pair: Pair, service: GatewayService, seed: int) -> Messages:
    create(pair, "undisturbed")
    run_turn(service, PROMPT, "undisturbed", max_tokens=5, ignore_eos=True)
    return run_turn(service, " upon", "undisturbed", **DRAWN, seed=seed)


def test_the_client_begins_a_lost_turn_again_on_another_router(pair: Pair) -> None:
    with settling_router(pair, "a") as first, settling_router(pair, "b") as second:
        create(pair, "s")
        run_turn(first, PROMPT, "s", max_tokens=5, ignore_eos=True)
        pair.lose_what_follows()
        request = turn_request(" upon", "s", request_id="r", **DRAWN)
        held, received = lost_stream(first, request, 4)
        pair.fail_over()
        messages = held + list(second.client.messages(received.again()))
        assert [message.sequence for message in messages] == list(range(1, 14))
        assert messages[-1].finished.persisted
        whole = undisturbed(pair, second, messages[0].accepted.seed)
        assert ids_of(messages) == ids_of(whole)
        assert tokens_of(pair, "s") == tokens_of(pair, "undisturbed")


@pytest.mark.parametrize("missing", ["digest", "tokens", "input", "seed"])
def test_without_proof_a_lost_turn_is_not_begun_again(pair: Pair, missing: str) -> None:
    with settling_router(pair, "a") as service:
        create(pair, "s")
        pair.lose_what_follows()
        request = turn_request(PROMPT, "s", request_id="r", **DRAWN)
        _, received = lost_stream(service, request, 4)
        pair.fail_over()
        again = received.again()
        if missing == "digest":
            again.resume_prompt_digest = b""
        elif missing == "tokens":
            again.ClearField("resume_tokens")
        elif missing == "input":
            again.ClearField("text")
        else:
            again.sampling.seed += 1
        with pytest.raises(SessionFencedError, match=r"read .*, and send"):
            list(service.client.messages(again))
        assert tokens_of(pair, "s") == []


@pytest.mark.parametrize("what", ["an earlier turn is lost, too", "another turn came first"])
def test_a_turn_is_not_put_behind_another_history(pair: Pair, what: str) -> None:
    with settling_router(pair, "a") as service:
        create(pair, "s")
        if what == "an earlier turn is lost, too":
            pair.lose_what_follows()
        run_turn(service, PROMPT, "s", max_tokens=5, ignore_eos=True)
        if what == "another turn came first":
            pair.lose_what_follows()
        request = turn_request(" upon", "s", request_id="r", **DRAWN)
        _, received = lost_stream(service, request, 4)
        pair.fail_over()
        if what == "another turn came first":
            run_turn(service, " a", "s", max_tokens=3, ignore_eos=True)
        before = tokens_of(pair, "s")
        with pytest.raises(SessionFencedError, match=f"it has {len(before)} tokens; read it"):
            list(service.client.messages(received.again()))
        assert tokens_of(pair, "s") == before


def test_a_running_turn_outlives_the_failover(pair: Pair) -> None:
    """The router that runs it opens it again; the stream does not notice."""
    with settling_router(pair, "a") as service:
        create(pair, "s")
        pair.lose_what_follows()
        service.model.stop_after(4)
        stream = service.client.messages(turn_request(PROMPT, "s", **DRAWN))
        held = take(stream, 4)
        pair.fail_over()
        service.model.stop_after(None)
        messages = held + list(stream)
        assert len(ids_of(messages)) == 12
        assert messages[-1].finished.persisted
        expected = TEXT.encode(PROMPT) + ids_of(messages)
        assert tokens_of(pair, "s") == expected
        assert len(ids_of(run_turn(service, " more", "s", max_tokens=2, ignore_eos=True))) == 2


def test_a_running_turn_ends_where_another_has_taken_the_session(pair: Pair) -> None:
    with settling_router(pair, "a") as first, settling_router(pair, "b") as second:
        create(pair, "s")
        pair.lose_what_follows()
        first.model.stop_after(4)
        stream = first.client.messages(turn_request(PROMPT, "s", **DRAWN))
        take(stream, 4)
        pair.fail_over()
        other = run_turn(second, " a", "s", max_tokens=3, ignore_eos=True)
        first.model.stop_after(None)
        with pytest.raises(SessionFencedError):
            list(stream)
        assert tokens_of(pair, "s") == TEXT.encode(" a") + ids_of(other)
