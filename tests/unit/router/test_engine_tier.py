"""The engine with a tier behind its pool: what another router computed, it need not compute."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protos.errors import DeadlineExceededError
from router.engine.engine import Engine
from router.engine.request import (
    EngineRequest,
    FinishReason,
    Priority,
    SessionHint,
    StepOutput,
)
from router.engine.tier import Probe, ProbeResult, TtlClass
from tests.unit.router.engine_harness import (
    VOCAB,
    Outputs,
    assert_as_expected,
    expected_of,
    request_of,
)
from tests.unit.router.hash_model import ReusingHashModel
from tests.unit.router.memory_tier import MemoryTier, run_with
from tests.unit.router.test_engine_reuse import LENGTH, assert_consistent, reusing, tokens_of

PROMPT = tokens_of(1, 400)


def engine_of(tier: MemoryTier, **options: Any) -> Engine:
    clock = options.pop("clock", lambda: 0.0)
    config = reusing(snapshot_interval=128, **options)
    return Engine(ReusingHashModel(VOCAB), config, tier=tier, clock=clock)


def one(tier: MemoryTier, engine: Engine, request: EngineRequest) -> int:
    """Run a request alone; return the tokens that were not computed."""
    outputs = Outputs()
    engine.submit(request, outputs)
    run_with(tier, engine)
    assert_as_expected([request], outputs, engine.config.max_model_len)
    assert_consistent(engine)
    return outputs.cached[request.request_id, 0]


def filled(**options: Any) -> MemoryTier:
    """A tier that holds what `PROMPT` and 100 tokens behind it have left."""
    tier = MemoryTier()
    request = request_of("first", PROMPT, max_tokens=100, ignore_eos=True, **options)
    one(tier, engine_of(tier), request)
    return tier


def test_another_router_goes_on_where_the_first_one_stopped() -> None:
    told: list[tuple[int, bytes]] = []
    hint = SessionHint(on_snapshot=lambda position, key: told.append((position, key)))
    tier = filled(session=hint)
    assert [position for position, _ in told] == [128, 256, 384, 499]
    history = (
        PROMPT
        + expected_of(request_of("", PROMPT, max_tokens=99, ignore_eos=True), 0, LENGTH).tokens
    )
    other = engine_of(tier)
    positions = tuple(position for position, _ in told)
    request = request_of(
        "second", [*history, 5, 6], max_tokens=9, session=SessionHint(snapshot_positions=positions)
    )
    assert one(tier, other, request) == 499
    stats = other.stats()
    assert (stats.reuse.restored_tokens, stats.reuse.hit_tokens) == (499, 0)
    assert stats.prompt_tokens == 501 - 499
    assert len(tier.loads) == 1
    # What was loaded is the pool's own now.
    assert one(tier, other, request_of("third", [*history, 7], max_tokens=9)) == 499
    assert len(tier.loads) == 1


def test_without_a_session_multiples_of_128_are_found() -> None:
    tier = filled()
    assert one(tier, engine_of(tier), request_of("b", [*PROMPT, 5], max_tokens=3)) == 384


def beside_a_batch(tier: MemoryTier) -> tuple[Engine, Outputs]:
    """An engine in the midst of a batch sequence, and an interactive request that just came."""
    engine, outputs = engine_of(tier), Outputs()
    rows = request_of(
        "row", tokens_of(2, 300), max_tokens=50, ignore_eos=True, priority=Priority.BATCH
    )
    engine.submit(rows, outputs)
    while not outputs.tokens["row", 0]:
        engine.step()
        tier.pump()
    engine.submit(request_of("person", tokens_of(3, 300), max_tokens=3), outputs)
    return engine, outputs


def test_the_tier_answers_before_a_step_of_batch_work(monkeypatch: pytest.MonkeyPatch) -> None:
    class NearTier(MemoryTier):
        def probe(self, query: Probe, done: Callable[[ProbeResult], None]) -> None:
            super().probe(query, done)
            threading.Timer(0.05, self.pump).start()  # the step is about to begin by then

    monkeypatch.setattr("router.engine.core.PROBE_WAIT_S", 60.0)
    engine, outputs = beside_a_batch(NearTier())
    row_tokens = len(outputs.tokens["row", 0])
    engine.step()
    assert outputs.progress["person", 0], "its prompt is in the very next step"
    assert len(outputs.tokens["row", 0]) == row_tokens, "without the batch"
    engine.stop()


def test_a_tier_that_does_not_answer_holds_up_a_batch_for_a_moment() -> None:
    tier = MemoryTier()
    engine, outputs = beside_a_batch(tier)
    row_tokens = len(outputs.tokens["row", 0])
    assert engine.step()
    assert engine.step()
    assert len(outputs.tokens["row", 0]) == row_tokens + 2
    assert not outputs.progress["person", 0]
    run_with(tier, engine)
    assert outputs.last["person", 0].finish_reason is not None


def test_the_pool_comes_first() -> None:
    """250 tokens are here, 384 there: only what lies behind 250 is loaded."""
    tier = filled()
    other = engine_of(tier)
    tier.decision = "prefill"
    assert one(tier, other, request_of("b", PROMPT[:250], max_tokens=3)) == 0
    tier.decision = "load"
    assert one(tier, other, request_of("c", [*PROMPT, 5], max_tokens=3)) == 384
    job = tier.loads[-1]
    assert (job.start, job.num_tokens) == (250, 384)
    assert other.stats().reuse.restored_tokens == 384 - 250


def test_a_short_prompt_is_not_probed() -> None:
    tier = filled()
    probed = len(tier.probes)
    assert one(tier, engine_of(tier), request_of("b", PROMPT[:128], max_tokens=3)) == 0
    assert len(tier.probes) == probed


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_a_load_that_fails_leaves_the_prefill(kept: int) -> None:
    tier = filled()
    other = engine_of(tier)
    tier.blocks_until_failure = kept
    assert one(tier, other, request_of("b", [*PROMPT, 5], max_tokens=30)) == 0
    assert tier.results[-1].error == "cut off"
    assert other.stats().reuse.restored_tokens == 0


def test_a_load_that_fails_goes_on_from_the_pool() -> None:
    """State and tail of the pool's 250 tokens are overwritten by the load, and come back."""
    tier = filled()
    other = engine_of(tier)
    tier.decision = "prefill"
    one(tier, other, request_of("b", PROMPT[:250], max_tokens=3))
    tier.decision, tier.blocks_until_failure = "load", 1
    assert one(tier, other, request_of("c", [*PROMPT, 5], max_tokens=30)) == 250
    assert tier.results[-1].error == "cut off"


