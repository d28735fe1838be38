"""Asks the tier for prefixes that the pool does not hold.

A sequence is probed between its submission and the queue, and loaded between its admission and its
prefill. Decides who is worth a probe and how long a load may take; how far to restore, and whether
that beats a prefill, is the tier's. Whatever fails, the sequence goes on from what the pool had.

A sequence that does not fit the pool is loaded like any other, every value once and verified: its
newest cache blocks come into its window, the older ones into the cold store, which may leave them
in the tier and keep only what it takes to read them again (`router.engine.spill`). One that lost
such a block later is probed and loaded anew, up to the hole.

The tier's callbacks come on its threads and only post; everything else runs in the engine thread.
Decoding sequences wait for none of it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from router.engine.batch_rows import PrefillChunk
from router.engine.block_manager import BlockManager
from router.engine.chain import CACHE_BLOCK
from router.engine.config import EngineConfig
from router.engine.model import CacheIo, Model
from router.engine.prefix_cache import PrefixUse
from router.engine.reuse import Post, Reuse
from router.engine.sequence import Sequence
from router.engine.spill import Spill
from router.engine.tier import (
    LoadJob,
    LoadResult,
    Probe,
    ProbeResult,
    Snapshot,
    Streaming,
    Tier,
)

logger = logging.getLogger(__name__)

_LOAD_SLACK = 3.0
"""Times the predicted time, after which a load is given up. The tier stops hoping for more at half
of it, and has the rest for the snapshot of what is there."""
_MOST_SLACK = 20.0
"""The same of a load that goes on as long as it brings values, because a prefill is dear."""
_PREFILL_SHARE = 0.5
"""Part of the predicted prefill that such a load may take."""


def patience_s(load_s: float, prefill_s: float) -> float:
    """Return how long a load may take, both predicted: the first loads of a process rest on what
    was believed of the store, and a million tokens take minutes to prefill."""
    return max(_LOAD_SLACK * load_s, min(_MOST_SLACK * load_s, _PREFILL_SHARE * prefill_s))


class Restorer:
    """Probes and loads.

    Args:
        tier: The slower store.
        reuse: The pool's own prefixes.
        spill: Runs sequences that do not fit the pool; None: there are none.
        config: Bounds of loads and steps.
        post: Brings the tier's callbacks into the engine thread.
        clock: The engine's; deadlines are on it.
    """

    def __init__(
        self,
        tier: Tier,
        reuse: Reuse,
        spill: Spill | None,
        config: EngineConfig,
        post: Post,
        clock: Callable[[], float],
    ) -> None:
        self._tier = tier
        self._reuse = reuse
        self._spill = spill
        self._config = config
        self._post = post
        self._clock = clock

    def probe(self, sequence: Sequence, done: Callable[[Sequence], None]) -> None:
        """Ask how far a sequence could be restored, if the pool leaves enough to gain.

        Args:
            sequence: Owns nothing, and is not in the queue.
            done: Called in the engine thread, unless the sequence has finished.
        """
        use = self._reuse.extended(sequence)
        limit = self._reuse.limit_of(sequence)
        start = self._reuse.cache.match(use.chain, limit).num_tokens
        if limit - start < CACHE_BLOCK:
            done(sequence)
            return
        query = Probe(
            chain=use.chain,
            start=start,
            limit=limit,
            snapshot_positions=_positions(sequence),
            streaming=self._streaming(sequence),
        )

        def probed(result: ProbeResult) -> None:
            if sequence.is_finished:
                return
            logger.log(
                logging.DEBUG if query.streaming is None else logging.INFO,
                "prefix.probed id=%s start=%d found=%d decision=%s reason=%s",
                *(sequence.request_id, start, result.num_tokens, result.decision, result.reason),
            )
            if result.should_load:
                use.load_to = min(result.num_tokens, limit)
                use.load_timeout_s = patience_s(result.predicted_load_s, result.predicted_prefill_s)
            done(sequence)

        self._tier.probe(query, lambda result: self._post(lambda: probed(result)))

    def _streaming(self, sequence: Sequence) -> Streaming | None:
        if self._spill is None or not self._spill.is_long(sequence):
            return None
        return self._spill.streaming(self._config.max_num_batched_tokens)

    def load(self, sequence: Sequence, done: Callable[[Sequence], None]) -> None:
        """Bring an admitted sequence's prefix, up to its `load_to`, into its blocks and slot.

        Args:
            sequence: Owns both, and does not run.
            done: Called later, in the engine thread; the tier has let go of them then.
        """
        use = _use(sequence)
        use.loading = threading.Event()
        first_kept = 0
        if sequence.cold is not None and self._spill is not None:
            first_kept = self._spill.num_cold_blocks(use.load_to)
        loading = _Loading(
            self._reuse.io, sequence, use.loading, self._reuse.cache.blocks_per_entry, first_kept
        )
        timeout_s = max(self._config.min_load_timeout_s, use.load_timeout_s)
        if sequence.request.deadline is not None:
            timeout_s = min(timeout_s, sequence.request.deadline - self._clock())
        job = LoadJob(
            chain=use.chain,
            start=sequence.num_computed,
            num_tokens=use.load_to,
            snapshot_positions=_positions(sequence),
            block_sink=loading.take_block,
            state_sink=loading.take_state,
            cancelled=use.loading,
            deadline_s=max(0.0, timeout_s),
        )

        def loaded(result: LoadResult) -> None:
            use.loading = None
            snapshot = loading.snapshot
            if result.error:
                logger.info(
                    "prefix.load id=%s wanted=%d loaded=%d error=%s",
                    *(sequence.request_id, job.num_tokens, result.num_tokens, result.error),
                )
            if not sequence.is_finished:
                if snapshot is not None and job.start < result.num_tokens == snapshot.num_tokens:
                    loading.settle_cold(result.num_tokens)
                    self._reuse.take_loaded(sequence, snapshot)
                else:
                    loading.settle_cold(None)
                    self._reuse.write_back(sequence)
            done(sequence)

        self._tier.load(job, lambda result: self._post(lambda: loaded(result)))

    def note_step(self, chunks: list[PrefillChunk], num_decoding: int, seconds: float) -> None:
        """Tell the tier how long a step took that did little but prefill one sequence."""
        num_tokens = chunks[0].stop - chunks[0].start
        if len(chunks) == 1 and num_tokens >= max(CACHE_BLOCK, 8 * num_decoding):
            self._tier.note_prefill(num_tokens, chunks[0].start, seconds)


def reuse_of(
    model: Model,
    caches: Any,
    blocks: BlockManager,
    config: EngineConfig,
    tier: Tier | None,
    post: Post,
) -> Reuse | None:
    """Return what reuses prefixes; None where that is not possible, and log why."""
    make_io = getattr(model, "cache_io", None)
    io: CacheIo | None = None if make_io is None else make_io(caches)
    least_bytes = 0 if io is None else io.state_bytes + io.kv_block_bytes
    if not config.prefix_caching:
        reason = "it is switched off"
    elif io is None:
        reason = "the model gives no access to its caches"
    elif CACHE_BLOCK % config.block_size:
        reason = f"block_size {config.block_size} does not divide {CACHE_BLOCK}"
    elif config.max_snapshot_bytes < least_bytes:
        reason = f"max_snapshot_bytes {config.max_snapshot_bytes} < {least_bytes}, one snapshot"
    else:
        return Reuse(blocks, io, config, tier, post)
    logger.info("prefix_caching.off reason=%s", reason)
    return None


class _Loading:
    """Where one load writes to, on the tier's threads.

    Args:
        io: The pool's memory.
        sequence: Owns blocks, a state slot and, where it does not fit the pool, reserved cold
            cache blocks.
        cancelled: Once set, nothing is written.
        blocks_per_entry: Blocks of a cache block.
        first_kept: Cache blocks before this one go to the cold store; the sequence's blocks begin
            with it, or with the first that the load brings.
    """

    def __init__(
        self,
        io: CacheIo,
        sequence: Sequence,
        cancelled: threading.Event,
        blocks_per_entry: int,
        first_kept: int,
    ) -> None:
        self.snapshot: Snapshot | None = None
        self._io = io
        self._cancelled = cancelled
        self._per = blocks_per_entry
        self._blocks = list(sequence.blocks)
        self._first = sequence.num_computed // CACHE_BLOCK
        """Cache blocks below are in place, in the pool shared with others."""
        self._first_kept = max(first_kept, sequence.num_cold_blocks)
        self._num_cold = sequence.num_cold_blocks
        self._cold = sequence.cold
        self._chain = _use(sequence).chain
        self._slot = sequence.state_slot

    def take_block(self, index: int, values: memoryview) -> None:
        """See `LoadJob.block_sink`."""
        assert index >= self._first, f"cache block {index} is in place already"
        if self._cancelled.is_set():
            return
        if index >= self._first_kept:
            self._io.write_blocks(self._of(index - self._first_kept), values)
        else:
            assert self._cold is not None, "a sequence without cold cache blocks keeps all"
            self._cold.place(
                index, self._chain.block_hash(index), np.frombuffer(values, dtype=np.uint8)
            )

    def settle_cold(self, num_tokens: int | None) -> None:
        """Count the cold cache blocks, now that no more come and `num_tokens` are in place; None:
        only what was there before."""
        if self._cold is not None and num_tokens is None:
            self._cold.settle(self._num_cold)
        elif self._cold is not None and num_tokens is not None:
            self._cold.settle(min(self._first_kept, num_tokens // CACHE_BLOCK))

    def take_state(self, num_tokens: int, state: memoryview, tail: memoryview) -> None:
        """See `LoadJob.state_sink`."""
        if self._cancelled.is_set():
            return
        values = np.empty(len(state) + len(tail), dtype=np.uint8)
        values[: len(state)] = state
        values[len(state) :] = tail
        values.flags.writeable = False
        self._io.write_state(self._slot, values[: len(state)])
        if num_tail := num_tokens % CACHE_BLOCK:
            index = num_tokens // CACHE_BLOCK
            # A load that ends so far below what was wanted that all its blocks are cold.
            place = index - min(self._first_kept, index)
            self._io.write_tail(self._of(place), num_tail, tail)
        self.snapshot = Snapshot(num_tokens, values, len(state))

    def _of(self, place: int) -> list[int]:
        return self._blocks[place * self._per : (place + 1) * self._per]


def _positions(sequence: Sequence) -> tuple[int, ...]:
    hint = sequence.request.session
    return () if hint is None else hint.snapshot_positions


def _use(sequence: Sequence) -> PrefixUse:
    assert sequence.prefix is not None, "a sequence without a chain"
    return sequence.prefix
