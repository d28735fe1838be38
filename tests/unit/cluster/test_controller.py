"""The controller against a world in which every action takes a while, fails, or meets a death."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from cluster import controller
from cluster.controller import (
    Abandon,
    AddRouter,
    BeginPlan,
    Commit,
    Connect,
    DrainRouter,
    GroupPhase,
    GroupView,
    LoadGroup,
    Observed,
    RouterView,
    Sleep,
    StartGroup,
    StopGroup,
    Switch,
    Target,
    Trim,
    Wake,
    members,
    step,
)
from experts.placement import Placement
from experts.planner import balancedness, plan_placement

LAYERS, EXPERTS = 2, 12
RUNNING, STARTING = GroupPhase.RUNNING, GroupPhase.STARTING
Residents = frozenset[tuple[int, int]]


def residents(placement: Placement, group_id: str) -> Residents:
    if group_id not in placement.groups:
        return frozenset()
    by_layer = placement.experts_of(group_id)
    return frozenset((layer_id, e) for layer_id, ids in by_layer.items() for e in ids)


@dataclass
class World:
    """Groups and routers that do what the controller says, in the order that the test draws."""

    placement: Placement
    target: Target
    groups: dict[str, GroupView] = field(default_factory=dict)
    held: dict[str, Residents] = field(default_factory=dict)
    routers: dict[str, RouterView] = field(default_factory=dict)
    plan: Placement | None = None
    order: int = 0
    known: dict[int, Placement] = field(default_factory=dict)
    """Epoch -> placement that a router may follow."""
    died: dict[str, int] = field(default_factory=dict)
    """Group -> the last epoch when its process last ended: it lost what that gave it."""
    pending: list[controller.Action] = field(default_factory=list)
    last_epoch: int = 1
    is_published: bool = False
    refusals: float = 0.0
    """Part of the times that a router has requests when it is asked to sleep."""

    @classmethod
    def of(cls, groups: int, routers: int) -> World:
        names = [f"group-{i}" for i in range(groups)]
        placement = plan_placement(LAYERS, EXPERTS, dict.fromkeys(names, 1.0))
        world = cls(placement, Target(groups=groups, routers=routers))
        for name in names:
            world.groups[name] = GroupView(phase=RUNNING, holds=1, joined=1, trimmed=1)
            world.held[name] = residents(placement, name)
        for i in range(routers):
            world.routers[f"router-{i}"] = RouterView(is_up=True, follows=1, connected=1)
        world.known[1] = placement
        return world

    def observe(self) -> Observed:
        return Observed(
            placement=self.placement,
            plan=self.plan,
            groups=self.groups,
            routers=self.routers,
            order=self.order,
        )

    @property
    def is_settled(self) -> bool:
        return not self.pending and controller.is_settled(self.observe(), self.target)

    def tick(self) -> None:
        for _ in range(20):
            actions = step(self.observe(), self.target, 0.0)
            for action in actions:
                self.begin(action)
            if not actions:
                return
        raise AssertionError(f"the controller does not come to rest: {actions}")

    def begin(self, action: controller.Action) -> None:
        match action:
            case StartGroup(name):
                assert name not in self.groups
                self.groups[name] = GroupView(phase=STARTING)
                self.held[name] = frozenset()
                self.pending.append(action)
            case StopGroup(name):
                del self.groups[name], self.held[name]
            case BeginPlan(placement):
                self.last_epoch += 1
                self.plan = replace(placement, epoch=self.last_epoch)
                self.known[self.last_epoch] = self.plan
                self.order, self.is_published = self.target.order, False
            case LoadGroup(name) | Trim(name):
                assert not self.groups[name].busy
                trimmed = 0 if isinstance(action, LoadGroup) else self.groups[name].trimmed
                self.groups[name] = replace(self.groups[name], busy=True, trimmed=trimmed)
                self.pending.append(action)
            case Connect(name) | Switch(name):
                assert not self.routers[name].busy
                self.is_published |= isinstance(action, Switch)
                self.routers[name] = replace(self.routers[name], busy=True)
                self.pending.append(action)
            case Sleep(name) | Wake(name):
                assert not self.routers[name].busy
                follows = self.known[self.routers[name].follows]
                if isinstance(action, Wake):
                    joined = [self.groups[g].joined for g in follows.groups]
                    assert max(joined) <= follows.epoch, "it knows the process before"
                self.routers[name] = replace(self.routers[name], busy=True)
                self.pending.append(action)
            case Commit():
                assert self.plan is not None
                self.placement, self.plan = self.plan, None
            case Abandon():
                self.abandon()
            case AddRouter():
                name = next(f"router-{i}" for i in range(99) if f"router-{i}" not in self.routers)
                self.routers[name] = RouterView(is_up=False, follows=self.placement.epoch)
                self.pending.append(action)
            case DrainRouter(name):
                self.routers[name] = replace(self.routers[name], is_leaving=True)
                self.pending.append(action)
        self.check()

    def wake(self) -> None:
        if self.target.groups == 0:
            self.target = replace(self.target, groups=len(self.placement.groups))

    def abandon(self) -> None:
        assert self.plan is not None
        if self.is_published:
            self.placement = self.plan
        self.plan = None

    def end_one(self, generator: random.Random) -> None:
        """Let one thing that is under way end."""
        if not self.pending:
            return
        action = self.pending.pop(generator.randrange(len(self.pending)))
        match action:
            case StartGroup(name) if name in self.groups:
                self.groups[name] = replace(self.groups[name], phase=RUNNING)
            case LoadGroup(name) if name in self.groups and self.groups[name].busy:
                if self.plan is not None and name in self.plan.groups:
                    self.held[name] |= residents(self.plan, name)
                    holds = self.plan.epoch
                    joined = self.groups[name].joined or holds
                    self.groups[name] = replace(
                        self.groups[name], busy=False, holds=holds, joined=joined
                    )
                else:
                    self.groups[name] = replace(self.groups[name], busy=False)
            case Trim(name) if name in self.groups and self.groups[name].busy:
                self.held[name] &= residents(self.placement, name)
                trimmed = self.placement.epoch
                self.groups[name] = replace(self.groups[name], busy=False, trimmed=trimmed)
            case Connect(name) | Switch(name) if name in self.routers:
                view = replace(self.routers[name], busy=False)
                if self.plan is not None and isinstance(action, Connect):
                    view = replace(view, connected=self.plan.epoch)
                elif self.plan is not None and view.connected == self.plan.epoch:
                    view = replace(view, follows=self.plan.epoch)
                self.routers[name] = view
            case Sleep(name) if generator.random() < self.refusals:
                self.routers[name] = replace(self.routers[name], busy=False)
                self.wake()
            case Sleep(name) | Wake(name):
                is_asleep = isinstance(action, Sleep)
                view = replace(self.routers[name], busy=False, is_asleep=is_asleep)
                self.routers[name] = view
            case AddRouter():
                for name, router in self.routers.items():
                    if not router.is_up:
                        self.routers[name] = replace(router, is_up=True)
                        break
            case DrainRouter(name):
                del self.routers[name]
        self.check()

    def kill(self, name: str) -> None:
        """A group's process ends; another one starts."""
        self.pending = [a for a in self.pending if getattr(a, "group_id", "") != name]
        if self.plan is not None and name in self.plan.groups:
            self.abandon()
        self.groups[name] = GroupView(phase=STARTING)
        self.held[name] = frozenset()
        self.died[name] = self.last_epoch
        self.pending.append(StartGroup(name))

    def check(self) -> None:
        """What a router asks for is there, except where a process has died."""
        for router in self.routers.values():
            if router.is_asleep:
                continue
            placement = self.known.get(router.follows)
            for name in placement.groups if placement else ():
                if router.follows <= self.died.get(name, 0):
                    continue
                missing = residents(placement, name) - self.held.get(name, frozenset())
                assert not missing, f"{name} lacks {sorted(missing)[:3]} of epoch {router.follows}"

    def settle(self, generator: random.Random) -> None:
        for _ in range(3000):
            self.tick()
            if self.is_settled:
                return
            self.end_one(generator)
        raise AssertionError("the service does not become as wanted")


