from __future__ import annotations

import numpy as np
import pytest
import torch

from experts.native.kernels import DTYPES
from router.model.lazy_zeros import lazy_zeros
from router.model.native_ops import NativeKv, NativeOps
from router.model.ops import choose_ops

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
@pytest.mark.parametrize("shape", [(3, 5), (1, 1 << 20), (0, 4)])
def test_zeros_begin_at_a_cache_line(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    zeros = lazy_zeros(shape, dtype, CPU)
    assert (zeros.shape, zeros.dtype) == (shape, dtype)
    assert zeros.is_contiguous()
    assert zeros.data_ptr() % 64 == 0 or not zeros.numel()
    assert not zeros.count_nonzero()
    zeros.fill_(1)
    assert zeros.count_nonzero() == zeros.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 40])
def test_a_cache_that_begins_elsewhere_is_written_alike(
    dtype: torch.dtype, num_tokens: int
) -> None:
    """Streaming stores need alignment; where it lacks, plain ones do the same."""
    ops = choose_ops(dtype, CPU, "native")
    assert isinstance(ops, NativeOps)
    aligned = ops.allocate_kv(3, 16, 2, 40, dtype)
    words = torch.zeros(aligned.blocks.numel() + 1, dtype=torch.int32)[1:]
    shifted = NativeKv(words.view_as(aligned.blocks), 16, 2, 40, DTYPES[dtype], words.data_ptr())
    assert {kv.address % 32 == 0 for kv in (aligned, shifted)} == {True, False}
    generator = torch.Generator().manual_seed(num_tokens)
    values = torch.randn(2 * num_tokens * 2 * 40, generator=generator).to(dtype)
    values_bytes = values.view(torch.uint8).numpy()
    table = np.array([2, 0, 1], dtype=np.int32)[: -(-num_tokens // 16)]
    ops.write_kv([aligned, shifted], table, num_tokens, np.tile(values_bytes, 2))
    assert torch.equal(aligned.blocks, shifted.blocks)
    assert aligned.blocks.count_nonzero()
    out = np.zeros_like(values_bytes)
    ops.read_kv([shifted], table, num_tokens, out)
    assert np.array_equal(out, values_bytes)
