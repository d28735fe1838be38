"""Placements that change under calls: groups that come, go, die and come back elsewhere.

Real expert servers; the dispatcher is asked for the same rows all the time, and the bits must never
change.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from experts.native.kernels import load_kernels
from experts.placement import Placement
from experts.planner import plan_placement
from experts.service import ExpertServer, start_expert_server
from protos.errors import GroupLostError, StalePlacementError
from router.engine.batch import Batch
from router.gating.dispatch import ExpertDispatcher
from router.model.config import ModelConfig
from router.model.decoder import Decoder
from tests.eventually import eventually
from tests.parity.checkpoints import make_checkpoint
from tests.unit.router.test_dispatch import EXPERTS, LAYERS, TOP_K, Groups, call, connect, runtime
from tests.unit.router.test_native_step import BLOCK, NUM_BLOCKS, NUM_SLOTS, steps

WAYS = ("native", "lane", "grpc", "torch")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("switch"))


class World(Groups):
    """Two groups, `a` and `b`; more can come, and any can die."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, {"a": 1.0, "b": 1.0})
        self.path = path

    def plan(self, epoch: int, **capacities: float) -> Placement:
        return plan_placement(LAYERS, EXPERTS, capacities, epoch=epoch)

    def start(self, group_id: str, placement: Placement, port: int = 0) -> ExpertServer:
        self.runtimes[group_id] = runtime(self.path, group_id, placement)
        self.servers[group_id] = start_expert_server(self.runtimes[group_id], "127.0.0.1", port)
        return self.servers[group_id]

    def hold(self, placement: Placement) -> None:
        """Let every group that is there hold what the placement gives it, and no more."""
        for group_id, held in self.runtimes.items():
            wanted = {
                (layer_id, expert_id)
                for layer_id, ids in placement.experts_of(group_id).items()
                for expert_id in ids
            }
            there = {(k, e) for k, ids in held.status().layers.items() for e in ids}
            held.load_experts(sorted(wanted - there), placement.epoch)
            held.drop_experts(sorted(there - wanted), placement.epoch)


@pytest.fixture
def world(path: Path) -> Iterator[World]:
    made = World(path)
    yield made
    made.stop()


class Caller:
    """Asks for the same steps again and again, in a thread, and keeps what differs."""

    def __init__(self, path: Path, dispatcher: ExpertDispatcher, way: str) -> None:
        self._dispatcher = dispatcher
        self._way = way
        if way == "native":
            ModelConfig.from_checkpoint(path)
            self._decoder = Decoder.from_checkpoint(path, dtype=torch.float32, experts=dispatcher)
            self._caches = self._decoder.allocate_caches(NUM_BLOCKS, BLOCK, NUM_SLOTS)
            self._batches: list[Batch] = steps()
        self._expected = self._run()
        self.num_done = 0
        self.unequal = 0
        self.error: Exception | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._loop)
        self._thread.start()

    def _run(self) -> torch.Tensor:
        if self._way != "native":
            arguments = call(40)
            return torch.stack(
                [
                    self._dispatcher.combine(self._dispatcher.dispatch(layer_id, *arguments))
                    for layer_id in range(LAYERS)
                ]
            )
        with torch.inference_mode():
            logits = [self._decoder.forward(batch, self._caches) for batch in self._batches]
        return torch.cat(logits)

    def _loop(self) -> None:
        try:
            while not self._ended.is_set():
                self.unequal += not torch.equal(self._run(), self._expected)
                self.num_done += 1
        except (GroupLostError, StalePlacementError) as error:
            self.error = error

    def goes_on(self) -> None:
        """Wait until two more rounds are done."""
        before = self.num_done
        eventually(lambda: self.num_done >= before + 2 or self.error is not None)
        assert self.error is None

    def end(self) -> None:
        self._ended.set()
        self._thread.join(30)
        assert not self._thread.is_alive()
        assert self.error is None
        assert self.unequal == 0


def connected(world: World, way: str, **overrides: Any) -> ExpertDispatcher:
    overrides.setdefault("patience_s", 60.0)
    return connect(
        world,
        transport="grpc" if way == "grpc" else "lane",
        kernels=None if way == "torch" else load_kernels(),
        **overrides,
    )


@pytest.mark.parametrize("way", WAYS)
def test_groups_come_and_go_under_calls(path: Path, world: World, way: str) -> None:
    dispatcher = connected(world, way)
    caller = Caller(path, dispatcher, way)
    grown = world.plan(2, a=1, b=1, c=2)
    world.start("c", grown)
    route = dispatcher.prepare(grown, world.addresses)
    caller.goes_on()
    assert dispatcher.placement.epoch == 1, "prepared is not in force"
    dispatcher.offer(route)
    assert dispatcher.wait_adopted(2, 20)
    world.hold(grown)
    caller.goes_on()
    shrunk = world.plan(3, b=1)
    for layer_id, ids in shrunk.experts_of("b").items():
        world.runtimes["b"].load_experts([(layer_id, expert_id) for expert_id in ids], 3)
    dispatcher.offer(dispatcher.prepare(shrunk, world.addresses))
    assert dispatcher.wait_adopted(3, 20)
    for gone in ("a", "c"):
        lanes, server = world.servers[gone].lanes, world.servers.pop(gone)
        eventually(lambda lanes=lanes: lanes.num_open == 0)
        server.stop()
    caller.goes_on()
    caller.end()
    assert [t.group_id for t in dispatcher.transports] == ["b"]
    dispatcher.close()


