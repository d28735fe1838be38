"""The engine's thread with the real tier on real servers."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from router.engine.engine import Engine
from router.engine.request import EngineRequest, FinishReason, SessionHint
from router.state.loader import LoaderSettings
from router.state.restore import ValueSizes
from router.state.tier import BlobTier, TierSettings
from tests.eventually import eventually
from tests.unit.router.engine_harness import VOCAB, expected_of, request_of
from tests.unit.router.hash_model import HashCacheIo, ReusingHashModel
from tests.unit.router.test_engine_reuse import LENGTH, assert_consistent, reusing, tokens_of
from tests.unit.router.test_engine_thread import Waiter
from tests.unit.state.blob_servers import KINDS, BlobServer, blob_server, tier_of

SIZES = ValueSizes(block_bytes=HashCacheIo.kv_block_bytes, state_bytes=HashCacheIo.state_bytes)
PATIENT = TierSettings(probe_s=20.0, loader=LoaderSettings(min_load_s=20.0))
"""Shared cores: no test depends on how fast they are."""


@pytest.fixture(params=KINDS)
def servers(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[list[BlobServer]]:
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(blob_server(request.param, tmp_path, name=name))
            for name in ("one", "two")
        ]


class Router:
    """An engine, its thread and its tier. No prefill is noted, so that a load always pays."""

    def __init__(
        self, servers: list[BlobServer], settings: TierSettings = PATIENT, interval: int = 128
    ) -> None:
        self.tier: BlobTier = tier_of(*servers, settings=settings, sizes=SIZES, io_s=2.0)
        self.tier.note_prefill = lambda *_: None  # type: ignore[method-assign]
        config = reusing(
            snapshot_interval=interval,
            decode_snapshot_interval=interval,
            min_load_timeout_s=settings.loader.min_load_s,
        )
        self.engine = Engine(ReusingHashModel(VOCAB), config, tier=self.tier)
        self.engine.start()

    def answer(self, request: EngineRequest) -> Waiter:
        waiter = Waiter(request.sampling.n)
        self.engine.submit(request, waiter)
        assert waiter.done.wait(60)
        return waiter

    def close(self) -> None:
        """End it, with nothing left in use once all writes are done."""
        eventually(lambda: self.engine.stats().reuse.num_writing_blocks == 0, timeout_s=20)
        eventually(lambda: self.engine.stats().reuse.num_restoring == 0, timeout_s=20)
        self.engine.stop()
        self.tier.close()
        assert_consistent(self.engine)


def test_a_conversation_moves_from_router_to_router(servers: list[BlobServer]) -> None:
    """Six turns, each on a fresh router that is told only where snapshots are."""
    history = tokens_of(3, 150)
    stored: list[int] = []
    for turn in range(6):
        router = Router(servers, interval=0)
        restorable = max(stored, default=0)
        ends = [len(history), len(history) + 39]  # of prompt and turn
        hint = SessionHint(
            snapshot_positions=tuple(stored),
            on_snapshot=lambda position, _: stored.append(position),
        )
        request = request_of("r", history, max_tokens=40, ignore_eos=True, session=hint)
        waiter = router.answer(request)
        assert waiter.tokens["r", 0] == expected_of(request, 0, LENGTH).tokens
        assert waiter.cached["r", 0] == restorable
        eventually(partial(set(ends).issubset, stored), timeout_s=20)
        router.close()
        history = [*history, *waiter.tokens["r", 0], *tokens_of(50 + turn, 45)]


def test_cancels_at_random_moments_leave_nothing(servers: list[BlobServer]) -> None:
    rng = random.Random(20261122)
    first = Router(servers)
    prompts = [tokens_of(seed, 300) for seed in range(4)]
    for i, prompt in enumerate(prompts):
        first.answer(request_of(str(i), prompt, max_tokens=2, ignore_eos=True))
    first.close()
    second = Router(servers)
    waiters = {}
    for i in range(60):
        prompt = [*prompts[rng.randrange(4)][: rng.randrange(150, 300)], rng.randrange(4, VOCAB)]
        request = request_of(f"r{i}", prompt, max_tokens=12, ignore_eos=True)
        waiter = waiters[request.request_id] = Waiter(1)
        second.engine.submit(request, waiter)
        if rng.random() < 0.5:
            if rng.random() < 0.5:
                waiter.first.wait(0.02)
            second.engine.cancel(f"r{rng.randrange(i + 1)}")
    for name, waiter in waiters.items():
        assert waiter.done.wait(60)
        assert waiter.last[name, 0].error is None
        if waiter.last[name, 0].finish_reason is not FinishReason.CANCELLED:
            assert len(waiter.tokens[name, 0]) == 12
    second.close()


def test_servers_that_freeze_cost_time_and_no_token(servers: list[BlobServer]) -> None:
    first = Router(servers)
    first.answer(request_of("a", tokens_of(1, 400), max_tokens=2, ignore_eos=True))
    first.close()
    second = Router(servers, TierSettings())
    for server in servers:
        server.freeze()
    try:
        request = request_of("b", [*tokens_of(1, 400), 5], max_tokens=20, ignore_eos=True)
        waiter = second.answer(request)
        assert waiter.tokens["b", 0] == expected_of(request, 0, LENGTH).tokens
        assert waiter.cached["b", 0] == 0
    finally:
        for server in servers:
            server.thaw()
    second.close()
