"""What `expertmesh status` shows of a router's figures, to people and as JSON."""

from __future__ import annotations

import io
from dataclasses import replace

from rich.console import Console

from cluster.router_status import cold_status
from cluster.status import message_document, print_cache
from protos.v1 import cluster_pb2
from router.state.cold import ColdStats
from tests.unit.cluster.test_metrics import STATS

COLD = ColdStats(sent_bytes=3 << 20, read_blocks=8, read_bytes=5 << 20)


def status_of(*routers: cluster_pb2.ColdStatus) -> cluster_pb2.ClusterStatus:
    return cluster_pb2.ClusterStatus(
        routers=[
            cluster_pb2.RouterStatus(router_id=f"router-{number}", cold=cold)
            for number, cold in enumerate(routers)
        ]
    )


def printed(status: cluster_pb2.ClusterStatus) -> str:
    out = io.StringIO()
    print_cache(status, Console(file=out, width=200))
    return out.getvalue()


def test_spilled_kv_is_shown_of_the_routers_that_have_any() -> None:
    spilled = replace(STATS, spilled_blocks=40, num_cold_bytes=2 << 30)
    none = replace(STATS, spilled_blocks=0)
    text = printed(status_of(cold_status(none, ColdStats()), cold_status(spilled, COLD)))
    assert "router-0" not in text
    (line,) = [line for line in text.splitlines() if "router-1" in line]
    assert line.split() == ["router-1", "40", "2.0", "GiB", "3.0", "MiB", "8", "5.0", "MiB"]
    assert printed(status_of(cold_status(none, ColdStats()))) == ""


def test_spilled_kv_is_numbers_in_json() -> None:
    document = message_document(status_of(cold_status(STATS, COLD)))
    assert document["routers"][0]["cold"] == {
        "spilled_blocks": 6,
        "host_bytes": 4096,
        "sent_bytes": 3 << 20,
        "read_blocks": 8,
        "read_bytes": 5 << 20,
    }


def test_what_is_so_or_not_is_a_boolean_in_json() -> None:
    scaling = cluster_pb2.ScalingStatus(target_groups=2, is_settled=True)
    document = message_document(cluster_pb2.ClusterStatus(scaling=scaling))["scaling"]
    assert (document["is_settled"], document["is_asleep"]) == (True, False)
    assert {type(document[name]) for name in ("is_settled", "is_asleep")} == {bool}
    assert type(document["target_groups"]) is int
