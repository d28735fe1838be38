"""Continuous batching as a request sees it: the same tokens whatever else runs."""

from __future__ import annotations

import dataclasses
import threading
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from protos.errors import (
    ConfigurationError,
    ContextLengthExceededError,
    DeadlineExceededError,
    DrainingError,
    DuplicateRequestError,
    EngineStoppedError,
    ExpertMeshError,
    GroupLostError,
    InternalError,
    InvalidFieldError,
    NonFiniteError,
    QueueFullError,
    ResourceError,
)
from router.engine.batch import Batch
from router.engine.engine import Engine, EngineConfig
from router.engine.request import (
    EngineRequest,
    FinishReason,
    Logprobs,
    SamplingParams,
    StepOutput,
    StoppingParams,
)
from router.engine.sampler import SamplerState, sample
from tests.unit.router.hash_model import HashModel, logits_of

VOCAB = 40
EOS = 3
MAX_MODEL_LEN = 48


def config_of(**options: Any) -> EngineConfig:
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "max_model_len": MAX_MODEL_LEN,
        "num_blocks": 60,
        "num_state_slots": 8,
        "block_size": 4,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 32,
        "max_queued": 100,
        "eos_token_ids": (EOS,),
    }
    return EngineConfig(**(sizes | options))


def request_of(request_id: str, prompt: list[int], **options: Any) -> EngineRequest:
    """Build a request; options of sampling and stopping are told apart by name."""
    stopping = {
        key: options.pop(key)
        for key in ("max_tokens", "min_tokens", "stop_token_ids", "ignore_eos")
        if key in options
    }
    others = {
        key: options.pop(key)
        for key in ("logprobs", "prompt_logprobs", "deadline", "text_stop", "forced_ids")
        if key in options
    }
    options.setdefault("temperature", 0.0)
    return EngineRequest(
        request_id=request_id,
        prompt_ids=prompt,
        sampling=SamplingParams(**options),
        stopping=StoppingParams(**stopping),
        **others,
    )


class Outputs:
    """Collects what sinks receive, and checks each sequence's order of events."""

    def __init__(self) -> None:
        self.tokens: dict[tuple[str, int], list[int]] = defaultdict(list)
        self.logprobs: dict[tuple[str, int], Logprobs] = defaultdict(Logprobs)
        self.last: dict[tuple[str, int], StepOutput] = {}
        self.progress: dict[tuple[str, int], list[int]] = defaultdict(list)
        self.prompt_logprobs: dict[tuple[str, int], Logprobs] = {}

    def __call__(self, output: StepOutput) -> None:
        key = (output.request_id, output.index)
        assert key not in self.last, f"{key} went on after its end"
        self.tokens[key] += output.token_ids
        if output.logprobs is not None:
            self.logprobs[key].extend(output.logprobs)
        if output.prefill is not None:
            assert not self.tokens[key] or len(self.tokens[key]) == len(output.token_ids)
            self.progress[key].append(output.prefill.tokens_done)
            if output.prefill.prompt_logprobs is not None:
                assert key not in self.prompt_logprobs
                self.prompt_logprobs[key] = output.prefill.prompt_logprobs
        if output.is_last:
            assert output.timings is not None
            self.last[key] = output


def run(engine: Engine) -> None:
    for _ in range(5000):
        if not engine.step():
            return
    raise AssertionError("the engine does not come to an end")


def assert_all_free(engine: Engine) -> None:
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting) == (0, 0)
    assert (stats.num_blocks_used, stats.num_state_slots_used) == (0, 0)
    assert not engine._live


@dataclasses.dataclass
class Expected:
    tokens: list[int]
    logprobs: Logprobs
    prompt_logprobs: Logprobs | None
    reason: FinishReason


