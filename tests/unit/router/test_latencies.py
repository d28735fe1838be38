"""Times to first token and between tokens, as the engine counts them."""

from __future__ import annotations

from router.engine.latencies import LATENCY_BOUNDS_S, Latencies


def test_bounds_go_from_a_millisecond_to_minutes_two_to_an_octave() -> None:
    assert LATENCY_BOUNDS_S[0] == 0.001
    assert LATENCY_BOUNDS_S[2] == 0.002
    assert 360 < LATENCY_BOUNDS_S[-1] < 371


def test_a_step_is_a_token_of_each_decoding_sequence() -> None:
    latencies = Latencies()
    latencies.note_step(10.0, 0)  # a prefill
    latencies.note_step(10.5, 3)
    latencies.note_step(11.0, 2)
    latencies.note_first(0.25)
    stats = latencies.stats()
    assert sum(stats.between_tokens.counts) == 5
    assert stats.between_tokens.total == 2.5
    where = next(i for i, bound in enumerate(LATENCY_BOUNDS_S) if bound >= 0.5)
    assert stats.between_tokens.counts[where] == 5
    assert (sum(stats.first_token.counts), stats.first_token.total) == (1, 0.25)
