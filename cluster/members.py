"""The small records that `serve` and its processes exchange. Imports nothing heavy."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from router.state.endpoint import Endpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessFacts:
    """Where a process runs."""

    node_id: str
    address: str
    """The node's address, as other nodes reach it."""
    pid: int
    cores: int
    """Cores that this process may use."""
    boot: str
    """Drawn when the process starts: tells it from the one before it with the same name."""

    @classmethod
    def here(cls, node_id: str, address: str, boot: str) -> ProcessFacts:
        """Return the facts of the process that asks."""
        cores = len(os.sched_getaffinity(0))
        return cls(node_id=node_id, address=address, pid=os.getpid(), cores=cores, boot=boot)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupMember:
    """One expert group of the service."""

    group_id: str
    grpc_address: str
    node_id: str
    pid: int
    capacity: float
    """Relative share of the experts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceView:
    """What every router says of the whole service."""

    version: int
    """Grows: calls into a process may overtake each other."""
    groups: tuple[GroupMember, ...]
    routers: Mapping[str, str]
    """router_id -> gRPC address."""
    target_groups: int
    target_routers: int
    change: str
    """What is under way, in words."""
    trouble: str
    """Why the last change was not possible, in words."""
    is_settled: bool
    """The service is as wanted."""
    is_asleep: bool = False
    """There are no groups until the first request, which waits for them."""


@dataclass(frozen=True, slots=True)
class ScaleWish:
    """Someone wants other numbers; None leaves one as it is."""

    expert_groups: int | None
    routers: int | None


@dataclass(frozen=True, slots=True)
class LeaveWish:
    """Someone wants an expert group to go."""

    group_id: str


@dataclass(frozen=True, slots=True)
class PlaceWish:
    """Someone wants another placement."""

    capacities: Mapping[str, float]
    load: npt.NDArray[np.int64]
    """`[num_layers, num_experts]` pairs, as the router that was asked has counted them."""


@dataclass(frozen=True, slots=True)
class WakeWish:
    """A request waits for expert groups, and there are none."""


Wish = ScaleWish | LeaveWish | PlaceWish | WakeWish


@dataclass(frozen=True, slots=True, kw_only=True)
class StateServers:
    """Where sessions and cached values are."""

    meta: Endpoint
    blobs: tuple[Endpoint, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterStart:
    """What a router needs besides its trunk."""

    host: str
    port: int
    """0: a free one."""
    advertised_host: str
    """Stands in the router's address, as clients and other routers reach it."""
    model_name: str
    placement_json: str | None
    """None in a dense model."""
    groups: tuple[GroupMember, ...]
    num_routers_here: int
    """Routers on this node; they share its memory."""
    num_kv_blocks: int | None
    """As many as the process before it had; None: as the memory allows."""
    metrics_port: int | None
    """None: no metrics; 0: a free port."""
    service_id: str
    """Drawn for each `serve`: tells its routers from others' on the same servers."""
    state: StateServers | None
    """None: no sessions, nothing shared."""

    @property
    def group_addresses(self) -> Mapping[str, str]:
        """group_id -> gRPC address."""
        return {member.group_id: member.grpc_address for member in self.groups}


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterReady:
    """What a router says when its port is open."""

    address: str
    num_kv_blocks: int


def new_boot() -> str:
    """Return a text that no other process has."""
    return secrets.token_hex(8)


def new_service_id() -> str:
    """Return a text that tells the routers of one `serve` from those of others."""
    return secrets.token_hex(4)


def engine_id(router_id: str, service_id: str) -> str:
    """Return the name of a router in leases and heartbeats: `router-0.5f3a9c`."""
    return f"{router_id}.{service_id}"


def threads_per_group(
    configured: int | None, node_of_group: Mapping[str, str], cores: Mapping[str, int]
) -> dict[str, int]:
    """Return group_id -> threads: as configured, else the node's cores shared among its groups.

    Args:
        configured: `experts.threads`.
        node_of_group: group_id -> node_id.
        cores: node_id -> cores.
    """
    on_node: dict[str, int] = {}
    for node in node_of_group.values():
        on_node[node] = on_node.get(node, 0) + 1
    return {
        group: configured or max(1, cores[node] // on_node[node])
        for group, node in node_of_group.items()
    }
