"""A group: its life cycle, what it answers, and what it refuses before a kernel sees it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from experts import calls
from experts.group_state import GroupState
from experts.planner import plan_placement
from experts.reference import experts_forward
from experts.runtime import ExpertRuntime
from protos.codec import Combine, FrameHeader, FrameKind, result_payload_bytes
from protos.errors import (
    CheckpointError,
    ConfigurationError,
    DeadlineExceededError,
    GroupComputeError,
    InvalidFieldError,
    MessageTooLargeError,
    NonFiniteError,
    NotReadyError,
    ResourceError,
    StalePlacementError,
    WireFormatError,
)
from tests.unit.experts.builders import (
    EXPERTS,
    HIDDEN,
    INTER,
    LAYERS,
    as_tensors,
    expert_tensors,
    forward_call,
    loaded_runtime,
    tensors,
    write,
)

EXPERT_BYTES = 3 * HIDDEN * INTER * 4


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("checkpoint"), tensors())


@pytest.fixture(scope="module")
def shared(path: Path) -> ExpertRuntime:
    """A READY group with all experts, for tests that do not change it."""
    return loaded_runtime(path)


def result(header: FrameHeader, payload: memoryview) -> torch.Tensor:
    dtype = torch.float32
    return torch.frombuffer(bytearray(payload), dtype=dtype).view(-1, header.hidden)


@pytest.mark.parametrize("combine", list(Combine))
@pytest.mark.parametrize("compute", ["auto", "deepspeed", "torch"])
def test_a_forward_is_the_slow_twin_of_the_checkpoint(
    path: Path, combine: Combine, compute: str
) -> None:
    group = loaded_runtime(path, compute=compute)
    for layer_id in range(LAYERS):
        header, payload = forward_call(4, (3, 0, 4), combine=combine, layer_id=layer_id)
        answer, out = group.forward(header, payload)
        weights = {e: w for (layer, e), w in expert_tensors().items() if layer == layer_id}
        want = experts_forward(*as_tensors(header, payload), weights, combine)
        torch.testing.assert_close(result(answer, out), want, rtol=1e-5, atol=1e-5)
        assert answer.kind is FrameKind.RESULT
        assert answer.payload_bytes == len(out)
        assert answer.payload_bytes == result_payload_bytes(4, HIDDEN, 12, 1, combine)
        same = ("combine", "call_id", "layer_id", "placement_epoch", "num_rows", "num_pairs")
        assert [getattr(answer, f) for f in same] == [getattr(header, f) for f in same]


def test_a_forward_twice_is_the_same_bytes(shared: ExpertRuntime) -> None:
    header, payload = forward_call(5, (0, 1, 2, 3, 4))
    assert shared.forward(header, payload)[1] == shared.forward(header, payload)[1]


def test_the_life_of_a_group(path: Path) -> None:
    group = ExpertRuntime(group_id="a", checkpoint=path, dtype="float32")
    seen: list[GroupState] = []
    group.on_state(seen.append)
    with pytest.raises(NotReadyError, match="group a is STARTING"):
        group.forward(*forward_call())
    group.load(plan_placement(LAYERS, EXPERTS, {"a": 1, "b": 1}, epoch=6))
    with pytest.raises(NotReadyError, match=r"group a is READY, load\(\) comes once"):
        group.load(plan_placement(LAYERS, EXPERTS, {"a": 1}))
    group.drain()
    assert seen == ["STARTING", "LOADING", "READY", "DRAINING"]
    group.forward(*forward_call(placement_epoch=6))  # open lanes are still answered


def test_counters_follow_the_calls(path: Path) -> None:
    group = loaded_runtime(path, share=0.5)
    group.forward(*forward_call(3, (0, 1)))
    group.forward(*forward_call(2, (1,), layer_id=2))
    counts = group.load_counts()
    assert counts[0].tolist() == [3, 3, 0, 0, 0]
    assert counts[2].tolist() == [0, 2, 0, 0, 0]
    status = group.status()
    assert (status.num_calls, status.num_rows, status.num_pairs) == (2, 5, 8)
    assert status.busy_s > 0
    assert status.layers == {0: [0, 1, 2], 1: [0, 1], 2: [0, 1, 2]}
    assert status.resident_bytes >= 8 * EXPERT_BYTES  # native slots are padded
    assert (status.group_id, status.state, status.placement_epoch) == ("a", "READY", 1)
    assert status.dtype == "float32"


def set_pair(payload: bytearray, index: int, value: int) -> bytearray:
    payload[4 * index : 4 * index + 4] = value.to_bytes(4, "little", signed=True)
    return payload


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": FrameKind.RESULT}, "expected a forward"),
        ({"layer_id": LAYERS}, f"layer_id {LAYERS}: the model has {LAYERS}"),
        ({"hidden": 8}, "rows of 8: the model's hidden size is 16"),
        ({"dtype": 2}, "rows of BFLOAT16: the group computes in FLOAT32"),
    ],
)
def test_a_header_that_does_not_fit_the_model_is_refused(
    shared: ExpertRuntime, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(WireFormatError, match=message):
        shared.forward(*forward_call(**change))


def test_pairs_without_rows_are_refused_and_nothing_is_answered_with_nothing(
    shared: ExpertRuntime,
) -> None:
    header, payload = forward_call(3, (0, 1))
    with pytest.raises(WireFormatError, match="6 pairs on no rows"):
        shared.forward(header._replace(num_rows=0), payload[: 6 * 12])
    assert len(shared.forward(*forward_call(0))[1]) == 0
    assert len(shared.forward(*forward_call(2, ()))[1]) == 0


@pytest.mark.parametrize("value", [3, -1, 2**31 - 1, -(2**31)])
def test_pairs_out_of_range_are_refused(shared: ExpertRuntime, value: int) -> None:
    header, payload = forward_call(3, (0, 1))
    with pytest.raises(WireFormatError, match="the frame has 3 rows"):
        shared.forward(header, set_pair(payload, 4, value))
    header, payload = forward_call(3, (0, 1))
    with pytest.raises(WireFormatError, match=f"the model has {EXPERTS}"):
        shared.forward(header, set_pair(payload, 6 + 4, value if value != 3 else EXPERTS))


def test_an_absent_expert_is_stale_and_another_epoch_is_not(path: Path) -> None:
    group = loaded_runtime(path, share=0.5)
    same = [group.forward(*forward_call(placement_epoch=epoch)) for epoch in (1, 2)]
    assert same[0][1] == same[1][1]
    assert same[1][0].placement_epoch == 2, "the answer is to the call's own epoch"
    with pytest.raises(StalePlacementError, match="layer 1 expert 4 is not resident"):
        group.forward(*forward_call(1, (0, 4), layer_id=1))
    assert group.status().num_calls == 2


def test_a_result_that_fits_no_frame_is_refused(
    shared: ExpertRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "MAX_FRAME_BYTES", 64 + 6 * HIDDEN * 4 - 1)
    with pytest.raises(MessageTooLargeError):
        shared.forward(*forward_call(3, (0, 1)))
    shared.forward(*forward_call(1, (0, 1)))


@pytest.mark.parametrize("combine", list(Combine))
def test_rows_that_are_not_finite_are_an_error_of_the_call(
    shared: ExpertRuntime, combine: Combine
) -> None:
    rows = torch.ones(3, HIDDEN)
    rows[1, 4] = float("nan")
    with pytest.raises(NonFiniteError, match="row 1 of the call of layer 2"):
        shared.forward(*forward_call(rows=rows, layer_id=2, combine=combine))


def test_an_output_that_overflows_names_the_expert(shared: ExpertRuntime) -> None:
    rows = torch.full((2, HIDDEN), 1e30)
    with pytest.raises(NonFiniteError, match=r"the output of expert 0"):
        shared.forward(*forward_call(rows=rows))
    with pytest.raises(NonFiniteError, match=r"the sum for row 0"):
        shared.forward(*forward_call(rows=rows, combine=Combine.PARTIAL))


def test_a_kernel_that_fails_is_a_compute_error(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = loaded_runtime(path, compute="torch")

    def broken(*call: object) -> torch.Tensor:
        raise RuntimeError("out of kernels")

    monkeypatch.setattr(group._compute, "forward", broken)
    with pytest.raises(GroupComputeError, match="group a failed to compute: out of kernels"):
        group.forward(*forward_call())
    monkeypatch.undo()
    group.forward(*forward_call())


def test_a_caller_that_stopped_waiting_is_not_computed(path: Path) -> None:
    group = loaded_runtime(path, compute="torch")
    caught: list[BaseException] = []

    def call() -> None:
        try:
            group.forward(*forward_call(deadline_ms=1))
        except DeadlineExceededError as error:
            caught.append(error)

    waiting = threading.Thread(target=call)
    with group._compute_lock:
        waiting.start()
        waiting.join(0.05)  # longer than the caller's millisecond
    waiting.join()
    assert "queued in group a did not finish within 0.001 s" in str(caught[0])
    assert group.status().num_calls == 0


@pytest.mark.parametrize("compute", ["auto", "deepspeed", "torch"])
def test_experts_are_added_and_dropped_with_their_epoch(path: Path, compute: str) -> None:
    group = loaded_runtime(path, share=0.5, compute=compute, capacity_bytes=2**20)
    before = group.forward(*forward_call(2, (0, 1)))[1].tobytes()
    assert group.load_experts([(0, 4), (0, 0), (1, 3)], 2, dry_run=True)[:2] == (
        0,
        2 * EXPERT_BYTES,
    )
    assert group.epoch == 1
    num_loaded, needed, free = group.load_experts([(0, 4), (0, 0), (1, 3)], 2)
    assert (num_loaded, needed) == (2, 2 * EXPERT_BYTES)
    assert 0 < free < 2**20
    assert group.status().layers == {0: [0, 1, 2, 4], 1: [0, 1, 3], 2: [0, 1, 2]}
    assert group.forward(*forward_call(2, (0, 1)))[1].tobytes() == before, "of the epoch before"
    assert group.forward(*forward_call(2, (0, 1), placement_epoch=2))[1].tobytes() == before
    header, payload = forward_call(2, (4,), placement_epoch=2)
    answer, out = group.forward(header, payload)
    weights = {4: expert_tensors()[0, 4]}
    want = experts_forward(*as_tensors(header, payload), weights, Combine.SLOTS)
    torch.testing.assert_close(result(answer, out), want, rtol=1e-5, atol=1e-5)
    assert group.drop_experts([(0, 4), (0, 4), (1, 0)], 3) == 2
    assert group.status().layers == {0: [0, 1, 2], 1: [1, 3], 2: [0, 1, 2]}
    with pytest.raises(StalePlacementError, match="layer 0 expert 4"):
        group.forward(*forward_call(2, (4,), placement_epoch=3))


def test_changes_that_make_no_sense_change_nothing(path: Path) -> None:
    group = loaded_runtime(path, share=0.5, capacity_bytes=2**20)
    status = group.status()
    with pytest.raises(InvalidFieldError, match=r"experts\[1\]\.layer_id must be below 3, got 3"):
        group.load_experts([(0, 4), (LAYERS, 0)], 2)
    with pytest.raises(InvalidFieldError, match=r"experts\[0\]\.expert_id must be below 5, got 5"):
        group.drop_experts([(0, EXPERTS)], 2)
    with pytest.raises(InvalidFieldError, match='must be resident, got "layer 0 expert 4"'):
        group.drop_experts([(0, 0), (0, 4)], 2)
    with pytest.raises(InvalidFieldError, match="placement_epoch must be 1 or more, got 0"):
        group.load_experts([(0, 4)], 0)
    assert group.status() == status


def test_what_does_not_fit_the_capacity_is_refused_with_numbers(path: Path) -> None:
    group = ExpertRuntime(group_id="a", checkpoint=path, dtype="float32", capacity_bytes=100)
    with pytest.raises(ResourceError, match=f"need {15 * EXPERT_BYTES} bytes, have 100 bytes"):
        group.load(plan_placement(LAYERS, EXPERTS, {"a": 1}))
    assert group.state is GroupState.FAILED
    assert "need" in group.status().failure
    full = loaded_runtime(path, share=0.5, compute="torch", capacity_bytes=8 * EXPERT_BYTES)
    with pytest.raises(ResourceError, match="have 0 bytes"):
        full.load_experts([(0, 4)], 2)
    assert full.load_experts([(0, 4)], 2, dry_run=True) == (0, EXPERT_BYTES, 0)


def test_a_placement_or_checkpoint_that_does_not_fit_fails_the_group(
    path: Path, tmp_path: Path
) -> None:
    group = ExpertRuntime(group_id="a", checkpoint=path)
    with pytest.raises(ConfigurationError, match="must have 3 layers of 5 experts"):
        group.load(plan_placement(LAYERS, EXPERTS + 1, {"a": 1}))
    group = ExpertRuntime(group_id="z", checkpoint=path)
    with pytest.raises(ConfigurationError, match="must contain 'z'"):
        group.load(plan_placement(LAYERS, EXPERTS, {"a": 1}))
    group = ExpertRuntime(group_id="a", checkpoint=tmp_path)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        group.load(plan_placement(LAYERS, EXPERTS, {"a": 1}))
    assert group.state is GroupState.FAILED


def test_configuration_is_checked_before_anything_is_read(path: Path) -> None:
    with pytest.raises(ConfigurationError, match="dtype must be one of float32, bfloat16"):
        ExpertRuntime(group_id="a", checkpoint=path, dtype="float16")
    with pytest.raises(ConfigurationError, match="num_threads must be 1 or more"):
        ExpertRuntime(group_id="a", checkpoint=path, num_threads=0)


def test_forwards_go_on_while_experts_are_loaded_and_dropped(path: Path) -> None:
    group = loaded_runtime(path, share=0.5)
    header, payload = forward_call(2, (0, 1))
    want = group.forward(header, payload)[1].tobytes()
    stop, failures, count = threading.Event(), [], [0]

    def ask() -> None:
        while not stop.is_set():
            answer = group.forward(header, payload)[1].tobytes()
            count[0] += 1
            if answer != want:
                failures.append(answer)

    asking = threading.Thread(target=ask)
    asking.start()
    for _ in range(20):
        group.load_experts([(0, 3), (0, 4), (1, 4)], 1)
        group.drop_experts([(0, 3), (0, 4), (1, 4)], 1)
    stop.set()
    asking.join()
    assert not failures
    assert count[0] > 0
