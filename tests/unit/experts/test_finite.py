"""The bit test for NaN and infinity agrees with torch on every pattern."""

from __future__ import annotations

import pytest
import torch

from experts.finite import all_finite


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_pattern_is_judged_as_torch_judges_it(dtype: torch.dtype) -> None:
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = torch.isfinite(patterns)
    assert all_finite(patterns[finite])
    assert not any(all_finite(value) for value in patterns[~finite].split(1))


@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_one_bad_element_is_found(value: float, dtype: torch.dtype) -> None:
    values = torch.full((5, 7), torch.finfo(dtype).min, dtype=dtype)
    assert all_finite(values)
    values[3, 2] = value
    assert not all_finite(values)


def test_nothing_is_finite() -> None:
    assert all_finite(torch.empty(0))
