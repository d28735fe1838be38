"""What `expertmesh scale` and `expertmesh drain` ask of a service, and show of the answers."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import grpc

from cluster.console import err_console, out_console, print_json
from cluster.status import StatusAsker, message_document
from protos.errors import (
    ExpertMeshError,
    InvalidFieldError,
    from_rpc_error,
)
from protos.tls import Access
from protos.v1 import cluster_pb2, cluster_pb2_grpc

ASK_TIMEOUT_S = 10.0
LOOK_S = 0.2
LONGEST_DRAIN_S = 3600.0
"""Bound where the service's own time counts, which is not known here."""
UNREACHABLE_S = 10.0
"""How long no router need answer while one waits: the one that was asked may be drained."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """The numbers that a user wants; None leaves one as it is."""

    expert_groups: int | None
    routers: int | None

    def is_met(self, status: cluster_pb2.ClusterStatus) -> bool:
        """Return whether the service is as wanted, and has taken up what is wanted."""
        scaling = status.scaling
        return (
            scaling.is_settled
            and self.expert_groups in (None, scaling.target_groups)
            and self.routers in (None, scaling.target_routers)
        )


def scale_service(
    url: str, access: Access, wanted: Wanted, wait_s: float | None, *, as_json: bool
) -> bool:
    """Ask for the numbers and show how far the service is; wait for them if `wait_s` is given.

    Returns:
        False where the service was not as wanted after `wait_s`.

    Raises:
        ExpertMeshError: Not reachable, or numbers that cannot be.
    """
    asker = StatusAsker(url, access)
    if wanted.expert_groups is not None or wanted.routers is not None:
        _ask(url, access, wanted)
    status, is_met = asker.status(), True
    if wait_s is not None:
        status, is_met = _wait(asker, wanted, wait_s)
    if as_json:
        print_json(message_document(status.scaling))
    else:
        out_console().print(_sentence(status), markup=False)
    return is_met


def drain_member(url: str, access: Access, target: str, timeout_s: float, *, as_json: bool) -> int:
    """Drain a router or an expert group and wait; return how many requests were left.

    Raises:
        ExpertMeshError: Not reachable, no such member, or it did not get done in time.
    """
    if not target:  # the router that is asked would take it for itself
        raise InvalidFieldError("target", "must be the name of a router or an expert group", "")
    request = cluster_pb2.DrainRequest(target=target, timeout_s=timeout_s)
    with access.channel(url) as channel, _telling(url, access):
        try:
            bound_s = (timeout_s or LONGEST_DRAIN_S) + ASK_TIMEOUT_S
            answer = cluster_pb2_grpc.ClusterServiceStub(channel).Drain(request, timeout=bound_s)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
    if as_json:
        print_json({"target": target, **message_document(answer)})
    else:
        left = f", {answer.requests_left} requests go on elsewhere" if answer.requests_left else ""
        out_console().print(f"{target} was drained{left}", markup=False)
    return int(answer.requests_left)


def _ask(url: str, access: Access, wanted: Wanted) -> None:
    request = cluster_pb2.ScaleRequest(expert_groups=wanted.expert_groups, routers=wanted.routers)
    with access.channel(url) as channel:
        try:
            cluster_pb2_grpc.ClusterServiceStub(channel).Scale(request, timeout=ASK_TIMEOUT_S)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error


def _wait(
    asker: StatusAsker, wanted: Wanted, wait_s: float
) -> tuple[cluster_pb2.ClusterStatus, bool]:
    """Return the last status, and whether the service is as wanted; say what happens meanwhile."""
    begun = seen_s = time.monotonic()
    console, said = err_console(), ""
    while True:
        try:
            status = asker.status()
            seen_s = time.monotonic()
        except ExpertMeshError:
            if time.monotonic() - seen_s > UNREACHABLE_S:
                raise
            time.sleep(LOOK_S)
            continue
        if wanted.is_met(status) or time.monotonic() - begun >= wait_s:
            return status, wanted.is_met(status)
        if (now := _sentence(status)) != said:
            console.print(now, style="dim", markup=False)
            said = now
        time.sleep(LOOK_S)


@contextmanager
def _telling(url: str, access: Access) -> Iterator[None]:
    """Say what changes in the service, until the block ends."""
    asker, ended = StatusAsker(url, access), threading.Event()

    def tell() -> None:
        console, said = err_console(), ""
        while not ended.wait(LOOK_S):
            try:
                now = _sentence(asker.status())
            except ExpertMeshError:
                continue
            if now != said:
                console.print(now, style="dim", markup=False)
                said = now

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        ended.set()
        teller.join()


def _sentence(status: cluster_pb2.ClusterStatus) -> str:
    """Return in one line how far the service is."""
    scaling = status.scaling
    groups = sum(group.state == "READY" for group in status.groups)
    routers = sum(router.state == "READY" for router in status.routers)
    parts = [
        f"expert groups {groups} of {scaling.target_groups}",
        f"routers {routers} of {scaling.target_routers}",
        f"placement epoch {status.placement_epoch}",
        scaling.change or ("as wanted" if scaling.is_settled else "not as wanted"),
    ]
    if scaling.trouble:
        parts.append(f"not possible: {scaling.trouble}")
    return ", ".join(parts)
