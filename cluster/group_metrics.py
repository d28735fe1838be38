"""An expert group's figures for Prometheus, on a port of its own; see `cluster.metrics`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cluster.metrics import MetricsServer, metric_line
from experts.group_state import GroupStatus
from protos.errors import ConfigurationError

SETTING = "experts.metrics_port"
MAX_PORT = 65535
MAX_TRIES = 64
"""Groups of one node."""


def open_group_metrics(host: str, port: int, read: Callable[[], str]) -> MetricsServer:
    """Serve a group's figures on the first free port from `port` on; 0: any.

    Raises:
        ConfigurationError: None of `MAX_TRIES` ports is free.
    """
    for tried in range(port, min(port + MAX_TRIES, MAX_PORT + 1)):
        try:
            return MetricsServer(host, tried, read, SETTING)
        except ConfigurationError:
            continue
    raise ConfigurationError(SETTING, f"must have a free port among the next {MAX_TRIES}", port)


def group_metrics_text(status: GroupStatus, layer_pairs: Sequence[int]) -> str:
    """Return the figures in Prometheus' text format.

    Args:
        status: Of the group.
        layer_pairs: Token-expert pairs computed, by layer.
    """
    labels = {"group": status.group_id, "compute": status.compute, "dtype": status.dtype}
    values: dict[str, float] = {
        "expert_placement_epoch": status.placement_epoch,
        "expert_resident": sum(len(ids) for ids in status.layers.values()),
        "expert_resident_bytes": status.resident_bytes,
        "expert_capacity_bytes": status.capacity_bytes,
        "expert_threads": status.num_threads,
        "expert_calls_total": status.num_calls,
        "expert_rows_total": status.num_rows,
        "expert_busy_seconds_total": status.busy_s,
    }
    lines = []
    for name, value in values.items():
        kind = "counter" if name.endswith("_total") else "gauge"
        lines += [f"# TYPE expertmesh_{name} {kind}", metric_line(name, labels, value)]
    lines.append("# TYPE expertmesh_expert_rank_tokens_total counter")
    for layer_id, pairs in enumerate(layer_pairs):
        of_layer = {"group": status.group_id, "layer": str(layer_id)}
        lines.append(metric_line("expert_rank_tokens_total", of_layer, pairs))
    return "\n".join(lines) + "\n"
