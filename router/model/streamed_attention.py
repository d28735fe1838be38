"""Exact attention of a chunk of queries over keys that arrive section by section.

A long context may not fit the router's blocks: its oldest keys come from elsewhere, a section at a
time, and only one section is in memory. Per (query, head) three numbers carry everything over: the
largest score so far, the sum of exponentials relative to it, and the values weighted by them. What
is exact in real numbers is here exact up to float32 rounding; `NativeOps` visits the same keys in
the same order as without sections, and so gives the same bits (`attention.cpp`).

Worked sum: scores (1, 3) and (2) with values (10, 20) and (40). After the first section the top is
3, the sum 1 + e^-2, the output 20 + 10 e^-2; the second, relative to the same top, adds e^-1 and
40 e^-1. The quotient is the softmax of (1, 3, 2) over (10, 20, 40).

Legend: T queries, Hq/Hkv heads, r = Hq / Hkv, M keys, hd head dim; rows of a KV head are (T, r).

Source: online softmax (arXiv 1805.02867), FlashAttention (arXiv 2205.14135) section 3.1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

SCORE_ELEMENTS = 1 << 23
"""Keys are taken in tiles, so that one tile's scores have at most about this many elements."""

_NONE = float("-inf")


class StreamedAttention:
    """The running attention of one chunk of queries."""

    def __init__(self, q: Tensor, num_kv_heads: int, scale: float) -> None:
        """Start without any key.

        Args:
            q: `[T, Hq, hd]`; query heads h*r .. h*r + r - 1 share KV head h.
            num_kv_heads: Hkv.
            scale: Of the scores.
        """
        num_queries, num_heads, head_dim = q.shape
        self._shape = num_queries, num_kv_heads, num_heads // num_kv_heads, head_dim
        self._rows = q.float().view(self._shape).transpose(0, 1).reshape(num_kv_heads, -1, head_dim)
        self._scale = scale
        self._out = torch.zeros_like(self._rows)
        self._total = self._rows.new_zeros(self._rows.shape[:2])
        self._top = self._rows.new_full(self._rows.shape[:2], _NONE)

    def add(self, k: Tensor, v: Tensor, offset: int | None = None) -> None:
        """Attend to some more keys.

        Args:
            k: `[M, Hkv, hd]`, any float dtype; products and sums are float32.
            v: `[M, Hkv, hd]`.
            offset: None where every query sees all of them; else query i sees the keys
                `0 .. offset + i` of these.
        """
        tile = max(1, SCORE_ELEMENTS // self._total.numel())
        for start in range(0, k.shape[0], tile):
            keys = k[start : start + tile].float().permute(1, 2, 0)
            values = v[start : start + tile].float().transpose(0, 1)
            scores = torch.bmm(self._rows, keys).mul_(self._scale)
            if offset is not None and start + keys.shape[2] > offset + 1:
                scores.masked_fill_(self._hidden(start, keys.shape[2], offset), _NONE)
            self._add_tile(scores, values)

    def _hidden(self, start: int, count: int, offset: int) -> Tensor:
        """Return which keys a row does not see, bool `[rows, count]`."""
        num_queries, _, group, _ = self._shape
        device = self._rows.device
        last_seen = torch.arange(num_queries, device=device).repeat_interleave(group) + offset
        return torch.arange(start, start + count, device=device) > last_seen[:, None]

    def _add_tile(self, scores: Tensor, values: Tensor) -> None:
        top = torch.maximum(self._top, scores.amax(dim=2))
        # A row that has seen no key yet has no top; any finite one serves, all its terms are zero.
        origin = torch.where(top == _NONE, 0.0, top)
        weights = scores.sub_(origin[:, :, None]).exp_()
        decay = torch.exp(self._top - origin)
        self._total.mul_(decay).add_(weights.sum(dim=2))
        self._out.mul_(decay[:, :, None]).baddbmm_(weights, values)
        self._top = top

    def partial(self) -> tuple[Tensor, Tensor]:
        """Return the attention over the keys so far, and the logarithms of the sums.

        Returns:
            `out` float32 `[T, Hq, hd]`, zeros for a query that has seen no key; `logsumexp` float32
            `[T, Hq]`, -inf there.
        """
        num_queries, num_kv_heads, group, head_dim = self._shape
        is_empty = self._total == 0
        out = self._out / torch.where(is_empty, 1.0, self._total)[:, :, None]
        logsumexp = self._top + self._total.log()
        shape = num_kv_heads, num_queries, group
        return (
            out.view(*shape, head_dim).transpose(0, 1).reshape(num_queries, -1, head_dim),
            logsumexp.view(shape).transpose(0, 1).reshape(num_queries, -1),
        )


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Join attentions of the same queries over disjoint sets of keys.

    Args:
        parts: As `StreamedAttention.partial` returns them; at least one.

    Returns:
        The same of the union.
    """
    outs, sums = torch.stack([out for out, _ in parts]), torch.stack([s for _, s in parts])
    logsumexp = torch.logsumexp(sums, dim=0)
    weights = torch.exp(sums - torch.where(logsumexp == _NONE, 0.0, logsumexp))
    return (outs * weights[..., None]).sum(dim=0), logsumexp


def attend_in_sections(
    q: Tensor,
    sections: Iterable[tuple[Tensor, Tensor]],
    k: Tensor,
    v: Tensor,
    scale: float,
) -> Tensor:
    """Attend over a past in sections, then causally over the local keys, the last T of which are
    the queries' own.

    Args:
        q: `[T, Hq, hd]`.
        sections: K and V, each `[M, Hkv, hd]`; one pair is looked at before the next is asked for.
        k: Local keys `[L, Hkv, hd]`, L >= T.
        v: Local values.
        scale: Of the scores.

    Returns:
        float32 `[T, Hq, hd]`.
    """
    running = StreamedAttention(q, k.shape[1], scale)
    for keys, values in sections:
        running.add(keys, values)
    running.add(k, v, offset=k.shape[0] - q.shape[0])
    return running.partial()[0]


def attend_at_once(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attend with all keys in one product: the slow twin, in float64.

    Args:
        q: `[T, Hq, hd]`.
        k: All keys `[L, Hkv, hd]`, the last T being the queries' own.
        v: All values.
        scale: Of the scores.
    """
    num_queries, num_heads, _ = q.shape
    num_keys, num_kv_heads, _ = k.shape
    group = num_heads // num_kv_heads
    keys, values = (x.double().repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("thd,mhd->htm", q.double(), keys) * scale
    last_seen = torch.arange(num_queries)[:, None] + num_keys - num_queries
    scores.masked_fill_(torch.arange(num_keys) > last_seen, _NONE)
    return torch.einsum("htm,mhd->thd", scores.softmax(dim=2), values)
