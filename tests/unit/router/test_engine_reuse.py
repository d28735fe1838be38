"""Prefixes that are reused: the same tokens as if nothing were, and nothing lost or kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from protos.errors import GroupLostError, NonFiniteError
from router.engine.batch import Batch
from router.engine.config import EngineConfig
from router.engine.engine import Engine
from router.engine.request import EngineRequest
from tests.unit.router.engine_harness import (
    VOCAB,
    Outputs,
    assert_all_free,
    assert_as_expected,
    config_of,
    request_of,
    run,
)
from tests.unit.router.hash_model import ReusingHashModel

LENGTH = 700


def reusing(**options: Any) -> EngineConfig:
    sizes = {
        "max_model_len": LENGTH,
        "num_blocks": 200,
        "block_size": 16,
        "max_num_batched_tokens": 300,
        "decode_snapshot_interval": 128,
    }
    return config_of(**(sizes | options))


def tokens_of(seed: int, count: int) -> list[int]:
    """Random prompt tokens; the same seed gives the same beginning at every length."""
    return np.random.default_rng(seed).integers(4, VOCAB, LENGTH)[:count].tolist()


def assert_consistent(engine: Engine) -> None:
    """Nobody uses anything, and the cache's blocks and the free ones are all blocks."""
    assert_all_free(engine)
    reuse = engine._reuse
    assert reuse is not None
    cache = reuse.cache
    assert all(entry.num_users == 0 for entry in cache._entries.values())
    assert set(cache._unused) == set(cache._entries.values())
    cached = [block for entry in cache._entries.values() for block in entry.blocks]
    assert sorted(cached + engine._blocks._free) == list(range(engine.config.num_blocks))
    assert cache.snapshot_bytes == sum(
        kept.snapshot.num_bytes for kept in cache._snapshots.values()
    )
    standing = [k for tails in cache._standing.values() for keys in tails.values() for k in keys]
    assert sorted(standing) == sorted(cache._snapshots)
    assert not reuse._expected
    assert reuse._num_writing == 0


def one(engine: Engine, request: EngineRequest) -> Outputs:
    outputs = Outputs()
    engine.submit(request, outputs)
    run(engine)
    assert_as_expected([request], outputs, engine.config.max_model_len)
    return outputs


def cached(outputs: Outputs, request_id: str, index: int = 0) -> int:
    return outputs.cached[request_id, index]


# What is found.


def test_the_next_turn_starts_where_the_last_one_ended() -> None:
    engine = Engine(ReusingHashModel(VOCAB), reusing(decode_snapshot_interval=0))
    first = request_of("a", tokens_of(1, 200), max_tokens=61, ignore_eos=True)
    answer = one(engine, first).tokens["a", 0]
    history = first.prompt_ids + answer
    second = request_of("b", [*history, *tokens_of(2, 50)], max_tokens=5, ignore_eos=True)
    outputs = one(engine, second)
    assert cached(outputs, "b") == 260  # all but the last token, which was never computed
    stats = engine.stats()
    assert stats.prompt_tokens == 200 + 51
    assert stats.reuse.hit_tokens == 260
    # Prompt end at 200; turn end at 260; prompt end at 311. The turn's end at 315 saves too little.
    assert stats.reuse.snapshots == 3
    assert_consistent(engine)


def test_another_answer_to_the_same_turn_starts_at_the_prompts_end() -> None:
    engine = Engine(ReusingHashModel(VOCAB), reusing())
    one(engine, request_of("a", tokens_of(1, 200), max_tokens=90, ignore_eos=True))
    again = request_of("b", [*tokens_of(1, 200), 7, 8, 9], max_tokens=5)
    assert cached(one(engine, again), "b") == 200
    assert_consistent(engine)


def test_kv_without_a_snapshot_is_no_hit_but_becomes_one() -> None:
    """256 shared tokens: the second sighting leaves a snapshot there, the third finds it."""
    engine = Engine(ReusingHashModel(VOCAB), reusing())
    shared = tokens_of(1, 256)
    hits = []
    for i in range(3):
        request = request_of(str(i), shared + tokens_of(10 + i, 100), max_tokens=2)
        hits.append(cached(one(engine, request), str(i)))
    assert hits == [0, 0, 256]
    assert engine.stats().reuse.lost_tokens == 256
    assert_consistent(engine)


def test_a_junction_is_found_at_the_second_sighting() -> None:
    engine = Engine(ReusingHashModel(VOCAB), reusing())
    shared = tokens_of(1, 300)
    hits = []
    for i in range(3):
        prompt = shared + tokens_of(10 + i, 100)
        request = request_of(str(i), prompt, max_tokens=2, junctions=(300,))
        hits.append(cached(one(engine, request), str(i)))
    assert hits == [0, 256, 256]
    assert engine.stats().reuse.lost_tokens == 0
    assert_consistent(engine)


