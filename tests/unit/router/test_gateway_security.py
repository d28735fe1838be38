"""The port with TLS and API keys: who gets in, and what the others are told."""

from __future__ import annotations

import logging
import queue
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from protos.certificates import CertificateFiles, Identity, port_identity
from protos.client import AsyncClient, Client, ClientConfig
from protos.errors import (
    ConfigurationError,
    UnauthenticatedError,
    UnreachableError,
    from_rpc_error,
)
from protos.tls import Access, ClientTls
from protos.v1 import generation_pb2, generation_pb2_grpc
from router.gateway.authentication import ApiKey
from router.gateway.server import GatewayOptions
from tests.certificates import SERVER_ONLY, Authority, Issued
from tests.eventually import eventually
from tests.silent_socket import connect_silently, is_closed_by_peer
from tests.unit.router.gateway_service import PROMPT, ScriptModel, running

KEYS = ("first-key", "second-key")
API_KEYS = tuple(ApiKey(key) for key in KEYS)
ONCE = ClientConfig(timeout_s=20, short_timeout_s=10, max_attempts=1)


class Pki(NamedTuple):
    ca: Authority
    """Of the port."""
    clients: Authority
    """Of clients' certificates."""
    stranger: Authority
    port: Issued
    client: Issued


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    folder = tmp_path_factory.mktemp("pki")
    ca, clients, stranger = (Authority(folder, name) for name in ("ca", "clients", "stranger"))
    port = ca.issue("port", names=("mesh.test", "127.0.0.1"), usages=SERVER_ONLY)
    return Pki(ca, clients, stranger, port, clients.issue("client", names=("somebody",)))


def identity(pki: Pki, *, client_ca: bool = False) -> Identity:
    found = port_identity(
        CertificateFiles(
            section="router",
            keyfile=str(pki.port.keyfile),
            certfile=str(pki.port.certfile),
            ca_certs=str(pki.clients.certfile) if client_ca else None,
        )
    )
    assert found is not None
    return found


@pytest.fixture(scope="module")
def tls_address(pki: Pki) -> Iterator[str]:
    options = GatewayOptions(tls=identity(pki).server)
    with running(ScriptModel("answer"), options=options) as service:
        yield service.address


@pytest.fixture(scope="module")
def mutual_address(pki: Pki) -> Iterator[str]:
    options = GatewayOptions(tls=identity(pki, client_ca=True).server)
    with running(ScriptModel("answer"), options=options) as service:
        yield service.address


@pytest.fixture(scope="module")
def keyed_address() -> Iterator[str]:
    with running(ScriptModel("answer"), options=GatewayOptions(api_keys=API_KEYS)) as service:
        yield service.address


def text_of(address: str, tls: ClientTls | None = None, api_key: str | None = None) -> str:
    with Client(address, ONCE, tls=tls, api_key=api_key) as client:
        return client.complete(PROMPT, max_tokens=6, temperature=0.0).text


async def test_the_right_ca_gets_an_answer(pki: Pki, tls_address: str) -> None:
    tls = ClientTls.from_files(pki.ca.certfile)
    assert text_of(tls_address, tls) == "answer"
    assert text_of(f"grpcs://{tls_address}", tls) == "answer"
    async with AsyncClient(tls_address, ONCE, tls=tls) as client:
        assert (await client.complete(PROMPT, max_tokens=6, temperature=0.0)).text == "answer"


def test_others_than_the_right_ca_get_none(pki: Pki, tls_address: str) -> None:
    with pytest.raises(UnreachableError):
        text_of(tls_address)
    with pytest.raises(UnreachableError, match="CERTIFICATE_VERIFY_FAILED"):
        text_of(tls_address, ClientTls.from_files(pki.stranger.certfile))
    with pytest.raises(UnreachableError, match="CERTIFICATE_VERIFY_FAILED"):
        text_of(f"grpcs://{tls_address}")
    with pytest.raises(UnreachableError, match="Hostname Verification Check failed"):
        text_of(tls_address, ClientTls.from_files(pki.ca.certfile, server_name="other.test"))


def test_a_client_certificate_is_demanded(pki: Pki, mutual_address: str) -> None:
    def with_certificate(issued: Issued) -> ClientTls:
        return ClientTls.from_files(pki.ca.certfile, issued.certfile, issued.keyfile)

    assert text_of(mutual_address, with_certificate(pki.client)) == "answer"
    with pytest.raises(UnreachableError):
        text_of(mutual_address, ClientTls.from_files(pki.ca.certfile))
    with pytest.raises(UnreachableError):
        text_of(mutual_address, with_certificate(pki.stranger.issue("impostor")))
    with pytest.raises(UnreachableError):
        text_of(mutual_address, with_certificate(pki.clients.issue("late", days=-1)))


@pytest.mark.parametrize("client_ca", [False, True])
def test_a_peer_calls_with_the_ports_own_certificate(
    pki: Pki, tls_address: str, mutual_address: str, client_ca: bool
) -> None:
    peer = identity(pki, client_ca=client_ca).peer
    assert text_of(mutual_address if client_ca else tls_address, peer) == "answer"


@pytest.mark.parametrize("key", KEYS)
async def test_a_known_key_gets_an_answer(keyed_address: str, key: str) -> None:
    assert text_of(keyed_address, api_key=key) == "answer"
    async with AsyncClient(keyed_address, ONCE, api_key=key) as client:
        assert (await client.complete(PROMPT, max_tokens=6, temperature=0.0)).text == "answer"
        assert [model.name for model in await client.list_models()] == ["script"]


