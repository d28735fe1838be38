"""`expertmesh autoscale explain | simulate`: prints decisions with their numbers."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable
from typing import Any, cast

import grpc

from cluster.autoscale_log import changes_something
from cluster.console import out_console, table
from cluster.status import STATUS_TIMEOUT_S, message_document
from protos.errors import from_rpc_error
from protos.tls import Access
from protos.v1 import cluster_pb2, cluster_pb2_grpc


def ask_decisions(url: str, access: Access, limit: int) -> cluster_pb2.ExplainAutoscaleResponse:
    """Return the last decisions of the service that a router belongs to.

    Raises:
        ExpertMeshError: Not reachable, or what the router answered.
    """
    with access.channel(url) as channel:
        try:
            answer = cluster_pb2_grpc.ClusterServiceStub(channel).ExplainAutoscale(
                cluster_pb2.ExplainAutoscaleRequest(limit=limit), timeout=STATUS_TIMEOUT_S
            )
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
    return cast(cluster_pb2.ExplainAutoscaleResponse, answer)


def decision_line(decision: cluster_pb2.AutoscaleDecision) -> str:
    """Return a decision as one line of JSON; what is not known is left out of the load."""
    document: dict[str, Any] = message_document(decision)
    document["load"] = {field.name: value for field, value in decision.load.ListFields()}
    return json.dumps(document)


def print_decisions(
    title: str, decisions: Iterable[cluster_pb2.AutoscaleDecision], *, is_clock: bool
) -> None:
    """Print decisions as a table, and the sums of the last one.

    Args:
        title: Above the table.
        decisions: Oldest first.
        is_clock: Their times are Unix seconds; else seconds of a trace.
    """
    console = out_console()
    rows = table(title, "at", ">routers", ">groups", "why")
    last = None
    for last in decisions:
        at = _clock_time(last.unix_s) if is_clock else f"{last.unix_s:g} s"
        why = [f"{name}: {pool.reason}" for name, pool in _pools(last) if _speaks(last, pool)]
        rows.add_row(at, _count(last.routers), _count(last.groups), "; ".join(why))
    console.print(rows)
    if last is None:
        return
    sums = table("the last one's sums", "pool", "signal", ">demand", ">raises to", ">keeps", "sum")
    for name, pool in _pools(last):
        for signal in pool.signals:
            raises = str(signal.raises_to) if signal.raises_to else ""
            sums.add_row(
                name, signal.name, f"{signal.demand:.2f}", raises, str(signal.keeps), signal.text
            )
    console.print(sums)


def _pools(
    decision: cluster_pb2.AutoscaleDecision,
) -> tuple[tuple[str, cluster_pb2.PoolDecision], ...]:
    return ("routers", decision.routers), ("groups", decision.groups)


def _speaks(decision: cluster_pb2.AutoscaleDecision, pool: cluster_pb2.PoolDecision) -> bool:
    """A change is explained by the pool that changes; a hold by both."""
    return pool.wanted != pool.count or not changes_something(decision)


def _count(pool: cluster_pb2.PoolDecision) -> str:
    text = str(pool.count) if pool.wanted == pool.count else f"{pool.count} -> {pool.wanted}"
    return text if pool.ready == pool.count else f"{text} ({pool.ready} ready)"


def _clock_time(unix_s: float) -> str:
    return datetime.datetime.fromtimestamp(unix_s).strftime("%H:%M:%S")
