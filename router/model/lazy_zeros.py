"""Zeros that take no memory until they are written: caches are sized for the worst case and mostly
stay empty.

`torch.zeros` writes every page; the system's own zero pages (`calloc`) do not, so a router's
resident size follows its use.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_STAND_INS = {torch.float32: np.float32, torch.bfloat16: np.int16, torch.int32: np.int32}


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros `shape` of `dtype` on `device`; on the CPU their pages are not resident yet."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(shape, dtype=_STAND_INS[dtype])).view(dtype)
