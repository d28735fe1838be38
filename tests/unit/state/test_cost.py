from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.engine.tier import Streaming
from router.state.cost import CostModel, CostSettings

A, B = 1e-3, 2e-8  # seconds a token, and a token over a token
RTT, BANDWIDTH = 0.004, 400e6


def prefill_s(num_tokens: int, context: int) -> float:
    return A * num_tokens + B * num_tokens * (context + num_tokens / 2)


def measured(noise: float = 0.0, seed: int = 0) -> CostModel:
    """A model that saw chunks of 512 tokens behind all contexts, and loads of several sizes."""
    generator = random.Random(seed)
    model = CostModel()
    for context in range(0, 32_768, 512):
        factor = 1 + generator.uniform(-noise, noise)
        model.note_prefill(512, context, prefill_s(512, context) * factor)
    for size in [1e6, 5e6, 2e7, 8e7, 3e8] * 4:
        factor = 1 + generator.uniform(-noise, noise)
        model.note_load(int(size), (RTT + size / BANDWIDTH) * factor, now=0.0)
    return model


def test_the_fit_finds_the_lines_it_was_shown() -> None:
    model = measured()
    for num_tokens, context in [(256, 0), (4096, 0), (32_768, 0), (1024, 30_000), (10**6, 0)]:
        wanted = prefill_s(num_tokens, context)
        assert model.prefill_s(num_tokens, context) == pytest.approx(wanted, rel=0.03)
    for size in (2_000_000, 50_000_000, 1_000_000_000):
        assert model.load_s(size) == pytest.approx(RTT + size / BANDWIDTH, rel=0.03)
    assert model.bytes_per_s == pytest.approx(BANDWIDTH, rel=0.03)
    assert model.prefill_tokens_per_s == pytest.approx(1 / A, rel=0.03)


@pytest.mark.parametrize("seconds", [1e-4, 2.0, 200.0])
def test_the_fit_follows_a_change_both_ways(seconds: float) -> None:
    """From 0.13 s: soon about right, later exact."""
    model = measured()
    for _ in range(20):
        model.note_load(50_000_000, seconds, now=1.0)
    assert 1 / 2 < model.load_s(50_000_000) / seconds < 2
    for _ in range(80):
        model.note_load(50_000_000, seconds, now=1.0)
    assert model.load_s(50_000_000) == pytest.approx(seconds, rel=0.05)


def test_equal_chunks_are_split_by_the_shape_that_is_believed() -> None:
    """Chunks of one size at one place cannot tell linear from quadratic."""
    model = CostModel()
    for _ in range(20):
        model.note_prefill(512, 0, 0.5)
    assert model.prefill_s(512, 0) == pytest.approx(0.5, rel=0.01)
    assert 1.9 < model.prefill_s(1024, 0) / 0.5 < 2.1


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_the_faster_one_is_picked(noise: float) -> None:
    """Over 256 .. 32K tokens and links from slow to fast, at bytes a token of a small model; where
    the two lie within the advantage asked for, computing is right by definition."""
    right = total = 0
    for seed in range(5):
        model = measured(noise, seed)
        for length in (2**exponent for exponent in range(8, 16)):
            for bytes_per_token in (20_480, 200_000, 400_000, 800_000):
                size = 65_000_000 + length * bytes_per_token
                load, compute = RTT + size / BANDWIDTH, prefill_s(length, 0)
                choice = model.choose(0, length, size, now=0.0)
                right += choice.decision == ("load" if load < 0.8 * compute else "prefill")
                total += 1
    assert right / total >= (1.0 if noise == 0 else 0.9), f"{right} of {total}"


