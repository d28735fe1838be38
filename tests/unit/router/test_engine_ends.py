"""What the engine refuses, and what ends a request early."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from protos.errors import (
    ConfigurationError,
    ContextLengthExceededError,
    DeadlineExceededError,
    DuplicateRequestError,
    ExpertMeshError,
    GroupLostError,
    InternalError,
    InvalidFieldError,
    NonFiniteError,
    QueueFullError,
    ResourceError,
)
from router.engine.batch import Batch
from router.engine.engine import Engine
from router.engine.request import FinishReason, StepOutput
from tests.unit.router.engine_harness import (
    MAX_MODEL_LEN,
    VOCAB,
    Outputs,
    assert_all_free,
    assert_as_expected,
    config_of,
    request_of,
    run,
)
from tests.unit.router.hash_model import HashModel

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
