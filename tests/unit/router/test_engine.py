"""Continuous batching as a request sees it: the same tokens whatever else runs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protos.errors import (
    DeadlineExceededError,
    GroupLostError,
    InternalError,
    InvalidFieldError,
)
from router.engine.batch import Batch
from router.engine.engine import Engine
from router.engine.request import EngineRequest, FinishReason, Priority, StoppingParams
from tests.unit.router.engine_harness import (
    EOS,
    MAX_MODEL_LEN,
    VOCAB,
    Outputs,
    assert_all_free,
    assert_as_expected,
    config_of,
    expected_of,
    request_of,
    run,
)
from tests.unit.router.hash_model import HashModel

OPTIONS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.0, 0.8, 1.5]),
        "seed": st.integers(0, 99),
        "max_tokens": st.one_of(st.none(), st.integers(1, 24)),
    },
    optional={
        "top_k": st.sampled_from([1, 5]),
        "top_p": st.sampled_from([0.5, 0.9]),
        "min_p": st.sampled_from([0.1]),
        "repetition_penalty": st.sampled_from([1.3]),
        "presence_penalty": st.sampled_from([0.7]),
        "frequency_penalty": st.sampled_from([0.4]),
        "logit_bias": st.just({5: 3.0, 7: -2.0}),
        "n": st.integers(1, 3),
        "min_tokens": st.integers(0, 10),
        "ignore_eos": st.booleans(),
        "stop_token_ids": st.just((11, 12)),
        "logprobs": st.integers(0, 2),
        "prompt_logprobs": st.integers(0, 2),
        "priority": st.sampled_from(Priority),
    },
)
PROMPTS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=23)
SIZES = st.fixed_dictionaries(
    {
        "max_num_seqs": st.integers(1, 6),
        "max_num_batched_tokens": st.integers(6, 40),
        "num_blocks": st.integers(12, 40),
        "num_state_slots": st.integers(1, 8),
        "max_prompt_rows": st.integers(1, 30),
    }
)


@settings(max_examples=60, deadline=None)
@given(
    requests=st.lists(st.tuples(PROMPTS, OPTIONS, st.integers(0, 30)), min_size=1, max_size=6),
    sizes=SIZES,
)
def test_outputs_do_not_depend_on_budget_batch_blocks_or_arrival(
    requests: list[tuple[list[int], dict[str, Any], int]], sizes: dict[str, int]
) -> None:
    engine = Engine(HashModel(VOCAB), config_of(**sizes))
    outputs = Outputs()
    built = [request_of(f"r{i}", prompt, **o) for i, (prompt, o, _) in enumerate(requests)]
    arrivals = sorted(range(len(built)), key=lambda i: requests[i][2])
    step = 0
    while arrivals or engine.stats().num_running or engine.stats().num_waiting:
        while arrivals and requests[arrivals[0]][2] <= step:
            engine.submit(built[arrivals.pop(0)], outputs)
        engine.step()
        step += 1
        assert step < 5000
    assert_as_expected(built, outputs)
    assert_all_free(engine)


def test_preemption_repeats_and_loses_nothing() -> None:
    """12 blocks of 4 tokens for four sequences that grow to 40 tokens each."""
    model = HashModel(VOCAB)
    engine = Engine(model, config_of(num_blocks=12, max_num_batched_tokens=9))
    outputs = Outputs()
    requests = [
        request_of(
            f"r{i}",
            [i, 1, 2, 4, 5, 6, 7, 8],
            max_tokens=32,
            ignore_eos=True,
            temperature=0.9 if i % 2 else 0.0,
            seed=i,
            frequency_penalty=0.3,
            logprobs=1,
            prompt_logprobs=1,
        )
        for i in range(4)
    ]
    for request in requests:
        engine.submit(request, outputs)
    run(engine)
    assert engine.stats().preemptions >= 3
    assert_as_expected(requests, outputs)
    assert_all_free(engine)
    assert engine.stats().prompt_tokens == 4 * 8
    assert engine.stats().generation_tokens == 4 * 32


def test_decode_and_prefill_share_steps_within_the_budget() -> None:
    model = HashModel(VOCAB)
    engine = Engine(model, config_of(max_num_batched_tokens=10))
    outputs = Outputs()
    engine.submit(request_of("a", [1, 2], max_tokens=9, ignore_eos=True), outputs)
    engine.step()
    engine.submit(request_of("b", list(range(20)), max_tokens=2, ignore_eos=True), outputs)
    run(engine)
    # "b" needs 9 + 9 + 2 prompt tokens beside the one of "a", and then one decode step.
    assert model.batches[:6] == [(2, 1), (10, 2), (10, 2), (3, 2), (2, 2), (1, 1)]


TRACE = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), PROMPTS, OPTIONS),
        st.tuples(st.just("cancel"), st.integers(0, 20)),
        st.tuples(st.just("fail"), st.none()),
        st.tuples(st.just("tick"), st.integers(1, 9)),
        st.tuples(st.just("step"), st.integers(1, 6)),
    ),
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(trace=TRACE, sizes=SIZES)
def test_any_trace_leaves_all_blocks_and_slots_free(
    trace: list[tuple[Any, ...]], sizes: dict[str, int]
) -> None:
    """Submit, cancel, preempt, expire and fail at random; `check_batch` watches ownership."""
    now = 0.0
    model = HashModel(VOCAB)
    engine = Engine(model, config_of(**sizes), clock=lambda: now)
    outputs = Outputs()
    submitted: list[EngineRequest] = []

    def lose_group(batch: Batch) -> None:
        raise GroupLostError("g0")

    for move in trace:
        if move[0] == "submit":
            request = request_of(
                f"r{len(submitted)}",
                move[1],
                deadline=now + 20 if len(move[1]) % 3 else None,
                **move[2],
            )
            engine.submit(request, outputs)
            submitted.append(request)
        elif move[0] == "cancel":
            engine.cancel(f"r{move[1]}")
        elif move[0] == "fail":
            model.before_forward = lose_group
            engine.step()
            model.before_forward = lambda batch: None
        elif move[0] == "tick":
            now += move[1]
        else:
            for _ in range(move[1]):
                engine.step()
    run(engine)
    assert_all_free(engine)
    for request in submitted:
        for index in range(request.sampling.n):
            key = (request.request_id, index)
            whole = expected_of(request, index).tokens
            got = outputs.tokens[key]
            last = outputs.last[key]
            if last.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
                assert got == whole
            else:
                assert got == whole[: len(got)]
                assert last.finish_reason is FinishReason.CANCELLED or isinstance(
                    last.error, (GroupLostError, DeadlineExceededError)
                )


def test_same_seed_same_text_and_n_sequences_differ() -> None:
    outputs = Outputs()
    engine = Engine(HashModel(VOCAB), config_of())
    options: dict[str, Any] = {"temperature": 2.0, "max_tokens": 20, "ignore_eos": True}
    engine.submit(request_of("a", [1, 2], seed=1, n=3, **options), outputs)
    engine.submit(request_of("b", [1, 2], seed=1, **options), outputs)
    engine.submit(request_of("c", [1, 2], seed=2, **options), outputs)
    run(engine)
    assert outputs.tokens["a", 0] == outputs.tokens["b", 0]
    texts = [outputs.tokens[key] for key in (("a", 0), ("a", 1), ("a", 2), ("c", 0))]
    assert len({tuple(text) for text in texts}) == 4


def test_a_generated_token_given_as_prompt_changes_nothing_after_it() -> None:
    """What a resume on another router relies on: draws are keyed by the token's position."""
    outputs = Outputs()
    engine = Engine(HashModel(VOCAB), config_of())
    options: dict[str, Any] = {"temperature": 1.5, "seed": 9, "ignore_eos": True}
    engine.submit(request_of("whole", [1, 2], max_tokens=20, **options), outputs)
    run(engine)
    tokens = outputs.tokens["whole", 0]
    engine.submit(request_of("rest", [1, 2, *tokens[:8]], max_tokens=12, **options), outputs)
    run(engine)
    assert outputs.tokens["rest", 0] == tokens[8:]


