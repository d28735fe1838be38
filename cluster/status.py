"""What a service says of itself: asked of a router, and shown by `expertmesh status`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import grpc
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich.console import Console

from cluster.console import out_console, table
from cluster.kv_budget import format_bytes
from protos.errors import (
    DeadlineExceededError,
    ExpertMeshError,
    ServiceUnavailableError,
    from_rpc_error,
)
from protos.tls import Access
from protos.v1 import cluster_pb2, cluster_pb2_grpc

STATUS_TIMEOUT_S = 5.0


def ask_status(
    url: str, access: Access | None = None, timeout_s: float = STATUS_TIMEOUT_S
) -> cluster_pb2.ClusterStatus:
    """Return the status of the service that a router belongs to.

    Raises:
        ExpertMeshError: Not reachable, or what the router answered.
    """
    with (access or Access()).channel(url) as channel:
        try:
            answer = cluster_pb2_grpc.ClusterServiceStub(channel).GetStatus(
                cluster_pb2.GetStatusRequest(), timeout=timeout_s
            )
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
    return cast(cluster_pb2.ClusterStatus, answer)


@dataclass(slots=True)
class StatusAsker:
    """Asks for the status again and again: the router that answered last, then the others.

    The first address is the user's; the others come from the answers.

    Args:
        url: Of any router.
        access: How to reach it, and the others.
        ask: Returns a status, or raises.
    """

    url: str
    access: Access
    ask: Callable[[str, Access], cluster_pb2.ClusterStatus] = ask_status
    _others: list[str] = field(default_factory=list)

    def status(self) -> cluster_pb2.ClusterStatus:
        """Return the status.

        Raises:
            ExpertMeshError: No router answers; the error is the first one's.
        """
        first: ExpertMeshError | None = None
        for url in dict.fromkeys((self.url, *self._others)):
            try:
                status = self.ask(url, self.access)
            except (ServiceUnavailableError, DeadlineExceededError) as error:
                first = first or error
                continue
            self.url = url
            scheme = url[: url.find("://") + 3] if "://" in url else ""
            known = [r.grpc_address for r in status.routers if r.grpc_address]
            self._others = [scheme + address for address in known] or self._others
            return status
        assert first is not None  # there is one address at least
        raise first


def message_document(message: Message) -> dict[str, Any]:
    """Return a message as plain JSON types, every field present, 64-bit counts as numbers."""
    document = MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return cast(dict[str, Any], _numbers(document, message))


def dispatch_share(router: cluster_pb2.RouterStatus) -> float:
    """Return the part of the steps' time that a router waited for expert groups."""
    return router.dispatch_s / router.step_s if router.step_s else 0.0


def print_status(status: cluster_pb2.ClusterStatus) -> None:
    """Print the status as tables."""
    console = out_console()
    if not status.routers:
        console.print(f"{status.model}  {status.state}", markup=False)
        for sentence in status.progress:
            console.print(f"  {sentence}", style="dim", markup=False)
        return
    console.print(
        f"{status.model}  {status.state}  {status.dtype}  window {status.max_model_len} tokens"
        f"  placement epoch {status.placement_epoch}",
        markup=False,
    )
    print_scaling(status, console)
    routers = table(
        "routers",
        "id",
        "state",
        "address",
        ">running",
        ">waiting",
        ">kv blocks",
        ">steps",
        ">tokens out",
        ">dispatch",
        "ops",
    )
    for router in status.routers:
        routers.add_row(
            router.router_id,
            router.state,
            router.grpc_address,
            str(router.requests_running),
            str(router.requests_waiting),
            f"{router.kv_blocks_used}/{router.kv_blocks_total}",
            str(router.steps),
            str(router.generation_tokens),
            f"{dispatch_share(router):.0%}",
            router.trunk_ops,
        )
    console.print(routers)
    print_cache(status, console)
    if not status.groups:
        return
    groups = table(
        "expert groups",
        "id",
        "state",
        "address",
        "way",
        "compute",
        ">threads",
        ">experts",
        ">memory",
        ">calls",
        ">pairs",
        ">busy s",
    )
    for group in status.groups:
        groups.add_row(
            group.group_id,
            group.state,
            group.grpc_address,
            group.transport,
            group.compute,
            str(group.num_threads),
            str(group.num_experts),
            format_bytes(group.resident_bytes),
            str(group.num_calls),
            str(group.num_pairs),
            f"{group.busy_s:.2f}",
        )
    console.print(groups)