def test_values_that_have_gone_are_recomputed() -> None:
    tier = filled()
    other = engine_of(tier)
    outputs = Outputs()
    request = request_of("b", [*PROMPT, 5], max_tokens=30)
    other.submit(request, outputs)
    other.step()
    tier.pump()  # probed: 384
    chain = tier.probes[-1].chain
    del tier.snapshots[chain.position_hash(384)]
    run_with(tier, other)
    assert outputs.cached["b", 0] == 256  # the next lower one that is complete
    assert_as_expected([request], outputs, LENGTH)
    assert_consistent(other)


def test_decoding_goes_on_while_another_sequence_is_restored() -> None:
    tier = filled()
    other = engine_of(tier)
    outputs = Outputs()
    decoding = request_of("a", [1, 2], max_tokens=40, ignore_eos=True)
    restored = request_of("b", [*PROMPT, 5], max_tokens=5)
    other.submit(decoding, outputs)
    other.step()
    other.submit(restored, outputs)
    for _ in range(5):
        assert other.step()
    tier.pump()
    for _ in range(5):
        assert other.step()
    assert len(outputs.tokens["a", 0]) == 11
    assert other.stats().num_running == 2  # the restored one owns blocks and slot already
    assert other.stats().reuse.num_restoring == 1
    assert not outputs.tokens["b", 0]
    run_with(tier, other)
    assert_as_expected([decoding, restored], outputs, LENGTH)
    assert_consistent(other)


@pytest.mark.parametrize(("budget", "stride"), [(300, 1), (40, 11)])
def test_a_turn_goes_on_elsewhere_at_every_token(budget: int, stride: int) -> None:
    """What a router's death asks for: the other one gets the tokens drawn so far as forced ones and
    whatever the tier holds, and its tokens are those of the undisturbed run."""
    options: dict[str, Any] = {
        "max_tokens": 60,
        "min_tokens": 45,
        "stop_token_ids": (9, 11),
        "temperature": 0.9,
        "seed": 11,
        "repetition_penalty": 1.3,
        "frequency_penalty": 0.4,
        "presence_penalty": 0.2,
        "session": SessionHint(snapshot_positions=(240,)),
    }
    prompt = tokens_of(4, 240)
    whole = request_of("whole", prompt, **options)
    expected = expected_of(whole, 0, LENGTH)
    assert len(expected.tokens) >= 45
    for cut in range(0, len(expected.tokens), stride):
        tier, seen = MemoryTier(), Outputs()
        first = engine_of(tier, max_num_batched_tokens=budget)
        first.submit(whole, seen)
        while len(seen.tokens["whole", 0]) < cut:
            first.step()
            tier.pump()
        # Here the first router is gone.
        forced = tuple(seen.tokens["whole", 0])
        assert len(forced) == cut
        other, rest = engine_of(tier, max_num_batched_tokens=budget), Outputs()
        other.submit(request_of("rest", prompt, forced_ids=forced, **options), rest)
        run_with(tier, other)
        assert rest.tokens["rest", 0] == expected.tokens[cut:], f"cut at {cut}"
        assert rest.last["rest", 0].finish_reason is expected.reason
        assert rest.cached["rest", 0] >= (240 if cut > 2 else 0)
        assert_consistent(other)


