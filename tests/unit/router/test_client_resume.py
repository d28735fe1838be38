"""The client library when connections break under it: every token once, on any router."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from protos.client import AsyncClient, Client, ClientConfig
from protos.errors import (
    DeadlineExceededError,
    ExpertMeshError,
    InvalidFieldError,
    UnreachableError,
)
from protos.events import Accepted, Completion, Delta, Prefill
from protos.v1 import cluster_pb2, cluster_pb2_grpc
from router.gateway.server import GrpcService
from tests.eventually import eventually
from tests.store_servers import StoreServer, running_store
from tests.tcp_proxy import TcpProxy, proxied
from tests.unit.router.gateway_service import PROMPT, GatewayService, running
from tests.unit.router.hash_script import HashScript
from tests.unit.router.session_service import ask, create, router, tokens_of

QUICK = ClientConfig(timeout_s=30, first_backoff_s=0.02, max_backoff_s=0.1, resume_timeout_s=20)
OPTIONS: dict[str, Any] = {
    "max_tokens": 30,
    "ignore_eos": True,
    "temperature": 0.9,
    "frequency_penalty": 0.2,
}


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[GatewayService, GatewayService]]:
    with running(HashScript()) as first, running(HashScript()) as second:
        yield first, second


@contextmanager
def breakable(
    first: GatewayService, second: GatewayService, config: ClientConfig = QUICK
) -> Iterator[tuple[TcpProxy, Client]]:
    """Give a client two routers, the first one behind a connection that can be cut."""
    with ExitStack() as stack:
        proxy = stack.enter_context(proxied(first.address))
        client = stack.enter_context(Client(f"{proxy.address}, {second.address}", config))
        yield proxy, client


def collect(client: Client, proxy: TcpProxy, model: HashScript, at: int, **options: Any) -> Any:
    """Take a stream whose connection is cut after `at` tokens; return events and completion."""
    model.stop_after(at)
    events, completion, is_cut = [], Completion(), False
    for event in client.generate(PROMPT, **{**OPTIONS, **options}):
        events.append(event)
        completion.add(event)
        if len(completion.token_ids) == at and not is_cut:
            is_cut = True
            model.wait_until_stopped()
            proxy.cut()
            model.stop_after(None)
    assert is_cut
    return events, completion


@pytest.mark.parametrize("at", [1, 7, 29])
def test_a_stream_goes_on_at_the_next_router(
    pair: tuple[GatewayService, GatewayService], at: int
) -> None:
    first, second = pair
    whole = second.client.complete(PROMPT, seed=3, **OPTIONS)
    with breakable(first, second) as (proxy, client):
        events, completion = collect(client, proxy, first.model, at, seed=3)
    assert completion.token_ids == whole.token_ids
    assert completion.text == whole.text
    assert sum(isinstance(event, Accepted) for event in events) == 1
    assert sum(isinstance(event, Prefill) for event in events) == 1
    finished, expected = completion.choices[0].finished, whole.choices[0].finished
    assert finished is not None
    assert expected is not None
    assert finished.usage == expected.usage
    eventually(first.is_idle)
    eventually(second.is_idle)


def test_a_drawn_seed_and_hidden_ids_go_on_too(
    pair: tuple[GatewayService, GatewayService],
) -> None:
    """The caller gave no seed and wants no ids: the library keeps both for itself."""
    first, second = pair
    with breakable(first, second) as (proxy, client):
        first.model.stop_after(6)
        events, text, is_cut = [], "", False
        for event in client.generate(PROMPT, return_token_ids=False, **OPTIONS):
            events.append(event)
            text += event.text if isinstance(event, Delta) else ""
            if isinstance(event, Delta) and not is_cut:
                is_cut = True
                first.model.wait_until_stopped()
                proxy.cut()
                first.model.stop_after(None)
    assert not any(event.token_ids for event in events if isinstance(event, Delta))
    (accepted,) = [event for event in events if isinstance(event, Accepted)]
    assert text == second.client.complete(PROMPT, seed=accepted.seed, **OPTIONS).text


def test_one_router_whose_connection_comes_back(
    pair: tuple[GatewayService, GatewayService],
) -> None:
    first, second = pair
    whole = second.client.complete(PROMPT, seed=3, **OPTIONS)
    with proxied(first.address) as proxy, Client(proxy.address, QUICK) as client:
        first.model.stop_after(5)
        completion, is_cut = Completion(), False
        for event in client.generate(PROMPT, seed=3, **OPTIONS):
            completion.add(event)
            if len(completion.token_ids) == 5 and not is_cut:
                is_cut = True
                first.model.wait_until_stopped()
                proxy.cut(for_good=False)
                first.model.stop_after(None)
    assert completion.token_ids == whole.token_ids
    assert proxy.num_connections >= 2


async def test_the_async_client_goes_on_too(
    pair: tuple[GatewayService, GatewayService],
) -> None:
    first, second = pair
    whole = await asyncio.to_thread(second.client.complete, PROMPT, seed=3, **OPTIONS)
    with proxied(first.address) as proxy:
        async with AsyncClient([proxy.address, second.address], QUICK) as client:
            first.model.stop_after(9)
            completion, is_cut = Completion(), False
            async for event in client.generate(PROMPT, seed=3, **OPTIONS):
                completion.add(event)
                if len(completion.token_ids) == 9 and not is_cut:
                    is_cut = True
                    await asyncio.to_thread(first.model.wait_until_stopped)
                    proxy.cut()
                    first.model.stop_after(None)
    assert completion.token_ids == whole.token_ids


def test_the_deadline_holds_over_all_routers(
    pair: tuple[GatewayService, GatewayService],
) -> None:
    """The second router hangs: the call ends when the first one's deadline would have."""
    first, second = pair
    with breakable(first, second) as (proxy, client):
        second.model.stop_after(0)
        begun = time.monotonic()
        with pytest.raises(DeadlineExceededError):
            collect(client, proxy, first.model, 3, timeout_s=2.0)
        assert time.monotonic() - begun < 10
        second.model.stop_after(None)
    eventually(second.is_idle)


