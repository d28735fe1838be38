"""The text that Prometheus reads, and the port it comes from."""

from __future__ import annotations

import re
import socket
import urllib.error
import urllib.request
from dataclasses import replace

import pytest

from cluster import metrics
from cluster.figures import Figures, Server
from cluster.metrics import MetricsServer, metrics_text
from protos.errors import ConfigurationError
from router.engine.config import EngineStats, ReuseStats
from router.engine.tier import TierStats
from router.gateway.forwarding import ForwardStats
from router.gateway.turn_figures import TurnStats
from router.state.cold import ColdStats
from router.state.counters import Distribution

STATS = EngineStats(
    num_running=2,
    num_waiting=1,
    num_queued_tokens=300,
    num_blocks_used=5,
    num_blocks=20,
    num_state_slots_used=2,
    num_state_slots=4,
    prompt_tokens=100,
    generation_tokens=50,
    preemptions=0,
    steps=7,
    step_s=1.5,
    dispatch_s=0.25,
    num_cold_bytes=4096,
    spilled_blocks=6,
    reuse=ReuseStats(is_on=True, hit_tokens=60, restored_tokens=40, lost_tokens=8),
)
FIGURES = Figures(
    router_id="router-0",
    model='a "model"',
    stats=STATS,
    tier=TierStats(
        num_queued_bytes=9,
        counters={"corrupt_total": 3, "restore_bytes": 12.0},
        gauges={"prefill_tokens_per_s": 2.5},
    ),
    cold=ColdStats(sent_bytes=2048, read_blocks=3, read_bytes=1024),
    servers=[Server(role="blob", address="redis://h:1/0", breaker="open", failures=2)],
    forwards=ForwardStats(forwarded=4, fell_back=1),
    sessions_held=2,
    turns=TurnStats(
        commit_s=Distribution(bounds=(0.001, 0.5), counts=(3, 2, 1), total=4.5),
        fenced=5,
        leases_lost=6,
        conflicts=7,
        not_persisted=8,
        num_unsaved=9,
        unsaved_s=0.75,
    ),
)
LINE = re.compile(r'^expertmesh_[a-z0-9_]+\{([a-z_]+="([^"\\]|\\.)*",?)+\} \S+$')


def values(text: str) -> dict[str, float]:
    found = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            assert LINE.match(line), line
            found[line.split("{")[0]] = float(line.rsplit(" ", 1)[1])
    return found


def test_every_line_is_well_formed_and_every_metric_has_a_type() -> None:
    text = metrics_text(FIGURES)
    found = values(text)
    typed = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    parts = {"_bucket", "_sum", "_count"}
    histograms = {name for name, kind in typed.items() if kind == "histogram"}
    assert histograms == {
        "expertmesh_state_commit_seconds",
        "expertmesh_time_to_first_token_seconds",
        "expertmesh_inter_token_latency_seconds",
    }
    shown = {name + part for name in histograms for part in parts} | typed.keys() - histograms
    assert shown == found.keys()
    assert all((kind == "counter") == name.endswith("_total") for name, kind in typed.items())
    assert r'model_name="a \"model\""' in text


def test_the_figures_are_the_routers() -> None:
    found = values(metrics_text(FIGURES))
    for name, value in {
        "requests_running": 2,
        "requests_waiting_uncached_tokens": 300,
        "kv_usage_ratio": 0.25,
        "prefix_cache_queries_total": 200,
        "prefix_cache_hits_total": 100,
        "prefix_cache_lost_tokens_total": 8,
        "router_forwarded_total": 4,
        "kv_spilled_blocks_total": 6,
        "kv_spilled_host_bytes": 4096,
        "kv_spilled_sent_bytes_total": 2048,
        "kv_spilled_read_blocks_total": 3,
        "kv_spilled_read_bytes_total": 1024,
        "state_corrupt_total": 3,
        "state_restore_bytes_total": 12,
        "state_prefill_tokens_per_s": 2.5,
        "state_breaker_state": 2,
        "state_breaker_opened_total": 2,
        "sessions_held": 2,
        "state_fenced_total": 5,
        "state_lease_lost_total": 6,
        "state_conflict_total": 7,
        "state_persisted_false_total": 8,
        "state_ckpt_lag_tokens": 9,
        "state_ckpt_lag_seconds": 0.75,
    }.items():
        assert found[f"expertmesh_{name}"] == value, name


def test_a_histogram_counts_all_up_to_each_bound() -> None:
    text = metrics_text(replace(FIGURES, model="m"))
    assert [line for line in text.splitlines() if "commit_seconds" in line] == [
        line.replace("{", '{router="router-0",model_name="m"')
        for line in (
            "# TYPE expertmesh_state_commit_seconds histogram",
            'expertmesh_state_commit_seconds_bucket{,le="0.001"} 3',
            'expertmesh_state_commit_seconds_bucket{,le="0.5"} 5',
            'expertmesh_state_commit_seconds_bucket{,le="+Inf"} 6',
            "expertmesh_state_commit_seconds_sum{} 4.5",
            "expertmesh_state_commit_seconds_count{} 6",
        )
    ]


def test_a_router_without_servers_has_fewer_lines() -> None:
    found = values(metrics_text(Figures(router_id="r", model="m", stats=STATS)))
    assert not [name for name in found if "_state_b" in name]


def test_the_port_answers_metrics_and_nothing_else() -> None:
    server = MetricsServer("127.0.0.1", 0, lambda: "a 1\n")
    url = f"http://127.0.0.1:{server.port}"
    with urllib.request.urlopen(f"{url}/metrics?x=1", timeout=10) as answer:
        assert answer.read() == b"a 1\n"
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{url}/", timeout=10)
    with pytest.raises(ConfigurationError, match=r"router\.metrics_port cannot be bound"):
        MetricsServer("127.0.0.1", server.port, str)
    server.close()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"{url}/metrics", timeout=10)


def test_a_caller_that_says_nothing_is_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "REQUEST_TIMEOUT_S", 0.1)
    server = MetricsServer("127.0.0.1", 0, lambda: "")
    try:
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as caller:
            assert caller.recv(1) == b""
    finally:
        server.close()
