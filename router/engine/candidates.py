"""The most probable tokens of a distribution, exactly and without sorting the vocabulary.

Pure functions over float32 rows `[rows, vocab]`. Each row's answer is a function of that row alone:
its bits do not depend on the other rows. Ties go to the lower token id.

A search has two steps: a *bound*, so low that no wanted token lies below it, and a sort of the few
tokens at or above it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router.engine.request import Logprobs

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ints = NDArray[np.int64]

SLICE_WIDTHS = (64, 16, 4)
"""A row is cut into `vocab // width` interleaved slices; the k-th largest slice maximum bounds the
k-th largest value from below. The widest that leaves at least 4 slices per wanted candidate is
taken; the answer does not depend on it."""

SUM_WIDTH = 512
"""Masses are summed over stretches of 512 tokens in float32, then over stretches in float64."""

BLOCK_VALUES = 1 << 20
"""Logits worked on at a time: 4 MiB, so that later passes find them in a cache."""

_SUM_ERROR = 4e-6
"""Bound of the relative error of a sum of float32 masses."""

_FIRST_DIVISOR, _LADDER = 256, 16
"""The first attempt at a nucleus takes tokens down to a 256th of the mass that top-p leaves over,
each further one down to a 16th of the one before."""

_LEAST_MASS = 1e-16
"""Float32 masses are exact to `_SUM_ERROR` down to this; below it all tokens are candidates."""

_SLACK = 1 + 1e-5
"""Factor on the depth of a bound; more than the rounding of a temperature and of a difference."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """The first tokens of each row in order of (value descending, id ascending)."""

    ids: Ints
    """`[rows, k]`; 0 behind a row's last candidate."""

    values: Floats
    """`[rows, k]`; -inf behind a row's last candidate."""