def expected_of(request: EngineRequest, index: int) -> Expected:
    """Generate one sequence alone: no batch, no blocks, no steps."""
    stopping = request.stopping
    stop_ids = set(stopping.stop_token_ids) | (set() if stopping.ignore_eos else {EOS})
    tokens = list(request.prompt_ids)
    state = SamplerState(
        request.sampling,
        index=index,
        prompt=np.array(tokens),
        logprobs=request.logprobs,
        banned_ids=frozenset(stop_ids),
        min_tokens=stopping.min_tokens,
    )
    limit = min(stopping.max_tokens or MAX_MODEL_LEN, MAX_MODEL_LEN - len(tokens))
    logprobs = Logprobs()
    prompt_logprobs = None
    if request.prompt_logprobs is not None:
        prompt_logprobs = Logprobs()
        for position in range(1, len(tokens)):
            row = logits_of(tokens[:position], VOCAB).astype(np.float64)
            values = row - row.max() - np.log(np.exp(row - row.max()).sum())
            best = np.argsort(-row, kind="stable")[: request.prompt_logprobs]
            prompt_logprobs.extend(
                Logprobs(
                    [tokens[position]],
                    [float(values[tokens[position]])],
                    [(best.tolist(), values[best].tolist())],
                )
            )
    generated: list[int] = []
    while True:
        samples = sample(torch.from_numpy(logits_of(tokens, VOCAB))[None], [state])
        token = int(samples.token_ids[0])
        generated.append(token)
        tokens.append(token)
        state.observe(token)
        if 0 in samples.logprobs:
            logprobs.extend(samples.logprobs[0])
        if token in stop_ids:
            return Expected(generated, logprobs, prompt_logprobs, FinishReason.STOP)
        if len(generated) == limit:
            return Expected(generated, logprobs, prompt_logprobs, FinishReason.LENGTH)


def assert_as_expected(requests: list[EngineRequest], outputs: Outputs) -> None:
    for request in requests:
        for index in range(request.sampling.n):
            key = (request.request_id, index)
            expected = expected_of(request, index)
            assert outputs.tokens[key] == expected.tokens
            assert outputs.logprobs[key] == expected.logprobs
            assert outputs.last[key].finish_reason is expected.reason
            assert outputs.last[key].error is None
            progress = outputs.progress[key]
            assert progress == sorted(set(progress))
            assert progress[-1] == len(request.prompt_ids)
            if expected.prompt_logprobs is not None:
                got = outputs.prompt_logprobs[key]
                assert got.token_ids == expected.prompt_logprobs.token_ids
                assert got.logprobs == pytest.approx(expected.prompt_logprobs.logprobs, abs=1e-5)
                for (ids, _), (ids_expected, _) in zip(
                    got.top, expected.prompt_logprobs.top, strict=True
                ):
                    assert ids == ids_expected


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


# What is refused at submission, with its numbers.


@pytest.mark.parametrize(("prompt_len", "max_tokens"), [(49, None), (48, None), (40, 9), (100, 1)])
def test_a_request_beyond_the_context_window_is_refused(
    prompt_len: int, max_tokens: int | None
) -> None:
    engine = Engine(HashModel(VOCAB), config_of())
    with pytest.raises(ContextLengthExceededError) as caught:
        engine.submit(request_of("a", [1] * prompt_len, max_tokens=max_tokens), Outputs())
    assert caught.value.fields == {
        "prompt_tokens": prompt_len,
        "max_tokens": max_tokens or 1,
        "limit": MAX_MODEL_LEN,
    }


def test_a_request_that_never_fits_the_blocks_is_refused() -> None:
    outputs = Outputs()
    engine = Engine(HashModel(VOCAB), config_of(num_blocks=5))
    with pytest.raises(ResourceError) as caught:
        engine.submit(request_of("a", [1] * 10, max_tokens=12), outputs)
    assert caught.value.fields["need"] == "6"  # 21 cached tokens, 4 a block
    assert caught.value.fields["have"] == "5"
    fits = request_of("b", [1] * 10, max_tokens=11, ignore_eos=True)  # 20 cached tokens
    engine.submit(fits, outputs)
    run(engine)
    assert_as_expected([fits], outputs)