def test_stop_token_is_named_and_part_of_the_output() -> None:
    outputs = Outputs()
    engine = Engine(HashModel(VOCAB), config_of())
    free = request_of("free", [1, 2], max_tokens=20, ignore_eos=True)
    engine.submit(free, outputs)
    run(engine)
    tokens = outputs.tokens["free", 0]
    stop = tokens[6]
    engine.submit(
        dataclasses.replace(
            free,
            request_id="stopped",
            stopping=StoppingParams(stop_token_ids=(stop,), ignore_eos=True),
        ),
        outputs,
    )
    run(engine)
    first = tokens.index(stop)
    assert outputs.tokens["stopped", 0] == tokens[: first + 1]
    assert outputs.last["stopped", 0].stop_token_id == stop
    assert outputs.last["stopped", 0].finish_reason is FinishReason.STOP


def test_a_stop_string_ends_only_its_own_sequence() -> None:
    outputs = Outputs()
    engine = Engine(HashModel(VOCAB), config_of())
    made: list[list[int]] = []

    def checker_of() -> Any:
        seen: list[int] = []
        made.append(seen)

        def check(token_id: int) -> bool:
            seen.append(token_id)
            return len(seen) == 4

        return check

    engine.submit(
        request_of(
            "a", [1], temperature=1.0, n=2, max_tokens=9, ignore_eos=True, text_stop=checker_of
        ),
        outputs,
    )
    engine.submit(request_of("b", [1], max_tokens=9, ignore_eos=True), outputs)
    run(engine)
    assert [len(seen) for seen in made] == [4, 4]
    assert made == [outputs.tokens["a", 0], outputs.tokens["a", 1]]
    assert outputs.last["a", 0].finish_reason is FinishReason.STOP
    assert outputs.last["a", 0].stop_token_id is None
    assert len(outputs.tokens["b", 0]) == 9


