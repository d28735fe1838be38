"""Tenants over real gRPC and servers: nobody meets, or can tell apart from nothing, another's.

`a` and `b` are tenants, `plain` is a key without one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import grpc
import pytest

from protos.client import Client, ClientConfig
from protos.errors import (
    PermissionDeniedError,
    SessionExistsError,
    SessionFencedError,
    SessionNotFoundError,
    from_rpc_error,
)
from protos.tls import Access
from protos.v1 import cluster_pb2, cluster_pb2_grpc, session_pb2, session_pb2_grpc
from router.engine.chain import tenant_namespace
from router.gateway.authentication import ApiKey, Callers
from router.gateway.server import GatewayOptions, GrpcService
from router.state.sessions import SessionStore
from tests.eventually import eventually
from tests.store_servers import StoreServer, running_store
from tests.unit.router.gateway_service import GatewayService, running
from tests.unit.router.hash_model import ReusingHashModel
from tests.unit.router.hash_script import HashScript
from tests.unit.router.session_service import ids_of, take, turn_request

KEYS = (ApiKey("key-a", "a"), ApiKey("key-b", "b"), ApiKey("key-plain"))
ONCE = ClientConfig(timeout_s=30, short_timeout_s=10, max_attempts=1)


class ReusingScript(HashScript, ReusingHashModel):
    """Every token depends on all before it, and prefixes are reused."""


class Served(NamedTuple):
    service: GatewayService
    a: Client
    b: Client
    plain: Client


@pytest.fixture(scope="module")
def server() -> Iterator[StoreServer]:
    with running_store() as started:
        yield started


@contextmanager
def served_by(model: Any, server: StoreServer) -> Iterator[Served]:
    store = SessionStore.connect(server.endpoint, engine="r")
    options = GatewayOptions(api_keys=KEYS)
    with running(model, store=store, options=options, callers=Callers(KEYS)) as service:
        clients = [Client(service.address, ONCE, api_key=key.key) for key in KEYS]
        yield Served(service, *clients)
        for client in clients:
            client.close()


@pytest.fixture(scope="module")
def served(server: StoreServer) -> Iterator[Served]:
    with served_by(HashScript(), server) as found:
        yield found


def run_turn(client: Client, prompt: Any, session_id: str, **options: Any) -> list[int]:
    options = {"max_tokens": 4, "ignore_eos": True} | options
    return ids_of(list(client.messages(turn_request(prompt, session_id, **options))))


def test_each_tenant_has_sessions_of_its_own_under_any_name(served: Served) -> None:
    """Two tenants and the unnamed one use one id, and see their own."""
    tokens = {}
    for name in ("a", "b", "plain"):
        client: Client = getattr(served, name)
        client.create_session("mine", metadata={"of": name})
        with pytest.raises(SessionExistsError):
            client.create_session("mine")
        tokens[name] = run_turn(client, f"I am {name}", "mine")
        client.create_session(f"only-{name}")
    for name in ("a", "b", "plain"):
        client = getattr(served, name)
        assert [s.session_id for s in client.list_sessions()] == ["mine", f"only-{name}"]
        session = client.get_session("mine", include_token_ids=True)
        assert session.metadata["of"] == name
        assert list(session.token_ids)[-4:] == tokens[name]
        assert client.delete_session(f"only-{name}")
        assert client.delete_session("mine")


def everything(stub: Any, session_id: str, other_id: str) -> dict[str, Callable[[], Any]]:
    """Every call that names a session."""
    return {
        "get": lambda: stub.GetSession(
            session_pb2.GetSessionRequest(
                session_id=session_id, include_turns=True, include_token_ids=True
            ),
            timeout=10,
        ),
        "fork": lambda: stub.ForkSession(
            session_pb2.ForkSessionRequest(session_id=session_id, new_session_id=other_id),
            timeout=10,
        ),
        "delete": lambda: stub.DeleteSession(
            session_pb2.DeleteSessionRequest(session_id=session_id), timeout=10
        ),
    }


def outcome(call: Callable[[], Any], session_id: str) -> tuple[object, ...]:
    """What a client gets, to the last byte of its trailers, with the session's id taken out."""
    try:
        answer = call()
    except grpc.RpcError as error:
        details = dict(error.trailing_metadata())["grpc-status-details-bin"]  # type: ignore[union-attr]
        shown = details.replace(session_id.encode(), b"ID")
        return error.code(), error.details().replace(session_id, "ID"), shown
    return (answer.SerializeToString(),)


