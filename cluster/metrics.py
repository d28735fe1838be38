"""A router's figures for Prometheus: one text, made when it is asked for, on a port of its own.

`metrics_text` is pure. Names begin with `expertmesh_`; those of state.md 5.9 keep theirs behind
`expertmesh_state_`. Counters end in `_total`, units stand in the name.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from cluster.figures import Figures, Server
from protos.errors import ConfigurationError
from router.state.counters import Distribution

REQUEST_TIMEOUT_S = 10.0
"""How long a caller may take to say what it wants, and to take the answer."""
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_BREAKERS = {"closed": 0, "half-open": 1, "open": 2}


def metrics_text(figures: Figures) -> str:
    """Return the figures in Prometheus' text format."""
    stats, reuse = figures.stats, figures.stats.reuse
    found = reuse.hit_tokens + reuse.restored_tokens
    values: dict[str, float] = {
        "requests_running": stats.num_running,
        "requests_waiting": stats.num_waiting,
        "router_asleep": stats.is_asleep,
        "requests_waiting_uncached_tokens": stats.num_queued_tokens,
        "kv_usage_ratio": stats.num_blocks_used / stats.num_blocks,
        "linear_state_usage_ratio": stats.num_state_slots_used / stats.num_state_slots,
        "prompt_tokens_total": stats.prompt_tokens,
        "generation_tokens_total": stats.generation_tokens,
        "preemptions_total": stats.preemptions,
        "steps_total": stats.steps,
        "step_seconds_total": stats.step_s,
        "expert_dispatch_seconds_total": stats.dispatch_s,
        "prefix_cache_queries_total": found + stats.prompt_tokens,
        "prefix_cache_hits_total": found,
        "prefix_cache_lost_tokens_total": reuse.lost_tokens,
        "prefix_cache_snapshot_bytes": reuse.num_snapshot_bytes,
        "kv_spilled_blocks_total": stats.spilled_blocks,
        "kv_spilled_host_bytes": stats.num_cold_bytes,
        "kv_spilled_sent_bytes_total": figures.cold.sent_bytes,
        "kv_spilled_read_blocks_total": figures.cold.read_blocks,
        "kv_spilled_read_bytes_total": figures.cold.read_bytes,
        "sessions_held": figures.sessions_held,
    }
    if figures.forwards is not None:
        values["router_forwarded_total"] = figures.forwards.forwarded
        values["router_forwards_failed_total"] = figures.forwards.fell_back
    if (turns := figures.turns) is not None:
        values |= {
            "state_fenced_total": turns.fenced,
            "state_conflict_total": turns.conflicts,
            "state_lease_lost_total": turns.leases_lost,
            "state_persisted_false_total": turns.not_persisted,
            "state_ckpt_lag_tokens": turns.num_unsaved,
            "state_ckpt_lag_seconds": turns.unsaved_s,
        }
    if figures.tier is not None:
        values["state_queued_bytes"] = figures.tier.num_queued_bytes
        values |= {_state_name(k, "_total"): v for k, v in figures.tier.counters.items()}
        values |= {_state_name(k, ""): v for k, v in figures.tier.gauges.items()}
    labels = {"router": figures.router_id, "model_name": figures.model}
    lines = []
    for name, value in values.items():
        kind = "counter" if name.endswith("_total") else "gauge"
        lines += [f"# TYPE expertmesh_{name} {kind}", metric_line(name, labels, value)]
    lines += _histogram("time_to_first_token_seconds", labels, stats.latency.first_token)
    lines += _histogram("inter_token_latency_seconds", labels, stats.latency.between_tokens)
    if turns is not None:
        lines += _histogram("state_commit_seconds", labels, turns.commit_s)
    for name, read in _SERVER_METRICS.items():
        kind = "counter" if name.endswith("_total") else "gauge"
        lines.append(f"# TYPE expertmesh_{name} {kind}")
        for server in figures.servers:
            of_server = {**labels, "role": server.role, "server": server.address}
            lines.append(metric_line(name, of_server, read(server)))
    return "\n".join(lines) + "\n"


_SERVER_METRICS: dict[str, Callable[[Server], float]] = {
    "state_breaker_state": lambda server: _BREAKERS[server.breaker],
    "state_breaker_opened_total": lambda server: server.failures,
    "state_used_memory_bytes": lambda server: server.used_bytes,
    "state_max_memory_bytes": lambda server: server.limit_bytes,
}


class MetricsServer:
    """Answers `GET /metrics` until `close`.

    Args:
        host: Address to bind.
        port: 0 picks a free one.
        read: Makes the text; called in a thread of the server.
        setting: Names the port in an error.

    Raises:
        ConfigurationError: The port is taken.
    """

    def __init__(
        self, host: str, port: int, read: Callable[[], str], setting: str = "router.metrics_port"
    ) -> None:
        class Handler(BaseHTTPRequestHandler):
            timeout = REQUEST_TIMEOUT_S  # each caller has a thread of the router

            def do_GET(self) -> None:
                """Answer with the text, whatever the query."""
                if self.path.partition("?")[0] != "/metrics":
                    self.send_error(404)
                    return
                body = read().encode()
                self.send_response(200)
                self.send_header("Content-Type", CONTENT_TYPE)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments: object) -> None:
                """Say nothing: scrapes come every few seconds."""

        try:
            self._server = ThreadingHTTPServer((host, port), Handler)
        except OSError as error:
            raise ConfigurationError(
                setting, f"cannot be bound on {host}: {error.strerror}", port
            ) from None
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True).start()

    def close(self) -> None:
        """Close the port."""
        self._server.shutdown()
        self._server.server_close()


def _state_name(name: str, suffix: str) -> str:
    return f"state_{name.removesuffix(suffix)}{suffix}" if suffix else f"state_{name}"


def _histogram(name: str, labels: Mapping[str, str], found: Distribution) -> list[str]:
    lines, count = [f"# TYPE expertmesh_{name} histogram"], 0
    for bound, added in zip((*found.bounds, math.inf), found.counts, strict=True):
        count += added
        le = "+Inf" if bound == math.inf else f"{bound:g}"
        lines.append(metric_line(f"{name}_bucket", {**labels, "le": le}, count))
    lines.append(metric_line(f"{name}_sum", labels, found.total))
    lines.append(metric_line(f"{name}_count", labels, count))
    return lines


def metric_line(name: str, labels: Mapping[str, str], value: float) -> str:
    """Return one line of the text; the name without its prefix."""
    inside = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
    return f"expertmesh_{name}{{{inside}}} {value:.17g}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
