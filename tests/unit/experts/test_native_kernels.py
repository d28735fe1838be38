"""Linear and expert kernels equal torch, and a row's bits depend on that row alone."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from experts.native import build
from experts.native.kernels import (
    PARTIAL,
    SLOTS,
    ExpertBank,
    Kernels,
    PackedLinear,
    cpu_flags,
    load_kernels,
)

F32, BF16 = torch.float32, torch.bfloat16
TOLERANCE = {F32: 2e-6, BF16: 2e-6}  # of the largest value: inputs are exact in the packed dtype
ISAS = [isa for isa in build.ISA_FLAGS if isa == "avx2" or "avx512_bf16" in cpu_flags()]


@pytest.fixture(scope="module", params=ISAS)
def kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    state = build.build(request.param)
    loaded = load_kernels(request.param)
    assert loaded is not None, state
    yield loaded
    loaded.set_num_threads(1)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(got: Tensor, want: Tensor, tolerance: float) -> None:
    assert got.shape == want.shape
    if want.numel():
        scale = float(want.abs().max()) + 1e-30
        assert float((got.double() - want.double()).abs().max()) / scale < tolerance


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("x_dtype", [F32, BF16])
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(1, 64, 64), (3, 1, 7), (7, 63, 33), (6, 65, 1), (13, 100, 250), (100, 48, 129), (0, 16, 8),
     (2, 17, 385), (600, 33, 40)],
)  # fmt: skip
def test_linear_equals_torch(
    kernels: Kernels, dtype: torch.dtype, x_dtype: torch.dtype, m: int, n: int, k: int
) -> None:
    weight, x = normal(n, k, seed=1, dtype=dtype), normal(m, k, seed=2, dtype=x_dtype)
    packed = kernels.pack_linear(weight)
    got = kernels.linear(x, packed)
    want = x.to(dtype).double() @ weight.double().T
    assert got.dtype == F32
    assert_close(got, want, TOLERANCE[dtype])
    narrow = kernels.linear(x, packed, out_dtype=BF16)
    assert torch.equal(narrow, got.to(BF16))


def test_linear_takes_row_strides_and_an_output(kernels: Kernels) -> None:
    wide = normal(5, 200)
    weight = normal(40, 64, seed=3, dtype=BF16)
    packed = kernels.pack_linear(normal(40, 100, seed=3)[:, :64].to(BF16))
    out = torch.full((5, 90), 7.0)
    kernels.linear(wide[:, 100:164], packed, out=out[:, 10:50])
    weight = normal(40, 100, seed=3)[:, :64].to(BF16)
    assert torch.equal(out[:, 10:50], kernels.linear(wide[:, 100:164].contiguous(), packed))
    assert torch.equal(out[:, :10], torch.full((5, 10), 7.0))
    assert torch.equal(out[:, 50:], torch.full((5, 40), 7.0))
    assert_close(out[:, 10:50], wide[:, 100:164].to(BF16).double() @ weight.double().T, 2e-6)


def test_pack_linear_can_round_to_bfloat16(kernels: Kernels) -> None:
    weight, x = normal(30, 21), normal(2, 21, seed=5)
    rounded = kernels.linear(x, kernels.pack_linear(weight, BF16))
    assert torch.equal(rounded, kernels.linear(x, kernels.pack_linear(weight.to(BF16))))


def test_linear_refuses_a_wrong_width(kernels: Kernels) -> None:
    packed = kernels.pack_linear(normal(4, 8))
    with pytest.raises(ValueError, match="x has 9 columns, the weight 8"):
        kernels.linear(normal(1, 9), packed)


def test_nan_and_infinity_reach_the_output(kernels: Kernels) -> None:
    packed = kernels.pack_linear(normal(20, 16, dtype=BF16))
    x = normal(3, 16)
    x[1, 4] = float("nan")
    x[2, 5] = float("inf")
    got = kernels.linear(x, packed)
    assert bool(got[0].isfinite().all())
    assert bool(got[1].isnan().all())
    assert not bool(got[2].isfinite().any())


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_rows_bits_do_not_depend_on_batch_or_threads(
    kernels: Kernels, dtype: torch.dtype
) -> None:
    packed = kernels.pack_linear(normal(200, 700, seed=1, dtype=dtype))
    x = normal(101, 700, seed=2)
    kernels.set_num_threads(1)
    alone = torch.cat([kernels.linear(x[i : i + 1], packed) for i in range(len(x))])
    for threads in (1, 2, 3):
        kernels.set_num_threads(threads)
        for rows in (2, 5, 6, 7, 32, 101):
            assert torch.equal(kernels.linear(x[:rows], packed), alone[:rows])


def test_calls_from_several_threads_take_turns(kernels: Kernels) -> None:
    kernels.set_num_threads(2)
    packed = kernels.pack_linear(normal(512, 256, seed=1, dtype=BF16))
    inputs = [normal(9, 256, seed=seed) for seed in range(4)]
    want = [kernels.linear(x, packed) for x in inputs]
    wrong: list[int] = []

    def call(i: int) -> None:
        for _ in range(200):
            if not torch.equal(kernels.linear(inputs[i], packed), want[i]):
                wrong.append(i)

    callers = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for caller in callers:
        caller.start()
    kernels.park()
    for caller in callers:
        caller.join()
    assert wrong == []


# Experts


def make_bank(
    kernels: Kernels, slots: int, hidden: int, inter: int, dtype: torch.dtype
) -> tuple[ExpertBank, list[tuple[Tensor, Tensor]]]:
    bank = kernels.new_expert_bank(slots, hidden, inter, dtype)
    experts = []
    for slot in range(slots):
        gate_up = normal(2 * inter, hidden, seed=2 * slot, dtype=dtype) / hidden**0.5
        down = normal(hidden, inter, seed=2 * slot + 1, dtype=dtype) / inter**0.5
        kernels.fill_slot(bank, slot, gate_up, down)
        experts.append((gate_up, down))
    return bank, experts


def expert(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Float64 but for the rounding of the SwiGLU output to the bank's dtype."""
    gate, up = F.linear(x.to(gate_up.dtype).double(), gate_up.double()).chunk(2, -1)
    return F.linear((F.silu(gate) * up).to(down.dtype).double(), down.double())


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(
    ("rows", "top_k", "slots", "hidden", "inter"),
    [(1, 1, 1, 16, 16), (5, 2, 4, 33, 7), (9, 1, 3, 64, 48), (40, 3, 4, 100, 33),
     (1, 8, 9, 128, 96), (250, 2, 2, 50, 80)],
)  # fmt: skip
def test_experts_equal_torch(
    kernels: Kernels,
    dtype: torch.dtype,
    rows: int,
    top_k: int,
    slots: int,
    hidden: int,
    inter: int,
) -> None:
    kernels.set_num_threads(2)
    bank, experts = make_bank(kernels, slots, hidden, inter, dtype)
    x = normal(rows, hidden, seed=99)
    scores = torch.rand(rows, slots, generator=torch.Generator().manual_seed(3))
    pair_slot = scores.topk(min(top_k, slots)).indices.int().flatten()
    pair_row = torch.arange(rows).repeat_interleave(min(top_k, slots)).int()
    weight = torch.rand(len(pair_row), generator=torch.Generator().manual_seed(4))
    want = torch.cat(
        [
            expert(x[r : r + 1], *experts[s])
            for r, s in zip(pair_row.tolist(), pair_slot.tolist(), strict=True)
        ]
    )
    # A SwiGLU output next to a rounding boundary may fall to either side of it.
    tolerance = 1e-5 if dtype == F32 else 4e-3
    out = torch.empty(len(pair_row), hidden)
    kernels.experts_forward(bank, x, pair_row, pair_slot, None, SLOTS, out)
    assert_close(out, want, tolerance)
    narrow = torch.empty(len(pair_row), hidden, dtype=BF16)
    kernels.experts_forward(bank, x, pair_row, pair_slot, weight, SLOTS, narrow)
    assert torch.equal(narrow, out.to(BF16))
    partial = torch.empty(rows, hidden)
    kernels.experts_forward(bank, x, pair_row, pair_slot, weight, PARTIAL, partial)
    sums = (
        torch.zeros(rows, hidden).double().index_add_(0, pair_row, out.double() * weight[:, None])
    )
    assert_close(partial, sums, 1e-6)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("rows", "pairs"), [(0, 0), (3, 0)])
