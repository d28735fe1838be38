"""The most probable tokens of a distribution, exactly and without sorting the vocabulary.

Pure functions over float32 rows `[rows, vocab]`. Each row's answer is a function of that row alone:
its bits do not depend on the other rows. Ties go to the lower token id.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router.engine.request import Logprobs

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ints = NDArray[np.int64]

SLICE_WIDTHS = (64, 16, 4)
"""A row is cut into `vocab // width` interleaved slices; the k-th largest slice maximum bounds the
k-th largest value from below, so only slices that reach it are looked at. The widest that leaves
at least 4 slices per wanted candidate is taken; the answer does not depend on it."""

SUM_WIDTH = 512
"""Masses are summed over stretches of 512 tokens in float32, then over stretches in float64."""

_LOGPROB_ROWS = 16
"""Rows per pass of `token_logprobs`; bounds the scratch memory to 16 vocabularies."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """The first tokens of each row in order of (value descending, id ascending)."""

    ids: Ints
    """`[rows, k]`; 0 behind a row's last candidate."""

    values: Floats
    """`[rows, k]`; -inf behind a row's last candidate."""


def top_candidates(values: Floats, counts: Ints) -> Candidates:
    """Return the `counts[r]` largest entries of each row r.

    Args:
        values: `[rows, vocab]`, no NaN.
        counts: `[rows]`, each at least 1; more than the vocabulary means all.

    Source: slow twin: a stable sort of the whole row, in `tests/unit/router/test_sampler.py`.
    """
    num_rows, vocab = values.shape
    counts = np.minimum(counts, vocab)
    widest = int(counts.max())
    width = next((width for width in SLICE_WIDTHS if vocab // width >= 4 * widest), 0)
    if not width:
        return _sorted_candidates(values, counts, widest)
    num_slices = vocab // width
    whole = num_slices * width
    slices = values[:, :whole].reshape(num_rows, width, num_slices)
    maxima = slices.max(1)
    ranks = num_slices - counts
    bounds = np.partition(maxima, np.unique(ranks), axis=1)[np.arange(num_rows), ranks]
    row, column = np.nonzero(maxima >= bounds[:, None])
    picked = slices[row, :, column]
    hit, depth = np.nonzero(picked >= bounds[row, None])
    found_row = row[hit]
    found_id = depth * num_slices + column[hit]
    found_value = picked[hit, depth]
    if whole < vocab:
        tail_row, tail_id = np.nonzero(values[:, whole:] >= bounds[:, None])
        found_row = np.concatenate([found_row, tail_row])
        found_id = np.concatenate([found_id, tail_id + whole])
        found_value = np.concatenate([found_value, values[tail_row, tail_id + whole]])
    order = np.lexsort((found_id, -found_value, found_row))
    found_row = found_row[order]
    rank = np.arange(len(order)) - np.searchsorted(found_row, np.arange(num_rows))[found_row]
    kept = rank < counts[found_row]
    found_row, rank, order = found_row[kept], rank[kept], order[kept]
    ids = np.zeros((num_rows, widest), dtype=np.int64)
    top = np.full((num_rows, widest), -np.inf, dtype=np.float32)
    ids[found_row, rank] = found_id[order]
    top[found_row, rank] = found_value[order]
    return Candidates(ids, top)


def _sorted_candidates(values: Floats, counts: Ints, widest: int) -> Candidates:
    """The same by sorting every row: for small vocabularies and large counts."""
    ids = np.argsort(-values, axis=1, kind="stable")[:, :widest]
    top = np.take_along_axis(values, ids, axis=1)
    behind = np.arange(widest) >= counts[:, None]
    ids[behind] = 0
    top[behind] = -np.inf
    return Candidates(ids, top)


def masses(values: Floats, peaks: Floats, temperatures: Floats) -> Floats:
    """Return `exp((values - peak) / temperature)` in stretches `[rows, stretches, SUM_WIDTH]`.

    The last stretch is filled up with zeros.
    """
    num_rows, vocab = values.shape
    num_stretches = -(-vocab // SUM_WIDTH)
    flat = np.zeros((num_rows, num_stretches * SUM_WIDTH), dtype=np.float32)
    inner = flat[:, :vocab]
    np.subtract(values, peaks[:, None], out=inner)
    with np.errstate(over="ignore", under="ignore"):
        np.divide(inner, temperatures[:, None], out=inner)
        np.exp(inner, out=inner)
    return flat.reshape(num_rows, num_stretches, SUM_WIDTH)


def cumulative_masses(stretches: Floats) -> Doubles:
    """Return the running sum over stretches, float64 `[rows, stretches]`; the last is the total."""
    return np.cumsum(stretches.sum(2), axis=1, dtype=np.float64)


def token_logprobs(values: Floats, token_ids: Ints, tops: Ints) -> Logprobs:
    """Return the log-probabilities of one token a row, and of each row's most probable tokens.

    Args:
        values: Logits `[rows, vocab]`, finite maxima.
        token_ids: `[rows]`.
        tops: `[rows]`: how many of the most probable tokens to list; 0 for none.
    """
    result = Logprobs()
    for start in range(0, len(values), _LOGPROB_ROWS):
        part = values[start : start + _LOGPROB_ROWS]
        rows = np.arange(len(part))
        peaks = part.max(1)
        ones = np.ones(len(part), dtype=np.float32)
        totals = cumulative_masses(masses(part, peaks, ones))[:, -1]
        log_totals = peaks.astype(np.float64) + np.log(totals)
        ids = token_ids[start : start + _LOGPROB_ROWS]
        result.token_ids += ids.tolist()
        result.logprobs += (part[rows, ids] - log_totals).tolist()
        wanted = tops[start : start + _LOGPROB_ROWS].tolist()
        if not any(wanted):
            result.top += [([], []) for _ in wanted]
            continue
        best = top_candidates(part, np.maximum(tops[start : start + _LOGPROB_ROWS], 1))
        best_logprobs = best.values - log_totals[:, None]
        result.top += [
            (best.ids[row, :k].tolist(), best_logprobs[row, :k].tolist())
            for row, k in enumerate(wanted)
        ]
    return result
