"""A tier in a dictionary: the slow twin of `router.state.tier`, without threads.

What the engine asks for waits until the test calls `pump`, so a test decides what happens in
between. Values are copied as the real tier copies them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np

from router.engine.chain import CACHE_BLOCK, HashChain
from router.engine.engine import Engine
from router.engine.tier import (
    LoadJob,
    LoadResult,
    Probe,
    ProbeResult,
    Snapshot,
    TierStats,
    TtlClass,
)


class MemoryTier:
    """Implements `router.engine.tier.Tier`."""

    def __init__(self) -> None:
        self.blocks: dict[bytes, bytes] = {}
        self.snapshots: dict[bytes, Snapshot] = {}
        self.classes: dict[bytes, TtlClass] = {}
        self.prefills: list[tuple[int, int, float]] = []
        self.probes: list[Probe] = []
        self.touched: list[tuple[bytes, int, int]] = []
        self.loads: list[LoadJob] = []
        self.results: list[LoadResult] = []
        self.decision = "load"
        self.takes_values = True
        self.blocks_until_failure: int | None = None
        """Cache blocks that a load brings before it fails."""
        self.is_writing = True
        """False: what is to be written waits."""
        self._reads: deque[Callable[[], None]] = deque()
        self._writes: deque[Callable[[], None]] = deque()

    def pump(self) -> bool:
        """Do what was asked for so far; return whether there was anything."""
        due = list(self._reads)
        self._reads.clear()
        if self.is_writing:
            due += self._writes
            self._writes.clear()
        for call in due:
            call()
        return bool(due)

    def _restorable(
        self, chain: HashChain, start: int, limit: int, positions: tuple[int, ...]
    ) -> int:
        aligned = range(0, limit + 1, CACHE_BLOCK)
        for position in sorted({*positions, *aligned}, reverse=True):
            if start < position <= limit and chain.position_hash(position) in self.snapshots:
                needed = range(start // CACHE_BLOCK, position // CACHE_BLOCK)
                if all(chain.block_hash(i) in self.blocks for i in needed):
                    return position
        return 0

    def probe(self, query: Probe, done: Callable[[ProbeResult], None]) -> None:
        self.probes.append(query)

        def answer() -> None:
            found = self._restorable(
                query.chain, query.start, query.limit, query.snapshot_positions
            )
            decision = self.decision if found else "prefill"
            done(ProbeResult(num_tokens=found, decision=decision, reason="a test"))

        self._reads.append(answer)

    def load(self, job: LoadJob, done: Callable[[LoadResult], None]) -> None:
        self.loads.append(job)
        self._reads.append(lambda: done(self._load(job)))

    def _load(self, job: LoadJob) -> LoadResult:
        result = self._loaded(job)
        self.results.append(result)
        return result

    def _loaded(self, job: LoadJob) -> LoadResult:
        def failed(error: str) -> LoadResult:
            return LoadResult(num_tokens=job.start, num_bytes=0, seconds=0.0, error=error)

        if job.cancelled.is_set():
            return failed("cancelled")
        target = self._restorable(job.chain, job.start, job.num_tokens, job.snapshot_positions)
        if not target:
            return failed("gone")
        snapshot = self.snapshots[job.chain.position_hash(target)]
        job.state_sink(target, snapshot.state, snapshot.tail)
        for count, index in enumerate(range(job.start // CACHE_BLOCK, target // CACHE_BLOCK)):
            if count == self.blocks_until_failure:
                return failed("cut off")
            job.block_sink(index, memoryview(self.blocks[job.chain.block_hash(index)]))
        return LoadResult(num_tokens=target, num_bytes=snapshot.num_bytes, seconds=0.1)

    def put_block(
        self,
        key: bytes,
        parent: bytes,
        read: Callable[[memoryview], None],
        num_bytes: int,
        release: Callable[[], None],
        ttl_class: TtlClass,
        *,
        num_tokens: int = 0,
    ) -> bool:
        if not self.takes_values:
            return False
        assert num_tokens % CACHE_BLOCK == 0 < num_tokens

        def write() -> None:
            value = bytearray(num_bytes)
            read(memoryview(value))
            assert self.blocks.setdefault(key, bytes(value)) == bytes(value)
            self.classes[key] = ttl_class
            release()

        self._writes.append(write)
        return True

    def put_snapshot(
        self,
        key: bytes,
        snapshot: Snapshot,
        ttl_class: TtlClass,
        stored: Callable[[bool], None],
    ) -> bool:
        if not self.takes_values:
            return False
        values = np.array(snapshot.values)

        def write() -> None:
            assert (values == snapshot.values).all(), "a snapshot is immutable"
            self.snapshots[key] = snapshot
            self.classes[key] = ttl_class
            stored(True)

        self._writes.append(write)
        return True

    def touch(self, chain: HashChain, num_tokens: int, num_shared: int) -> None:
        self.touched.append((chain.position_hash(num_tokens), num_tokens, num_shared))

    def note_prefill(self, num_tokens: int, context: int, seconds: float) -> None:
        self.prefills.append((num_tokens, context, seconds))

    def stats(self) -> TierStats:
        return TierStats()

    def close(self) -> None:
        self._reads.clear()
        self._writes.clear()


def run_with(tier: MemoryTier, *engines: Engine) -> None:
    """Step engines and tier until nothing is left to do."""
    for _ in range(5000):
        did_run = [engine.step() for engine in engines]
        is_busy = any(engine.num_live or engine._inbox.has_calls for engine in engines)
        if not tier.pump() and not any(did_run) and not is_busy:
            return
    raise AssertionError("the engine does not come to an end")
