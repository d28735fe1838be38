"""The port of `serve` itself, without a service behind it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent import futures

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.config import Config, load_config
from cluster.front import StatusPort
from cluster.status import ask_status, print_status
from protos.errors import ConfigurationError, NotReadyError, UnauthenticatedError
from protos.tls import Access
from protos.v1 import cluster_pb2, cluster_pb2_grpc


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def config_of(port: int | None, **settings: object) -> Config:
    values = {"model.checkpoint": "/models/tiny", "cluster.status_port": port, **settings}
    return load_config(values).config


@pytest.fixture
def port() -> Iterator[StatusPort]:
    opened = StatusPort(config_of(free_port()))
    opened.open()
    yield opened
    opened.close()


@pytest.fixture
def router() -> Iterator[str]:
    """A server that answers as a router does."""

    class Router(cluster_pb2_grpc.ClusterServiceServicer):
        def GetStatus(self, request: object, context: object) -> cluster_pb2.ClusterStatus:
            return cluster_pb2.ClusterStatus(model="tiny", state="READY", placement_epoch=7)

    server = grpc.server(futures.ThreadPoolExecutor(1))
    cluster_pb2_grpc.add_ClusterServiceServicer_to_server(Router(), server)
    number = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{number}"
    server.stop(0).wait()


def health(address: str) -> int:
    with Access().channel(address) as channel:
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
    port.ready((f"127.0.0.1:{free_port()}", router))
    status = ask_status(port.address)
    assert (status.state, status.placement_epoch) == ("READY", 7)
    assert health(port.address) == health_pb2.HealthCheckResponse.SERVING
    port.stopping()
    assert ask_status(port.address).state == "STOPPING"


def test_no_router_that_answers_is_an_error(port: StatusPort) -> None:
    port.ready((f"127.0.0.1:{free_port()}",))
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
    silent.ready(())
    silent.close()
    assert silent.address == ""
