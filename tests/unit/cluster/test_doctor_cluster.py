"""What a machine's answer means, by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from cluster.doctor_cluster import Expected, judge
from cluster.remote import Answer

EXPECTED = Expected(
    checkpoint="/models/m",
    token="abc",
    redis="10.0.0.9:6379",
    head="10.0.0.11:6379",
    is_up=True,
    versions={"python": "3.11", "ray": "2.60.0", "expertmesh": "0.1.0"},
    started_s=1000.0,
    ended_s=1002.0,
)
SOUND = {
    "time_s": 1001.0,
    "python": "3.11",
    "ray": "2.60.0",
    "expertmesh": "0.1.0",
    "token": "abc",
    "shm_bytes": 1 << 30,
    "disk_bytes": 100 << 30,
    "checkpoint": True,
    "reaches": {"10.0.0.9:6379": True, "10.0.0.11:6379": True},
}


def findings(expected: Expected = EXPECTED, **found: Any) -> dict[str, tuple[str, str]]:
    """What is not ok: name -> state and detail."""
    answer = Answer(0, "welcome to this machine\n" + json.dumps({**SOUND, **found}), "")
    checks = judge("h2", answer, expected)
    assert all(check.remedy for check in checks if check.state != "ok")
    return {c.name.removeprefix("h2 "): (c.state, c.detail) for c in checks if c.state != "ok"}


def test_a_sound_machine_has_no_findings() -> None:
    assert findings() == {}


@pytest.mark.parametrize(
    ("found", "name", "state", "detail"),
    [
        ({"ray": "2.59.0"}, "ray", "fail", "2.59.0, here 2.60.0"),
        ({"expertmesh": ""}, "expertmesh", "warn", "not installed yet"),
        ({"python": "3.12"}, "python", "fail", "3.12, here 3.11"),
        ({"time_s": 1012.0}, "clock", "warn", "10 s ahead of ours"),
        ({"time_s": 980.0}, "clock", "warn", "20 s behind ours"),
        ({"token": ""}, "token", "warn", "none yet"),
        ({"token": "xyz"}, "token", "fail", "another secret than here"),
        ({"shm_bytes": 64 << 20}, "/dev/shm", "warn", "64.0 MiB free"),
        ({"disk_bytes": 1 << 30}, "disk", "warn", "1.0 GiB free"),
        ({"checkpoint": False}, "checkpoint", "fail", "no /models/m"),
    ],
)
def test_a_finding(found: dict[str, Any], name: str, state: str, detail: str) -> None:
    assert findings(**found) == {name: (state, detail)}


def test_ports_are_judged_by_whether_the_service_runs() -> None:
    closed = {"10.0.0.9:6379": True, "10.0.0.11:6379": False}
    assert findings(reaches=closed) == {"ray's port": ("fail", "10.0.0.11:6379 cannot be reached")}
    down = replace(EXPECTED, is_up=False)
    assert findings(down, reaches=closed) == {}
    assert findings(down) == {"ray's port": ("warn", "10.0.0.11:6379 is taken")}


def test_a_store_that_a_machine_does_not_reach_is_a_failure() -> None:
    reaches = {"10.0.0.9:6379": False, "10.0.0.11:6379": True}
    assert findings(reaches=reaches) == {"redis": ("fail", "10.0.0.9:6379 cannot be reached")}
    assert findings(replace(EXPECTED, redis=None), reaches=reaches) == {}


def test_a_clock_is_not_blamed_for_a_slow_answer() -> None:
    assert findings(replace(EXPECTED, started_s=900.0, ended_s=1100.0), time_s=1099.0) == {}


def test_a_remedy_that_is_known_is_told() -> None:
    (check,) = judge("h2", Answer(255, "", "another host key", "ssh-keygen -R h2"), EXPECTED)
    assert (check.state, check.remedy) == ("fail", "ssh-keygen -R h2")


def test_no_ssh_is_one_failure() -> None:
    checks = judge("h2", Answer(255, "", "Connection refused"), EXPECTED)
    assert [(c.name, c.state, c.detail) for c in checks] == [
        ("h2 ssh", "fail", "Connection refused")
    ]