@pytest.mark.parametrize(
    ("prompt", "options", "field"),
    [
        ([], {}, "tokens.ids"),
        ([1, VOCAB], {}, "tokens.ids"),
        ([-1], {}, "tokens.ids"),
        ([1], {"max_tokens": 0}, "stopping.max_tokens"),
        ([1], {"logit_bias": {VOCAB: 1.0}}, "sampling.logit_bias"),
        ([1], {"stop_token_ids": (VOCAB,)}, "stopping.stop_token_ids"),
        ([1], {"n": 0}, "sampling.n"),
        ([1], {"n": 109}, "sampling.n"),
    ],
)
def test_fields_that_would_break_a_step_are_refused(
    prompt: list[int], options: dict[str, Any], field: str
) -> None:
    engine = Engine(HashModel(VOCAB), config_of())
    with pytest.raises(InvalidFieldError, match=field):
        engine.submit(request_of("a", prompt, **options), Outputs())
    assert_all_free(engine)


def test_a_full_queue_refuses_and_says_when_to_retry() -> None:
    outputs = Outputs()
    engine = Engine(HashModel(VOCAB), config_of(max_num_seqs=2, max_queued=3))
    ahead = [engine.submit(request_of(f"r{i}", [1], max_tokens=3), outputs) for i in range(5)]
    assert ahead == [0, 1, 2, 3, 4]
    with pytest.raises(QueueFullError) as caught:
        engine.submit(request_of("r5", [1]), outputs)
    assert caught.value.fields["limit"] == 3
    assert caught.value.retry_after_s is not None
    assert 0 < caught.value.retry_after_s <= 30
    run(engine)
    engine.submit(request_of("r5", [1], max_tokens=3), outputs)
    run(engine)
    assert len(outputs.last) == 6


def test_a_live_request_id_is_refused_and_free_again_after_its_end() -> None:
    outputs = Outputs()
    engine = Engine(HashModel(VOCAB), config_of())
    engine.submit(request_of("a", [1], max_tokens=2), outputs)
    with pytest.raises(DuplicateRequestError, match="a"):
        engine.submit(request_of("a", [1]), outputs)
    run(engine)
    engine.submit(request_of("a", [1], max_tokens=2), Outputs())
    run(engine)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"max_num_batched_tokens": 7}, "engine.max_num_batched_tokens"),
        ({"num_blocks": 0}, "engine.num_blocks"),
        ({"max_queued": -1}, "engine.max_queued"),
    ],
)
def test_impossible_sizes_are_refused(options: dict[str, int], field: str) -> None:
    with pytest.raises(ConfigurationError, match=field):
        config_of(**options)


# What ends a request early.


def test_cancel_frees_within_one_step() -> None:
    outputs = Outputs()
    engine = Engine(HashModel(VOCAB), config_of(max_num_seqs=1))
    engine.submit(request_of("running", [1, 2], ignore_eos=True), outputs)
    waiting = request_of("waiting", [1, 2], max_tokens=4)
    engine.submit(waiting, outputs)
    engine.submit(request_of("third", [1, 2]), outputs)
    for _ in range(3):
        engine.step()
    assert engine.cancel("running", "the client is gone")
    assert engine.cancel("third")
    assert not engine.cancel("unknown")
    engine.step()
    assert outputs.last["running", 0].finish_reason is FinishReason.CANCELLED
    assert len(outputs.tokens["running", 0]) == 3
    assert outputs.last["third", 0].finish_reason is FinishReason.CANCELLED
    assert (engine.stats().num_running, engine.stats().num_waiting) == (1, 0)
    assert engine.num_live == 1
    run(engine)
    assert engine.num_live == 0
    assert_as_expected([waiting], outputs)
    assert_all_free(engine)