def test_what_cannot_be_resumed_fails_as_it_did(
    pair: tuple[GatewayService, GatewayService],
) -> None:
    """Several sequences, or a caller that wants one attempt."""
    first, second = pair
    for config, options in (
        (QUICK, {"n": 2}),
        (ClientConfig(timeout_s=30, max_attempts=1), {}),
    ):
        with breakable(first, second, config) as cut, pytest.raises(UnreachableError):
            collect(cut[1], cut[0], first.model, 4, **options)
        first.model.stop_after(None)
        eventually(first.is_idle)


def test_an_error_of_the_request_keeps_the_router(
    pair: tuple[GatewayService, GatewayService],
) -> None:
    first, _ = pair
    with Client([first.address, "127.0.0.1:1"], QUICK) as client:
        with pytest.raises(InvalidFieldError):
            client.complete(PROMPT, temperature=-1)
        assert client.complete(PROMPT, max_tokens=1).token_ids
    with Client(["127.0.0.1:1", first.address], QUICK) as client:
        assert client.complete(PROMPT, max_tokens=1).token_ids
        [model] = client.list_models()
        assert (model.name, json.loads(model.sampling_defaults_json)["temperature"]) == (
            "script",
            1,
        )
        deltas = [
            list(event.token_ids)
            for event in client.generate(PROMPT, max_tokens=70, ignore_eos=True, priority="batch")
            if isinstance(event, Delta)
        ]
        assert all(len(ids) >= 32 for ids in deltas[:-1])
        assert sum(map(len, deltas)) == 70
    with pytest.raises(ValueError, match="needs the address"):
        Client(" , ")


def test_a_long_stream_teaches_the_client_the_other_routers() -> None:
    class Cluster(cluster_pb2_grpc.ClusterServiceServicer):
        async def GetStatus(self, request: Any, context: Any) -> cluster_pb2.ClusterStatus:
            return cluster_pb2.ClusterStatus(
                routers=[
                    cluster_pb2.RouterStatus(state=state, grpc_address=address)
                    for state, address in (("READY", second.address), ("LOST", "127.0.0.1:1"))
                ]
            )

    name = cluster_pb2.DESCRIPTOR.services_by_name["ClusterService"].full_name
    extra = GrpcService(name, Cluster(), cluster_pb2_grpc.add_ClusterServiceServicer_to_server)
    with ExitStack() as stack:
        second = stack.enter_context(running(HashScript()))
        first = stack.enter_context(running(HashScript(), services=(extra,)))
        proxy = stack.enter_context(proxied(first.address))
        client = stack.enter_context(Client(proxy.address, QUICK))
        whole = second.client.complete(PROMPT, seed=3, **OPTIONS)
        first.model.stop_after(4)
        completion, is_old, is_cut = Completion(), False, False
        for event in client.generate(PROMPT, seed=3, **OPTIONS):
            completion.add(event)
            if len(completion.token_ids) == 4 and not is_old:
                # The next token comes when the stream is old enough to ask.
                is_old, begun = True, time.monotonic()
                eventually(lambda begun=begun: time.monotonic() - begun > 1.1)
                first.model.go_on(1)
            elif len(completion.token_ids) == 5 and not is_cut:
                is_cut = True
                eventually(lambda: len(client.addresses) == 2)
                first.model.wait_until_stopped()
                proxy.cut()
                first.model.stop_after(None)
        assert client.addresses == [proxy.address, second.address]
        assert completion.token_ids == whole.token_ids


