"""Clients that are killed, cancel, or read nothing any more: blocks, slots, leases, streams are 0.

The router is real but for its model, the store is real, the killed clients are processes.
"""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import aclosing, suppress

import grpc
import pytest

from protos.client import AsyncClient, ClientConfig, build_request
from protos.errors import (
    ClientStalledError,
    DeadlineExceededError,
    InvalidFieldError,
    MessageTooLargeError,
    from_rpc_error,
)
from protos.events import Delta
from protos.v1 import generation_pb2, generation_pb2_grpc
from router.gateway import interceptor
from tests.chaos.small_router import ROOT
from tests.eventually import eventually
from tests.store_servers import StoreServer, running_store
from tests.unit.router.gateway_service import PROMPT, GatewayService, running
from tests.unit.router.hash_script import BrakedScript
from tests.unit.router.session_service import ask, create, router

pytestmark = pytest.mark.timeout(400)

NUM_CANCELS = 80
NUM_KILLED, STREAMS_EACH = 4, 5
STORY = "There was once a model that told the same story again and again. "


@pytest.fixture(scope="module")
def server() -> Iterator[StoreServer]:
    with running_store() as running_server:
        yield running_server


@pytest.fixture
def service(server: StoreServer) -> Iterator[GatewayService]:
    with router(server, "a", BrakedScript(STORY)) as running_service:
        yield running_service


def assert_nothing_is_left(service: GatewayService, server: StoreServer | None = None) -> None:
    """Wait until the router holds nothing of any client, and the store no lease."""
    servicer = service.servicer
    eventually(service.is_idle, 20)
    eventually(lambda: not servicer._live._live)
    if server is None:
        return
    turns = servicer._turns
    assert turns is not None
    eventually(lambda: turns.is_settled)
    eventually(lambda: turns._store.num_leases == 0)
    records, _ = ask(server, lambda store: store.list("", 1000))
    assert [record.session_id for record in records if record.holder] == []


def test_killed_client_processes_leave_nothing_behind(
    server: StoreServer, service: GatewayService
) -> None:
    sessions = [f"killed-{i}" for i in range(NUM_KILLED * STREAMS_EACH // 2)]
    for session in sessions:
        create(server, session)
    names = iter([*sessions, *["-"] * (NUM_KILLED * STREAMS_EACH - len(sessions))])
    clients = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.chaos.streaming_client", service.address),
                *(next(names) for _ in range(STREAMS_EACH)),
            ],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for _ in range(NUM_KILLED)
    ]
    for client in clients:
        assert client.stdout is not None
        assert client.stdout.readline() == "streaming\n"
    assert service.engine.num_live > 0
    for client in clients:
        client.kill()
        client.wait()
        client.stdout.close()  # type: ignore[union-attr]
    assert_nothing_is_left(service, server)
    opened = [ask(server, lambda store, s=s: store.get("", s)).open_turn for s in sessions]
    assert all(turn is not None and turn.num_tokens > turn.prompt_tokens for turn in opened)


async def test_cancelled_and_expired_streams_leave_nothing_behind(
    server: StoreServer, service: GatewayService
) -> None:
    """At random tokens, in three ways, with sessions and without, all at once."""
    generator = random.Random(11)
    for number in range(NUM_CANCELS // 2):
        await asyncio.to_thread(create, server, f"cancelled-{number}")

    async def one(client: AsyncClient, number: int) -> None:
        way, at = generator.choice(("close", "expire", "cancel")), generator.randrange(40)
        options = {"session": f"cancelled-{number // 2}"} if number % 2 else {}
        timeout_s = generator.uniform(0.01, 0.5) if way == "expire" else 30.0
        request_id = f"cancelled-{number}"
        stream = client.generate(
            PROMPT, request_id=request_id, timeout_s=timeout_s, ignore_eos=True, **options
        )
        num_tokens = 0
        async with aclosing(stream):
            with suppress(DeadlineExceededError):
                async for event in stream:
                    num_tokens += len(event.token_ids) if isinstance(event, Delta) else 0
                    if num_tokens >= at and way == "close":
                        break
                    if num_tokens >= at and way == "cancel":
                        await client.cancel(request_id)

    async with AsyncClient(service.address, ClientConfig(max_attempts=1)) as client:
        await asyncio.gather(*(one(client, number) for number in range(NUM_CANCELS)))
    await asyncio.to_thread(assert_nothing_is_left, service, server)


def test_a_client_that_reads_nothing_any_more_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its connection lives and its window is full: neither its output nor its status gets out."""
    monkeypatch.setattr(interceptor, "ABORT_TIMEOUT_S", 0.3)
    small_window = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65535)]
    with running(BrakedScript(STORY), max_pending_tokens=10**9, stall_timeout_s=0.5) as service:
        idle = len(asyncio.all_tasks(service.thread._loop))
        with grpc.insecure_channel(service.address, options=small_window) as channel:
            stub = generation_pb2_grpc.GenerationServiceStub(channel)
            request, _ = build_request(PROMPT, {"max_tokens": 8000, "top_logprobs": 20})
            call = stub.Generate(request, timeout=200)
            assert next(iter(call)).HasField("accepted")
            assert_nothing_is_left(service)

            def handlers() -> int:
                tasks = asyncio.all_tasks(service.thread._loop)
                return sum("Generate" in task.get_name() for task in tasks)

            eventually(lambda: handlers() == 0)
            assert service.client.complete(PROMPT, max_tokens=3).token_ids, "others are served"
            with pytest.raises(grpc.RpcError) as caught:
                list(call)
        error = from_rpc_error(caught.value)
        assert isinstance(error, ClientStalledError)
        assert error.fields["stalled_s"] == 0.5
        eventually(lambda: len(asyncio.all_tasks(service.thread._loop)) <= idle)


def test_the_default_message_limit_is_64_mib(service: GatewayService) -> None:
    """A message just below it arrives, one just above it is refused with both sizes."""
    limit = 64 << 20
    small = generation_pb2.GenerateRequest(text="x", request_id="y" * (limit - 64))
    with pytest.raises(InvalidFieldError, match="request_id must be 1 to 128 characters"):
        list(service.client.messages(small))
    large = generation_pb2.GenerateRequest(text="x", request_id="y" * limit)
    with pytest.raises(MessageTooLargeError) as caught:
        list(service.client.messages(large))
    assert caught.value.fields["limit_bytes"] == limit
    assert_nothing_is_left(service)