@pytest.mark.parametrize("key", [None, "first-ke", "first-key1", "SECOND-KEY", "x"])
async def test_other_keys_are_refused_in_every_method(keyed_address: str, key: str | None) -> None:
    rule = "API_KEY" if key is None else "not known"
    with pytest.raises(UnauthenticatedError, match=rule):
        text_of(keyed_address, api_key=key)
    with (
        Client(keyed_address, ONCE, api_key=key) as client,
        pytest.raises(UnauthenticatedError, match=rule),
    ):
        client.list_models()
    async with AsyncClient(keyed_address, ONCE, api_key=key) as client:
        with pytest.raises(UnauthenticatedError, match=rule):
            await client.complete(PROMPT)


@pytest.mark.parametrize(
    "headers",
    [
        (("authorization", "first-key"),),
        (("authorization", "Basic first-key"),),
        (("authorization", "Bearer "),),
        (("authorization", "Bearer x"), ("authorization", "Bearer first-key")),
        (("x-api-key", "first-key"),),
    ],
)
def test_a_key_in_another_form_is_refused(
    keyed_address: str, headers: tuple[tuple[str, str], ...]
) -> None:
    with grpc.insecure_channel(keyed_address) as channel:
        call = channel.unary_unary("/expertmesh.v1.GenerationService/ListModels")
        with pytest.raises(grpc.RpcError) as raised:
            call(b"", metadata=headers, timeout=10)
    assert isinstance(from_rpc_error(raised.value), UnauthenticatedError)


def test_a_call_that_passes_a_clients_key_on_carries_that_one(keyed_address: str) -> None:
    """A key twice would be refused: nobody could say which one counts."""
    for own, passed, is_taken in ((KEYS[0], KEYS[1], True), (KEYS[0], "x", False)):
        with Access(api_key=own).channel(keyed_address) as channel:
            stub = generation_pb2_grpc.GenerationServiceStub(channel)
            ask = partial(
                stub.ListModels,
                generation_pb2.ListModelsRequest(),
                metadata=[("authorization", f"Bearer {passed}")],
                timeout=10,
            )
            if is_taken:
                assert ask().models
            else:
                with pytest.raises(grpc.RpcError) as raised:
                    ask()
                assert raised.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_only_health_needs_no_key(keyed_address: str) -> None:
    with grpc.insecure_channel(keyed_address) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(), timeout=10
        )
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        with pytest.raises(grpc.RpcError) as raised:
            list(reflection(iter([ask]), timeout=10))
        assert raised.value.code() is grpc.StatusCode.UNAUTHENTICATED
    with Access(api_key=KEYS[0]).channel(keyed_address) as channel:
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
        assert list(reflection(iter([ask]), timeout=10))


def test_a_stream_without_a_key_ends_before_its_first_message(keyed_address: str) -> None:
    silence: queue.SimpleQueue[None] = queue.SimpleQueue()
    with grpc.insecure_channel(keyed_address) as channel:
        route = channel.stream_stream("/expertmesh.v1.GatingService/Route")
        with pytest.raises(grpc.RpcError) as raised:
            next(route(iter(silence.get, None), timeout=10))
        silence.put(None)
    assert raised.value.code() is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize("is_tls", [False, True])
def test_silent_connections_are_bounded_in_number_and_time(pki: Pki, is_tls: bool) -> None:
    options = GatewayOptions(
        handshake_timeout_s=0.5, max_connections=3, tls=identity(pki).server if is_tls else None
    )
    tls = ClientTls.from_files(pki.ca.certfile) if is_tls else None
    with running(ScriptModel("answer"), options=options) as service:
        silent = [connect_silently(service.address) for _ in range(6)]
        for sock in silent:
            assert is_closed_by_peer(sock)
        assert eventually(lambda: answers(service.address, tls), 20)


def answers(address: str, tls: ClientTls | None) -> bool:
    try:
        return text_of(address, tls) == "answer"
    except UnreachableError:
        return False


def test_keys_are_never_logged_or_shown(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    options = GatewayOptions(api_keys=API_KEYS)
    with running(ScriptModel("answer"), options=options) as service:
        assert text_of(service.address, api_key=KEYS[0]) == "answer"
        with pytest.raises(UnauthenticatedError) as raised:
            text_of(service.address, api_key="wrong-key")
    shown = [caplog.text, repr(options), repr(Access(api_key=KEYS[0])), str(raised.value)]
    assert not [text for text in shown if "-key" in text]


@pytest.mark.parametrize("key", ["", "two words", "a,b", "ключ", "line\n"])
def test_a_key_that_no_header_carries(key: str) -> None:
    with pytest.raises(ConfigurationError, match="visible ASCII") as raised:
        Client("127.0.0.1:1", api_key=key)
    assert not key or key not in str(raised.value)


def test_addresses_and_files_that_do_not_fit(pki: Pki, tmp_path: Path) -> None:
    tls = ClientTls.from_files(pki.ca.certfile)
    with pytest.raises(ConfigurationError, match="must not be grpc://"):
        Client("grpc://127.0.0.1:1", tls=tls)
    with pytest.raises(ConfigurationError, match="grpcs://host:port"):
        Client("https://127.0.0.1:1")
    with pytest.raises(ConfigurationError, match="tls_ca must be a readable file"):
        ClientTls.from_files(tmp_path / "none")
    with pytest.raises(ConfigurationError, match="tls_key must be set too"):
        ClientTls.from_files(certificate=pki.client.certfile)