# Ends at every moment.


@pytest.mark.parametrize("when", ["probing", "waiting", "loading"])
def test_cancel_answers_at_once_and_frees_when_the_tier_lets_go(when: str) -> None:
    tier = filled()
    other = engine_of(tier)
    outputs = Outputs()
    other.submit(request_of("b", [*PROMPT, 5], max_tokens=5), outputs)
    if when != "waiting":
        other.step()
    if when == "loading":
        tier.pump()
        other.step()
        assert other.stats().num_blocks_used == 26
    other.cancel("b")
    other.step()
    assert outputs.last["b", 0].finish_reason is FinishReason.CANCELLED
    assert other.num_live == 0
    # The loader may still write: blocks and slot stay until it says that it is done.
    assert other.stats().num_blocks_used == (26 if when == "loading" else 0)
    assert other.stats().num_state_slots_used == (1 if when == "loading" else 0)
    run_with(tier, other)
    assert not tier.results or tier.results[-1].error == "cancelled"
    assert_consistent(other)


@pytest.mark.parametrize("is_loading", [False, True])
def test_a_deadline_ends_a_sequence_that_waits_for_the_tier(is_loading: bool) -> None:
    now = 0.0
    tier = filled()
    other = engine_of(tier, clock=lambda: now)
    outputs = Outputs()
    other.submit(request_of("b", [*PROMPT, 5], deadline=3.0), outputs)
    other.step()
    if is_loading:
        tier.pump()
        now = 2.9
        other.step()
        assert tier.loads[-1].deadline_s == pytest.approx(0.1)  # what the client has left
    now = 3.0
    other.step()
    assert isinstance(outputs.last["b", 0].error, DeadlineExceededError)
    run_with(tier, other)
    assert_consistent(other)


# Writing.


def test_junctions_live_longer() -> None:
    tier = filled(junctions=(300,))
    classes = list(tier.classes.values())
    # Blocks 0 and 1 and the snapshots at 128 and 256, under the same two names.
    assert classes.count(TtlClass.SHARED) == 2
    assert classes.count(TtlClass.SESSION) == len(classes) - 2


def test_short_turns_are_uploaded_every_128_tokens() -> None:
    """Turns of 50 tokens: each leaves a snapshot here, each third one in the tier."""
    tier = MemoryTier()
    engine = Engine(ReusingHashModel(VOCAB), reusing(decode_snapshot_interval=0), tier=tier)
    history: list[int] = []
    for turn in range(8):
        history += tokens_of(100 + turn, 50)
        assert one(tier, engine, request_of(str(turn), history, max_tokens=1)) == 50 * turn
    assert sorted(s.num_tokens for s in tier.snapshots.values()) == [150, 300]


def test_a_tier_that_takes_nothing_costs_nothing() -> None:
    tier = MemoryTier()
    tier.takes_values = False
    engine = engine_of(tier)
    one(tier, engine, request_of("a", PROMPT, max_tokens=100, ignore_eos=True))
    assert engine.stats().reuse.skipped_writes == 3 + 4
    assert not tier.blocks


def test_what_is_being_written_is_neither_given_up_nor_most_of_the_pool() -> None:
    """64 blocks: at most two cache blocks of 8 wait for a tier that is slow to write."""
    tier = MemoryTier()
    tier.is_writing = False
    engine = engine_of(tier, num_blocks=64)
    outputs = Outputs()
    requests = [
        request_of(str(i), tokens_of(i, 300), max_tokens=20, ignore_eos=True) for i in range(4)
    ]
    for request in requests:
        engine.submit(request, outputs)
    run_with(tier, engine)
    assert_as_expected(requests, outputs, LENGTH)
    stats = engine.stats()
    assert stats.reuse.num_writing_blocks == stats.num_blocks_used == 16
    assert stats.reuse.evicted_blocks > 0
    assert stats.reuse.skipped_writes == 4 * 2 - 2
    tier.is_writing = True
    run_with(tier, engine)  # the tier asserts that the bytes are still those of their tokens
    assert len(tier.blocks) == 2
    assert_consistent(engine)