def test_cancel_of_an_object_leaves_its_ids_next_request_alone() -> None:
    outputs = Outputs()
    engine = Engine(HashModel(VOCAB), config_of())
    first = request_of("a", [1], max_tokens=1)
    engine.submit(first, outputs)
    engine.step()
    again = request_of("a", [1], max_tokens=5, ignore_eos=True)
    engine.submit(again, Outputs())
    assert not engine.cancel(first)
    assert engine.num_live == 1
    assert engine.cancel(again)
    run(engine)
    assert_all_free(engine)


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


def test_a_late_cancel_does_not_hit_the_next_request_of_the_same_id() -> None:
    first, second = Outputs(), Outputs()
    model = HashModel(VOCAB)
    engine = Engine(model, config_of())
    engine.submit(request_of("a", [1], max_tokens=1), first)
    model.before_forward = lambda batch: engine.cancel("a")  # type: ignore[assignment]
    engine.step()
    model.before_forward = lambda batch: None
    again = request_of("a", [1], max_tokens=5)
    engine.submit(again, second)
    run(engine)
    assert first.last["a", 0].finish_reason is FinishReason.LENGTH
    assert_as_expected([again], second)


def test_a_deadline_ends_running_and_waiting_sequences() -> None:
    now = 100.0
    outputs = Outputs()
    engine = Engine(HashModel(VOCAB), config_of(max_num_seqs=1), clock=lambda: now)
    engine.submit(request_of("running", [1], ignore_eos=True, deadline=105.0), outputs)
    engine.submit(request_of("waiting", [1], deadline=103.0), outputs)
    later = request_of("later", [1], max_tokens=3, deadline=500.0)
    engine.submit(later, outputs)
    engine.step()
    now = 103.0
    engine.step()
    error = outputs.last["waiting", 0].error
    assert isinstance(error, DeadlineExceededError)
    assert error.fields["timeout_s"] == 3.0
    assert ("running", 0) not in outputs.last
    now = 105.5
    engine.step()
    assert isinstance(outputs.last["running", 0].error, DeadlineExceededError)
    assert len(outputs.tokens["running", 0]) == 2
    run(engine)
    assert_as_expected([later], outputs)
    assert_all_free(engine)


@pytest.mark.parametrize(
    ("raised", "seen"),
    [(GroupLostError("g1", "connection reset"), GroupLostError), (ValueError("x"), InternalError)],
)
def test_a_failing_step_fails_its_own_sequences_only(
    raised: Exception, seen: type[ExpertMeshError]
) -> None:
    outputs = Outputs()
    model = HashModel(VOCAB)
    engine = Engine(model, config_of(max_num_seqs=2))
    engine.submit(request_of("a", [1], ignore_eos=True), outputs)
    engine.submit(request_of("b", [1], ignore_eos=True), outputs)
    survivor = request_of("c", [1], max_tokens=5)
    engine.submit(survivor, outputs)
    engine.step()

    def fail(batch: Batch) -> None:
        raise raised

    model.before_forward = fail
    engine.step()
    model.before_forward = lambda batch: None
    for name in ("a", "b"):
        assert isinstance(outputs.last[name, 0].error, seen)
        assert len(outputs.tokens[name, 0]) == 1
    assert engine.stats().num_blocks_used == 0
    run(engine)
    assert_as_expected([survivor], outputs)
    assert_all_free(engine)


def test_logits_that_are_not_finite_fail_their_sequence_only() -> None:
    outputs = Outputs()
    model = HashModel(VOCAB)
    engine = Engine(model, config_of())
    others = [request_of(name, [1, 2], max_tokens=8, ignore_eos=True) for name in ("a", "c")]
    engine.submit(others[0], outputs)
    engine.submit(request_of("b", [7, 2, 9], max_tokens=8, ignore_eos=True), outputs)
    engine.submit(others[1], outputs)

    def poison(batch: Batch, logits: np.ndarray) -> None:
        positions = batch.positions.tolist()
        if sorted(positions) == [4, 4, 5]:  # "b" is one token longer than the others
            logits[positions.index(5), 4] = np.nan

    model.change_logits = poison
    run(engine)
    error = outputs.last["b", 0].error
    assert isinstance(error, NonFiniteError)
    assert error.fields["where"] == "logits of request b index 0 at position 6"
    assert len(outputs.tokens["b", 0]) == 3
    assert_as_expected(others, outputs)
    assert_all_free(engine)


