"""What a running service is doing, between two of its statuses: the figures of `expertmesh top`.

Pure. A view is a plain document, so that `--json` prints what the screen shows. Rates are over the
time between the two statuses; latencies too, or, where nothing came in it, since the routers'
starts.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cluster.rates import (
    GroupRates,
    RouterRates,
    by_id,
    first_token_percentile,
    group_rates,
    router_rates,
    token_percentile,
)
from protos.v1 import cluster_pb2

PERCENTS = (50, 95, 99)


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterRow:
    """One router; rates are None where it is not known what it did."""

    router_id: str
    state: str
    grpc_address: str
    requests_running: int
    requests_waiting: int
    waiting_tokens: int
    kv_usage: float
    state_slot_usage: float
    prompt_tokens_per_s: float | None
    generation_tokens_per_s: float | None
    step_share: float | None
    """Part of the time that it was in steps."""
    dispatch_share: float | None
    """Part of its steps' time that it waited for expert groups."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRow:
    """One expert group."""

    group_id: str
    state: str
    transport: str
    compute: str
    num_experts: int
    resident_bytes: int
    busy: float | None
    """Part of the time that it computed."""
    pairs_per_s: float | None
    layer_shares: tuple[float, ...]
    """Its part of each layer's token-expert pairs; empty where there were none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """The whole service."""

    model: str
    placement_epoch: int
    is_asleep: bool
    """There are no groups until the first request."""
    seconds: float
    """Between the two statuses; 0: there is one."""
    routers: tuple[RouterRow, ...]
    groups: tuple[GroupRow, ...]
    ttft_ms: Mapping[str, float | None]
    """Time to first token by percentile: p50, p95, p99."""
    itl_ms: Mapping[str, float | None]
    """Time between two tokens alike."""
    balancedness: float | None
    """Mean over groups / largest, of the worst layer; 1 is even; None: no load."""

    def document(self) -> dict[str, Any]:
        """Return it in JSON's types."""
        return asdict(self)


def view_of(
    before: cluster_pb2.ClusterStatus | None, after: cluster_pb2.ClusterStatus, seconds: float
) -> View:
    """Return what the service did between two statuses.

    Args:
        before: None: this is the first.
        after: The latest.
        seconds: Between them.
    """
    routers_before = by_id(before.routers if before else ())
    groups_before = by_id(before.groups if before else ())
    shares = _layer_shares(groups_before, after.groups)
    return View(
        model=after.model,
        placement_epoch=after.placement_epoch,
        is_asleep=after.scaling.is_asleep,
        seconds=seconds,
        routers=tuple(
            _router_row(
                router,
                router_rates(routers_before[router.router_id], router, seconds)
                if router.router_id in routers_before
                else None,
            )
            for router in after.routers
        ),
        groups=tuple(
            _group_row(
                group,
                group_rates(groups_before[group.group_id], group, seconds)
                if group.group_id in groups_before
                else None,
                shares[group.group_id],
            )
            for group in after.groups
        ),
        ttft_ms=_latencies(routers_before, after, first_token_percentile),
        itl_ms=_latencies(routers_before, after, token_percentile),
        balancedness=_balancedness(list(shares.values())),
    )


def _router_row(router: cluster_pb2.RouterStatus, rates: RouterRates | None) -> RouterRow:
    return RouterRow(
        router_id=router.router_id,
        state=router.state,
        grpc_address=router.grpc_address,
        requests_running=router.requests_running,
        requests_waiting=router.requests_waiting,
        waiting_tokens=router.waiting_tokens,
        kv_usage=_part(router.kv_blocks_used, router.kv_blocks_total),
        state_slot_usage=_part(router.state_slots_used, router.state_slots_total),
        prompt_tokens_per_s=None if rates is None else rates.prompt_tokens_per_s,
        generation_tokens_per_s=None if rates is None else rates.generation_tokens_per_s,
        step_share=None if rates is None else rates.step_share,
        dispatch_share=None if rates is None else rates.dispatch_share,
    )


def _group_row(
    group: cluster_pb2.GroupStatus, rates: GroupRates | None, shares: tuple[float, ...]
) -> GroupRow:
    return GroupRow(
        group_id=group.group_id,
        state=group.state,
        transport=group.transport,
        compute=group.compute,
        num_experts=group.num_experts,
        resident_bytes=group.resident_bytes,
        busy=None if rates is None else rates.busy,
        pairs_per_s=None if rates is None else rates.pairs_per_s,
        layer_shares=shares,
    )


def _layer_shares(
    before: Mapping[str, cluster_pb2.GroupStatus], groups: Sequence[cluster_pb2.GroupStatus]
) -> dict[str, tuple[float, ...]]:
    """Return each group's part of each layer: of what came since, or, if nothing did, of all."""
    counts = {group.group_id: list(group.layer_pairs) for group in groups}
    new = {
        group.group_id: rates.layer_pairs
        for group in groups
        if group.group_id in before
        and (rates := group_rates(before[group.group_id], group, 1.0)) is not None
    }
    if any(any(pairs) for pairs in new.values()):
        counts = {name: list(new.get(name, ())) for name in counts}
    num_layers = max((len(pairs) for pairs in counts.values()), default=0)
    full = {name: pairs or [0] * num_layers for name, pairs in counts.items()}
    totals = [sum(column) for column in zip(*full.values(), strict=True)]
    if not any(totals):
        return dict.fromkeys(counts, ())
    return {
        name: tuple(_part(pairs, total) for pairs, total in zip(row, totals, strict=True))
        for name, row in full.items()
    }


def _balancedness(rows: Sequence[Sequence[float]]) -> float | None:
    rows = [row for row in rows if row]
    layers = [column for column in zip(*rows, strict=True) if any(column)]
    return min((statistics.fmean(layer) / max(layer) for layer in layers), default=None)


def _latencies(
    before: Mapping[str, cluster_pb2.RouterStatus],
    after: cluster_pb2.ClusterStatus,
    percentile: Any,
) -> dict[str, float | None]:
    recent = [(before.get(router.router_id), router) for router in after.routers]
    ever = [(None, router) for router in after.routers]
    pairs = recent if percentile(recent, 50) is not None else ever
    found = {f"p{percent}": percentile(pairs, percent) for percent in PERCENTS}
    return {name: None if value is None else 1e3 * value for name, value in found.items()}


def _part(used: float, whole: float) -> float:
    return used / whole if whole else 0.0