def test_an_engine_without_room_sleeps_until_the_tier_lets_go() -> None:
    """The blocks of a write are all that a sequence lacks; the thread neither fails nor spins."""
    tier = MemoryTier()
    tier.is_writing = False
    engine = engine_of(tier, num_blocks=32)
    done = threading.Event()
    outputs = Outputs()

    def sink(output: StepOutput) -> None:
        outputs(output)
        if output.is_last:
            done.set()

    engine.submit(request_of("a", tokens_of(1, 200), max_tokens=2, ignore_eos=True), outputs)
    run_with(tier, engine)
    assert engine.stats().num_blocks_used == 8
    whole = request_of("b", tokens_of(2, 440), max_tokens=60, ignore_eos=True)  # 32 blocks
    engine.submit(whole, sink)
    engine.step()
    tier.pump()  # the probe
    calls = 0
    step = engine.step

    def counted() -> bool:
        nonlocal calls
        calls += 1
        return step()

    engine.step = counted  # type: ignore[method-assign]
    engine.start()
    tier.is_writing = True
    assert not done.is_set()
    tier.pump()
    assert done.wait(30)
    engine.stop()
    assert calls <= engine.stats().steps + 10
    assert_as_expected([whole], outputs, LENGTH)


TRACE = st.lists(
    st.one_of(
        st.tuples(
            st.just("submit"),
            st.integers(0, 3),
            st.integers(1, 420),
            st.integers(0, 5),
            st.integers(1, 60),
        ),
        st.tuples(st.just("cancel"), st.integers(0, 20)),
        st.tuples(st.just("step"), st.integers(0, 1), st.integers(1, 30)),
        st.tuples(st.just("pump"), st.booleans()),
        st.tuples(st.just("lose"), st.integers(0, 9)),
        st.tuples(st.just("break"), st.sampled_from([None, 0, 1])),
        st.tuples(st.just("drop"), st.booleans()),
    ),
    min_size=5,
    max_size=40,
)


@settings(max_examples=40, deadline=None)
@given(trace=TRACE, num_blocks=st.integers(50, 120), budget=st.integers(150, 600))
def test_any_trace_over_two_routers_changes_no_token_and_leaks_nothing(
    trace: list[tuple[Any, ...]], num_blocks: int, budget: int
) -> None:
    """Four prefixes of any length with any tail, cancelled at any moment, under pressure, with a
    tier that loses, fails, refuses and lags."""
    tier = MemoryTier()
    engines = [
        engine_of(tier, num_blocks=num_blocks, max_num_batched_tokens=budget, num_state_slots=3)
        for _ in range(2)
    ]
    outputs = Outputs()
    requests: list[EngineRequest] = []
    for move in trace:
        if move[0] == "submit":
            _, seed, length, tail, max_tokens = move
            request = request_of(
                f"r{len(requests)}",
                [*tokens_of(seed, length), *range(5, 5 + tail)],
                max_tokens=max_tokens,
                n=1 + (length % 3 == 0),
                temperature=0.7 * (tail % 2),
                junctions=(length // 2,) if tail > 2 else (),
                prompt_logprobs=0 if tail == 4 else None,
            )
            engines[len(requests) % 2].submit(request, outputs)
            requests.append(request)
        elif move[0] == "cancel":
            for engine in engines:
                engine.cancel(f"r{move[1]}")
        elif move[0] == "step":
            for _ in range(move[2]):
                engines[move[1]].step()
        elif move[0] == "pump":
            tier.is_writing = move[1]
            tier.pump()
        elif move[0] == "lose":
            for key in list(tier.blocks)[move[1] :: 10]:
                del tier.blocks[key]
        elif move[0] == "break":
            tier.blocks_until_failure = move[1]
        else:
            tier.takes_values = not move[1]
    tier.is_writing = True
    run_with(tier, *engines)
    for engine in engines:
        assert_consistent(engine)
    for request in requests:
        for index in range(request.sampling.n):
            key = (request.request_id, index)
            whole = expected_of(request, index, LENGTH).tokens
            if outputs.last[key].finish_reason is FinishReason.CANCELLED:
                assert outputs.tokens[key] == whole[: len(outputs.tokens[key])]
            else:
                assert outputs.last[key].error is None
                assert outputs.tokens[key] == whole
