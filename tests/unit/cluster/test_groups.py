"""The life of expert groups' processes, with calls that end when the test says so."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from cluster.controller import GroupPhase
from cluster.groups import Groups, ProcessPhase
from cluster.members import ProcessFacts
from cluster.restarts import FIRST_BACKOFF_S, MAX_QUICK_DEATHS, QUICK_S, backoff_s
from protos.errors import (
    CheckpointError,
    ConfigurationError,
    ExpertMeshError,
    GroupLostError,
)

START_TIMEOUT_S = 60.0
FACTS = ProcessFacts(node_id="n", address="10.0.0.1", pid=1, cores=2, boot="b")


@dataclass
class World:
    """Ray, the service and time, as far as `Groups` sees them."""

    now: float = 100.0
    said: list[str] = field(default_factory=list)
    killed: list[str] = field(default_factory=list)
    died: list[str] = field(default_factory=list)
    places: int = 0
    released: list[int] = field(default_factory=list)
    num_spawned: int = 0
    error: ExpertMeshError | None = None
    taken: ExpertMeshError | None = None
    """Why no actor can be made."""

    def result(self, name: str, reference: Any, lost: Any) -> Any:
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        return FACTS if reference == "prepare" else None

    def kill(self, actor: Any) -> None:
        self.killed.append(actor.group_id)

    def reserve_group(self) -> int:
        self.places += 1
        return self.places

    def release(self, place: int) -> None:
        self.released.append(place)

    def spawn_group(self, group_id: str, place: int) -> Any:
        if self.taken is not None:
            raise self.taken
        self.num_spawned += 1
        return Actor(group_id)

    def group_died(self, group_id: str) -> None:
        self.died.append(group_id)


@dataclass
class Actor:
    group_id: str

    def call(self, method: str, *args: Any) -> str:
        return method


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def groups(world: World) -> Groups:
    made = Groups(world, world, world.said.append, START_TIMEOUT_S, clock=lambda: world.now)
    made.start("group-0", 1.0)
    made.finished("group-0")
    made.all["group-0"].holds = made.all["group-0"].trimmed = 3
    return made


def die(world: World, groups: Groups, group_id: str = "group-0") -> None:
    world.error = GroupLostError(group_id, "its process ended")
    groups.finished(group_id)


def test_a_group_starts_in_its_place_and_leaves_it(world: World, groups: Groups) -> None:
    view = groups.all["group-0"].view()
    assert (view.phase, view.holds, view.busy) == (GroupPhase.RUNNING, 3, False)
    groups.stop("group-0")
    assert groups.all["group-0"].view().phase is GroupPhase.LEAVING
    assert not world.killed, "it closes its port first"
    groups.finished("group-0")
    assert (world.killed, world.released, groups.all) == (["group-0"], [1], {})


def test_a_dead_group_has_lost_its_experts_and_starts_again_in_its_place(
    world: World, groups: Groups
) -> None:
    world.now += QUICK_S
    die(world, groups)
    assert world.died == ["group-0"]
    view = groups.all["group-0"].view()
    assert (view.phase, view.holds, view.trimmed) == (GroupPhase.STARTING, 0, 0)
    groups.tick()
    assert (world.places, world.released, world.num_spawned) == (1, [], 2)
    groups.finished("group-0")
    assert groups.all["group-0"].view().phase is GroupPhase.RUNNING
    assert world.said == [
        "group-0 died (expert group group-0 is lost: its process ended); it starts again now"
    ]


def test_a_group_that_dies_too_often_is_given_up(world: World, groups: Groups) -> None:
    for deaths in range(1, MAX_QUICK_DEATHS):
        die(world, groups)
        world.now += backoff_s(deaths)
        groups.tick()
        groups.finished("group-0")
    assert groups.given_up == []
    die(world, groups)
    assert groups.given_up == ["group-0"]
    assert "5 times in a row; it is given up" in world.said[-1]
    world.now += 1e6
    groups.tick()
    assert world.num_spawned == MAX_QUICK_DEATHS


def test_a_group_that_dies_too_often_loses_its_place_while_another_serves(
    world: World, groups: Groups
) -> None:
    """Its node may be broken; for that a service that answers must not end."""
    groups.start("group-1", 1.0)
    groups.finished("group-1")
    for deaths in range(1, MAX_QUICK_DEATHS):
        die(world, groups, "group-1")
        world.now += backoff_s(deaths)
        groups.tick()
        groups.finished("group-1")
    assert world.released == []
    die(world, groups, "group-1")
    assert (list(groups.all), groups.given_up, world.released) == (["group-0"], [], [2])
    assert world.died.count("group-1") == MAX_QUICK_DEATHS
    assert groups.trouble.startswith("group-1 died, 5 times in a row: ")


def test_a_group_that_never_started_is_forgotten_and_says_why(world: World, groups: Groups) -> None:
    groups.start("group-1", 1.0)
    world.error = CheckpointError("/c", "no such folder")
    groups.finished("group-1")
    assert list(groups.all) == ["group-0"]
    assert world.released == [2]
    assert groups.trouble == "group-1 did not start: checkpoint /c: no such folder"
    groups.start("group-1", 1.0)
    groups.finished("group-1")
    assert groups.trouble == ""


def test_a_start_without_a_node_is_ended(world: World, groups: Groups) -> None:
    groups.start("group-1", 1.0)
    world.now += START_TIMEOUT_S * 0.99
    groups.tick()
    assert groups.all["group-1"].phase is ProcessPhase.PREPARE
    world.now += START_TIMEOUT_S * 0.02
    groups.tick()
    assert list(groups.all) == ["group-0"]
    assert "the start did not finish within 60 s" in groups.trouble
    assert world.died == ["group-1"]


def test_a_name_that_is_not_free_yet_is_tried_again_within_the_bound(
    world: World, groups: Groups
) -> None:
    world.taken = ConfigurationError("cluster.namespace", "is in use", "x")
    groups.start("group-1", 1.0)
    world.now += FIRST_BACKOFF_S
    groups.tick()
    assert groups.all["group-1"].phase is ProcessPhase.WAITING
    world.taken = None
    world.now += FIRST_BACKOFF_S
    groups.tick()
    groups.finished("group-1")
    assert groups.all["group-1"].phase is ProcessPhase.UP
    world.taken = ConfigurationError("cluster.namespace", "is in use", "x")
    groups.start("group-2", 1.0)
    world.now += START_TIMEOUT_S
    groups.tick()
    assert "group-2" not in groups.all
    assert "is in use" in groups.trouble


def test_a_group_that_is_not_needed_before_it_starts_is_ended(world: World, groups: Groups) -> None:
    groups.start("group-1", 1.0)
    groups.stop("group-1")
    assert (world.killed, world.released) == (["group-1"], [2])
