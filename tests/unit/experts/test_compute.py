"""Every way to compute gives the slow twin's answer, and slots are bookkept."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from experts.compute import (
    DeepSpeedCompute,
    ExpertCompute,
    ExpertShape,
    NativeCompute,
    NotResidentError,
    SlotMap,
    weighted_sum,
)
from experts.compute_choice import choose_compute
from experts.native.kernels import load_kernels
from experts.reference import ReferenceCompute
from protos.codec import Combine
from protos.errors import ConfigurationError, ResourceError

KINDS = ["deepspeed_loop", "deepspeed_grouped_mm", *(["native"] if load_kernels() else [])]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def shape_of(hidden: int, inter: int, dtype: torch.dtype) -> ExpertShape:
    return ExpertShape(
        num_layers=2, num_experts=6, hidden_size=hidden, intermediate_size=inter, dtype=dtype
    )


def make(kind: str, shape: ExpertShape) -> ExpertCompute:
    if kind == "torch":
        return ReferenceCompute(shape.dtype)
    if kind == "native":
        kernels = load_kernels()
        assert kernels is not None
        return NativeCompute(shape, kernels)
    return DeepSpeedCompute(shape, use_grouped_mm=kind == "deepspeed_grouped_mm")


def fill(compute: ExpertCompute, shape: ExpertShape, layer_id: int, ids: list[int]) -> None:
    compute.reserve(layer_id, len(compute.residents(layer_id)) + len(ids))
    for expert_id in ids:
        generator = torch.Generator().manual_seed(100 * layer_id + expert_id)
        hidden, inter = shape.hidden_size, shape.intermediate_size
        gate_up = torch.randn(2 * inter, hidden, generator=generator) / hidden**0.5
        down = torch.randn(hidden, inter, generator=generator) / inter**0.5
        compute.load(layer_id, expert_id, gate_up.to(shape.dtype), down.to(shape.dtype))


def random_pairs(
    num_rows: int, hidden: int, dtype: torch.dtype, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_rows, hidden, generator=generator).to(dtype)
    experts = torch.cat([torch.randperm(6, generator=generator)[:3] for _ in range(num_rows)])
    pair_row = torch.arange(num_rows).repeat_interleave(3)
    order = torch.randperm(len(pair_row), generator=generator)
    weight = torch.rand(len(pair_row), generator=generator)
    return rows, pair_row[order].int(), experts[order].int(), weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("combine", list(Combine))
@pytest.mark.parametrize("kind", KINDS)
def test_a_fast_path_agrees_with_the_slow_twin(
    kind: str, combine: Combine, dtype: torch.dtype
) -> None:
    shape = shape_of(48, 40, dtype)
    compute, twin = make(kind, shape), make("torch", shape)
    for layer_id in (1, 0):
        fill(compute, shape, layer_id, [5, 0, 3, 1, 4, 2])
        fill(twin, shape, layer_id, [0, 1, 2, 3, 4, 5])
    for num_rows in (1, 2, 17):
        for layer_id in (0, 1):
            call = random_pairs(num_rows, 48, dtype, seed=num_rows)
            got = compute.forward(layer_id, *call, combine)
            want = twin.forward(layer_id, *call, combine)
            assert got.dtype == want.dtype
            scale = float(want.abs().max())
            torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE[dtype] * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loop_and_grouped_mm_give_the_same_bits_at_even_shapes(dtype: torch.dtype) -> None:
    for hidden, inter in ((64, 32), (512, 256)):
        shape = shape_of(hidden, inter, dtype)
        answers = []
        for kind in ("deepspeed_loop", "deepspeed_grouped_mm"):
            compute = make(kind, shape)
            fill(compute, shape, 0, [0, 1, 2, 3, 4, 5])
            answers.append(compute.forward(0, *random_pairs(9, hidden, dtype), Combine.SLOTS))
        assert torch.equal(*answers)


@pytest.mark.parametrize("kind", [*KINDS, "torch"])
def test_residency_changes_between_calls(kind: str) -> None:
    shape = shape_of(16, 8, torch.float32)
    compute = make(kind, shape)
    rows = torch.randn(1, 16, generator=torch.Generator().manual_seed(1))
    row, weight = torch.zeros(1, dtype=torch.int32), torch.ones(1)

    def ask(expert_id: int) -> torch.Tensor:
        ids = torch.tensor([expert_id], dtype=torch.int32)
        return compute.forward(0, rows, row, ids, weight, Combine.SLOTS)

    with pytest.raises(NotResidentError, match="layer 0 expert 2"):
        ask(2)
    fill(compute, shape, 0, [2, 4])
    assert compute.residents(0) == [2, 4]
    assert compute.residents(1) == []
    before, bytes_of_two = ask(2), compute.resident_bytes
    fill(compute, shape, 0, [0])  # grows the layer: the others stay where they are
    assert compute.residents(0) == [0, 2, 4]
    assert compute.resident_bytes * 2 == bytes_of_two * 3
    assert torch.equal(ask(2), before)
    compute.drop(0, 4)
    fill(compute, shape, 0, [5])  # takes the slot that was freed
    assert compute.residents(0) == [0, 2, 5]
    assert torch.equal(ask(2), before)
    with pytest.raises(NotResidentError, match="expert 4"):
        ask(4)
    with pytest.raises(NotResidentError, match="expert 4"):
        compute.drop(0, 4)


@pytest.mark.parametrize("kind", [*KINDS, "torch"])
def test_a_call_without_pairs_is_answered(kind: str) -> None:
    compute = make(kind, shape_of(16, 8, torch.float32))
    none = torch.empty(0, dtype=torch.int32)
    rows = torch.ones(2, 16)
    slots = compute.forward(0, rows, none, none, torch.empty(0), Combine.SLOTS)
    assert slots.shape == (0, 16)
    partial = compute.forward(0, rows, none, none, torch.empty(0), Combine.PARTIAL)
    assert torch.equal(partial, torch.zeros(2, 16))


def test_a_row_has_the_same_bits_alone_and_in_company() -> None:
    if "native" not in KINDS:
        return  # only the native kernels promise it
    shape = shape_of(48, 40, torch.bfloat16)
    compute = make("native", shape)
    fill(compute, shape, 0, [0, 1, 2, 3, 4, 5])
    rows, pair_row, pair_expert, weight = random_pairs(13, 48, torch.bfloat16)
    together = compute.forward(0, rows, pair_row, pair_expert, weight, Combine.SLOTS)
    for pair in range(len(pair_row)):
        row = rows[pair_row[pair]][None]
        zero, one = torch.zeros(1, dtype=torch.int32), slice(pair, pair + 1)
        alone = compute.forward(0, row, zero, pair_expert[one], weight[one], Combine.SLOTS)
        assert torch.equal(alone[0], together[pair])


def test_weighted_sum_adds_in_pair_order() -> None:
    # In float32 (1e8 + 1) - 1e8 is 0 and (1e8 - 1e8) + 1 is 1: the order shows.
    slots = torch.tensor([[1e8], [1.0], [-1e8], [5.0]])
    pair_row = torch.tensor([0, 0, 0, 1], dtype=torch.int32)
    assert weighted_sum(slots, pair_row, None, 3).tolist() == [[0.0], [5.0], [0.0]]
    order = [0, 2, 1, 3]
    assert weighted_sum(slots[order], pair_row[order], None, 3).tolist() == [[1.0], [5.0], [0.0]]
    half = torch.full((4,), 0.5)
    assert weighted_sum(slots[order], pair_row[order], half, 2).tolist() == [[0.5], [2.5]]


def test_slots_run_out_and_are_reused() -> None:
    slots = SlotMap(4, num_experts=9)
    slots.grow(2)
    for expert_id, slot in ((7, 0), (1, 1)):
        assert slots.take(expert_id) == slot
        slots.publish(expert_id, slot)
    with pytest.raises(ResourceError, match="slots in layer 4: need 3, have 2"):
        slots.take(3)
    assert slots.take(7) == 0
    slots.release(7)
    assert slots.take(3) == 0
    assert slots.slots_of(np.array([1, 1], np.int32)).tolist() == [1, 1]


def test_the_choice_is_measured_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    chosen = choose_compute(shape_of(32, 16, torch.bfloat16))
    line = next(m for m in caplog.messages if m.startswith("event=compute_chosen"))
    assert "rows=1/8/64" in line
    assert "deepspeed_loop_us=" in line
    assert "deepspeed_grouped_mm_us=" in line
    assert ("native_us=" in line) == ("native" in KINDS)
    assert chosen.residents(0) == []


def test_a_shape_that_grouped_mm_refuses_is_computed_by_the_loop() -> None:
    shape = shape_of(50, 20, torch.bfloat16)  # 100 bytes a row: no multiple of 16
    compute = choose_compute(shape, "deepspeed")
    assert isinstance(compute, DeepSpeedCompute)
    assert not compute.use_grouped_mm


def test_a_choice_can_be_forced() -> None:
    shape = shape_of(32, 16, torch.float32)
    assert choose_compute(shape, "torch").name == "torch"
    assert choose_compute(shape, "deepspeed").name == "deepspeed"
    with pytest.raises(ConfigurationError, match=r"experts\.compute must be one of auto, native"):
        choose_compute(shape, "cuda")
    with pytest.raises(ConfigurationError, match=r"experts\.dtype must be float32 or bfloat16"):
        choose_compute(shape_of(32, 16, torch.float16))


def test_forced_native_without_kernels_says_how_to_get_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("experts.compute_choice.load_kernels", lambda: None)
    with pytest.raises(ResourceError, match=r"run python -m experts\.native\.build"):
        choose_compute(shape_of(32, 16, torch.float32), "native")
    assert choose_compute(shape_of(32, 16, torch.float32)).name == "deepspeed"


def test_a_candidate_that_is_wrong_is_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def wrong(self: DeepSpeedCompute, *call: object) -> torch.Tensor:
        out = right(self, *call)  # type: ignore[arg-type]
        return out + 1 if self.use_grouped_mm else out

    right = DeepSpeedCompute.forward
    monkeypatch.setattr(DeepSpeedCompute, "forward", wrong)
    compute = choose_compute(shape_of(32, 16, torch.float32), "deepspeed")
    assert isinstance(compute, DeepSpeedCompute)
    assert not compute.use_grouped_mm
    assert any("event=compute_rejected name=deepspeed_grouped_mm" in m for m in caplog.messages)