def drawn(seed: int = 1) -> random.Random:
    return random.Random(seed)


def test_groups_come_and_every_expert_stays_where_it_can() -> None:
    world = World.of(1, 2)
    world.target = replace(world.target, groups=3)
    world.settle(drawn())
    assert list(world.groups) == ["group-0", "group-1", "group-2"]
    assert [len(world.held[g]) for g in world.groups] == [8, 8, 8]
    assert world.held["group-0"] <= residents(world.known[1], "group-0")
    assert world.placement.epoch == 2, "one change for both"


def test_the_order_of_a_change() -> None:
    """Load before connect, connect before any switch, and trim last."""
    world = World.of(1, 2)
    world.target = replace(world.target, groups=2)
    seen: list[str] = []
    generator = drawn()
    while not world.is_settled:
        before = list(world.pending)
        world.tick()
        seen += [type(a).__name__ for a in world.pending if a not in before]
        world.end_one(generator)
    assert seen == [
        "StartGroup",
        *["LoadGroup"] * 2,
        *["Connect"] * 2,
        *["Switch"] * 2,
        *["Trim"] * 2,
    ]


def test_the_newest_groups_and_routers_leave_first_and_those_that_are_named_before() -> None:
    world = World.of(3, 3)
    world.target = Target(groups=2, routers=2)
    world.settle(drawn())
    assert sorted(world.groups) == ["group-0", "group-1"]
    assert sorted(world.routers) == ["router-0", "router-1"]
    world.target = Target(groups=1, routers=1, leaving=frozenset({"group-0", "router-0"}))
    world.settle(drawn())
    assert (list(world.groups), list(world.routers)) == (["group-1"], ["router-1"])