def test_experts_without_pairs(kernels: Kernels, dtype: torch.dtype, rows: int, pairs: int) -> None:
    bank, _ = make_bank(kernels, 1, 16, 16, dtype)
    empty = torch.empty(pairs, dtype=torch.int32)
    kernels.experts_forward(
        bank, normal(rows, 16), empty, empty, None, SLOTS, torch.empty(pairs, 16)
    )
    partial = torch.full((rows, 16), 5.0)
    kernels.experts_forward(bank, normal(rows, 16), empty, empty, None, PARTIAL, partial)
    assert torch.equal(partial, torch.zeros(rows, 16))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_pairs_bits_do_not_depend_on_the_others(kernels: Kernels, dtype: torch.dtype) -> None:
    bank, experts = make_bank(kernels, 4, 96, 40, dtype)
    x = normal(30, 96, seed=7, dtype=BF16)
    pair_row = torch.arange(30).repeat_interleave(2).int()
    pair_slot = (torch.arange(60) * 7 % 4).int()
    weight = torch.rand(60, generator=torch.Generator().manual_seed(1))
    kernels.set_num_threads(1)
    alone, alone_partial = torch.empty(60, 96), torch.empty(30, 96)
    lone_bank = kernels.new_expert_bank(1, 96, 40, dtype)
    for p in range(60):
        kernels.fill_slot(lone_bank, 0, *experts[int(pair_slot[p])])
        row = x[int(pair_row[p])][None]
        zero = torch.zeros(1, dtype=torch.int32)
        kernels.experts_forward(lone_bank, row, zero, zero, None, SLOTS, alone[p : p + 1])
    for r in range(30):
        kernels.experts_forward(
            *(bank, x[r : r + 1], torch.zeros(2, dtype=torch.int32)),
            *(pair_slot[2 * r : 2 * r + 2], weight[2 * r : 2 * r + 2], PARTIAL),
            alone_partial[r : r + 1],
        )
    for threads in (1, 2, 3):
        kernels.set_num_threads(threads)
        out, partial = torch.empty(60, 96), torch.empty(30, 96)
        kernels.experts_forward(bank, x, pair_row, pair_slot, weight, SLOTS, out)
        kernels.experts_forward(bank, x, pair_row, pair_slot, weight, PARTIAL, partial)
        assert torch.equal(out, alone)
        assert torch.equal(partial, alone_partial)
    # Pairs in another order give the same outputs, in that order.
    order = torch.randperm(60, generator=torch.Generator().manual_seed(2))
    shuffled = torch.empty(60, 96)
    kernels.experts_forward(bank, x, pair_row[order], pair_slot[order], None, SLOTS, shuffled)
    assert torch.equal(shuffled, alone[order])


