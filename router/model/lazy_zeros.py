"""Zeros that take no memory until they are written: caches are sized for the worst case and mostly
stay empty.

`torch.zeros` writes every page; the system's own zero pages (`calloc`) do not, so a router's
resident size follows its use. They begin at a cache line: kernels load and stream whole ones.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

_LINE_BYTES = 64
_STAND_INS = {torch.float32: np.float32, torch.bfloat16: np.int16, torch.int32: np.int32}


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros `shape` of `dtype` on `device`; on the CPU their pages are not resident yet."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    stand_in = np.dtype(_STAND_INS[dtype])
    num_bytes = math.prod(shape) * stand_in.itemsize
    memory = np.zeros(num_bytes + _LINE_BYTES, dtype=np.uint8)
    start = -memory.ctypes.data % _LINE_BYTES
    zeros = memory[start : start + num_bytes].view(stand_in).reshape(shape)
    return torch.from_numpy(zeros).view(dtype)
