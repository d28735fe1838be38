"""The port of `serve` itself, without a service behind it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.autoscale_explain import ask_decisions
from cluster.config import Config
from cluster.config_loading import load_config
from cluster.front import ASK_TIMEOUT_S, StatusPort
from cluster.scale_commands import Wanted, drain_member, scale_service
from cluster.security import load_security
from cluster.status import ask_status, print_status
from protos.errors import (
    ConfigurationError,
    DeadlineExceededError,
    InvalidFieldError,
    NotReadyError,
    UnauthenticatedError,
    UnreachableError,
    UnsupportedFeatureError,
)
from protos.tls import Access, ClientTls
from protos.v1 import cluster_pb2, cluster_pb2_grpc
from tests.certificates import Authority
from tests.ports import free_port


def config_of(port: int | None, **settings: object) -> Config:
    values = {"model.checkpoint": "/models/tiny", "cluster.status_port": port, **settings}
    return load_config(values).config


@pytest.fixture
def port() -> Iterator[StatusPort]:
    opened = StatusPort(config_of(free_port()))
    opened.open()
    yield opened
    opened.close()


@contextmanager
def answering_router(credentials: grpc.ServerCredentials | None = None) -> Iterator[str]:
    """A server that answers as a router does, at an address of its own."""

    class Router(cluster_pb2_grpc.ClusterServiceServicer):
        def GetStatus(self, request: object, context: object) -> cluster_pb2.ClusterStatus:
            return cluster_pb2.ClusterStatus(model="tiny", state="READY", placement_epoch=7)

    server = grpc.server(futures.ThreadPoolExecutor(1))
    cluster_pb2_grpc.add_ClusterServiceServicer_to_server(Router(), server)
    if credentials is None:
        number = server.add_insecure_port("127.0.0.1:0")
    else:
        number = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    yield f"127.0.0.1:{number}"
    server.stop(0).wait()


@pytest.fixture
def router() -> Iterator[str]:
    with answering_router() as address:
        yield address


def health(address: str, access: Access | None = None) -> int:
    with (access or Access()).channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return int(stub.Check(health_pb2.HealthCheckRequest(), timeout=10).status)


def test_a_start_tells_how_far_it_is(port: StatusPort, capsys: pytest.CaptureFixture[str]) -> None:
    port.tell("joining the Ray cluster auto")
    port.tell("router-0 loaded in 1.0 s")
    status = ask_status(port.address)
    assert (status.model, status.state) == ("tiny", "STARTING")
    assert list(status.progress) == ["joining the Ray cluster auto", "router-0 loaded in 1.0 s"]
    assert health(port.address) == health_pb2.HealthCheckResponse.NOT_SERVING
    print_status(status)
    assert capsys.readouterr().out == (
        "tiny  STARTING\n  joining the Ray cluster auto\n  router-0 loaded in 1.0 s\n"
    )


def test_a_ready_service_is_described_by_a_router_that_answers(
    port: StatusPort, router: str
) -> None:
    port.ready(lambda: (f"127.0.0.1:{free_port()}", router))
    status = ask_status(port.address)
    assert (status.state, status.placement_epoch) == ("READY", 7)
    assert health(port.address) == health_pb2.HealthCheckResponse.SERVING
    port.stopping()
    assert ask_status(port.address).state == "STOPPING"


def test_routers_may_come_and_go(port: StatusPort, router: str) -> None:
    addresses = [f"127.0.0.1:{free_port()}"]
    port.ready(lambda: addresses)
    with pytest.raises(NotReadyError):
        ask_status(port.address, timeout_s=20)
    addresses[:] = [router]
    assert ask_status(port.address).placement_epoch == 7


def test_a_router_whose_host_is_gone_is_asked_last(port: StatusPort, router: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        port.ready(lambda: [address, router])
        with pytest.raises(DeadlineExceededError):
            ask_status(port.address, timeout_s=0.3)
        assert ask_status(port.address, timeout_s=ASK_TIMEOUT_S).placement_epoch == 7


def test_who_wants_to_change_something_is_sent_to_a_router(port: StatusPort) -> None:
    wanted = Wanted(expert_groups=2, routers=None)
    with pytest.raises(UnsupportedFeatureError, match="ask a router, once there is one"):
        scale_service(port.address, Access(), wanted, None, as_json=False)
    port.ready(lambda: ("10.0.0.12:50051",))
    for ask in (
        lambda: scale_service(port.address, Access(), wanted, None, as_json=False),
        lambda: drain_member(port.address, Access(), "router-1", 1.0, as_json=False),
        lambda: ask_decisions(port.address, Access(), 1),
    ):
        with pytest.raises(UnsupportedFeatureError, match=r"ask a router, e\.g\. 10.0.0.12:50051"):
            ask()


def test_a_drain_without_a_name_is_refused() -> None:
    with pytest.raises(InvalidFieldError, match="must be the name of a router"):
        drain_member("127.0.0.1:1", Access(), "", 1.0, as_json=False)


def test_no_router_that_answers_is_an_error(port: StatusPort) -> None:
    port.ready(lambda: (f"127.0.0.1:{free_port()}",))
    with pytest.raises(NotReadyError, match="no router answers"):
        ask_status(port.address, timeout_s=20)


def test_it_asks_for_the_keys_of_the_routers() -> None:
    keyed = StatusPort(config_of(free_port(), **{"router.api_keys": ("sesame-street-1",)}))
    keyed.open()
    try:
        with pytest.raises(UnauthenticatedError):
            ask_status(keyed.address)
        assert ask_status(keyed.address, Access(api_key="sesame-street-1")).state == "STARTING"
    finally:
        keyed.close()


def test_it_shows_and_asks_for_the_certificates_of_the_routers(tmp_path: Path) -> None:
    """Routers behind TLS show the port's own certificate, which names another host than theirs."""
    ports, clients = Authority(tmp_path, "ports"), Authority(tmp_path, "clients")
    issued = ports.issue("port", names=("mesh.test",))
    client = clients.issue("client")
    config = config_of(
        free_port(),
        **{
            "router.ssl_keyfile": str(issued.keyfile),
            "router.ssl_certfile": str(issued.certfile),
            "router.ssl_ca_certs": str(clients.certfile),
            "router.api_keys": ("sesame-street-1",),
        },
    )
    identity = load_security(config).port
    assert identity is not None
    trusting = ClientTls.from_files(
        ports.certfile, client.certfile, client.keyfile, server_name="mesh.test"
    )
    access = Access(tls=trusting, api_key="sesame-street-1")
    unknown = ClientTls.from_files(ports.certfile, server_name="mesh.test")
    port = StatusPort(config)
    port.open()
    try:
        assert ask_status(port.address, access).state == "STARTING"
        for refused in (Access(), Access(tls=unknown), Access(tls=ClientTls())):
            with pytest.raises(UnreachableError):
                ask_status(port.address, refused)
        with pytest.raises(UnauthenticatedError):
            ask_status(port.address, Access(tls=trusting))
        assert health(port.address, access) == health_pb2.HealthCheckResponse.NOT_SERVING
        with answering_router(identity.server.credentials()) as router:
            port.ready(lambda: (router,))
            assert ask_status(port.address, access).placement_epoch == 7
        assert health(port.address, access) == health_pb2.HealthCheckResponse.SERVING
    finally:
        port.close()


def test_a_taken_port_is_an_error_that_names_it(port: StatusPort) -> None:
    number = int(port.address.rpartition(":")[2])
    second = StatusPort(config_of(number))
    with pytest.raises(
        ConfigurationError, match=rf"cluster.status_port must be free, got {number}"
    ):
        second.open()
    second.close()


def test_nothing_is_opened_without_a_port() -> None:
    silent = StatusPort(config_of(None))
    silent.open()
    silent.tell("unheard")
    silent.ready(tuple)
    silent.close()
    assert silent.address == ""
