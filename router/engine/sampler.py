"""Draws the next token of every sequence of a step.

A drawn token is a function of its own sequence only: its logits, its parameters, and a random
number that is a pure function of (seed, index among the request's n, position of the token). No
generator lives anywhere, so neither the batch mix nor a preemption nor a resume on another machine
changes a token. Rows are worked on together; where all rows are plain greedy, one argmax does it.

Words: *plain* means greedy without bias, penalties, log-probabilities or a pending `min_tokens`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from router.engine.candidates import (
    SUM_WIDTH,
    Candidates,
    Doubles,
    Floats,
    Ints,
    cumulative_masses,
    floor_candidates,
    masses,
    nucleus_candidates,
    row_blocks,
    token_logprobs,
    top_candidates,
)
from router.engine.request import Logprobs, SamplingParams

_DRAWS_PER_COUNTER = 4
"""Philox 4x64 gives four 64-bit words a counter."""

_DRAWS_AHEAD = 64
"""Random numbers made at a time; they are a function of the position, so none is ever lost."""

_LEAST_TEMPERATURE = 1e-30
"""Still not 0 in float32; no two float32 logits of a model are so close that it matters."""


class SamplerState:
    """What the sampler remembers of one sequence. All of it follows from its tokens."""

    def __init__(
        self,
        params: SamplingParams,
        *,
        index: int,
        prompt: NDArray[np.int64],
        logprobs: int | None = None,
        banned_ids: frozenset[int] = frozenset(),
        min_tokens: int = 0,
    ) -> None:
        self.params = params
        self.is_greedy = params.temperature == 0.0
        self.logprobs = logprobs
        self.position = len(prompt)
        """Position of the token to be drawn next."""
        self._key = (params.seed & (2**64 - 1)) | (index << 64)
        self._draws: list[float] = []
        self._draws_from = -1
        self._banned = np.array(sorted(banned_ids), dtype=np.int64) if min_tokens else None
        self._banned_until = len(prompt) + min_tokens
        self._bias_ids = np.array(list(params.logit_bias), dtype=np.int64)
        self._bias = np.array(list(params.logit_bias.values()), dtype=np.float32)
        self._penalises = (
            params.repetition_penalty != 1.0
            or params.presence_penalty != 0.0
            or params.frequency_penalty != 0.0
        )
        self._prompt: NDArray[np.int64] | None = prompt
        self._column: dict[int, int] = {}
        self._seen_ids = np.empty(0, dtype=np.int64)
        self._seen_counts = np.empty(0, dtype=np.float32)
        self._note_plain()

    def _note_plain(self) -> None:
        if self._banned is not None and self.position >= self._banned_until:
            self._banned = None
        self.is_adjusted = bool(
            self._penalises or len(self._bias_ids) or (self._banned is not None)
        )
        self.is_plain = self.is_greedy and not self.is_adjusted and self.logprobs is None

    def observe(self, token_id: int) -> None:
        """Take the token that was drawn. Plain sequences need not call this."""
        self.position += 1
        if self._banned is not None:
            self._note_plain()
        if self._penalises:
            self._count_prompt()
            column = self._column_of(token_id)
            self._seen_counts[column] += 1

    def uniform(self) -> float:
        """Return the random number of the next position, in [0, 1)."""
        start = self.position - self.position % _DRAWS_AHEAD
        if start != self._draws_from:
            bits = np.random.Philox(key=self._key, counter=start // _DRAWS_PER_COUNTER)
            self._draws = np.random.Generator(bits).random(_DRAWS_AHEAD).tolist()
            self._draws_from = start
        return self._draws[self.position - start]

    def adjust(self, logits: Floats) -> None:
        """Apply bias, penalties and the ban of stop tokens to one row `[vocab]`, in place."""
        if len(self._bias_ids):
            logits[self._bias_ids] += self._bias
        if self._penalises:
            self._count_prompt()
            params = self.params
            ids = self._seen_ids[: len(self._column)]
            counts = self._seen_counts[: len(self._column)]
            seen = logits[ids]
            penalty = np.float32(params.repetition_penalty)
            if penalty != 1.0:
                seen = np.where(seen > 0, seen / penalty, seen * penalty)
            seen -= np.float32(params.frequency_penalty) * counts
            seen -= np.float32(params.presence_penalty) * (counts > 0)
            logits[ids] = seen
        if self._banned is not None:
            logits[self._banned] = -np.inf

    def _count_prompt(self) -> None:
        """Note the prompt's tokens, once; only the repetition penalty looks at them."""
        if self._prompt is None:
            return
        if self.params.repetition_penalty != 1.0:
            self._seen_ids = np.unique(self._prompt)
            self._seen_counts = np.zeros(len(self._seen_ids), dtype=np.float32)
            self._column = {token: i for i, token in enumerate(self._seen_ids.tolist())}
        self._prompt = None

    def _column_of(self, token_id: int) -> int:
        """Return the token's place in the seen columns, which may grow."""
        column = self._column.setdefault(token_id, len(self._column))
        if column >= len(self._seen_ids):
            spare = max(64, len(self._seen_ids))
            self._seen_ids = np.concatenate([self._seen_ids, np.zeros(spare, np.int64)])
            self._seen_counts = np.concatenate([self._seen_counts, np.zeros(spare, np.float32)])
        self._seen_ids[column] = token_id
        return column


