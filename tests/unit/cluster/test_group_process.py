"""What an expert group's process does with placements, without its actor."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.config_loading import load_config
from cluster.group_process import GroupProcess
from experts.moves import replan
from experts.planner import plan_placement
from tests.unit.experts.builders import EXPERTS, LAYERS, tensors, write


@pytest.fixture
def group(tmp_path: Path) -> Iterator[GroupProcess]:
    path = write(tmp_path / "checkpoint", tensors())
    made = GroupProcess("a", load_config({"model.checkpoint": str(path)}).config)
    yield made
    made.stop()


def held(group: GroupProcess) -> dict[int, list[int]]:
    assert group._runtime is not None
    return group._runtime.status().layers


def test_it_takes_what_a_plan_gives_it_and_forgets_the_rest_later(group: GroupProcess) -> None:
    first = plan_placement(LAYERS, EXPERTS, {"a": 1, "b": 1})
    address, epoch, _ = group.load(first.to_json(), "float32", 1, "127.0.0.1", "auto")
    assert (epoch, held(group)) == (1, first.experts_of("a"))
    plan = replan(first, {"a": 3, "b": 1})
    assert group.take(plan.to_json())[:2] == (address, 2)
    assert held(group) == plan.experts_of("a")
    assert group.trim(first.to_json()) == 1, "the plan was given up"
    assert held(group) == first.experts_of("a")


def test_it_computes_as_it_is_told(group: GroupProcess) -> None:
    """On a busy machine each group would measure something else, and the last bits differ."""
    placement = plan_placement(LAYERS, EXPERTS, {"a": 1})
    _, _, kind = group.load(placement.to_json(), "float32", 1, "127.0.0.1", "deepspeed")
    assert kind == "deepspeed"
