"""What `Scaling` makes of wishes, deaths and silence; calls end when the test says so."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest

from cluster.controller import Target
from cluster.groups import Groups, ProcessPhase
from cluster.members import ProcessFacts, RouterReady
from cluster.restarts import MAX_QUICK_DEATHS
from cluster.routers import Router, RouterPhase, Routers
from cluster.scaling import ANSWER_TIMEOUT_S, RETRY_S, Scaling
from experts.placement import Placement
from experts.planner import plan_placement
from protos.errors import ExpertMeshError, GroupLostError, RouterLostError

START_TIMEOUT_S = 60.0
GROUPS = ("group-0", "group-1", "group-2")
FACTS = ProcessFacts(node_id="n", address="10.0.0.1", pid=1, cores=2, boot="b")
READY = RouterReady(address="10.0.0.1:50051", num_kv_blocks=8)
ENDLESS = {"wait", "next_wish", "drain"}


@dataclass(eq=False)
class Call:
    """What an actor was asked for."""

    name: str
    method: str
    arguments: tuple[Any, ...]


@dataclass
class Actor:
    name: str

    def call(self, method: str, *arguments: Any) -> Call:
        return Call(self.name, method, arguments)


@dataclass
class World:
    """Ray, the service and time. Every call ends well, but those to who is silent."""

    now: float = 100.0
    said: list[str] = field(default_factory=list)
    silent: set[str] = field(default_factory=set)
    spawned: list[str] = field(default_factory=list)
    places: itertools.count[int] = field(default_factory=itertools.count)
    scaling: Scaling = field(init=False)
    error: ExpertMeshError | None = None

    def __post_init__(self) -> None:
        groups = Groups(self, self, self.said.append, START_TIMEOUT_S, clock=self.clock)
        routers = Routers(self, self, self.said.append, START_TIMEOUT_S, clock=self.clock)
        self.scaling = Scaling(
            calls=self,
            site=self,
            progress=self.said.append,
            groups=groups,
            routers=routers,
            target=Target(groups=len(GROUPS), routers=1, capacities=dict.fromkeys(GROUPS, 1.0)),
            drain_timeout_s=1.0,
            placement=plan_placement(2, 12, dict.fromkeys(GROUPS, 1.0)),
            clock=self.clock,
        )
        for name in GROUPS:
            groups.start(name, 1.0)
            groups.finished(name)
            group = groups.all[name]
            group.address, group.holds, group.joined, group.trimmed = "10.0.0.1:1", 1, 1, 1
        router = Router("router-0", 0, Actor("router-0"), FACTS, READY, follows=1, connected=1)
        routers.all["router-0"] = router
        routers.watch()

    def clock(self) -> float:
        return self.now

    def result(self, name: str, call: Call, lost: Any) -> Any:
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        match call.method:
            case "load" | "take":
                return "10.0.0.1:1", call.arguments[0], "torch"
            case "trim":
                return Placement.from_json(call.arguments[0]).epoch
            case "sleep" | "wake":
                return call.method, True
            case "connect":
                return "connect", Placement.from_json(call.arguments[0]).epoch
            case "switch":
                return "switch", call.arguments[0]
            case "prepare":
                return FACTS
            case "start":
                return READY
        return None

    def kill(self, actor: Actor) -> None:
        pass

    def reserve_group(self) -> int:
        return next(self.places)

    def release(self, place: int) -> None:
        pass

    def spawn_group(self, group_id: str, place: int) -> Actor:
        self.spawned.append(group_id)
        return Actor(group_id)

    spawn_router = lambda self, router_id: Actor(router_id)  # noqa: E731

    def group_died(self, group_id: str) -> None:
        self.scaling.group_died(group_id)

    def call_load(self, router: Router) -> Call:
        return router.actor.call("load", 1)

    def can_start(self) -> bool:
        return self.scaling.serves

    def call_start(self, router: Router) -> Call:
        assert self.scaling.placement is not None
        router.follows = router.connected = self.scaling.placement.epoch
        return router.actor.call("start")

    def router_died(self, router: Router) -> None:
        pass

    router_leaves = router_left = router_died

    def routers_changed(self) -> None:
        pass

    def call_load_experts(self, group: Any, placement: Placement) -> Call:
        return group.actor.call("take", placement.epoch)

    def missing_nodes(self) -> str:
        return ""

    # What the test does.

    def turn(self) -> None:
        """As `Service.wait`: take what has finished, then look."""
        scaling = self.scaling
        members = scaling.groups.references() | scaling.routers.references()
        for name, call in (members | scaling.references()).items():
            if call.method in ENDLESS or call.name in self.silent:
                continue
            if name in scaling.groups.all:
                scaling.groups.finished(name)
            elif name in scaling.routers.all:
                scaling.routers.finished(name)
            else:
                scaling.finished(name)
        scaling.groups.tick()
        scaling.routers.tick()
        scaling.tick()

    def settle(self) -> None:
        for _ in range(30):
            self.turn()
            self.now += 1.0
            if self.scaling.view().is_settled:
                return
        raise AssertionError(self.scaling.view())

    def settle_without(self, group_id: str) -> None:
        """Until a placement without it is in force and nothing more is done."""
        for _ in range(10):
            self.turn()
        assert self.scaling.placement is not None
        assert group_id not in self.scaling.placement.groups
        assert group_id not in self.scaling.groups.all

    def lose(self, group_id: str) -> None:
        """Its process ends."""
        self.error = GroupLostError(group_id, "its process ended")
        self.scaling.groups.finished(group_id)


@pytest.fixture
def world() -> World:
    return World()


def test_a_group_that_is_drained_twice_leaves_once(world: World) -> None:
    world.scaling.leave("group-1")
    world.scaling.leave("group-1")
    world.settle()
    assert list(world.scaling.groups.all) == ["group-0", "group-2"]
    world.scaling.leave("group-1")
    assert world.scaling.target.groups == 2, "it has gone"


def test_two_groups_that_are_drained_at_the_same_time_are_those_that_leave(world: World) -> None:
    world.scaling.leave("group-0")
    world.turn()
    world.scaling.leave("group-1")
    world.scaling.scale(None, 1)  # somebody else, who cares for routers
    world.settle()
    assert list(world.scaling.groups.all) == ["group-2"]
    world.scaling.scale(2)
    world.settle()
    assert list(world.scaling.groups.all) == ["group-2", "group-0"]
    assert not world.scaling.target.leaving, "it is another group of that name"


def test_a_drained_group_leaves_although_somebody_wants_the_number_back(world: World) -> None:
    """As an autoscaler does whose least number it was; another group takes its place."""
    world.scaling.leave("group-0")
    world.turn()
    world.scaling.scale(3)
    world.settle()
    assert list(world.scaling.groups.all) == ["group-1", "group-2", "group-3"]
    assert world.scaling.placement is not None
    assert set(world.scaling.placement.groups) == {"group-1", "group-2", "group-3"}


def test_a_group_whose_node_does_not_come_back_is_asked_for_anew(world: World) -> None:
    world.now += 1000
    world.silent.add("group-1")
    world.lose("group-1")
    scaling = world.scaling
    for _ in range(20):
        world.turn()
        world.now += START_TIMEOUT_S / 2
    assert scaling.groups.given_up == [], "for that the service would end"
    assert scaling.placement is not None
    assert sorted(scaling.placement.groups) == ["group-0", "group-2"]
    assert "group-1 did not start" in scaling.view().trouble
    world.silent.clear()
    world.now += RETRY_S
    world.settle()
    assert sorted(scaling.placement.groups) == list(GROUPS)
    assert scaling.view().trouble == ""


def test_after_a_group_that_dies_again_and_again_there_is_a_pause(world: World) -> None:
    groups = world.scaling.groups
    for _ in range(MAX_QUICK_DEATHS):
        while groups.all["group-1"].phase is not ProcessPhase.UP:
            world.turn()
            world.now += 0.5
        world.lose("group-1")
    world.settle_without("group-1")
    world.now += RETRY_S
    world.turn()
    assert "group-1" in groups.all


def test_a_group_that_does_not_finish_loading_is_ended(world: World) -> None:
    world.scaling.scale(2)
    world.silent.add("group-0")
    world.turn()
    world.turn()
    assert world.scaling.groups.all["group-0"].work is not None
    world.now += START_TIMEOUT_S * 1.01
    world.turn()
    world.silent.clear()
    world.settle()
    assert world.spawned.count("group-0") == 2
    assert any("group-0 died (loading did not finish within 60 s)" in line for line in world.said)


def test_a_group_that_does_not_stop_is_killed(world: World) -> None:
    world.scaling.scale(2)
    world.silent.add("group-2")
    while world.scaling.groups.all["group-2"].phase is not ProcessPhase.STOP:
        world.silent.clear()
        world.turn()
        world.silent.add("group-2")
    world.now += 1000
    world.turn()
    assert list(world.scaling.groups.all) == ["group-0", "group-1"]


def test_a_router_that_does_not_answer_is_ended_and_the_change_goes_on(world: World) -> None:
    world.silent.add("router-0")
    world.scaling.scale(2)
    for _ in range(10):
        world.turn()
    router = world.scaling.routers.all["router-0"]
    assert router.work is not None
    world.now += ANSWER_TIMEOUT_S * 1.01
    world.turn()
    assert router.phase is not RouterPhase.UP
    world.silent.clear()
    world.settle()
    assert router.phase is RouterPhase.UP


@pytest.mark.parametrize("phase", [RouterPhase.START, RouterPhase.CHECK])
def test_a_router_that_starts_with_a_group_that_dies_begins_anew(
    world: World, phase: RouterPhase
) -> None:
    """It waits for the group's answers, and no plan can be told to it meanwhile."""
    router = world.scaling.routers.all["router-0"]
    world.error = RouterLostError("router-0", "its process ended")
    world.scaling.routers.finished("router-0")
    while router.phase is not phase:
        world.turn()
    world.silent.add("group-1")
    world.lose("group-1")
    assert router.phase is RouterPhase.WAITING
    assert router.restarts.quick_deaths == 1, "the death before counts, this is none"
    for _ in range(10):
        world.turn()
    assert router.phase is RouterPhase.UP
    assert world.scaling.placement is not None
    assert "group-1" not in world.scaling.placement.groups


def test_a_router_that_waits_for_its_node_keeps_nobody_awake(world: World) -> None:
    world.scaling.scale(0, 2)
    world.silent.add("router-1")  # no node
    for _ in range(10):
        world.turn()
    assert world.scaling.routers.all["router-1"].phase is RouterPhase.PREPARE
    assert (world.scaling.target.groups, world.scaling.groups.all) == (0, {})
    world.silent.clear()
    world.settle()
    assert len(world.scaling.groups.all) == len(GROUPS), "it needs experts to start"