def test_a_long_prefill_leaves_snapshots_on_its_way() -> None:
    engine = Engine(ReusingHashModel(VOCAB), reusing(snapshot_interval=128))
    one(engine, request_of("a", tokens_of(1, 600), max_tokens=1))
    for shared in (500, 129, 128, 127, 300):
        name = str(shared)
        request = request_of(name, tokens_of(1, shared) + [5] * 40, max_tokens=2)
        assert cached(one(engine, request), name) == shared - shared % 128
    assert_consistent(engine)


def test_a_long_answer_leaves_snapshots_on_its_way() -> None:
    engine = Engine(ReusingHashModel(VOCAB), reusing(min_snapshot_gain=500))
    first = request_of("a", tokens_of(1, 20), max_tokens=400, ignore_eos=True)
    answer = one(engine, first).tokens["a", 0]
    assert engine.stats().reuse.snapshots == 0
    engine = Engine(ReusingHashModel(VOCAB), reusing())
    one(engine, first)
    fork = request_of("b", first.prompt_ids + answer[:300] + [9] * 30, max_tokens=2)
    assert cached(one(engine, fork), "b") == 256
    assert_consistent(engine)


def test_namespaces_share_nothing() -> None:
    engine = Engine(ReusingHashModel(VOCAB), reusing())
    prompt = tokens_of(1, 300)
    for i, namespace in enumerate(["", "x", "y", "x"]):
        request = request_of(str(i), [*prompt, 5], namespace=namespace, max_tokens=2)
        one(engine, request_of(f"p{i}", prompt, namespace=namespace, max_tokens=2))
        assert cached(one(engine, request), str(i)) == 300
    stats = engine.stats().reuse
    # "p3" is the prompt of "p1" again: its last token must be computed, so 300 is too far.
    assert (stats.hit_tokens, stats.lost_tokens) == (4 * 300, 256)
    assert_consistent(engine)


# Sharing.


@pytest.mark.parametrize("n", [2, 5])
def test_the_sequences_of_a_request_share_its_prompt(n: int) -> None:
    model = ReusingHashModel(VOCAB)
    engine = Engine(model, reusing(max_num_batched_tokens=4000))
    request = request_of("a", tokens_of(1, 300), n=n, max_tokens=20, temperature=1.0)
    outputs = one(engine, request)
    assert [cached(outputs, "a", i) for i in range(n)] == [0] + [299] * (n - 1)
    # 299 prompt tokens once, then the last one n times, in two steps.
    assert model.batches[0] == (299, 1)
    assert sum(tokens for tokens, _ in model.batches[:4]) < 299 + 4 * n
    assert_consistent(engine)


def test_requests_that_come_at_once_share_a_junction() -> None:
    """Four prompts with 256 common tokens: the first prefills them, the others wait for it, though
    there is room for all in one step."""
    engine = Engine(ReusingHashModel(VOCAB), reusing(max_num_batched_tokens=4000))
    outputs = Outputs()
    requests = [
        request_of(str(i), tokens_of(1, 256) + tokens_of(10 + i, 60), junctions=(256,))
        for i in range(4)
    ]
    for request in requests:
        engine.submit(request, outputs)
    engine.step()
    engine.step()
    assert engine.stats().num_blocks_used <= 20 + 3 * 4 + 4
    run(engine)
    assert_as_expected(requests, outputs, LENGTH)
    assert [cached(outputs, str(i)) for i in range(4)] == [0, 256, 256, 256]
    assert_consistent(engine)


def test_a_cancelled_leader_leaves_the_prompt_to_the_next() -> None:
    engine = Engine(ReusingHashModel(VOCAB), reusing(max_num_batched_tokens=64))
    outputs = Outputs()
    requests = [
        request_of(name, [*tokens_of(1, 256), i], junctions=(256,), max_tokens=3)
        for i, name in enumerate("abc")
    ]
    for request in requests:
        engine.submit(request, outputs)
    engine.step()
    engine.cancel("a")
    run(engine)
    assert_as_expected(requests[1:], outputs, LENGTH)
    assert [cached(outputs, name) for name in "bc"] == [64, 256]  # "a" left what it had computed
    assert_consistent(engine)


