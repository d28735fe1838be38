"""Full attention in torch: rotary embedding and causal attention over a paged past.

Source: transformers 5.23 `Qwen3_5MoeAttention`; paged KV as in vLLM (arXiv 2309.06180).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

MASK_ELEMENTS = 1 << 24
"""Queries are taken in tiles so that one mask has at most about this many elements."""


def apply_rotary(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate the first components of each head, pair i being (i, i + rotary_dim / 2).

    Args:
        x: `[T, heads, head_dim]`.
        cos_sin: float32 `[T, rotary_dim]`: cos, then sin.
    """
    half = cos_sin.shape[1] // 2
    cos, sin = torch.split(cos_sin.unsqueeze(1), half, dim=-1)
    first, second, rest = torch.split(x, [half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, query_positions: Tensor, scale: float) -> Tensor:
    """Attend causally, padded sequences side by side.

    Key j of a sequence stands at position j. Keys behind a sequence's end are excluded because no
    query stands there; they must be finite.

    Args:
        q: `[N, L, Hq, head_dim]`.
        k: `[N, M, Hkv, head_dim]`; query heads h*r .. h*r + r - 1 share KV head h.
        v: `[N, M, Hkv, head_dim]`.
        query_positions: int64 `[N, L]`, padding included (any position >= 0).
        scale: Of the scores.

    Returns:
        `[N, L, Hq, head_dim]`.
    """
    num_sequences, num_queries, num_heads, head_dim = q.shape
    num_keys, num_kv_heads = k.shape[1:3]
    group = num_heads // num_kv_heads
    # The heads of a group become rows of one product with their KV head: [N, Hkv, L * r, hd].
    rows = q.view(num_sequences, num_queries, num_kv_heads, group, head_dim)
    rows = rows.permute(0, 2, 1, 3, 4).reshape(num_sequences, num_kv_heads, -1, head_dim)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    key_positions = torch.arange(num_keys, device=q.device)
    row_positions = query_positions.repeat_interleave(group, dim=1)
    tile = max(1, MASK_ELEMENTS // (num_sequences * num_keys))
    outputs = []
    for start in range(0, rows.shape[2], tile):
        visible = key_positions <= row_positions[:, start : start + tile, None]
        outputs.append(
            F.scaled_dot_product_attention(
                rows[:, :, start : start + tile],
                k,
                v,
                attn_mask=visible.unsqueeze(1),
                scale=scale,
            )
        )
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
    out = out.view(num_sequences, num_kv_heads, num_queries, group, head_dim)
    return out.permute(0, 2, 1, 3, 4).reshape(num_sequences, num_queries, num_heads, head_dim)