def test_reasons() -> None:
    model = CostModel(CostSettings(prior_round_trip_s=0.001, prior_bytes_per_s=1e9))
    choice = model.choose(0, 1024, 10**9, now=0.0)
    assert (choice.decision, choice.reason, choice.prefill_s) == ("load", "unmeasured", math.inf)
    model.note_prefill(1000, 0, 1.0)
    assert model.choose(0, 1000, 10**8, now=0.0).reason == "faster"
    slow = model.choose(0, 1000, 10**9, now=0.0)
    assert (slow.decision, slow.reason) == ("prefill", "slower")
    assert slow.load_s == pytest.approx(1.001)
    assert slow.prefill_s == pytest.approx(1.0)


def test_a_prefill_that_streams_costs_what_it_reads_again() -> None:
    """A load of 1 s against 1 s of computing, and against 1 s more for 1 GB between the steps."""
    model = CostModel(CostSettings(prior_round_trip_s=0.0, prior_bytes_per_s=1e9))
    model.note_prefill(1000, 0, 1.0)
    assert model.choose(0, 1000, 10**9, now=0.0, streamed_bytes=10**8).reason == "slower"
    choice = model.choose(0, 1000, 10**9, now=0.0, streamed_bytes=10**9)
    assert (choice.decision, choice.reason) == ("load", "streamed")
    assert choice.prefill_s == pytest.approx(2.0)
    assert model.choose(0, 1000, 10**8, now=0.0, streamed_bytes=10**9).reason == "faster"


def test_what_a_prefill_streams() -> None:
    """300 tokens behind the 1,000 kept ones, 100 a step: 0 + 100 + 200, by the integral 450."""
    streaming = Streaming(kept_tokens=1000, step_tokens=100)
    assert streaming.read_tokens(0, 1300) == streaming.read_tokens(1000, 1300) == 450
    assert streaming.read_tokens(1200, 1300) == 450 - 200
    assert streaming.read_tokens(0, 1000) == 0
    assert Streaming(kept_tokens=None, step_tokens=100).read_tokens(0, 10**6) == 0


def test_advantage_is_asked_for() -> None:
    """A load of 0.9 s is not worth it where computing takes 1 s; one of 0.7 s is."""
    model = CostModel(CostSettings(prior_round_trip_s=0.0, prior_bytes_per_s=1e9))
    model.note_prefill(1000, 0, 1.0)
    assert model.choose(0, 1000, 900_000_000, now=0.0).decision == "prefill"
    assert model.choose(0, 1000, 700_000_000, now=0.0).decision == "load"


def test_tokens_in_place_are_not_computed_twice() -> None:
    model = measured()
    whole = model.choose(0, 8192, 10**8, now=0.0).prefill_s
    rest = model.choose(4096, 8192, 10**8, now=0.0).prefill_s
    assert rest == pytest.approx(prefill_s(4096, 4096), rel=0.03)
    assert rest < whole


def test_one_slow_minute_does_not_refuse_for_good() -> None:
    model = CostModel()
    model.note_prefill(1000, 0, 1.0)
    model.note_load(1_000_000, 60.0, now=100.0)
    assert model.choose(0, 1000, 1_000_000, now=129.0).reason == "slower"
    again = model.choose(0, 1000, 1_000_000, now=130.0)
    assert (again.decision, again.reason) == ("load", "remeasure")
    hopeless = model.choose(0, 1000, 1_000_000_000, now=130.0)
    assert hopeless.decision == "prefill", "by what was believed at first it would not pay either"


@given(
    st.lists(
        st.tuples(
            st.integers(1, 10**6),
            st.integers(0, 10**6),
            st.floats(0, 1e5, allow_nan=False),
        ),
        max_size=30,
    )
)
def test_no_measurement_makes_a_prediction_negative(seen: list[tuple[int, int, float]]) -> None:
    model = CostModel()
    for num_tokens, context, seconds in seen:
        model.note_prefill(num_tokens, context, seconds)
        model.note_load(num_tokens, seconds, now=0.0)
    assert model.load_s(10**6) >= 0
    assert model.prefill_s(1000, 0) >= 0
    assert model.prefill_s(10**6, 10**6) >= model.prefill_s(1, 0)
