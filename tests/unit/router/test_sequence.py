"""A sequence's properties, ends and timings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from router.engine.request import (
    EngineRequest,
    FinishReason,
    SamplingParams,
    StoppingParams,
    Timings,
)
from router.engine.sequence import Sequence, SequenceState

GREEDY = SamplingParams(temperature=0.0)


def sequence_of(
    prompt: list[int],
    *,
    max_model_len: int = 100,
    eos: tuple[int, ...] = (),
    text_stop: Any = None,
    prompt_logprobs: int | None = None,
    **stopping: Any,
) -> Sequence:
    request = EngineRequest(
        request_id="r",
        prompt_ids=prompt,
        sampling=GREEDY,
        stopping=StoppingParams(**stopping),
        text_stop=text_stop,
        prompt_logprobs=prompt_logprobs,
    )
    return Sequence(
        request,
        0,
        lambda output: None,
        prompt=np.array(prompt, dtype=np.int64),
        arrival=0,
        now=1.0,
        max_model_len=max_model_len,
        eos_token_ids=eos,
    )


def test_tokens_between_spans_prompt_and_output() -> None:
    sequence = sequence_of([1, 2, 3])
    for token in (4, 5, 6):
        assert sequence.append(token, 0.0) is None
    everything = [1, 2, 3, 4, 5, 6]
    for start in range(7):
        for stop in range(start, 7):
            assert sequence.tokens_between(start, stop).tolist() == everything[start:stop]


def test_counts_read_as_prose() -> None:
    sequence = sequence_of([1, 2, 3], max_tokens=5)
    assert sequence.state is SequenceState.WAITING
    assert (sequence.num_tokens, sequence.num_to_compute, sequence.num_generated) == (3, 3, 0)
    sequence.num_computed = 3
    sequence.append(9, 0.0)
    assert (sequence.num_tokens, sequence.num_to_compute, sequence.num_generated) == (4, 1, 1)
    assert not sequence.is_decoding
    assert not sequence.is_finished


@pytest.mark.parametrize(
    ("stopping", "tokens", "ends"),
    [
        ({"max_tokens": 2}, [5, 6], FinishReason.LENGTH),
        ({"stop_token_ids": (6,)}, [5, 6], FinishReason.STOP),
        ({}, [5, 7], FinishReason.STOP),
        ({"ignore_eos": True}, [5, 7], None),
        ({"max_tokens": 2}, [5, 7], FinishReason.STOP),  # eos at the last place is a stop
    ],
)
def test_ends(stopping: dict[str, Any], tokens: list[int], ends: FinishReason | None) -> None:
    sequence = sequence_of([1], eos=(7,), **stopping)
    reasons = [sequence.append(token, 0.0) for token in tokens]
    assert reasons == [None, ends]


def test_the_context_window_ends_with_length() -> None:
    sequence = sequence_of([1, 2, 3], max_model_len=5)
    assert sequence.append(4, 0.0) is None
    assert sequence.append(5, 0.0) is FinishReason.LENGTH


def test_a_stop_string_ends_it_but_not_before_min_tokens() -> None:
    seen: list[int] = []

    def checker(token: int) -> bool:
        seen.append(token)
        return token == 8

    sequence = sequence_of([1], text_stop=lambda: checker, min_tokens=2)
    assert [sequence.append(token, 0.0) for token in (8, 5)] == [None, None]
    assert sequence.append(8, 0.0) is FinishReason.STOP
    assert seen == [8, 5, 8]


def test_progress_is_reported_once() -> None:
    sequence = sequence_of([1, 2, 3, 4], prompt_logprobs=0)
    sequence.num_computed = 2
    progress = sequence.report_prefill()
    assert progress is not None
    assert (progress.tokens_done, progress.tokens_total) == (2, 4)
    assert progress.prompt_logprobs is None
    sequence.num_computed = 1  # preempted, and computed again
    assert sequence.report_prefill() is None
    sequence.num_computed = 4
    progress = sequence.report_prefill()
    assert progress is not None
    assert progress.prompt_logprobs is not None
    assert sequence.report_prefill() is None


def test_timings_by_hand() -> None:
    sequence = sequence_of([1])  # submitted at 1.0
    assert sequence.timings(1.5) == Timings(0.5, 0.0, 0.0, 0.0)
    sequence.admitted_s = 2.0
    sequence.append(5, 4.0)
    sequence.append(5, 7.0)
    # queued 2 - 1, prefill 4 - 2, decode 7 - 4, first token 4 - 1
    assert sequence.timings(9.0) == Timings(1.0, 2.0, 3.0, 3.0)