@pytest.mark.parametrize("tenant", ["b", "plain"])
def test_a_foreign_session_is_one_that_does_not_exist(served: Served, tenant: str) -> None:
    served.a.create_session("secret")
    history = run_turn(served.a, "Once", "secret")
    key = {"b": "key-b", "plain": "key-plain"}[tenant]
    with Access(api_key=key).channel(served.service.address) as channel:
        stub = session_pb2_grpc.SessionServiceStub(channel)
        foreign, missing = (everything(stub, name, "copy") for name in ("secret", "absent"))
        for name in foreign:
            got = outcome(foreign[name], "secret")
            assert got == outcome(missing[name], "absent"), name
    client: Client = getattr(served, tenant)
    with pytest.raises(SessionNotFoundError, match="session 'secret' is not there"):
        run_turn(client, "more", "secret")
    assert not list(client.list_sessions())
    assert list(served.a.get_session("secret", include_token_ids=True).token_ids)[-4:] == history
    assert served.a.delete_session("secret")


@pytest.mark.parametrize("session_id", ["talk", ""], ids=["session", "no_session"])
def test_a_foreign_request_is_one_that_does_not_run(served: Served, session_id: str) -> None:
    """It is neither cancelled nor taken over, and its id is free."""
    for client in (served.a, served.b):
        client.create_session("talk")
    model = served.service.model
    model.stop_after(2)
    request = turn_request("Once", session_id, request_id="same", max_tokens=6, ignore_eos=True)
    stream = served.a.messages(request)
    held = take(stream, 1)
    eventually(lambda: model.is_stopped)
    assert served.b.cancel("same") == []
    resumed = type(request)()
    resumed.CopyFrom(request)
    resumed.resume_from = 2
    if session_id:
        with pytest.raises(SessionFencedError, match="the turn of request same is not open"):
            list(served.b.messages(resumed))
    model.stop_after(None)
    # Without a session, the client's tokens are all that is needed to go on.
    theirs = list(served.b.messages(request if session_id else resumed))
    ours = held + list(stream)
    assert len(ids_of(ours)) == ours[-1].usage.completion_tokens == 6
    assert theirs[-1].finished.reason == ours[-1].finished.reason
    eventually(served.service.is_idle)
    for client in (served.a, served.b):
        assert client.delete_session("talk")


def test_cached_tokens_are_a_tenants_own(server: StoreServer) -> None:
    """What each tenant begins is cold, however far another one is; what it goes on from is warm."""
    prompt, other = ([7 + i % n for i in range(300)] for n in (200, 190))

    def cached(client: Client, prompt_ids: list[int], session_id: str) -> int:
        request = turn_request(prompt_ids, session_id, max_tokens=2, ignore_eos=True)
        (*_, last) = client.messages(request)
        return last.usage.cached_prompt_tokens

    with served_by(ReusingScript(), server) as served:
        for client in (served.a, served.b, served.plain):
            client.create_session("cached")
            assert cached(client, prompt, "cached") == 0
        for client in (served.a, served.b, served.plain):
            assert cached(client, [*prompt, 5, 6], "") == 300
        for more, client in enumerate((served.a, served.b, served.plain)):
            assert cached(client, other + more * [5], "") == 0


def test_the_namespace_of_a_tenant_is_its_own_and_the_unnamed_ones_the_routers() -> None:
    names = {tenant_namespace(base, tenant) for base in ("n", "m") for tenant in ("a", "b", "")}
    assert len(names) == 6
    assert tenant_namespace("n", "") == "n"
    assert tenant_namespace("n", "a") == tenant_namespace("n", "a")


class Operated(cluster_pb2_grpc.ClusterServiceServicer):
    """Answers everything."""

    async def GetStatus(self, request: Any, context: Any) -> cluster_pb2.ClusterStatus:
        return cluster_pb2.ClusterStatus()

    async def Drain(self, request: Any, context: Any) -> cluster_pb2.DrainResponse:
        return cluster_pb2.DrainResponse()


def test_a_tenant_looks_at_the_service_and_does_not_change_it() -> None:
    name = cluster_pb2.DESCRIPTOR.services_by_name["ClusterService"].full_name
    added = cluster_pb2_grpc.add_ClusterServiceServicer_to_server
    services = (GrpcService(name, Operated(), added),)
    with running(services=services, options=GatewayOptions(api_keys=KEYS)) as service:
        for key in KEYS:
            with Access(api_key=key.key).channel(service.address) as channel:
                stub = cluster_pb2_grpc.ClusterServiceStub(channel)
                stub.GetStatus(cluster_pb2.GetStatusRequest(), timeout=10)
                if not key.tenant:
                    stub.Drain(cluster_pb2.DrainRequest(), timeout=10)
                    continue
                for call, request in (
                    (stub.Drain, cluster_pb2.DrainRequest()),
                    (stub.Scale, cluster_pb2.ScaleRequest()),
                    (stub.ApplyPlacement, cluster_pb2.ApplyPlacementRequest()),
                ):
                    with pytest.raises(grpc.RpcError) as caught:
                        call(request, timeout=10)
                    error = from_rpc_error(caught.value)
                    assert isinstance(error, PermissionDeniedError)