def row_blocks(values: Floats) -> Iterator[slice]:
    """Cut rows into runs of at most `BLOCK_VALUES` logits, at least one row each."""
    step = max(1, BLOCK_VALUES // values.shape[1])
    return (slice(start, start + step) for start in range(0, len(values), step))


def top_candidates(values: Floats, counts: Ints) -> Candidates:
    """Return the `counts[r]` largest entries of each row r.

    Args:
        values: `[rows, vocab]`, no NaN.
        counts: `[rows]`, each at least 1; more than the vocabulary means all.

    Source: slow twin: a stable sort of the whole row, in `tests/unit/router/test_sampler.py`.
    """
    counts = np.minimum(counts, values.shape[1])
    widest = int(counts.max())
    found = _in_order(values, _reaching_kth(values, counts, widest))
    ids, top = found.ids[:, :widest], found.values[:, :widest]
    if len(counts) > 1:
        behind = np.arange(widest) >= counts[:, None]
        ids[behind] = 0
        top[behind] = -np.inf
    return Candidates(ids, top)


def _reaching_kth(values: Floats, counts: Ints, widest: int) -> Ints:
    """Return indices into the flattened rows: all entries that reach a bound of their row, which
    at least `counts[r]` entries reach and few others."""
    num_rows, vocab = values.shape
    each = np.arange(num_rows)
    width = next((width for width in SLICE_WIDTHS if vocab // width >= 4 * widest), 1)
    num_slices = vocab // width
    if width == 1:
        ranks = vocab - counts
        bounds = np.partition(values, np.unique(ranks), axis=1)[each, ranks]
        return np.flatnonzero(values >= bounds[:, None])
    whole = num_slices * width
    slices = values[:, :whole].reshape(num_rows, width, num_slices)
    maxima = slices.max(1)
    ranks = num_slices - counts
    bounds = np.partition(maxima, np.unique(ranks), axis=1)[each, ranks]
    row, column = np.nonzero(maxima >= bounds[:, None])
    hit, depth = np.nonzero(slices[row, :, column] >= bounds[row, None])
    found: Ints = row[hit] * vocab + depth * num_slices + column[hit]
    if whole < vocab:
        tail_row, tail_id = np.nonzero(values[:, whole:] >= bounds[:, None])
        found = np.concatenate([found, tail_row * vocab + tail_id + whole])
    return found


def nucleus_candidates(
    values: Floats, temperatures: Doubles, top_ps: Doubles
) -> tuple[Candidates, Doubles]:
    """Return each row's most probable tokens, down to the last that top-p can keep, and its mass.

    Args:
        values: `[rows, vocab]`, finite maxima.
        temperatures: `[rows]`, above 0.
        top_ps: `[rows]`, below 1.

    Returns:
        Candidates, a row's nucleus first and perhaps more; and the mass of the whole row,
        `[rows]`, relative to its most probable token.
    """
    vocab = values.shape[1]
    peaks = values.max(1)
    stretches = masses(values, peaks, temperatures.astype(np.float32))
    cumulative = cumulative_masses(stretches)
    totals = cumulative[:, -1]
    least = _least_masses(stretches, np.diff(cumulative, prepend=0.0), totals, top_ps, vocab)
    return _in_order(values, _reaching_mass(values, peaks, temperatures, least)), totals


def floor_candidates(values: Floats, temperatures: Doubles, min_ps: Doubles) -> Candidates:
    """Return each row's tokens that min-p can keep, and perhaps more, in order of id.

    Args:
        values: `[rows, vocab]`, finite maxima.
        temperatures: `[rows]`, above 0.
        min_ps: `[rows]`, above 0.
    """
    found = _reaching_mass(values, values.max(1), temperatures, min_ps)
    return _by_row(values, *_row_and_id(found, *values.shape))


def _reaching_mass(values: Floats, peaks: Floats, temperatures: Doubles, least: Doubles) -> Ints:
    """Return indices into the flattened rows: the entries of mass `least[r]`, all that are larger,
    and hardly any others; of all masses where `least` is 0."""
    with np.errstate(divide="ignore"):
        depth = np.log(least) * temperatures * _SLACK
    bounds = np.nextafter((peaks + depth).astype(np.float32), np.float32(-np.inf))
    return np.flatnonzero(values >= bounds[:, None])


def _least_masses(
    stretches: Floats, sums: Doubles, totals: Doubles, top_ps: Doubles, vocab: int
) -> Doubles:
    """Return per row a mass such that the tokens of this mass and more hold all of the nucleus.

    No token of a nucleus is lighter than what top-p leaves over, divided by the vocabulary: all
    tokens from the lightest one on weigh more than that rest together. Most nuclei end far above.
    """
    rest = np.maximum(1 - top_ps - _SUM_ERROR, 0.0) * totals
    least = np.empty(len(totals))
    pending = np.ones(len(totals), dtype=bool)
    divisor = _FIRST_DIVISOR
    while divisor < vocab:
        least[pending] = rest[pending] / divisor
        row, stretch = np.nonzero((sums >= least[:, None]) & pending[:, None])
        heavy = stretches[row, stretch]
        held = np.einsum("ij,ij->i", heavy >= least[row, None].astype(np.float32), heavy)
        held_of_row = np.bincount(row, held, minlength=len(totals)) * (1 - _SUM_ERROR)
        pending &= held_of_row < top_ps * totals
        if not pending.any():
            break
        divisor *= _LADDER
    least[pending] = rest[pending] / vocab
    least[least < _LEAST_MASS] = 0.0
    return least


def _row_and_id(found: Ints, num_rows: int, vocab: int) -> tuple[Ints, Ints]:
    """Split indices into the flattened rows; of a single row, leave out the rows."""
    if num_rows == 1:
        return found[:0], found
    row = found // vocab
    return row, found - row * vocab


def _in_order(values: Floats, found: Ints) -> Candidates:
    """Put chosen entries of each row in order of (value descending, id ascending).

    Args:
        values: `[rows, vocab]`.
        found: Indices into the flattened rows, at least one of every row.
    """
    num_rows, vocab = values.shape
    row, token_id = _row_and_id(found, num_rows, vocab)
    # One integer to sort by: the row, then the float's bits so that larger floats come first (+ 0.0
    # makes one of the two zeros), then the id. In place: fresh memory costs more than arithmetic.
    floats = values.reshape(-1).take(found)
    floats += np.float32(0.0)
    bits = floats.view(np.int32)
    bits ^= ~(bits >> 31) & 0x7FFFFFFF
    key = bits.view(np.uint32).astype(np.int64)
    id_bits = vocab.bit_length()
    key <<= id_bits
    key |= token_id
    if num_rows > 1:
        key |= row << (32 + id_bits)
    key.sort()
    ids = key & ((1 << id_bits) - 1)
    return _by_row(values, key >> (32 + id_bits) if num_rows > 1 else row, ids)


def _by_row(values: Floats, row: Ints, ids: Ints) -> Candidates:
    """Give every row its entries, in their order; `row` ascends."""
    num_rows = len(values)
    if num_rows == 1:
        return Candidates(ids[None], values[0].take(ids)[None])
    starts = np.searchsorted(row, np.arange(num_rows + 1))
    rank = np.arange(len(row)) - starts[row]
    all_ids = np.zeros((num_rows, int(np.diff(starts).max())), dtype=np.int64)
    top = np.full(all_ids.shape, -np.inf, dtype=np.float32)
    all_ids[row, rank] = ids
    top[row, rank] = values[row, ids]
    return Candidates(all_ids, top)


def masses(values: Floats, peaks: Floats, temperatures: Floats) -> Floats:
    """Return `exp((values - peak) / temperature)` in stretches `[rows, stretches, SUM_WIDTH]`.

    The last stretch is filled up with zeros.
    """
    num_rows, vocab = values.shape
    num_stretches = -(-vocab // SUM_WIDTH)
    flat = np.empty((num_rows, num_stretches * SUM_WIDTH), dtype=np.float32)
    flat[:, vocab:] = 0.0
    inner = flat[:, :vocab]
    np.subtract(values, peaks[:, None], out=inner)
    with np.errstate(over="ignore", under="ignore"):
        if (temperatures != 1.0).any():
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
    for block in row_blocks(values):
        part, ids, wanted = values[block], token_ids[block], tops[block]
        peaks = part.max(1)
        ones = np.ones(len(part), dtype=np.float32)
        totals = cumulative_masses(masses(part, peaks, ones))[:, -1]
        log_totals = peaks.astype(np.float64) + np.log(totals)
        result.token_ids += ids.tolist()
        result.logprobs += (part[np.arange(len(part)), ids] - log_totals).tolist()
        if not wanted.any():
            result.top += [([], []) for _ in wanted]
            continue
        best = top_candidates(part, np.maximum(wanted, 1))
        best_logprobs = best.values - log_totals[:, None]
        result.top += [
            (best.ids[row, :k].tolist(), best_logprobs[row, :k].tolist())
            for row, k in enumerate(wanted.tolist())
        ]
    return result