def test_a_router_that_does_not_serve_leaves_before_one_that_does() -> None:
    world = World.of(1, 3)
    world.routers["router-0"] = RouterView(is_up=False, follows=0)
    observed = world.observe()
    assert step(observed, Target(groups=1, routers=2), 0.0) == [DrainRouter("router-0")]
    two = [DrainRouter("router-0"), DrainRouter("router-2")]
    assert step(observed, Target(groups=1, routers=1), 0.0) == two


def test_new_groups_take_the_names_that_have_shares_of_their_own() -> None:
    world = World.of(1, 1)
    shares = {"group-0": 1.0, "big": 2.0}
    target = Target(groups=3, routers=1, capacities=shares)
    assert step(world.observe(), target, 0.0) == [StartGroup("big"), StartGroup("group-1")]


def test_a_dead_groups_experts_go_to_those_that_are_left_before_it_is_back() -> None:
    world = World.of(3, 1)
    world.kill("group-1")
    generator = drawn()
    start = world.pending.pop()
    for _ in range(100):
        world.tick()
        world.end_one(generator)
    assert sorted(world.placement.groups) == ["group-0", "group-2"]
    assert not world.is_settled
    world.pending.append(start)
    world.settle(generator)
    assert sorted(world.placement.groups) == ["group-0", "group-1", "group-2"]


def test_the_only_group_is_waited_for() -> None:
    world = World.of(1, 1)
    world.kill("group-0")
    world.tick()
    assert [type(a) for a in world.pending] == [StartGroup]
    world.settle(drawn())
    assert world.placement.epoch == 2, "it is somewhere else, perhaps: routers must hear of it"


def test_a_group_that_is_back_is_lost_until_a_plan_of_it_is_in_force() -> None:
    """A plan was given up after it had loaded experts; routers know the process before it."""
    world = World.of(1, 1)
    world.groups["group-0"] = GroupView(phase=RUNNING, holds=2, joined=2)
    assert not controller.serves(world.observe())
    assert [type(a) for a in step(world.observe(), world.target, 0.0)] == [BeginPlan]


def test_a_plan_that_failed_waits_and_other_groups_do_not() -> None:
    world = World.of(1, 1)
    world.groups["group-1"] = GroupView(phase=RUNNING)
    world.held["group-1"] = frozenset()
    observed = replace(world.observe(), retry_at=10.0, failed=frozenset({"group-0", "group-1"}))
    target = Target(groups=2, routers=1)
    assert step(observed, target, 9.0) == []
    assert [type(a) for a in step(observed, target, 10.0)] == [BeginPlan]
    assert [type(a) for a in step(replace(observed, failed=frozenset()), target, 9.0)] == [
        BeginPlan
    ]


def test_what_cannot_start_leaves_the_service_as_it_is() -> None:
    world = World.of(2, 1)
    target = Target(groups=5, routers=1)
    observed = replace(world.observe(), start_at=10.0)
    assert step(observed, target, 9.0) == []
    assert step(observed, target, 10.0) == [StartGroup(f"group-{i}") for i in (2, 3, 4)]


def test_a_router_that_starts_with_the_placement_before_holds_up_what_it_needs() -> None:
    world = World.of(2, 2)
    world.routers["router-1"] = RouterView(is_up=False, follows=1)
    world.target = Target(groups=1, routers=2)
    generator = drawn()
    for _ in range(200):
        world.tick()
        world.end_one(generator)
    assert "group-1" in world.groups
    world.routers["router-1"] = replace(world.routers["router-1"], is_up=True)
    world.settle(generator)
    assert list(world.groups) == ["group-0"]


def test_an_ordered_placement_follows_load_and_shares() -> None:
    world = World.of(2, 1)
    load = np.ones((LAYERS, EXPERTS))
    load[:, :6] = 10
    shares = {"group-0": 1.0, "group-1": 2.0}
    world.target = replace(world.target, order=1, capacities=shares)
    (plan,) = step(replace(world.observe(), load=load), world.target, 0.0)
    assert isinstance(plan, BeginPlan)
    assert [len(residents(plan.placement, g)) for g in shares] == [8, 16]
    assert balancedness(plan.placement, load, shares) > 0.9
    world.settle(drawn())


