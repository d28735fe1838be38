"""Packing: the native calls equal the torch twin byte for byte; sums follow the top-k order."""

import ctypes

import pytest
import torch

from experts.native.kernels import load_kernels
from protos import codec
from router.gating.packing import CallOptions, NativePacking, Packing, TorchPacking
from router.gating.transport.base import FrameBuffer

NUM_EXPERTS, NUM_GROUPS, HIDDEN = 12, 3, 40


def options(wire_dtype: codec.DType, top_k: int) -> CallOptions:
    return CallOptions(
        hidden=HIDDEN,
        top_k=top_k,
        wire_dtype=wire_dtype,
        combine=codec.Combine.SLOTS,
        placement_epoch=7,
        deadline_ms=1000,
    )


def choices(num_tokens: int, top_k: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = (
        torch.stack(
            [torch.randperm(NUM_EXPERTS, generator=generator)[:top_k] for _ in range(num_tokens)]
        )
        if num_tokens
        else torch.zeros(0, top_k)
    )
    return ids.to(torch.int32), torch.rand(num_tokens, top_k, generator=generator)


def native(call_options: CallOptions) -> NativePacking:
    kernels = load_kernels()
    assert kernels is not None, "this machine builds the kernels"
    return NativePacking(ctypes.CDLL(str(kernels.path)), call_options, NUM_GROUPS)


def run(
    packing: Packing,
    call_options: CallOptions,
    rows: torch.Tensor,
    ids: torch.Tensor,
    w: torch.Tensor,
) -> tuple[list[bytes], torch.Tensor, torch.Tensor]:
    frames = [FrameBuffer(call_options.frame_capacity(len(rows))) for _ in range(NUM_GROUPS)]
    load = torch.zeros(NUM_EXPERTS, dtype=torch.int64)
    group_of_expert = (torch.arange(NUM_EXPERTS) % NUM_GROUPS).to(torch.int32)
    call = packing.pack(9, 4, rows, ids, w, group_of_expert, frames, load)
    sent, results = [], []
    for group in range(NUM_GROUPS):
        num_rows, num_pairs = call.num_rows[group], call.num_pairs[group]
        num_bytes = 12 * num_pairs + num_rows * HIDDEN * call_options.item_bytes
        frame = bytes(frames[group].view[: codec.HEADER_BYTES + num_bytes]) if num_pairs else b""
        sent.append(frame)
        generator = torch.Generator().manual_seed(group)
        result = FrameBuffer(call_options.result_bytes(num_rows, num_pairs))
        values = torch.randn(num_pairs, HIDDEN, generator=generator)
        values = values.to(codec.torch_dtype(call_options.wire_dtype))
        result.tensor[:] = values.contiguous().view(torch.uint8).flatten()
        results.append(result)
    return sent, packing.sum_slots(call, results), load


@pytest.mark.parametrize("wire_dtype", [codec.DType.FLOAT32, codec.DType.BFLOAT16])
@pytest.mark.parametrize("rows_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("num_tokens", "top_k"), [(1, 1), (1, 5), (17, 4), (64, 12), (300, 4), (0, 3)]
)
def test_native_packing_equals_the_torch_twin(
    wire_dtype: codec.DType, rows_dtype: torch.dtype, num_tokens: int, top_k: int
) -> None:
    call_options = options(wire_dtype, top_k)
    ids, weights = choices(num_tokens, top_k, seed=3)
    rows = torch.randn(num_tokens, HIDDEN, generator=torch.Generator().manual_seed(1))
    rows = rows.to(rows_dtype)
    fast = run(native(call_options), call_options, rows, ids, weights)
    slow = run(TorchPacking(call_options, NUM_GROUPS), call_options, rows, ids, weights)
    assert fast[0] == slow[0]
    torch.testing.assert_close(fast[1], slow[1], rtol=1e-6, atol=1e-6)
    assert torch.equal(fast[2], slow[2])
    assert int(fast[2].sum()) == num_tokens * top_k


@pytest.mark.parametrize("make", [native, lambda o: TorchPacking(o, NUM_GROUPS)])
@pytest.mark.parametrize("expert_id", [-1, NUM_EXPERTS])
def test_an_expert_id_out_of_range_is_refused_before_anything_is_counted(make, expert_id) -> None:
    call_options = options(codec.DType.FLOAT32, 2)
    ids, weights = choices(3, 2, seed=0)
    ids[1, 1] = expert_id
    load = torch.zeros(NUM_EXPERTS, dtype=torch.int64)
    frames = [FrameBuffer(call_options.frame_capacity(3)) for _ in range(NUM_GROUPS)]
    groups = torch.zeros(NUM_EXPERTS, dtype=torch.int32)
    with pytest.raises(IndexError, match="out of range"):
        make(call_options).pack(1, 0, torch.zeros(3, HIDDEN), ids, weights, groups, frames, load)
    assert int(load.sum()) == 0


def test_a_wrong_shape_names_both_shapes() -> None:
    call_options = options(codec.DType.FLOAT32, 2)
    ids, weights = choices(3, 3, seed=0)
    with pytest.raises(ValueError, match=r"\[T, 2\], got \(3, 40\) torch.float32, \(3, 3\)"):
        run(native(call_options), call_options, torch.zeros(3, HIDDEN), ids, weights)
