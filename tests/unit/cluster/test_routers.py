"""The life of routers that die, with calls that end when the test says so."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from cluster.controller import Target
from cluster.groups import Groups
from cluster.members import ProcessFacts, RouterReady
from cluster.restarts import FIRST_BACKOFF_S, MAX_QUICK_DEATHS, QUICK_S, backoff_s
from cluster.routers import (
    GIVEN_UP_S,
    STOP_TIMEOUT_S,
    Router,
    RouterPhase,
    Routers,
)
from cluster.scaling import Scaling
from protos.errors import ConfigurationError, ExpertMeshError, RouterLostError

START_TIMEOUT_S = 60.0
FACTS = ProcessFacts(node_id="n", address="10.0.0.1", pid=1, cores=2, boot="b")
RESULTS = {
    "prepare": FACTS,
    "load": 1,
    "start": RouterReady(address="10.0.0.1:50051", num_kv_blocks=8),
    "check": None,
    "drain": 0,
    "stop": None,
}


@dataclass
class Call:
    """What an actor was asked for."""

    router_id: str
    method: str


@dataclass
class World:
    """Ray, the service and time, as far as `Routers` sees them."""

    now: float = 100.0
    said: list[str] = field(default_factory=list)
    killed: list[str] = field(default_factory=list)
    num_spawned: int = 0
    reported: list[tuple[str, str]] = field(default_factory=list)
    num_told: int = 0
    leaving: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    ports: list[int | None] = field(default_factory=list)
    has_experts: bool = True
    spawn_error: ExpertMeshError | None = None
    errors: dict[str, ExpertMeshError] = field(default_factory=dict)
    """Method -> what its next call raises."""

    def result(self, name: str, reference: Call, lost: type[ExpertMeshError]) -> Any:
        assert name == reference.router_id
        if reference.method in self.errors:
            raise self.errors.pop(reference.method)
        return RESULTS.get(reference.method)

    def kill(self, actor: Any) -> None:
        self.killed.append(actor.router_id)

    def spawn_router(self, router_id: str) -> Any:
        if self.spawn_error is not None:
            raise self.spawn_error
        self.num_spawned += 1
        return FakeActor(router_id)

    def call_load(self, router: Router) -> Any:
        assert router.facts is FACTS
        return Call(router.router_id, "load")

    def can_start(self) -> bool:
        return self.has_experts

    def call_start(self, router: Router) -> Any:
        self.ports.append(router.port)
        return Call(router.router_id, "start")

    def router_died(self, router: Router) -> None:
        assert router.facts is not None
        self.reported.append((router.router_id, router.facts.boot))

    def routers_changed(self) -> None:
        self.num_told += 1

    def router_leaves(self, router: Router) -> None:
        self.leaving.append(router.router_id)

    def router_left(self, router: Router) -> None:
        self.left.append(router.router_id)


@dataclass
class FakeActor:
    router_id: str

    def call(self, method: str, *args: Any) -> Call:
        return Call(self.router_id, method)


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def routers(world: World) -> Routers:
    made = Routers(world, world, world.said.append, START_TIMEOUT_S, clock=lambda: world.now)
    for index in range(2):
        router_id = f"router-{index}"
        made.all[router_id] = Router(router_id, index, FakeActor(router_id), FACTS)
        made.all[router_id].ready = RESULTS["start"]  # type: ignore[assignment]
    made.watch()
    return made


def die(world: World, routers: Routers, router_id: str = "router-0") -> None:
    router = routers.all[router_id]
    world.errors[router.phase.value] = RouterLostError(router_id, "its process ended")
    routers.finished(router_id)


def run_to_up(routers: Routers, router_id: str = "router-0") -> None:
    routers.tick()
    for phase in (RouterPhase.PREPARE, RouterPhase.LOAD, RouterPhase.START, RouterPhase.CHECK):
        assert routers.all[router_id].phase is phase
        routers.finished(router_id)
    assert routers.all[router_id].phase is RouterPhase.UP


def test_a_router_waits_for_experts_before_it_starts(world: World, routers: Routers) -> None:
    world.has_experts = False
    die(world, routers)
    routers.tick()
    routers.finished("router-0")
    routers.finished("router-0")
    router = routers.all["router-0"]
    assert (router.phase, router.pending) == (RouterPhase.LOADED, None)
    routers.tick()
    assert router.phase is RouterPhase.LOADED
    world.has_experts = True
    routers.tick()
    assert router.phase is RouterPhase.START


def test_a_dead_router_walks_back_to_its_port_and_all_are_told(
    world: World, routers: Routers
) -> None:
    world.now += QUICK_S
    die(world, routers)
    assert world.killed == ["router-0"]
    assert world.reported == [("router-0", "b")]
    assert [r.router_id for r in routers.up] == ["router-1"]
    assert routers.addresses().keys() == {"router-0", "router-1"}, "it comes back there"
    run_to_up(routers)
    assert world.ports == [50051]
    assert world.num_told == 1
    assert len(routers.up) == 2
    assert world.said == [
        "router-0 died (router router-0 is lost: its process ended); it starts again now",
        "router-0 is back at 10.0.0.1:50051",
    ]


def test_the_first_restart_is_at_once_and_then_the_waits_double(
    world: World, routers: Routers
) -> None:
    for deaths in range(1, MAX_QUICK_DEATHS):
        die(world, routers)
        delay_s = backoff_s(deaths)
        assert delay_s == (0.0 if deaths == 1 else FIRST_BACKOFF_S * 2 ** (deaths - 2))
        world.now += delay_s * 0.99
        routers.tick()
        assert (world.num_spawned == deaths) == (delay_s == 0), "not before its time"
        world.now += delay_s * 0.02
        if delay_s:
            run_to_up(routers)
        else:
            for _ in range(4):
                routers.finished("router-0")
    die(world, routers)
    assert routers.given_up == ["router-0"]
    assert "5 times in a row; it is given up" in world.said[-1]
    assert not routers.is_over, "the other one serves"
    world.now += GIVEN_UP_S * 0.99
    routers.tick()
    assert world.num_spawned == MAX_QUICK_DEATHS - 1


def test_why_a_router_does_not_serve_is_kept_until_one_does(world: World, routers: Routers) -> None:
    routers.add()
    routers.tick()
    routers.finished("router-2")
    routers.finished("router-2")
    world.errors["start"] = ConfigurationError("port", "must be free", 50053)
    routers.finished("router-2")
    assert routers.trouble.startswith("router-2 did not start (")
    assert "must be free" in routers.trouble
    run_to_up(routers, "router-2")
    assert routers.trouble == ""
    give_up(world, routers, "router-2")
    routers.trouble = "router-2 does not"
    routers.drain("router-2", 1.0)
    assert routers.trouble == "", "nobody wants it any more"


def give_up(world: World, routers: Routers, router_id: str) -> None:
    while router_id not in routers.given_up:
        die(world, routers, router_id)
        world.now += backoff_s(MAX_QUICK_DEATHS)
        routers.tick()


def test_a_router_that_was_given_up_is_tried_again_while_another_serves(
    world: World, routers: Routers
) -> None:
    give_up(world, routers, "router-0")
    world.now += GIVEN_UP_S
    routers.tick()
    assert routers.all["router-0"].phase is RouterPhase.PREPARE
    die(world, routers)
    assert routers.given_up == ["router-0"], "one more try, no five"
    world.now += GIVEN_UP_S
    run_to_up(routers)
    assert routers.given_up == []


def test_when_all_are_given_up_the_service_is_over(world: World, routers: Routers) -> None:
    give_up(world, routers, "router-0")
    give_up(world, routers, "router-1")
    world.now += GIVEN_UP_S
    routers.tick()
    assert routers.is_over


def test_a_router_that_stays_up_starts_over_with_its_patience(
    world: World, routers: Routers
) -> None:
    for _ in range(3 * MAX_QUICK_DEATHS):
        world.now += QUICK_S
        die(world, routers)
        run_to_up(routers)
    assert routers.given_up == []


@pytest.mark.parametrize(
    "phase", [RouterPhase.PREPARE, RouterPhase.LOAD, RouterPhase.START, RouterPhase.CHECK]
)
def test_a_start_that_fails_counts_as_a_quick_death(
    world: World, routers: Routers, phase: RouterPhase
) -> None:
    world.now += QUICK_S
    die(world, routers)
    routers.tick()
    while routers.all["router-0"].phase is not phase:
        routers.finished("router-0")
    world.errors[phase.value] = ConfigurationError("port", "must be free", 50051)
    routers.finished("router-0")
    assert routers.all["router-0"].restarts.quick_deaths == 1
    assert "router-0 did not come back" in world.said[-1]
    assert "must be free" in world.said[-1]
    assert world.killed == ["router-0", "router-0"]
    run_to_up(routers)


def test_a_name_that_is_not_free_yet_is_tried_again(world: World, routers: Routers) -> None:
    die(world, routers)
    world.spawn_error = ConfigurationError("cluster.namespace", "is in use", "x")
    routers.tick()
    assert routers.all["router-0"].phase is RouterPhase.WAITING
    world.spawn_error = None
    world.now += backoff_s(2)
    run_to_up(routers)


def test_a_start_that_hangs_is_ended(world: World, routers: Routers) -> None:
    world.now += QUICK_S
    die(world, routers)
    routers.tick()
    routers.finished("router-0")
    world.now += START_TIMEOUT_S * 0.99
    routers.tick()
    assert routers.all["router-0"].phase is RouterPhase.LOAD
    world.now += START_TIMEOUT_S * 0.02
    routers.tick()
    assert routers.all["router-0"].phase is RouterPhase.WAITING
    assert "the start" in world.said[-1]
    assert "router-0" not in routers.references()


def test_waiting_for_a_node_or_for_experts_counts_for_nothing(
    world: World, routers: Routers
) -> None:
    world.now += QUICK_S
    die(world, routers)
    for _ in range(2 * MAX_QUICK_DEATHS):
        routers.tick()
        routers.tick()
        world.now += START_TIMEOUT_S * 1.01
    router = routers.all["router-0"]
    assert (router.phase, router.restarts.quick_deaths) == (RouterPhase.PREPARE, 0)
    assert world.said[-1] == "router-0 has no node after 60 s; it goes on waiting"
    world.has_experts = False
    routers.finished("router-0")
    routers.finished("router-0")
    for _ in range(2 * MAX_QUICK_DEATHS):
        world.now += START_TIMEOUT_S
        routers.tick()
    assert (router.phase, router.restarts.quick_deaths) == (RouterPhase.LOADED, 0)
    world.has_experts = True
    routers.tick()
    assert router.phase is RouterPhase.START


@pytest.mark.parametrize("phase", [RouterPhase.DRAIN, RouterPhase.STOP])
def test_a_router_that_does_not_come_to_its_end_is_killed(
    world: World, routers: Routers, phase: RouterPhase
) -> None:
    routers.drain("router-0", 3.0)
    while routers.all["router-0"].phase is not phase:
        routers.finished("router-0")
    world.now += STOP_TIMEOUT_S * 0.99
    routers.tick()
    assert routers.all["router-0"].phase is phase
    world.now += 3.0 + STOP_TIMEOUT_S
    routers.tick()
    assert routers.all["router-0"].phase is RouterPhase.LEFT
    assert world.killed == ["router-0"]


def test_a_drained_router_stops_and_leaves(world: World, routers: Routers) -> None:
    routers.finished("router-0")
    assert routers.all["router-0"].phase is RouterPhase.STOP
    assert not world.killed, "it closes its port first"
    routers.finished("router-0")
    assert world.killed == ["router-0"]
    assert routers.addresses().keys() == {"router-1"}
    assert world.num_told == 1
    assert world.said == ["router-0 was drained and left"]
    assert (world.leaving, world.left) == (["router-0"], ["router-0"])
    routers.finished("router-1")
    die(world, routers, "router-1")  # while it stops: it leaves all the same
    assert routers.is_over
    assert routers.given_up == []


def test_a_router_is_added_and_takes_the_place_of_one_that_left(
    world: World, routers: Routers
) -> None:
    assert routers.add() == "router-2"
    run_to_up(routers, "router-2")
    assert world.said == ["router-2 serves at 10.0.0.1:50051"]
    routers.drain("router-1", 3.0)
    assert routers.all["router-1"].phase is RouterPhase.DRAIN
    assert "router-1" in routers.addresses(), "it serves what it has"
    routers.finished("router-1")
    assert routers.all["router-1"].phase is RouterPhase.STOP
    routers.finished("router-1")
    assert (world.leaving, world.left) == ([], ["router-1"]), "nobody asked the router itself"
    assert routers.add() == "router-1"
    assert routers.all["router-1"].port is None, "it is a new one"


@pytest.mark.parametrize("phase", [RouterPhase.DRAIN, RouterPhase.STOP])
def test_a_router_that_dies_while_it_leaves_has_left(
    world: World, routers: Routers, phase: RouterPhase
) -> None:
    routers.drain("router-0", 3.0)
    while routers.all["router-0"].phase is not phase:
        routers.finished("router-0")
    while routers.all["router-0"].phase is not RouterPhase.LEFT:
        die(world, routers)
    assert world.left == ["router-0"]
    assert world.num_spawned == 0


def test_a_router_that_is_down_leaves_at_once(world: World, routers: Routers) -> None:
    die(world, routers)
    routers.drain("router-0", 3.0)
    assert routers.all["router-0"].phase is RouterPhase.LEFT
    routers.tick()
    assert world.num_spawned == 0


def test_a_dead_router_is_asked_for_wishes_once(world: World, routers: Routers) -> None:
    """Its open call may fail before the one that tells of its death; others would fail at once."""
    groups = Groups(world, world, world.said.append, START_TIMEOUT_S)  # type: ignore[arg-type]
    scaling = Scaling(
        world,
        world,  # type: ignore[arg-type]
        world.said.append,
        groups,
        routers,
        Target(groups=0, routers=2),
        drain_timeout_s=1.0,
    )
    assert scaling.references().keys() == {"router-0/wish", "router-1/wish"}
    world.errors["next_wish"] = RouterLostError("router-0", "its process ended")
    scaling.finished("router-0/wish")
    assert scaling.references().keys() == {"router-1/wish"}
    die(world, routers)
    run_to_up(routers)
    assert scaling.references().keys() == {"router-0/wish", "router-1/wish"}, "a new process"