# Sessions


@pytest.fixture(scope="module")
def server() -> Iterator[StoreServer]:
    with running_store() as running_server:
        yield running_server


def test_session_calls(server: StoreServer) -> None:
    with router(server, "a") as service:
        client = service.client
        made = client.create_session(
            "chat-1", ttl_s=90, quota_tokens=100, metadata={"title": "first"}
        )
        assert (made.session_id, made.ttl.seconds, made.quota_tokens) == ("chat-1", 90, 100)
        assert client.create_session().session_id.startswith("session-")
        answer = client.complete("Once", session="chat-1", max_tokens=5, ignore_eos=True)
        client.complete(" more", session="chat-1", max_tokens=3, ignore_eos=True)
        found = client.get_session("chat-1", include_turns=True, include_token_ids=True)
        assert dict(found.metadata) == {"title": "first"}
        assert (found.num_tokens, found.num_turns) == (4 + 5 + 5 + 3, 2)
        assert list(found.token_ids)[4:9] == answer.token_ids
        assert [(t.turn, t.first_token, t.prompt_tokens) for t in found.turns] == [
            (1, 0, 4),
            (2, 9, 5),
        ]
        fork = client.fork_session("chat-1", "fork-1", at_tokens=7)
        assert (fork.num_tokens, fork.quota_tokens) == (7, 100)
        forked = client.complete(
            " less", session="fork-1", temperature=0, max_tokens=4, ignore_eos=True
        )
        ids = [*list(found.token_ids)[:7], *client.tokenize(" less")]
        fresh = client.complete(ids, temperature=0, max_tokens=4, ignore_eos=True)
        assert forked.token_ids == fresh.token_ids
        assert client.get_session("chat-1").num_tokens == 17
        names = [session.session_id for session in client.list_sessions(page_size=2)]
        assert {"chat-1", "fork-1"} <= set(names)
        assert names == sorted(names)
        assert client.delete_session("chat-1")
        assert not client.delete_session("chat-1")
        with pytest.raises(ExpertMeshError, match="session 'chat-1' is not there"):
            client.get_session("chat-1")
        with pytest.raises(InvalidFieldError, match="ttl must be in"):
            client.create_session(ttl_s=0.5)
        with pytest.raises(InvalidFieldError, match="metadata must have at most 32 entries"):
            client.create_session(metadata={str(i): "" for i in range(33)})


async def test_async_session_calls(server: StoreServer) -> None:
    with router(server, "a") as service:
        async with AsyncClient(service.address, QUICK) as client:
            await client.create_session("async-1")
            await client.complete("Once", session="async-1", max_tokens=2, ignore_eos=True)
            await client.fork_session("async-1", "async-2")
            names = [s.session_id async for s in client.list_sessions()]
            assert {"async-1", "async-2"} <= set(names)
            assert (await client.get_session("async-2")).num_tokens == 6
            assert await client.delete_session("async-2")


def test_a_sessions_stream_goes_on_at_the_next_router(server: StoreServer) -> None:
    """The first router lives and lets go of the session; the second one has it from the store."""
    with router(server, "a", HashScript()) as first, router(server, "b", HashScript()) as second:
        create(server, "whole")
        create(server, "broken")
        whole = second.client.complete(PROMPT, seed=3, session="whole", **OPTIONS)
        with breakable(first, second) as (proxy, client):
            _, completion = collect(client, proxy, first.model, 8, seed=3, session="broken")
        assert completion.token_ids == whole.token_ids
        assert completion.text == whole.text
        assert tokens_of(server, "broken") == tokens_of(server, "whole")
        assert ask(server, lambda store: store.get("", "broken")).holder is None
