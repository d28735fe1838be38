"""`ClusterService` of a router whose neighbours are gone."""

from __future__ import annotations

import socket
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.known_service import KnownService
from cluster.members import ServiceView
from cluster.service import ClusterServicer
from protos.errors import InvalidFieldError, UnreachableError
from protos.v1 import cluster_pb2


def view_of(routers: dict[str, str]) -> ServiceView:
    return ServiceView(
        version=1,
        groups=(),
        routers=routers,
        target_groups=0,
        target_routers=len(routers),
        change="",
        trouble="",
        is_settled=True,
    )


def servicer(router: Any, members: KnownService | None = None) -> ClusterServicer:
    """Of a dense model: nothing asks about experts."""
    experts: Any = None
    return ClusterServicer(router, experts, members or KnownService("router-0"))


async def test_draining_a_router_that_is_gone_says_unreachable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed_soon:
        port = closed_soon.getsockname()[1]
    members = KnownService("router-0")
    addresses = {"router-0": "127.0.0.1:1", "router-1": f"127.0.0.1:{port}"}
    members.learn(view_of(addresses))
    request = cluster_pb2.DrainRequest(target="router-1", timeout_s=5)
    with pytest.raises(UnreachableError):
        await servicer(SimpleNamespace(), members).Drain(request, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(("asked_s", "taken_s"), [(0.0, 45.0), (5.0, 5.0)])
async def test_a_drain_without_a_time_takes_the_services_own(
    asked_s: float, taken_s: float
) -> None:
    taken: list[float] = []

    async def drain_and_leave(timeout_s: float) -> int:
        taken.append(timeout_s)
        return 3

    router = SimpleNamespace(shutdown_timeout_s=45.0, drain_and_leave=drain_and_leave)
    request = cluster_pb2.DrainRequest(timeout_s=asked_s)
    answer = await servicer(router).Drain(request, None)  # type: ignore[arg-type]
    assert (answer.requests_left, taken) == (3, [taken_s])


async def test_a_negative_drain_time_is_refused() -> None:
    request = cluster_pb2.DrainRequest(timeout_s=-1)
    with pytest.raises(InvalidFieldError, match="timeout_s must be 0"):
        await servicer(SimpleNamespace(shutdown_timeout_s=45.0)).Drain(request, None)  # type: ignore[arg-type]