def test_prompt_logits_that_are_not_finite_fail_their_sequence() -> None:
    outputs = Outputs()
    model = HashModel(VOCAB)
    engine = Engine(model, config_of())
    other = request_of("b", [1, 2], max_tokens=4)
    engine.submit(request_of("a", [1, 2, 4], prompt_logprobs=0), outputs)
    engine.submit(other, outputs)

    def poison(batch: Batch, logits: np.ndarray) -> None:
        if len(model.batches) == 1:
            logits[0, 0] = np.inf

    model.change_logits = poison
    run(engine)
    error = outputs.last["a", 0].error
    assert isinstance(error, NonFiniteError)
    assert "prompt logits of request a" in str(error)
    assert_as_expected([other], outputs)
    assert_all_free(engine)


def test_a_sink_that_fails_ends_only_its_own_request() -> None:
    outputs = Outputs()
    engine = Engine(HashModel(VOCAB), config_of())

    def broken(output: StepOutput) -> None:
        raise OSError("gone")

    engine.submit(request_of("a", [1], ignore_eos=True), broken)
    other = request_of("b", [1], max_tokens=6)
    engine.submit(other, outputs)
    run(engine)
    assert engine.stats().generation_tokens <= 6 + 2
    assert_as_expected([other], outputs)
    assert_all_free(engine)


# Numbers and time.


def test_timings_follow_the_clock() -> None:
    now = 0.0
    outputs = Outputs()
    model = HashModel(VOCAB)
    engine = Engine(model, config_of(max_num_seqs=1), clock=lambda: now)

    def second(batch: Batch) -> None:
        nonlocal now
        now += 1.0

    model.before_forward = second
    engine.submit(request_of("a", [1], max_tokens=3, ignore_eos=True), outputs)
    engine.submit(request_of("b", [1], max_tokens=2, ignore_eos=True), outputs)
    run(engine)
    # "a" has its tokens at 1, 2 and 3; "b" is admitted at 3 and has its tokens at 4 and 5.
    a, b = outputs.last["a", 0].timings, outputs.last["b", 0].timings
    assert a is not None
    assert b is not None
    assert (a.queued_s, a.prefill_s, a.decode_s, a.time_to_first_token_s) == (0.0, 1.0, 2.0, 1.0)
    assert (b.queued_s, b.prefill_s, b.decode_s, b.time_to_first_token_s) == (3.0, 1.0, 1.0, 4.0)
    assert engine.stats().step_s == 5.0


def test_stats_count_what_is_held_and_done() -> None:
    outputs = Outputs()
    model = HashModel(VOCAB)
    model.dispatch_s = 2.5
    engine = Engine(model, config_of(max_num_seqs=1, max_num_batched_tokens=3))
    engine.submit(request_of("a", [1] * 5, max_tokens=2, ignore_eos=True), outputs)
    engine.submit(request_of("b", [1] * 5, max_tokens=2, ignore_eos=True), outputs)
    assert engine.stats().num_waiting == 2
    engine.step()
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.steps) == (1, 1, 1)
    assert (stats.num_blocks_used, stats.num_state_slots_used) == (2, 1)
    assert (stats.prompt_tokens, stats.generation_tokens) == (3, 0)
    run(engine)
    stats = engine.stats()
    assert (stats.prompt_tokens, stats.generation_tokens) == (10, 4)
    assert stats.dispatch_s == 2.5
    assert outputs.progress["a", 0] == [3, 5]


# The thread.


