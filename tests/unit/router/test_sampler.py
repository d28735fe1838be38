"""Drawing tokens: exact against a slow twin, by hand, and independent of the batch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from router.engine import candidates
from router.engine.candidates import token_logprobs, top_candidates
from router.engine.request import SamplingParams
from router.engine.sampler import SamplerState, Samples, draw, sample

NO_PROMPT = np.array([1], dtype=np.int64)


def state_of(*, prompt: np.ndarray = NO_PROMPT, **options: Any) -> SamplerState:
    keys = ("index", "logprobs", "banned_ids", "min_tokens")
    others = {key: options.pop(key) for key in keys if key in options}
    others.setdefault("index", 0)
    return SamplerState(SamplingParams(**options), prompt=prompt, **others)


def draw_slowly(row: np.ndarray, params: SamplingParams, uniform: float) -> int:
    """Draw one token in float64 from a whole, sorted vocabulary."""
    probability = np.exp((row.astype(np.float64) - row.max()) / params.temperature)
    if params.top_k == 0 and params.top_p == 1.0:
        order = np.arange(len(row))
        kept = probability >= params.min_p
    else:
        order = np.argsort(-row, kind="stable")
        sizes = probability[order]
        if params.top_k:
            sizes[params.top_k :] = 0.0
        before = np.concatenate([[0.0], np.cumsum(sizes)[:-1]])
        kept = (before < params.top_p * sizes.sum()) & (sizes >= params.min_p) & (sizes > 0)
        kept[0] = True
    mass = np.where(kept, probability[order], 0.0)
    cumulative = np.cumsum(mass)
    place = int((cumulative <= uniform * cumulative[-1]).sum())
    return int(order[place])


def draw_by_sorting(row: np.ndarray, params: SamplingParams, uniform: float) -> int:
    """Draw one token with the very arithmetic of `draw`, from a whole vocabulary without bounds."""
    rows, temperature = row[None], np.array([params.temperature], dtype=np.float32)
    stretches = candidates.masses(rows, rows.max(1), temperature)
    cumulative = candidates.cumulative_masses(stretches)[0]
    if params.top_k or params.top_p < 1.0:
        order = np.argsort(-row, kind="stable")[: params.top_k or None]
    elif params.min_p:
        order = np.arange(len(row))
    else:
        target = min(uniform * cumulative[-1], np.nextafter(cumulative[-1], 0))
        stretch = int((cumulative <= target).sum())
        inner = np.cumsum(stretches[0, stretch], dtype=np.float64)
        target -= cumulative[stretch - 1] if stretch else 0.0
        target = min(target, np.nextafter(inner[-1], 0))
        return stretch * candidates.SUM_WIDTH + int((inner <= target).sum())
    mass = np.exp((row[order] - row.max()).astype(np.float64) / params.temperature)
    if params.top_k or params.top_p < 1.0:
        running = np.cumsum(mass)
        total = running[-1] if params.top_k else cumulative[-1]
        in_nucleus = np.concatenate([[True], running[:-1] < params.top_p * total])
        mass[~in_nucleus] = 0.0
    mass[mass < params.min_p] = 0.0
    running = np.cumsum(mass)
    target = min(uniform * running[-1], np.nextafter(running[-1], 0))
    return int(order[(running <= target).sum()])


def random_rows(seed: int, num_rows: int, vocab: int, spread: float, ties: bool) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((num_rows, vocab)) * spread
    if ties:
        rows = np.round(rows * 4) / 4
    return rows.astype(np.float32)


@pytest.mark.parametrize("vocab", [3, 64, 1000, 1024, 5003])
@pytest.mark.parametrize("ties", [False, True])
def test_candidates_equal_a_stable_sort(vocab: int, ties: bool) -> None:
    rows = random_rows(vocab, 6, vocab, 2.0, ties)
    rows[3, ::7] = -np.inf
    counts = np.array([1, 2, 5, 20, 200, vocab + 5])
    for part in (slice(0, 3), slice(0, 4), slice(0, 5), slice(0, 6)):
        found = top_candidates(rows[part], counts[part])
        for r, (row, count) in enumerate(zip(rows[part], counts[part], strict=True)):
            expected = np.argsort(-row, kind="stable")[:count]
            size = len(expected)
            finite = row[expected] > -np.inf
            assert found.ids[r, :size][finite].tolist() == expected[finite].tolist()
            assert found.values[r, :size].tolist() == row[expected].tolist()
            assert (found.values[r, size:] == -np.inf).all()


SETTINGS = st.builds(
    dict,
    temperature=st.sampled_from([0.05, 0.6, 1.0, 1.7]),
    top_k=st.sampled_from([0, 0, 1, 5, 40, 300]),
    top_p=st.sampled_from([1.0, 0.05, 0.5, 0.9, 0.999, 1 - 1e-7, 1 - 1e-15]),
    min_p=st.sampled_from([0.0, 0.0, 0.02, 0.5]),
    seed=st.integers(0, 2**64 - 1),
)


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    vocab=st.sampled_from([2, 50, 700, 3001]),
    spread=st.sampled_from([0.01, 2.0, 8.0]),
    ties=st.booleans(),
    rows=st.lists(SETTINGS, min_size=1, max_size=6),
)
def test_drawing_equals_its_slow_twin_in_any_company(
    seed: int, vocab: int, spread: float, ties: bool, rows: list[dict[str, Any]]
) -> None:
    values = random_rows(seed, len(rows), vocab, spread, ties)
    states = [state_of(**row) for row in rows]
    together = draw(values, states).tolist()
    alone = [int(draw(values[i : i + 1], [state])[0]) for i, state in enumerate(states)]
    reverse = draw(values[::-1].copy(), states[::-1]).tolist()[::-1]
    assert together == alone == reverse
    for row, state, token in zip(values, states, together, strict=True):
        slow = draw_slowly(row, state.params, state.uniform())
        if slow != token:  # float32 masses may round over an edge; then the edge must be near
            nudged = [
                draw_slowly(row, state.params, min(max(state.uniform() + nudge, 0.0), 1 - 1e-16))
                for nudge in (-1e-5, 1e-5)
            ]
            assert token in nudged


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    vocab=st.sampled_from([2, 700, 3001, 40_000]),
    spread=st.sampled_from([0.01, 1.0, 2.0, 8.0]),
    ties=st.booleans(),
    rows=st.lists(SETTINGS, min_size=1, max_size=4),
)
def test_bounds_and_partial_sorts_change_no_token(
    seed: int, vocab: int, spread: float, ties: bool, rows: list[dict[str, Any]]
) -> None:
    values = random_rows(seed, len(rows), vocab, spread, ties)
    values[:, seed % vocab] += 3 * spread  # a peak, so that nuclei of one and of many occur
    states = [state_of(**row) for row in rows]
    assert draw(values, states).tolist() == [
        draw_by_sorting(row, state.params, state.uniform())
        for row, state in zip(values, states, strict=True)
    ]


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.6])
@pytest.mark.parametrize("top_p", [0.05, 0.8, 0.95, 0.9999])
def test_a_nucleus_of_a_large_vocabulary_is_found(temperature: float, top_p: float) -> None:
    """From a handful of tokens to most of the vocabulary."""
    row = random_rows(5, 1, 248_320, 2.5, ties=False)
    row[0, :40] += np.linspace(14, 4, 40, dtype=np.float32)
    states = [state_of(seed=s, temperature=temperature, top_p=top_p) for s in range(5)]
    for state in states:
        token = int(draw(row, [state])[0])
        assert token == draw_by_sorting(row[0], state.params, state.uniform())


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.from_numpy(random_rows(1, 40, 700, 3.0, ties=True))
    logits[[3, 22], 5] = math.nan
    kinds = [
        {"temperature": 0.0},
        {"temperature": 0.0, "logprobs": 2},
        {"top_k": 7, "logprobs": 0, "frequency_penalty": 0.5},
        {"top_p": 0.8},
        {"min_p": 0.1, "logit_bias": {7: 2.0}},
    ]

    def results() -> Samples:
        states = [state_of(seed=row, **kinds[row % 5]) for row in range(40)]
        return sample(logits.clone(), states)

    at_once = results()
    monkeypatch.setattr(candidates, "BLOCK_VALUES", 3 * 700)
    in_blocks = results()
    fine = [row for row in range(40) if row not in (3, 22)]
    assert at_once.failed_rows == in_blocks.failed_rows == [3, 22]
    assert at_once.token_ids[fine].tolist() == in_blocks.token_ids[fine].tolist()
    assert at_once.logprobs == in_blocks.logprobs
    assert len(at_once.logprobs) == 15


def test_frequencies_follow_the_distribution() -> None:
    """4000 positions of one seed; each frequency within 5 standard deviations."""
    logits = np.log(np.array([[0.5, 0.25, 0.15, 0.08, 0.02]], dtype=np.float32))
    state = state_of(seed=7)
    counts = np.zeros(5)
    for _ in range(4000):
        counts[draw(logits, [state])[0]] += 1
        state.observe(0)
    for count, p in zip(counts, [0.5, 0.25, 0.15, 0.08, 0.02], strict=True):
        assert abs(count - 4000 * p) < 5 * math.sqrt(4000 * p * (1 - p))


def test_random_numbers_depend_on_seed_index_and_position_only() -> None:
    long = state_of(seed=5, prompt=np.arange(70))
    grown = state_of(seed=5, prompt=np.arange(10))
    for token in range(60):
        grown.observe(token)
    assert grown.uniform() == long.uniform()
    series = {
        name: [state_of(prompt=np.arange(p), **options).uniform() for p in range(1, 200)]
        for name, options in {
            "a": {"seed": 1},
            "b": {"seed": 2},
            "c": {"seed": 1, "index": 1},
            "d": {"seed": 2**64 - 1},
        }.items()
    }
    flat = [number for numbers in series.values() for number in numbers]
    assert len(set(flat)) == len(flat)
    assert all(0.0 <= number < 1.0 for number in flat)


def test_greedy_takes_the_lowest_of_equal_ids() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0], [5.0, 5.0, 5.0]])
    samples = sample(logits, [state_of(temperature=0.0)] * 2)
    assert samples.token_ids.tolist() == [1, 0]
    assert samples.failed_rows == []


def test_bias_and_penalties_by_hand() -> None:
    state = state_of(
        temperature=0.0,
        repetition_penalty=2.0,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        logit_bias={0: 1.0, 4: -1.0},
        prompt=np.array([0, 1, 1]),
    )
    state.observe(2)
    state.observe(2)
    row = np.array([1.0, -2.0, 4.0, 3.0, 2.0], dtype=np.float32)
    state.adjust(row)
    # 0: (1 + 1) / 2; 1: -2 * 2; 2: 4 / 2 - 2 * 0.25 - 0.5; 3: untouched; 4: 2 - 1
    assert row.tolist() == [1.0, -4.0, 1.0, 3.0, 1.0]


def test_presence_and_frequency_look_at_the_output_only() -> None:
    state = state_of(temperature=0.0, presence_penalty=1.0, prompt=np.array([0, 1]))
    row = np.zeros(3, dtype=np.float32)
    state.adjust(row)
    assert row.tolist() == [0.0, 0.0, 0.0]
    state.observe(1)
    state.adjust(row)
    assert row.tolist() == [0.0, -1.0, 0.0]


def test_many_distinct_tokens_are_counted() -> None:
    state = state_of(frequency_penalty=1.0, prompt=np.arange(3))
    for token in list(range(200)) * 2:
        state.observe(token)
    row = np.zeros(300, dtype=np.float32)
    state.adjust(row)
    assert row[:200].tolist() == [-2.0] * 200
    assert row[200:].tolist() == [0.0] * 100


def test_stop_tokens_are_banned_before_min_tokens() -> None:
    state = state_of(temperature=0.0, banned_ids=frozenset({2}), min_tokens=2)
    logits = [[0.0, 1.0, 9.0]]
    assert not state.is_plain
    tokens = []
    for _ in range(3):
        token = int(sample(torch.tensor(logits), [state]).token_ids[0])
        tokens.append(token)
        state.observe(token)
    assert tokens == [1, 1, 2]
    assert state.is_plain


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("greedy", [True, False])
def test_a_row_that_is_not_finite_fails_alone(bad: float, greedy: bool) -> None:
    logits = torch.zeros(3, 8)
    logits[0, 5] = logits[2, 6] = 4.0
    logits[1, 3] = bad
    temperature = 0.0 if greedy else 1e-3
    samples = sample(logits, [state_of(temperature=temperature) for _ in range(3)])
    assert samples.failed_rows == [1]
    assert samples.token_ids[[0, 2]].tolist() == [5, 6]


def test_a_row_without_a_possible_token_fails() -> None:
    logits = torch.full((2, 4), -math.inf)
    logits[1, 2] = 0.0
    assert sample(logits, [state_of(temperature=0.0)] * 2).failed_rows == [0]
    banned = state_of(temperature=0.0, banned_ids=frozenset(range(4)), min_tokens=3)
    assert sample(torch.zeros(1, 4), [banned]).failed_rows == [0]


def test_minus_infinity_is_an_impossible_token() -> None:
    logits = torch.full((1, 600), -math.inf)
    logits[0, [7, 550]] = 1.0
    seen = set()
    for seed in range(40):
        for options in ({}, {"top_k": 5}, {"top_p": 0.99}):
            state = state_of(seed=seed, **options)
            seen.add(int(sample(logits.clone(), [state]).token_ids[0]))
    assert seen == {7, 550}


@pytest.mark.parametrize("temperature", [1e-6, 1e-45, 1e-300])
def test_a_tiny_temperature_draws_one_of_the_most_probable(temperature: float) -> None:
    logits = torch.tensor([[1.0, 5.0, 5.0, -4.0, -3e38]] * 3)
    states = [
        state_of(seed=seed, temperature=temperature, **options)
        for seed, options in enumerate(({}, {"top_k": 4}, {"top_p": 0.9}))
    ]
    samples = sample(logits, states)
    assert samples.failed_rows == []
    assert set(samples.token_ids.tolist()) <= {1, 2}


def test_logprobs_are_the_models_own() -> None:
    """Before bias and temperature: softmax of (ln 1, ln 2, ln 5) is (1/8, 2/8, 5/8)."""
    logits = torch.log(torch.tensor([[1.0, 2.0, 5.0]]))
    state = state_of(temperature=0.0, logit_bias={0: 50.0}, logprobs=2)
    samples = sample(logits, [state])
    assert samples.token_ids.tolist() == [0]
    logprobs = samples.logprobs[0]
    assert logprobs.token_ids == [0]
    assert logprobs.logprobs == pytest.approx([math.log(1 / 8)], abs=1e-6)
    [(ids, values)] = logprobs.top
    assert ids == [2, 1]
    assert values == pytest.approx([math.log(5 / 8), math.log(2 / 8)], abs=1e-6)


def test_logprobs_do_not_depend_on_the_other_rows() -> None:
    rows = random_rows(3, 40, 1500, 3.0, ties=True)
    ids = np.arange(40) * 31
    tops = np.arange(40) % 4
    together = token_logprobs(rows, ids, tops)
    for r in range(40):
        alone = token_logprobs(rows[r : r + 1], ids[r : r + 1], tops[r : r + 1])
        assert alone.logprobs == [together.logprobs[r]]
        assert alone.top == [together.top[r]]
        assert len(alone.top[0][0]) == tops[r]
        exact = rows[r].astype(np.float64)
        expected = exact[ids[r]] - exact.max() - math.log(np.exp(exact - exact.max()).sum())
        assert together.logprobs[r] == pytest.approx(expected, abs=2e-6)
