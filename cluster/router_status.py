"""A router's figures as `GetStatus` shows them: from what engine, tier and servers say. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from cluster.figures import Figures, Server
from cluster.members import ServiceView
from protos.v1 import cluster_pb2
from router.engine.config import EngineStats
from router.engine.latencies import LatencyStats
from router.engine.tier import TierStats
from router.state.cold import ColdStats


def router_status(
    figures: Figures,
    *,
    state: str,
    address: str,
    pid: int,
    trunk_ops: str,
    block_bytes: int,
    max_snapshot_bytes: int,
) -> cluster_pb2.RouterStatus:
    """Return one router's line.

    Args:
        figures: What it has counted.
        state: STARTING, READY, DRAINING or STOPPING.
        address: Its `host:port`, as clients reach it.
        pid: Of its process.
        trunk_ops: How its trunk computes.
        block_bytes: Of one KV block, all layers together.
        max_snapshot_bytes: Budget of the snapshots.
    """
    stats = figures.stats
    status = cluster_pb2.RouterStatus(
        router_id=figures.router_id,
        state=state,
        grpc_address=address,
        requests_running=stats.num_running,
        requests_waiting=stats.num_waiting,
        kv_blocks_used=stats.num_blocks_used,
        kv_blocks_total=stats.num_blocks,
        state_slots_used=stats.num_state_slots_used,
        state_slots_total=stats.num_state_slots,
        prompt_tokens=stats.prompt_tokens,
        generation_tokens=stats.generation_tokens,
        preemptions=stats.preemptions,
        steps=stats.steps,
        step_s=stats.step_s,
        dispatch_s=stats.dispatch_s,
        pid=pid,
        trunk_ops=trunk_ops,
        waiting_tokens=stats.num_queued_tokens,
        latency=latency_status(stats.latency),
        route_streams=figures.route_streams,
        cold=cold_status(stats, figures.cold),
        prefill_tokens_per_s=figures.prefill_tokens_per_s,
        sessions_held=figures.sessions_held,
        stores=[store_status(server) for server in figures.servers],
    )
    if stats.reuse.is_on:
        status.cache.CopyFrom(
            cache_status(
                stats,
                figures.tier,
                block_bytes=block_bytes,
                max_snapshot_bytes=max_snapshot_bytes,
            )
        )
    return status


def cache_status(
    stats: EngineStats, tier: TierStats | None, *, block_bytes: int, max_snapshot_bytes: int
) -> cluster_pb2.CacheStatus:
    """Return what a router found of the prompts it took, and what it holds.

    Args:
        stats: Of the engine.
        tier: Of the blob servers; None: there are none.
        block_bytes: Of one KV block, all layers together.
        max_snapshot_bytes: Budget of the snapshots.
    """
    reuse = stats.reuse
    found = reuse.hit_tokens + reuse.restored_tokens
    looked_up = found + stats.prompt_tokens
    status = cluster_pb2.CacheStatus(
        lookup_tokens=looked_up,
        hit_tokens=reuse.hit_tokens,
        restored_tokens=reuse.restored_tokens,
        lost_reuse_tokens=reuse.lost_tokens,
        hit_ratio=found / looked_up if looked_up else 0.0,
        block_bytes=reuse.num_blocks * block_bytes,
        snapshot_bytes=reuse.num_snapshot_bytes,
        snapshot_limit_bytes=max_snapshot_bytes,
    )
    if tier is not None:
        status.loaded_bytes = tier.read_bytes
        status.stored_bytes = tier.written_bytes
        status.dropped_bytes = tier.dropped_bytes
        status.queued_bytes = tier.num_queued_bytes
        status.loads_chosen = int(tier.counters.get("probes_decision_load", 0))
        status.prefills_chosen = int(tier.counters.get("probes_decision_prefill", 0))
        status.loads_failed = tier.load_failures
    return status


def cold_status(stats: EngineStats, cold: ColdStats) -> cluster_pb2.ColdStatus:
    """Return what has left a router's pool, and where it went."""
    return cluster_pb2.ColdStatus(
        spilled_blocks=stats.spilled_blocks,
        host_bytes=stats.num_cold_bytes,
        sent_bytes=cold.sent_bytes,
        read_blocks=cold.read_blocks,
        read_bytes=cold.read_bytes,
    )


def latency_status(latency: LatencyStats) -> cluster_pb2.LatencyStatus:
    """Return how long a router's clients waited."""
    return cluster_pb2.LatencyStatus(
        bounds_s=latency.first_token.bounds,
        first_token=latency.first_token.counts,
        between_tokens=latency.between_tokens.counts,
    )


def store_status(server: Server) -> cluster_pb2.StoreStatus:
    """Return a server's line."""
    return cluster_pb2.StoreStatus(
        role=server.role,
        address=server.address,
        breaker=server.breaker.upper().replace("-", "_"),
        failures=server.failures,
        used_bytes=server.used_bytes,
        limit_bytes=server.limit_bytes,
    )


def memory_of(info: Mapping[str, object]) -> tuple[int, int]:
    """Return (used bytes, limit) of a server's INFO; 0 where it does not say."""

    def number(name: str) -> int:
        text = str(info.get(name, "0"))
        return int(text) if text.isdigit() else 0

    return number("used_memory"), number("maxmemory")


def scaling_status(view: ServiceView) -> cluster_pb2.ScalingStatus:
    """Return what is wanted of the service, and how far it is."""
    return cluster_pb2.ScalingStatus(
        target_groups=view.target_groups,
        target_routers=view.target_routers,
        change=view.change,
        trouble=view.trouble,
        is_settled=view.is_settled,
        is_asleep=view.is_asleep,
    )
