"""The dispatcher against real expert servers: lanes, gRPC streams, in process; and what may go
wrong."""

from __future__ import annotations

import os
import resource
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from experts.native.kernels import load_kernels
from experts.placement import Placement
from experts.planner import plan_placement
from experts.runtime import ExpertRuntime
from experts.service import ExpertServer, start_expert_server
from protos import codec
from protos.errors import GroupLostError, NonFiniteError, StalePlacementError
from router.gating.dispatch import ExpertDispatcher
from router.gating.packing import CallOptions
from router.gating.transport.lane import LaneTransport
from router.gating.transport.local import LocalTransport
from tests.eventually import eventually
from tests.parity.checkpoints import SIZES, make_checkpoint
from tests.parity.oracle import LoopExperts

LAYERS, EXPERTS = SIZES["num_layers"], SIZES["num_experts"]
HIDDEN, TOP_K = SIZES["hidden_size"], SIZES["top_k"]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("dispatch"))


class Groups:
    """Servers of a placement over one checkpoint."""

    def __init__(self, path: Path, capacities: dict[str, float], epoch: int = 1) -> None:
        self.placement = plan_placement(LAYERS, EXPERTS, capacities, epoch=epoch)
        self.runtimes = {g: runtime(path, g, self.placement) for g in self.placement.groups}
        self.servers: dict[str, ExpertServer] = {
            g: start_expert_server(r, "127.0.0.1") for g, r in self.runtimes.items()
        }

    @property
    def addresses(self) -> dict[str, str]:
        return {g: s.address for g, s in self.servers.items()}

    def stop(self) -> None:
        for server in self.servers.values():
            server.stop()


def runtime(path: Path, group_id: str, placement: Placement) -> ExpertRuntime:
    made = ExpertRuntime(group_id=group_id, checkpoint=path, dtype="float32", compute="native")
    made.load(placement)
    return made


@pytest.fixture(scope="module")
def groups(path: Path) -> Iterator[Callable[..., Groups]]:
    made: dict[str, Groups] = {}

    def make(**capacities: float) -> Groups:
        key = repr(capacities)
        if key not in made:
            made[key] = Groups(path, capacities)
        return made[key]

    yield make
    for group in made.values():
        group.stop()


def connect(groups: Groups, **overrides: Any) -> ExpertDispatcher:
    arguments: dict[str, Any] = {
        "router_id": "router-test",
        "hidden": HIDDEN,
        "top_k": TOP_K,
        "dtype": torch.float32,
        "kernels": load_kernels(),
        "timeout_s": 20.0,
        **overrides,
    }
    placement = arguments.pop("placement", groups.placement)
    addresses = arguments.pop("addresses", groups.addresses)
    return ExpertDispatcher.connect(placement, addresses, **arguments)


def replace_lane(dispatcher: ExpertDispatcher, sock: socket.socket) -> None:
    """Let the only lane end in this socket."""
    (lane,) = dispatcher.transports
    assert isinstance(lane, LaneTransport)
    lane.close()
    lane._socket = sock


def call(num_tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_tokens, HIDDEN, generator=generator)
    ids = [torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(num_tokens)]
    weights = torch.rand(num_tokens, TOP_K, generator=generator)
    return rows, torch.stack(ids).to(torch.int32), weights


@pytest.mark.parametrize("transport", ["lane", "grpc"])
@pytest.mark.parametrize("has_kernels", [True, False])
@pytest.mark.parametrize("capacities", [{"a": 1.0}, {"a": 3.0, "b": 1.0}, {"a": 1, "b": 1, "c": 1}])
def test_every_transport_gives_the_sum_of_the_slow_twin(
    groups: Callable[..., Groups],
    path: Path,
    transport: Any,
    has_kernels: bool,
    capacities: dict[str, float],
) -> None:
    kernels = load_kernels() if has_kernels else None
    dispatcher = connect(groups(**capacities), transport=transport, kernels=kernels)
    twin = LoopExperts(path, torch.float32)
    for layer_id, num_tokens in ((0, 1), (2, 7), (1, 64)):
        arguments = call(num_tokens, seed=layer_id)
        ours = dispatcher.combine(dispatcher.dispatch(layer_id, *arguments))
        slow = twin.combine(twin.dispatch(layer_id, *arguments))
        torch.testing.assert_close(ours, slow, rtol=1e-5, atol=1e-5)
    assert int(dispatcher.load.counts.sum()) == (1 + 7 + 64) * TOP_K
    dispatcher.close()