@dataclass(slots=True)
class Samples:
    """The tokens of one step, row by row."""

    token_ids: Ints
    """`[rows]`; anything in failed rows."""

    failed_rows: list[int] = field(default_factory=list)
    """Rows without a finite maximum."""

    logprobs: dict[int, Logprobs] = field(default_factory=dict)
    """By row, where asked for."""


def sample(logits: Tensor, states: Sequence[SamplerState]) -> Samples:
    """Draw one token a row.

    A row fails if it holds NaN or +inf, or nothing but -inf; -inf marks an impossible token.

    Args:
        logits: float32 `[rows, vocab]`. Rows of sequences with bias or penalties are changed in
            place.
        states: One a row.
    """
    others = [row for row, state in enumerate(states) if not state.is_plain]
    if not others and logits.device.type != "cpu":
        tokens = logits.argmax(1)
        peaks = logits.gather(1, tokens[:, None])[:, 0].cpu().numpy()
        return _with_failures(Samples(tokens.cpu().numpy()), peaks)
    values: Floats = logits.cpu().numpy()
    samples = Samples(np.empty(len(values), dtype=np.int64))
    if not others:
        samples.token_ids = values.argmax(1)
        return _with_failures(samples, values[np.arange(len(values)), samples.token_ids])
    for block in row_blocks(values):
        _sample_block(samples, values[block], states[block], block.start)
    return samples


def _with_failures(samples: Samples, peaks: Floats) -> Samples:
    finite = np.isfinite(peaks)
    if not finite.all():
        samples.failed_rows = np.flatnonzero(~finite).tolist()
    return samples


def _sample_block(
    samples: Samples, values: Floats, states: Sequence[SamplerState], start: int
) -> None:
    """Draw for rows of any kind, the first of which is row `start` of the step."""
    token_ids = samples.token_ids[start : start + len(values)]
    token_ids[:] = values.argmax(1)
    finite = np.isfinite(values[np.arange(len(values)), token_ids])
    logged = [row for row, state in enumerate(states) if state.logprobs is not None and finite[row]]
    raw = {row: values[row].copy() for row in logged if states[row].is_adjusted}
    for row, state in enumerate(states):
        if state.is_adjusted and finite[row]:
            state.adjust(values[row])
            token = token_ids[row] = values[row].argmax()
            finite[row] = np.isfinite(values[row, token])
    samples.failed_rows += (np.flatnonzero(~finite) + start).tolist()
    drawn = [row for row, state in enumerate(states) if not state.is_greedy and finite[row]]
    if drawn:
        token_ids[drawn] = draw(_picked(values, drawn), [states[row] for row in drawn])
    logged = [row for row in logged if finite[row]]
    if logged:
        before = np.stack([raw.get(row, values[row]) for row in logged])
        tops = np.array([states[row].logprobs for row in logged], dtype=np.int64)
        found = token_logprobs(before, token_ids[logged], tops)
        columns = zip(logged, found.token_ids, found.logprobs, found.top, strict=True)
        for row, token_id, logprob, top in columns:
            samples.logprobs[start + row] = Logprobs([token_id], [logprob], [top])


def draw(values: Floats, states: Sequence[SamplerState]) -> Ints:
    """Draw one token a row by temperature, top-k, top-p and min-p, through the inverse of the
    cumulative distribution.

    Source: slow twin: `draw_slowly` in `tests/unit/router/test_sampler.py`.
    """
    settings = [
        (s.params.temperature, s.params.top_k, s.params.top_p, s.params.min_p, s.uniform())
        for s in states
    ]
    drawing = _Drawing(*np.array(settings, dtype=np.float64).T)
    np.maximum(drawing.temperature, _LEAST_TEMPERATURE, out=drawing.temperature)
    tokens = np.empty(len(values), dtype=np.int64)
    by_count = drawing.top_k > 0
    by_mass = ~by_count & (drawing.top_p < 1.0)
    by_floor = ~by_count & ~by_mass & (drawing.min_p > 0.0)
    for rows, draw_some in (
        (by_count, _draw_top_k),
        (by_mass, _draw_top_p),
        (by_floor, _draw_min_p),
        (~by_count & ~by_mass & ~by_floor, _draw_any),
    ):
        if rows.all():
            return draw_some(values, drawing)
        if rows.any():
            tokens[rows] = draw_some(values[rows], drawing.of(rows))
    return tokens