class Waiter(Outputs):
    """Outputs that a test can wait for."""

    def __init__(self, num_sequences: int) -> None:
        super().__init__()
        self.num_sequences = num_sequences
        self.done = threading.Event()
        self.first = threading.Event()

    def __call__(self, output: StepOutput) -> None:
        super().__call__(output)
        self.first.set()
        if len(self.last) == self.num_sequences:
            self.done.set()


class CountingEngine(Engine):
    """Counts calls of `step`, with or without work."""

    calls = 0

    def step(self) -> bool:
        self.calls += 1
        return super().step()


def test_the_thread_serves_sleeps_when_idle_and_drains() -> None:
    engine = CountingEngine(HashModel(VOCAB), config_of())
    engine.start()
    for round_ in range(5):
        waiter = Waiter(3)
        requests = [request_of(f"{round_}-{i}", [i, 1], max_tokens=6) for i in range(3)]
        for request in requests:
            engine.submit(request, waiter)
        assert waiter.done.wait(30)
        assert_as_expected(requests, waiter)
    late = Waiter(1)
    request = request_of("late", [1], max_tokens=40, ignore_eos=True)
    engine.submit(request, late)
    engine.stop(drain=True)
    assert_as_expected([request], late)
    assert_all_free(engine)
    # A spinning engine would have made thousands of empty steps while the test thread worked.
    assert engine.calls <= engine.stats().steps + 6 * 3
    with pytest.raises(EngineStoppedError):
        engine.submit(request_of("x", [1]), late)
    engine.stop()


def test_a_draining_engine_refuses_and_finishes() -> None:
    outputs = Outputs()
    engine = Engine(HashModel(VOCAB), config_of())
    request = request_of("a", [1], max_tokens=5)
    engine.submit(request, outputs)
    engine.drain()
    with pytest.raises(DrainingError):
        engine.submit(request_of("b", [1]), outputs)
    run(engine)
    assert_as_expected([request], outputs)


def test_stop_without_drain_ends_live_requests_with_an_error() -> None:
    model = HashModel(VOCAB)
    inside, go_on = threading.Event(), threading.Event()

    def wait(batch: Batch) -> None:
        inside.set()
        assert go_on.wait(30)

    model.before_forward = wait
    engine = Engine(model, config_of(max_num_seqs=1))
    engine.start()
    waiter = Waiter(2)
    engine.submit(request_of("running", [1], ignore_eos=True), waiter)
    engine.submit(request_of("waiting", [1]), waiter)
    assert inside.wait(30)
    stopper = threading.Thread(target=engine.stop, kwargs={"drain": False})
    stopper.start()
    go_on.set()
    stopper.join(30)
    for name in ("running", "waiting"):
        assert isinstance(waiter.last[name, 0].error, EngineStoppedError)
    assert_all_free(engine)


def test_an_engine_that_breaks_fails_every_request_and_refuses_new_ones() -> None:
    engine = Engine(HashModel(VOCAB), config_of())

    def broken(now: float) -> Any:
        raise RuntimeError("a bug")

    engine._scheduler.schedule = broken  # type: ignore[method-assign]
    engine.start()
    waiter = Waiter(1)
    engine.submit(request_of("a", [1]), waiter)
    assert waiter.done.wait(30)
    error = waiter.last["a", 0].error
    assert isinstance(error, InternalError)
    assert "RuntimeError: a bug" in str(error)
    with pytest.raises(EngineStoppedError):
        engine.submit(request_of("b", [1]), waiter)
    engine.stop()


def test_outputs_of_a_step_can_be_delivered_at_once() -> None:
    calls: list[int] = []
    outputs = Outputs()

    def deliver(pairs: list[Any]) -> None:
        calls.append(len(pairs))
        for sink, output in pairs:
            sink(output)

    engine = Engine(HashModel(VOCAB), config_of(), deliver=deliver)
    requests = [request_of(f"r{i}", [i], max_tokens=4, ignore_eos=True) for i in range(3)]
    for request in requests:
        engine.submit(request, outputs)
    run(engine)
    assert calls == [3, 3, 3, 3]
    assert_as_expected(requests, outputs)