def test_the_bits_do_not_depend_on_groups_or_transport(groups: Callable[..., Groups]) -> None:
    arguments = call(33)
    outputs = []
    for capacities in ({"a": 1.0}, {"a": 3.0, "b": 1.0}, {"a": 1, "b": 1, "c": 1}):
        for transport in ("lane", "grpc"):
            dispatcher = connect(groups(**capacities), transport=transport)
            outputs.append(dispatcher.combine(dispatcher.dispatch(1, *arguments)))
            dispatcher.close()
    local = groups(a=1.0).runtimes["a"]
    options = CallOptions(
        hidden=HIDDEN,
        top_k=TOP_K,
        wire_dtype=codec.DType.FLOAT32,
        combine=codec.Combine.SLOTS,
        placement_epoch=1,
        deadline_ms=0,
    )
    placement = groups(a=1.0).placement
    inside = ExpertDispatcher(placement, [LocalTransport(local)], options, load_kernels())
    outputs.append(inside.combine(inside.dispatch(1, *arguments)))
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_partial_sums_are_close_to_slots(groups: Callable[..., Groups]) -> None:
    arguments = call(9)
    two = groups(a=3.0, b=1.0)
    slots = connect(two)
    partial = connect(two, combine=codec.Combine.PARTIAL)
    torch.testing.assert_close(
        partial.combine(partial.dispatch(0, *arguments)),
        slots.combine(slots.dispatch(0, *arguments)),
        rtol=1e-5,
        atol=1e-5,
    )
    slots.close()
    partial.close()


@pytest.mark.parametrize("transport", ["lane", "grpc"])
def test_a_call_for_an_absent_expert_is_refused_and_the_connection_survives(
    groups: Callable[..., Groups], transport: Any
) -> None:
    two = groups(a=3.0, b=1.0)
    stale = plan_placement(LAYERS, EXPERTS, {"a": 1.0}, epoch=5)
    dispatcher = connect(two, transport=transport, placement=stale)
    with pytest.raises(StalePlacementError) as caught:
        dispatcher.combine(dispatcher.dispatch(0, *call(32)))
    assert caught.value.fields["group_epoch"] == 1
    assert caught.value.fields["call_epoch"] == 5
    rows, _, weights = call(3)
    held = two.placement.experts_of("a")[0][:TOP_K]
    ids = torch.tensor([held] * 3, dtype=torch.int32)
    assert torch.isfinite(dispatcher.combine(dispatcher.dispatch(0, rows, ids, weights))).all()
    dispatcher.close()


def test_rows_that_are_not_finite_are_named_and_the_next_call_works(
    groups: Callable[..., Groups],
) -> None:
    dispatcher = connect(groups(a=3.0, b=1.0))
    rows, ids, weights = call(4)
    rows[2, 3] = float("nan")
    with pytest.raises(NonFiniteError):
        dispatcher.combine(dispatcher.dispatch(0, rows, ids, weights))
    assert torch.isfinite(dispatcher.combine(dispatcher.dispatch(0, *call(4)))).all()
    dispatcher.close()


def test_an_abandoned_call_does_not_disturb_the_next(groups: Callable[..., Groups]) -> None:
    dispatcher = connect(groups(a=3.0, b=1.0))
    expected = dispatcher.combine(dispatcher.dispatch(0, *call(4)))
    dispatcher.dispatch(0, *call(5, seed=9))
    again = dispatcher.combine(dispatcher.dispatch(0, *call(4)))
    assert torch.equal(again, expected)
    dispatcher.close()


@pytest.mark.parametrize("transport", ["lane", "grpc"])
def test_a_group_that_leaves_is_lost_at_once_and_found_again_when_it_returns(
    path: Path, transport: Any
) -> None:
    groups = Groups(path, {"a": 1.0, "b": 1.0})
    dispatcher = connect(groups, transport=transport)
    expected = dispatcher.combine(dispatcher.dispatch(0, *call(4)))
    address = groups.addresses["b"]
    groups.servers["b"].stop()
    with pytest.raises(GroupLostError) as caught:
        dispatcher.combine(dispatcher.dispatch(0, *call(4)))
    assert caught.value.fields["group_id"] == "b"
    port = int(address.rsplit(":", 1)[1])
    groups.servers["b"] = start_expert_server(groups.runtimes["b"], "127.0.0.1", port)
    again = connect(groups, transport=transport)
    assert torch.equal(again.combine(again.dispatch(0, *call(4))), expected)
    dispatcher.close()
    again.close()
    groups.stop()