def test_a_late_group_holds_nobody_up() -> None:
    world = World.of(1, 1)
    world.target = Target(groups=3, routers=1)
    world.groups |= {
        "group-1": GroupView(phase=RUNNING, since=100.0),
        "group-2": GroupView(phase=STARTING),
    }
    assert step(world.observe(), world.target, 100.0 + 0.9 * controller.GATHER_S) == []
    (plan,) = step(world.observe(), world.target, 100.0 + controller.GATHER_S)
    assert isinstance(plan, BeginPlan)
    assert plan.placement.groups == ("group-0", "group-1")
    assert not controller.is_settled(
        replace(world.observe(), placement=plan.placement), Target(groups=3, routers=1)
    )


def test_the_service_sleeps_when_every_router_does_and_wakes_with_its_experts() -> None:
    world = World.of(2, 2)
    world.target = replace(world.target, groups=0)
    seen: list[str] = []
    generator = drawn()
    while not world.is_settled:
        before, groups = list(world.pending), len(world.groups)
        world.tick()
        seen += [type(a).__name__ for a in world.pending if a not in before]
        seen += ["StopGroup"] * (groups - len(world.groups))
        world.end_one(generator)
    assert seen == ["Sleep", "Sleep", "StopGroup", "StopGroup"]
    assert world.placement.epoch == 1
    world.wake()
    world.settle(generator)
    assert list(world.groups) == ["group-0", "group-1"]
    assert not any(router.is_asleep for router in world.routers.values())
    assert world.placement.epoch >= 2


def test_a_router_that_refuses_keeps_all_groups() -> None:
    world = World.of(2, 2)
    world.refusals = 1.0
    world.target = replace(world.target, groups=0)
    world.tick()
    world.end_one(drawn())
    world.refusals = 0.0
    world.settle(drawn())
    assert list(world.groups) == ["group-0", "group-1"]
    assert world.placement.epoch == 1, "nothing has changed"


def test_sleep_and_requests_in_any_order_never_take_an_expert_away() -> None:
    for seed in range(300):
        generator = random.Random(seed)
        world = World.of(generator.randint(1, 3), generator.randint(1, 3))
        world.refusals = 0.2
        for _ in range(60):
            draw = generator.random()
            if draw < 0.1:
                world.target = replace(world.target, groups=0)
            elif draw < 0.2:
                world.wake()
            elif draw < 0.25:
                world.target = replace(world.target, groups=generator.randint(1, 3))
            elif draw < 0.28 and world.groups:
                world.kill(generator.choice(list(world.groups)))
            world.tick()
            world.end_one(generator)
        world.refusals = 0.0
        world.settle(generator)
        is_asleep = world.target.groups == 0
        assert bool(world.groups) != is_asleep, f"seed {seed}"
        assert all(r.is_asleep == is_asleep for r in world.routers.values()), f"seed {seed}"


def test_a_dense_model_has_routers_only() -> None:
    observed = Observed(
        placement=None, groups={}, routers={"router-0": RouterView(is_up=True, follows=0)}
    )
    assert step(observed, Target(groups=1, routers=2), 0.0) == [AddRouter()]
    assert controller.is_settled(observed, Target(groups=1, routers=1))


@pytest.mark.parametrize("seed", range(40))
def test_random_targets_and_deaths_end_as_wanted_and_no_only_copy_is_dropped(seed: int) -> None:
    generator = random.Random(seed)
    world = World.of(generator.randint(1, 3), generator.randint(1, 3))
    for _ in range(60):
        event = generator.random()
        if event < 0.25:
            world.target = replace(
                world.target, groups=generator.randint(1, 4), routers=generator.randint(1, 3)
            )
        elif event < 0.35:
            running = [g for g, view in world.groups.items() if view.phase is RUNNING]
            if running:
                world.kill(generator.choice(running))
        elif event < 0.4:
            world.target = replace(world.target, order=world.target.order + 1)
        for _ in range(generator.randint(0, 8)):
            world.tick()
            world.end_one(generator)
    world.settle(generator)
    held = [residents(world.placement, g) for g in world.placement.groups]
    assert sum(map(len, held)) == LAYERS * EXPERTS
    assert [world.held[g] for g in world.placement.groups] == held or any(
        view.trimmed < world.placement.epoch for view in world.groups.values()
    )
    assert members(world.observe(), world.target)
