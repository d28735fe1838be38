"""What people are told of a change."""

from __future__ import annotations

import pytest

from cluster.controller import Target
from cluster.groups import Group, ProcessPhase
from cluster.routers import Router, RouterPhase
from cluster.under_way import under_way
from experts.placement import Placement
from experts.planner import plan_placement

PLAN = plan_placement(2, 4, {"group-0": 1.0, "group-1": 1.0})
"""Epoch 1."""


def words(
    *,
    groups: dict[str, Group] | None = None,
    routers: list[Router] | None = None,
    plan: Placement | None = None,
    wanted: int = 2,
    lacking: str = "",
) -> str:
    if groups is None:
        groups = {name: group(name) for name in PLAN.groups}
    target = Target(groups=wanted, routers=1)
    return under_way(target, groups, routers or [router()], plan, lambda: lacking)


def group(name: str, phase: ProcessPhase = ProcessPhase.UP, holds: int = 1) -> Group:
    return Group(name, 1.0, None, phase=phase, holds=holds)


def router(phase: RouterPhase = RouterPhase.UP, connected: int = 1) -> Router:
    return Router("router-0", 0, phase=phase, connected=connected)


def test_nothing_under_way_is_no_words() -> None:
    assert words() == ""


@pytest.mark.parametrize(
    ("lacking", "waits"), [("", ""), ("1 expert_group", " (the Ray cluster lacks 1 expert_group)")]
)
def test_a_start_says_what_it_waits_for(lacking: str, waits: str) -> None:
    groups = {"group-0": group("group-0"), "group-1": group("group-1", ProcessPhase.PREPARE)}
    assert words(groups=groups, lacking=lacking) == f"starting group-1{waits}"


def test_a_plan_says_how_far_it_is() -> None:
    begin = "placement epoch 1: "
    behind = {"group-0": group("group-0"), "group-1": group("group-1", holds=0)}
    assert words(plan=PLAN, groups=behind) == begin + "group-1 load experts"
    assert words(plan=PLAN, routers=[router(connected=0)]) == begin + "routers connect"
    starts = router(RouterPhase.LOAD, connected=0)  # is not waited for
    assert words(plan=PLAN, routers=[router(), starts]).startswith(begin + "routers switch")


def test_all_that_goes_on_is_told() -> None:
    routers = [router(RouterPhase.DRAIN), router(RouterPhase.CHECK), router(RouterPhase.LEFT)]
    assert words(wanted=0, routers=routers) == (
        "nobody asks for anything: group-0, group-1 leave; draining router-0;"
        " router-0 starts or stops"
    )