GARBAGE = {
    "no frame": b"\0" * 64,
    "another call": codec.pack_header(codec.FrameHeader(kind=codec.FrameKind.RESULT, call_id=99)),
    "too large": codec.pack_header(
        codec.FrameHeader(kind=codec.FrameKind.ERROR, call_id=1)._replace(payload_bytes=1 << 40)
    ),
    "closed": b"",
}


@pytest.mark.parametrize("name", GARBAGE)
def test_a_group_that_answers_garbage_is_lost(groups: Callable[..., Groups], name: str) -> None:
    """A real lane whose far end is replaced by one that answers nonsense."""
    dispatcher = connect(groups(a=1.0))
    ours, theirs = socket.socketpair()
    replace_lane(dispatcher, ours)

    def answer() -> None:
        theirs.recv(64)
        theirs.sendall(GARBAGE[name])
        theirs.close()

    thread = threading.Thread(target=answer)
    thread.start()
    with pytest.raises(GroupLostError):
        dispatcher.combine(dispatcher.dispatch(0, *call(1)))
    thread.join()
    dispatcher.close()
    ours.close()


def test_an_answer_of_another_epoch_is_stale_and_closes_the_connection(
    groups: Callable[..., Groups],
) -> None:
    dispatcher = connect(groups(a=1.0))
    ours, theirs = socket.socketpair()
    replace_lane(dispatcher, ours)
    answer = codec.FrameHeader(
        kind=codec.FrameKind.RESULT,
        call_id=1,
        placement_epoch=9,
        num_rows=1,
        hidden=HIDDEN,
        num_pairs=TOP_K,
        payload_bytes=TOP_K * HIDDEN * 4,
    )
    handle = dispatcher.dispatch(0, *call(1))
    theirs.sendall(codec.pack_header(answer) + bytes(answer.payload_bytes))
    with pytest.raises(StalePlacementError) as caught:
        dispatcher.combine(handle)
    assert caught.value.fields["group_epoch"] == 9
    assert ours.fileno() == -1
    theirs.close()
    assert torch.isfinite(dispatcher.combine(dispatcher.dispatch(0, *call(1)))).all()
    dispatcher.close()


def test_a_group_that_cannot_be_reached_leaves_no_connection_to_the_others(
    groups: Callable[..., Groups], monkeypatch: pytest.MonkeyPatch
) -> None:
    two = groups(a=3.0, b=1.0)
    lanes = two.servers["a"].lanes
    before = lanes.num_open
    open_lane = LaneTransport.open

    def open_all_but_b(lane: LaneTransport) -> None:
        if lane.group_id == "b":
            raise GroupLostError(group_id="b", detail="down")
        open_lane(lane)

    monkeypatch.setattr(LaneTransport, "open", open_all_but_b)
    with pytest.raises(GroupLostError, match="down"):
        connect(two, transport="lane")
    eventually(lambda: lanes.num_open == before)


def test_auto_takes_a_stream_where_no_lane_opens(
    groups: Callable[..., Groups], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = groups(a=1.0)
    direct = connect(one, transport="lane")
    expected = direct.combine(direct.dispatch(0, *call(4)))
    direct.close()

    def refuse(lane: LaneTransport) -> None:
        raise GroupLostError(group_id=lane.group_id, detail="lane: timed out")

    monkeypatch.setattr(LaneTransport, "open", refuse)
    dispatcher = connect(one, transport="auto")
    assert [transport.name for transport in dispatcher.transports] == ["grpc"]
    assert torch.equal(dispatcher.combine(dispatcher.dispatch(0, *call(4))), expected)
    dispatcher.close()


def test_a_lane_whose_descriptor_is_too_large_for_select_is_read(
    groups: Callable[..., Groups],
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft <= 1500:
        resource.setrlimit(resource.RLIMIT_NOFILE, (2048, hard))
    dispatcher = connect(groups(a=1.0), kernels=None)
    (lane,) = dispatcher.transports
    assert isinstance(lane, LaneTransport)
    os.dup2(lane.fileno(), 1500)
    replace_lane(dispatcher, socket.socket(fileno=1500))
    assert torch.isfinite(dispatcher.combine(dispatcher.dispatch(0, *call(1)))).all()
    dispatcher.close()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_silent_group_is_lost_after_the_bound(groups: Callable[..., Groups]) -> None:
    dispatcher = connect(groups(a=1.0), timeout_s=0.2)
    ours, theirs = socket.socketpair()
    replace_lane(dispatcher, ours)
    with pytest.raises(GroupLostError, match="no answer in time"):
        dispatcher.combine(dispatcher.dispatch(0, *call(1)))
    theirs.close()
    ours.close()
    dispatcher.close()