@dataclass(frozen=True, slots=True)
class _Drawing:
    """The settings of all rows, column by column, float64 `[rows]`."""

    temperature: Doubles
    top_k: Doubles
    top_p: Doubles
    min_p: Doubles
    uniform: Doubles

    def of(self, rows: NDArray[np.bool_]) -> _Drawing:
        """Return the settings of some rows."""
        columns = (self.temperature, self.top_k, self.top_p, self.min_p, self.uniform)
        return _Drawing(*(column[rows] for column in columns))


def _draw_top_k(values: Floats, drawing: _Drawing) -> Ints:
    """Draw from the `top_k` most probable tokens."""
    found = top_candidates(values, drawing.top_k.astype(np.int64))
    return _choose(found, drawing, None)


def _draw_top_p(values: Floats, drawing: _Drawing) -> Ints:
    """Draw from the smallest set of tokens that holds `top_p` of the mass."""
    found, totals = nucleus_candidates(values, drawing.temperature, drawing.top_p)
    return _choose(found, drawing, totals)


def _choose(found: Candidates, drawing: _Drawing, totals: Doubles | None) -> Ints:
    """Draw from candidates by top-p and min-p, in their order.

    Args:
        found: Candidates; what is not there has no mass.
        drawing: Settings of the same rows.
        totals: The mass that `top_p` is a part of, `[rows]`; None: the candidates'.
    """
    mass = _relative_masses(found.values, found.values[:, 0], drawing.temperature)
    cumulative = np.cumsum(mass, axis=1)
    if totals is None:
        totals = cumulative[:, -1]
    in_nucleus = found.values > -np.inf
    in_nucleus[:, 1:] &= cumulative[:, :-1] < (drawing.top_p * totals)[:, None]
    kept = (in_nucleus & (mass >= drawing.min_p[:, None])).sum(1)
    each = np.arange(len(mass))
    limit = cumulative[each, kept - 1]
    target = _below(drawing.uniform * limit, limit)
    tokens: Ints = found.ids[each, (cumulative <= target[:, None]).sum(1)]
    return tokens


def _draw_min_p(values: Floats, drawing: _Drawing) -> Ints:
    """Draw from the tokens of at least `min_p` times the largest mass, in order of id."""
    found = floor_candidates(values, drawing.temperature, drawing.min_p)
    mass = _relative_masses(found.values, found.values.max(1), drawing.temperature)
    mass[mass < drawing.min_p[:, None]] = 0.0
    cumulative = np.cumsum(mass, axis=1)
    target = _below(drawing.uniform * cumulative[:, -1], cumulative[:, -1])
    tokens: Ints = found.ids[np.arange(len(mass)), (cumulative <= target[:, None]).sum(1)]
    return tokens


def _relative_masses(values: Floats, peaks: Floats, temperatures: Doubles) -> Doubles:
    """Return `exp((values - peak) / temperature)` in float64."""
    mass = (values - peaks[:, None]).astype(np.float64)
    with np.errstate(over="ignore", under="ignore"):
        mass /= temperatures[:, None]
        return np.exp(mass, out=mass)


def _draw_any(values: Floats, drawing: _Drawing) -> Ints:
    """Draw from the whole vocabulary, in order of id."""
    stretches = masses(values, values.max(1), drawing.temperature.astype(np.float32))
    cumulative = cumulative_masses(stretches)
    target = _below(drawing.uniform * cumulative[:, -1], cumulative[:, -1])
    stretch = (cumulative <= target[:, None]).sum(1)
    each = np.arange(len(values))
    before = np.where(stretch > 0, cumulative[each, stretch - 1], 0.0)
    inner = np.cumsum(stretches[each, stretch], axis=1, dtype=np.float64)
    target = _below(target - before, inner[:, -1])
    tokens: Ints = stretch * SUM_WIDTH + (inner <= target[:, None]).sum(1)
    return tokens


def _picked(values: Floats, rows: Sequence[int]) -> Floats:
    return values if len(rows) == len(values) else values[rows]


def _below(target: Doubles, limit: Doubles) -> Doubles:
    """Return `target`, but strictly below `limit` where rounding reached it."""
    return np.minimum(target, np.nextafter(limit, 0.0))
