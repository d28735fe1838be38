"""`ClusterService` of a router whose neighbours are gone."""

from __future__ import annotations

import socket
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.service import ClusterServicer
from protos.errors import UnreachableError
from protos.v1 import cluster_pb2


async def test_draining_a_router_that_is_gone_says_unreachable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed_soon:
        port = closed_soon.getsockname()[1]
    addresses = {"router-0": "127.0.0.1:1", "router-1": f"127.0.0.1:{port}"}
    router: Any = SimpleNamespace(router_id="router-0", router_addresses=lambda: addresses)
    request = cluster_pb2.DrainRequest(target="router-1", timeout_s=5)
    with pytest.raises(UnreachableError):
        await ClusterServicer(router).Drain(request, None)  # type: ignore[arg-type]