def test_blocks_computed_twice_are_kept_once() -> None:
    """Two prompts without a junction, side by side."""
    engine = Engine(ReusingHashModel(VOCAB), reusing(max_num_batched_tokens=700))
    outputs = Outputs()
    requests = [
        request_of(name, [*tokens_of(1, 290), i], max_tokens=150, ignore_eos=True)
        for i, name in enumerate("ab")
    ]
    for request in requests:
        engine.submit(request, outputs)
    engine.step()
    assert engine.stats().num_blocks_used == 16 + 2 * 3
    run(engine)
    assert_as_expected(requests, outputs, LENGTH)
    assert_consistent(engine)


# Pressure.


def test_what_nobody_uses_gives_way_and_changes_no_token() -> None:
    """60 blocks of 16: three sequences of 20 blocks; the cache is given up again and again."""
    engine = Engine(ReusingHashModel(VOCAB), reusing(num_blocks=60, snapshot_interval=128))
    for round_ in range(3):
        for seed in range(6):
            prompt = tokens_of(seed, 260)
            one(engine, request_of(f"{round_}-{seed}", prompt, max_tokens=40, ignore_eos=True))
            assert_consistent(engine)
    assert engine.stats().reuse.evicted_blocks > 100
    assert engine.stats().preemptions == 0


def test_a_preempted_sequence_goes_on_from_what_is_left() -> None:
    model = ReusingHashModel(VOCAB)
    engine = Engine(model, reusing(num_blocks=80, snapshot_interval=128))
    outputs = Outputs()
    requests = [
        request_of(str(i), tokens_of(i, 250), max_tokens=220, ignore_eos=True) for i in range(3)
    ]
    for request in requests:
        engine.submit(request, outputs)
    run(engine)
    stats = engine.stats()
    assert stats.preemptions >= 1
    assert stats.reuse.hit_tokens > 0
    assert stats.prompt_tokens == 3 * 250
    assert_as_expected(requests, outputs, LENGTH)
    assert_consistent(engine)


def test_the_budget_of_snapshots_holds() -> None:
    # A block and a state: 1024 + 8 bytes. A snapshot is 8 bytes and 8 a token of its tail.
    engine = Engine(ReusingHashModel(VOCAB), reusing(max_snapshot_bytes=1032))
    for seed in range(20):
        one(engine, request_of(str(seed), tokens_of(seed, 190), max_tokens=40, ignore_eos=True))
        assert engine.stats().reuse.num_snapshot_bytes <= 1032
        assert_consistent(engine)
    assert engine.stats().reuse.evicted_snapshots > 10


@pytest.mark.parametrize(
    "options",
    [{"prefix_caching": False}, {"block_size": 24}, {"max_snapshot_bytes": 1031}],
    ids=str,
)
def test_without_reuse_everything_is_computed(options: dict[str, Any]) -> None:
    engine = Engine(ReusingHashModel(VOCAB), reusing(**options))
    for name in "ab":
        outputs = one(engine, request_of(name, tokens_of(1, 290), n=2, max_tokens=9))
        assert cached(outputs, name) == 0
    assert not engine.stats().reuse.is_on
    assert engine.stats().prompt_tokens == 4 * 290
    assert_all_free(engine)


# Failures.


def test_values_of_a_sequence_with_broken_logits_are_not_found() -> None:
    model = ReusingHashModel(VOCAB)
    engine = Engine(model, reusing())
    outputs = Outputs()
    prompt = tokens_of(1, 300)
    engine.submit(request_of("a", prompt, max_tokens=9, ignore_eos=True), outputs)
    engine.step()

    def poison(batch: Batch, logits: np.ndarray) -> None:
        logits[0, 0] = np.nan

    model.change_logits = poison
    run(engine)
    model.change_logits = lambda batch, logits: None
    assert isinstance(outputs.last["a", 0].error, NonFiniteError)
    assert engine.stats().reuse.num_blocks == 0
    assert cached(one(engine, request_of("b", [*prompt, 1], max_tokens=3)), "b") == 0
    assert_consistent(engine)


def test_a_failed_step_leaves_only_what_was_computed_before_it() -> None:
    model = ReusingHashModel(VOCAB)
    engine = Engine(model, reusing(max_num_batched_tokens=160, snapshot_interval=128))
    outputs = Outputs()
    prompt = tokens_of(1, 400)
    engine.submit(request_of("a", prompt, max_tokens=9), outputs)
    engine.step()

    def fail(batch: Batch) -> None:
        raise GroupLostError("g0")

    model.before_forward = fail
    engine.step()
    model.before_forward = lambda batch: None
    assert isinstance(outputs.last["a", 0].error, GroupLostError)
    assert cached(one(engine, request_of("b", prompt, max_tokens=3)), "b") == 128
    assert_consistent(engine)