def print_scaling(status: cluster_pb2.ClusterStatus, console: Console) -> None:
    """Print what is wanted of the service where it is not so, and why."""
    scaling = status.scaling
    if scaling.is_asleep:
        console.print("asleep: no expert groups until the first request, which waits for them")
    if status.HasField("scaling") and not scaling.is_settled:
        console.print(
            f"wanted: {scaling.target_groups} expert groups, {scaling.target_routers} routers",
            markup=False,
        )
        console.print(f"  {scaling.change or 'waiting'}", style="dim", markup=False)
    if scaling.trouble:
        console.print(f"  not possible: {scaling.trouble}", style="bold red", markup=False)


def print_cache(status: cluster_pb2.ClusterStatus, console: Console) -> None:
    """Print what the routers reuse, and how their servers of sessions and cached KV are."""
    caches = table(
        "cache",
        "router",
        ">hit ratio",
        ">looked up",
        ">own pool",
        ">restored",
        ">lost",
        ">blocks",
        ">snapshots",
        ">loaded",
        ">stored",
        ">dropped",
        ">loads/prefills",
    )
    for router in status.routers:
        if router.HasField("cache"):
            cache = router.cache
            caches.add_row(
                router.router_id,
                f"{cache.hit_ratio:.0%}",
                str(cache.lookup_tokens),
                str(cache.hit_tokens),
                str(cache.restored_tokens),
                str(cache.lost_reuse_tokens),
                format_bytes(cache.block_bytes),
                format_bytes(cache.snapshot_bytes),
                format_bytes(cache.loaded_bytes),
                format_bytes(cache.stored_bytes),
                format_bytes(cache.dropped_bytes),
                f"{cache.loads_chosen}/{cache.prefills_chosen}",
            )
    if caches.row_count:
        console.print(caches)
    print_spilled(status, console)
    stores = table(
        "stores", "router", "role", "address", "breaker", ">failures", ">used", ">limit", "error"
    )
    for router in status.routers:
        for store in router.stores:
            stores.add_row(
                router.router_id,
                store.role,
                store.address,
                store.breaker,
                str(store.failures),
                format_bytes(store.used_bytes) if store.used_bytes else "",
                format_bytes(store.limit_bytes) if store.limit_bytes else "",
                store.last_error,
            )
    if stores.row_count:
        console.print(stores)


def print_spilled(status: cluster_pb2.ClusterStatus, console: Console) -> None:
    """Print what has left the routers' KV caches, where anything has."""
    spilled = table(
        "spilled", "router", ">blocks", ">host memory", ">sent", ">read back", ">read bytes"
    )
    for router in status.routers:
        if (cold := router.cold).spilled_blocks:
            spilled.add_row(
                router.router_id,
                str(cold.spilled_blocks),
                format_bytes(cold.host_bytes),
                format_bytes(cold.sent_bytes),
                str(cold.read_blocks),
                format_bytes(cold.read_bytes),
            )
    if spilled.row_count:
        console.print(spilled)


def _numbers(document: Any, message: Any) -> Any:
    """Turn the decimal texts that JSON of protobuf uses for 64-bit integers into numbers."""
    if isinstance(document, list):
        return [_numbers(item, part) for item, part in zip(document, message, strict=True)]
    if not isinstance(document, dict):
        return document
    fixed = {}
    for name, value in document.items():
        field = getattr(message, name) if isinstance(message, Message) else message[name]
        is_number = isinstance(field, int) and not isinstance(field, bool)
        fixed[name] = int(value) if is_number else _numbers(value, field)
    return fixed