@pytest.mark.parametrize("way", WAYS)
def test_a_call_waits_for_a_group_that_dies_and_comes_back_elsewhere(
    path: Path, world: World, way: str
) -> None:
    dispatcher = connected(world, way)
    caller = Caller(path, dispatcher, way)
    caller.goes_on()
    world.servers["b"].stop(0)
    world.start("b", world.placement)
    again = world.plan(2, a=1, b=1)
    dispatcher.offer(dispatcher.prepare(again, world.addresses))
    assert dispatcher.wait_adopted(2, 20)
    caller.goes_on()
    caller.end()
    dispatcher.close()


@pytest.mark.parametrize("way", WAYS)
def test_a_call_waits_for_a_group_that_comes_back_where_it_was(
    path: Path, world: World, way: str
) -> None:
    dispatcher = connected(world, way)
    caller = Caller(path, dispatcher, way)
    caller.goes_on()
    port = int(world.addresses["a"].rsplit(":", 1)[1])
    world.servers["a"].stop(0)
    world.start("a", world.placement, port)
    caller.goes_on()
    caller.end()
    dispatcher.close()


@pytest.mark.parametrize("way", WAYS)
def test_an_expert_that_moved_too_early_is_asked_for_where_it_is(
    path: Path, world: World, way: str
) -> None:
    """Old copies are dropped before the router has heard of the new ones."""
    dispatcher = connected(world, way)
    caller = Caller(path, dispatcher, way)
    caller.goes_on()
    moved = world.plan(2, b=1, a=1)  # the two change their halves
    world.hold(moved)
    assert dispatcher.placement.epoch == 1
    dispatcher.offer(dispatcher.prepare(moved, world.addresses))
    assert dispatcher.wait_adopted(2, 20)
    caller.goes_on()
    caller.end()
    dispatcher.close()


@pytest.mark.parametrize("way", ["native", "lane"])
def test_patience_ends(path: Path, world: World, way: str) -> None:
    dispatcher = connected(world, way, patience_s=0.5)
    caller = Caller(path, dispatcher, way)
    world.servers["b"].stop(0)
    eventually(lambda: caller.error is not None, 20)
    assert isinstance(caller.error, GroupLostError)
    assert caller.error.fields["group_id"] == "b"
    dispatcher.close()


@pytest.mark.parametrize("way", ["native", "lane"])
def test_a_waiting_call_is_given_up(path: Path, world: World, way: str) -> None:
    dispatcher = connected(world, way, patience_s=600.0)
    caller = Caller(path, dispatcher, way)
    world.servers["b"].stop(0)
    dispatcher.give_up()
    eventually(lambda: caller.error is not None, 20)
    dispatcher.close()


def test_a_group_that_cannot_be_reached_is_no_part_of_a_route(world: World) -> None:
    dispatcher = connected(world, "lane")
    assert dispatcher._dialer is not None
    dispatcher._dialer = replace(dispatcher._dialer, connect_timeout_s=0.5)
    lanes = world.servers["a"].lanes
    before = lanes.num_open
    absent = world.plan(2, a=1, b=1, c=1)
    world.start("c", absent).stop(0)
    with pytest.raises(GroupLostError, match="group c"):
        dispatcher.prepare(absent, world.addresses)
    assert lanes.num_open == before
    arguments = call(3)
    assert torch.isfinite(dispatcher.combine(dispatcher.dispatch(0, *arguments))).all()
    dispatcher.close()


def test_a_route_that_another_supersedes_is_closed(world: World) -> None:
    dispatcher = connected(world, "lane")
    handle = dispatcher.dispatch(0, *call(3))
    world.start("c", world.plan(2, a=1, b=1, c=1))
    lanes = world.servers["c"].lanes
    dispatcher.offer(dispatcher.prepare(world.plan(2, a=1, b=1, c=1), world.addresses))
    eventually(lambda: lanes.num_open == 1)
    dispatcher.offer(dispatcher.prepare(world.plan(3, a=1, b=1), world.addresses))
    eventually(lambda: lanes.num_open == 0)
    assert dispatcher.placement.epoch == 1, "a call is in flight"
    dispatcher.combine(handle)
    assert dispatcher.placement.epoch == 3
    assert int(dispatcher.load.counts.sum()) == 3 * TOP_K
    dispatcher.close()
