"""Rotary position embedding: which angle each frequency has at each position.

A head's first `rotary_dim` components are rotated in pairs (i, i + rotary_dim/2) by
`position * inv_freq[i]`. Qwen3.5 has multimodal rotary embedding (M-RoPE): a token has three
positions (time, height, width), and frequency i takes one of them, interleaved T H W T H W ...
For text the three are equal, and M-RoPE is the ordinary rotary embedding.

Source: RoFormer (arXiv 2104.09864); YaRN (arXiv 2309.00071) eq. 17-23; transformers 5.23
`modeling_rope_utils.py`, `Qwen3_5MoeTextRotaryEmbedding`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from router.model.config import RopeConfig

_PAGE = 4096
"""Positions computed at once. The table grows in whole pages, always by the same kernel over the
same shape: the cos of a position has the same bits whatever was asked for before."""

_MOST_AHEAD = 16 * _PAGE
"""Positions that a growing table takes in advance."""


def inverse_frequencies(rope: RopeConfig) -> Tensor:
    """Return `inv_freq`, float32 `[rotary_dim / 2]`, YaRN's interpolation included."""
    dim = rope.rotary_dim
    wavelengths = rope.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if rope.rope_type != "yarn":
        return 1.0 / wavelengths
    low, high = _correction_range(rope)
    # 0: the frequency turns often within the pre-trained context, keep it; 1: stretch it by factor.
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)
    keep = 1 - ramp.clamp(0, 1)
    return 1.0 / (rope.factor * wavelengths) * (1 - keep) + 1.0 / wavelengths * keep


def _correction_range(rope: RopeConfig) -> tuple[float, float]:
    """Frequencies between which YaRN goes from keeping to stretching."""
    dim, context = rope.rotary_dim, rope.original_max_position_embeddings

    def frequency_that_turns(num_rotations: float) -> float:
        ratio = math.log(context / (num_rotations * 2 * math.pi))
        return dim * ratio / (2 * math.log(rope.theta))

    low, high = frequency_that_turns(rope.beta_fast), frequency_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    return low, high + 0.001 if low == high else high


def mrope_axes(rope: RopeConfig) -> Tensor:
    """Return which axis (0 time, 1 height, 2 width) frequency i takes, int64 `[rotary_dim / 2]`."""
    axes = torch.zeros(rope.rotary_dim // 2, dtype=torch.int64)
    for axis in (1, 2):
        axes[axis : 3 * rope.mrope_section[axis] : 3] = axis
    return axes


class RotaryTable:
    """cos and sin of every position up to the longest seen, grown on demand.

    A row is `concat(cos, sin)` of the `rotary_dim / 2` angles, float32, times the attention factor.
    """

    def __init__(self, rope: RopeConfig, device: torch.device) -> None:
        self._inv_freq = inverse_frequencies(rope)
        self._axes = mrope_axes(rope).to(device)
        self._scale = rope.attention_factor
        self._device = device
        self._table = torch.empty(0, rope.rotary_dim, device=device)

    def rows(self, positions: Tensor, max_position: int) -> Tensor:
        """Return the rows of a step's tokens.

        Args:
            positions: int64 `[T]` (text) or `[3, T]` (time, height, width).
            max_position: At least the largest position.

        Returns:
            float32 `[T, rotary_dim]`: cos, then sin.
        """
        if max_position >= self._table.shape[0]:
            self._grow(max_position + 1)
        if positions.dim() == 1:
            return self._table.index_select(0, positions)
        per_axis = self._table[positions]  # [3, T, rotary_dim]
        column_axis = torch.cat((self._axes, self._axes))  # the same frequency for cos and for sin
        index = column_axis.expand(1, positions.shape[1], -1)
        return per_axis.gather(0, index).squeeze(0)

    def _grow(self, num_positions: int) -> None:
        # Doubles, so that a growing context does not copy the table at every page, but by at most
        # `_MOST_AHEAD`: at a million positions and 64 rotated components the table has 250 MB.
        have = self._table.shape[0]
        wanted = max(num_positions, have + min(have, _MOST_AHEAD))
        pages = [self._table]
        for start in range(self._table.shape[0], wanted, _PAGE):
            positions = torch.arange(start, start + _PAGE, dtype=torch.float32)
            angles = positions[:, None] * self._inv_freq
            page = torch.cat((angles.cos(), angles.sin()), dim=1) * self._scale
            pages.append(page.to(self._device))
        self._table = torch.cat(pages)
