"""An expert group's figures for Prometheus, and the port that it finds."""

from __future__ import annotations

import urllib.request

import pytest

from cluster import group_metrics
from cluster.group_metrics import group_metrics_text, open_group_metrics
from experts.group_state import GroupState, GroupStatus
from protos.errors import ConfigurationError
from tests.unit.cluster.test_metrics import values

STATUS = GroupStatus(
    group_id="group-0",
    state=GroupState.READY,
    failure="",
    placement_epoch=7,
    layers={0: [1, 2], 1: [0]},
    compute="torch",
    num_threads=2,
    resident_bytes=300,
    capacity_bytes=1000,
    num_calls=5,
    num_rows=50,
    num_pairs=100,
    busy_s=1.5,
    dtype="float32",
)


def test_the_figures_are_the_groups() -> None:
    text = group_metrics_text(STATUS, [60, 40])
    found = values(text)
    for name, value in {
        "expert_placement_epoch": 7,
        "expert_resident": 3,
        "expert_resident_bytes": 300,
        "expert_capacity_bytes": 1000,
        "expert_threads": 2,
        "expert_calls_total": 5,
        "expert_rows_total": 50,
        "expert_busy_seconds_total": 1.5,
    }.items():
        assert found[f"expertmesh_{name}"] == value, name
    assert 'expertmesh_expert_rank_tokens_total{group="group-0",layer="0"} 60\n' in text
    assert 'expertmesh_expert_rank_tokens_total{group="group-0",layer="1"} 40\n' in text
    assert text.count("# TYPE ") == 9


def test_groups_of_a_node_take_the_next_free_port(monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_group_metrics("127.0.0.1", 0, lambda: "a 1\n")
    second = open_group_metrics("127.0.0.1", first.port, lambda: "b 2\n")
    try:
        assert second.port > first.port
        url = f"http://127.0.0.1:{second.port}/metrics"
        with urllib.request.urlopen(url, timeout=10) as answer:
            assert answer.read() == b"b 2\n"
        monkeypatch.setattr(group_metrics, "MAX_TRIES", 1)
        with pytest.raises(
            ConfigurationError, match=r"experts.metrics_port must have a free port among the next 1"
        ):
            open_group_metrics("127.0.0.1", first.port, str)
    finally:
        first.close()
        second.close()
