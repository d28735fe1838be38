"""Asks the tier for prefixes that the pool does not hold.

A sequence is probed between its submission and the queue, and loaded between its admission and its
prefill. Decides who is worth a probe and how long a load may take; how far to restore, and whether
that beats a prefill, is the tier's. Whatever fails, the sequence goes on from what the pool had.

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
from router.engine.tier import LoadJob, LoadResult, Probe, ProbeResult, Snapshot, Tier

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
        io: The pool's memory.
        post: Brings the tier's callbacks into the engine thread.
        clock: The engine's; deadlines are on it.
        min_timeout_s: See `EngineConfig.min_load_timeout_s`.
    """

    def __init__(
        self,
        tier: Tier,
        reuse: Reuse,
        io: CacheIo,
        post: Post,
        clock: Callable[[], float],
        min_timeout_s: float,
    ) -> None:
        self._tier = tier
        self._reuse = reuse
        self._io = io
        self._post = post
        self._clock = clock
        self._min_timeout_s = min_timeout_s

    def probe(self, sequence: Sequence, done: Callable[[Sequence], None]) -> None:
        """Ask how far a new sequence could be restored, if the pool leaves enough to gain.

        Args:
            sequence: Not in the queue yet.
            done: Called in the engine thread, unless the sequence has finished.
        """
        use = _use(sequence)
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
        )

        def probed(result: ProbeResult) -> None:
            if sequence.is_finished:
                return
            logger.debug(
                "prefix.probed id=%s start=%d found=%d decision=%s reason=%s",
                *(sequence.request_id, start, result.num_tokens, result.decision, result.reason),
            )
            if result.should_load:
                use.load_to = min(result.num_tokens, limit)
                use.load_timeout_s = patience_s(result.predicted_load_s, result.predicted_prefill_s)
            done(sequence)

        self._tier.probe(query, lambda result: self._post(lambda: probed(result)))

    def load(self, sequence: Sequence, done: Callable[[Sequence], None]) -> None:
        """Bring an admitted sequence's prefix, up to its `load_to`, into its blocks and slot.

        Args:
            sequence: Owns both, and does not run.
            done: Called later, in the engine thread; the tier has let go of them then.
        """
        use = _use(sequence)
        use.loading = threading.Event()
        loading = _Loading(self._io, sequence, use.loading, self._reuse.cache.blocks_per_entry)
        timeout_s = max(self._min_timeout_s, use.load_timeout_s)
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
                    self._reuse.take_loaded(sequence, snapshot)
                else:
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
    clock: Callable[[], float],
) -> tuple[Reuse | None, Restorer | None]:
    """Return what reuses prefixes, here and from the tier; None where it cannot, and log why."""
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
        reuse = Reuse(blocks, io, config, tier, post)
        if tier is None:
            return reuse, None
        return reuse, Restorer(tier, reuse, io, post, clock, config.min_load_timeout_s)
    logger.info("prefix_caching.off reason=%s", reason)
    return None, None


class _Loading:
    """Where one load writes to, on the tier's threads."""

    def __init__(
        self, io: CacheIo, sequence: Sequence, cancelled: threading.Event, blocks_per_entry: int
    ) -> None:
        self.snapshot: Snapshot | None = None
        self._io = io
        self._cancelled = cancelled
        self._per = blocks_per_entry
        self._blocks = list(sequence.blocks)
        self._first = sequence.num_computed // CACHE_BLOCK
        """Cache blocks below are shared with others."""
        self._slot = sequence.state_slot

    def take_block(self, index: int, values: memoryview) -> None:
        """See `LoadJob.block_sink`."""
        assert index >= self._first, f"cache block {index} is in place already"
        if not self._cancelled.is_set():
            self._io.write_blocks(self._of(index), values)

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
            self._io.write_tail(self._of(num_tokens // CACHE_BLOCK), num_tail, tail)
        self.snapshot = Snapshot(num_tokens, values, len(state))

    def _of(self, index: int) -> list[int]:
        return self._blocks[index * self._per : (index + 1) * self._per]


def _positions(sequence: Sequence) -> tuple[int, ...]:
    hint = sequence.request.session
    return () if hint is None else hint.snapshot_positions


def _use(sequence: Sequence) -> PrefixUse:
    assert sequence.prefix is not None, "a sequence without a chain"
    return sequence.prefix