def test_experts_refuse_pairs_out_of_range(kernels: Kernels) -> None:
    bank, _ = make_bank(kernels, 2, 16, 16, F32)
    x, out = normal(3, 16), torch.empty(1, 16)
    for row, slot, message in (
        (3, 0, r"pair_row has an entry outside \[0, 3\)"),
        (-1, 0, r"pair_row has an entry outside \[0, 3\)"),
        (0, 2, r"pair_slot has an entry outside \[0, 2\)"),
    ):
        pair = torch.tensor([row]).int(), torch.tensor([slot]).int()
        with pytest.raises(IndexError, match=message):
            kernels.experts_forward(bank, x, *pair, None, SLOTS, out)


def test_fill_slot_refuses_misshapen_experts(kernels: Kernels) -> None:
    bank = kernels.new_expert_bank(1, 16, 8, F32)
    with pytest.raises(ValueError, match=r"gate_up \(16, 16\) and down \(16, 8\)"):
        kernels.fill_slot(bank, 0, normal(8, 16), normal(16, 8))
    with pytest.raises(ValueError, match=r"slot 1 is not in \[0, 1\)"):
        kernels.fill_slot(bank, 1, normal(16, 16), normal(16, 8))


# Loading


def test_auto_takes_the_best_built_isa() -> None:
    for isa in build.ISA_FLAGS:
        build.build(isa)
    loaded = load_kernels()
    assert loaded is not None
    assert loaded.isa == ISAS[0]


def test_missing_libraries_mean_torch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(build, "BUILD_DIR", tmp_path)
    assert load_kernels() is None
    assert "fallback=torch" in caplog.text
    assert "avx2: not built (python -m experts.native.build)" in caplog.text


def test_build_without_a_compiler_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "BUILD_DIR", tmp_path)
    monkeypatch.setattr(build, "find_compiler", lambda: None)
    assert build.main() == 0
    assert capsys.readouterr().out.count("not built: no C++ compiler") == len(build.ISA_FLAGS)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_packed_memory_goes_with_its_owner(kernels: Kernels) -> None:
    weight = torch.zeros(1024, 1024)
    before = resident_bytes()
    small = [kernels.pack_linear(weight) for _ in range(64)]  # 4 MiB each, several arenas
    bank = kernels.new_expert_bank(200, 256, 256, F32)  # 157 MB of address space
    assert 250 << 20 < resident_bytes() - before < 320 << 20
    for slot in (0, 199):
        kernels.fill_slot(bank, slot, normal(512, 256), normal(256, 256))
    kept = small.pop(30)
    del small, bank
    assert resident_bytes() - before < 160 << 20
    assert torch.equal(kernels.linear(normal(1, 1024), kept), torch.zeros(1, 1024))


def test_packed_weights_know_their_size(kernels: Kernels) -> None:
    packed: PackedLinear = kernels.pack_linear(normal(100, 33, dtype=BF16))
    assert packed.num_bytes == 112 * 17 * 4  # columns in sixteens, inputs in pairs