def test_a_stop_checker_that_fails_ends_only_its_own_request() -> None:
    outputs = Outputs()
    engine = Engine(HashModel(VOCAB), config_of())

    def broken(token_id: int) -> bool:
        raise KeyError(token_id)

    engine.submit(request_of("a", [1], text_stop=lambda: broken), outputs)
    b = request_of("b", [1], max_tokens=9)
    engine.submit(b, outputs)
    run(engine)
    error = outputs.last["a", 0].error
    assert isinstance(error, InternalError)
    assert "KeyError" in str(error)
    assert_as_expected([b], outputs)
    assert_all_free(engine)


def test_the_context_window_ends_a_sequence_with_length() -> None:
    outputs = Outputs()
    engine = Engine(HashModel(VOCAB), config_of())
    engine.submit(request_of("a", [1] * 40, ignore_eos=True), outputs)
    run(engine)
    assert len(outputs.tokens["a", 0]) == MAX_MODEL_LEN - 40
    assert outputs.last["a", 0].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("chunk", [8, 32])
def test_forced_tokens_are_as_if_drawn_here(chunk: int) -> None:
    """At every cut: the same tokens go on, and only new ones are sent."""
    options: dict[str, Any] = {
        "max_tokens": 20,
        "min_tokens": 12,
        "temperature": 0.9,
        "seed": 11,
        "repetition_penalty": 1.3,
        "frequency_penalty": 0.4,
        "presence_penalty": 0.2,
    }
    whole = Outputs()
    engine = Engine(HashModel(VOCAB), config_of())
    engine.submit(request_of("whole", [5, 6, 7], **options), whole)
    run(engine)
    tokens = whole.tokens["whole", 0]
    assert len(tokens) >= 12
    engine = Engine(HashModel(VOCAB), config_of(max_num_batched_tokens=chunk))
    for cut in range(len(tokens)):
        outputs = Outputs()
        forced = tuple(tokens[:cut])
        engine.submit(request_of("part", [5, 6, 7], forced_ids=forced, **options), outputs)
        run(engine)
        assert outputs.tokens["part", 0] == tokens[cut:]
        last, expected = outputs.last["part", 0], whole.last["whole", 0]
        assert (last.finish_reason, last.stop_token_id) == (
            expected.finish_reason,
            expected.stop_token_id,
        )
    assert_all_free(engine)


def test_forced_tokens_count_for_stop_strings() -> None:
    seen: list[int] = []

    def checker() -> Any:
        def check(token_id: int) -> bool:
            seen.append(token_id)
            return len(seen) == 4

        return check

    outputs = Outputs()
    engine = Engine(HashModel(VOCAB), config_of())
    request = request_of("r", [1], forced_ids=(8, 9), text_stop=checker, ignore_eos=True)
    engine.submit(request, outputs)
    run(engine)
    assert seen == [8, 9, *outputs.tokens["r", 0]]
    assert outputs.last["r", 0].finish_reason is FinishReason.STOP


@pytest.mark.parametrize(
    ("forced", "field"), [((1, EOS), r"ids\[1\]"), ((1, 2, 4), r"ids\[2\]"), ((VOCAB,), "ids")]
)
def test_forced_tokens_after_the_end_are_refused(forced: tuple[int, ...], field: str) -> None:
    engine = Engine(HashModel(VOCAB), config_of())
    with pytest.raises(InvalidFieldError, match=rf"resume_tokens\.{field}"):
        engine.submit(request_of("r", [1], forced_ids=forced, max_tokens=3), Outputs())
    assert engine.num_live == 0
