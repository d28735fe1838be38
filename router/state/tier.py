"""The blob servers as the engine's tier: probing, and the parts that load and write.

Decides what of a sequence is restorable and whether it is worth it; the loader and the writer do
the rest. One thread probes: it asks for the blocks, then for snapshots at positions up to which
there is no hole, then for what else belongs to the best of those. It also lets live on what was
used without having been read.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from router.engine.chain import CACHE_BLOCK, HashChain
from router.engine.tier import (
    LoadJob,
    LoadResult,
    Probe,
    ProbeResult,
    Snapshot,
    TierStats,
    TtlClass,
)
from router.state.breaker import BreakerState
from router.state.codec import HEADER_BYTES, SnapshotStream
from router.state.cost import CostModel, CostSettings
from router.state.counters import Counters
from router.state.kv_store import KvStore, Links, block_ttl_s, snapshot_ttl_s
from router.state.loader import Loader, LoaderSettings
from router.state.restore import ValueSizes
from router.state.writer import StoredKeys, Writer, WriterSettings

logger = logging.getLogger(__name__)

_MAX_CANDIDATES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class TierSettings:
    """Bounds of the tier."""

    probe_s: float = 0.1
    """Bound of a probe, the wait for others included."""
    probe_key_s: float = 20e-6
    """Added to it for each key that is asked for."""
    max_probes: int = 256
    """Probes waiting; more are refused as `busy`."""
    cost: CostSettings = field(default_factory=CostSettings)
    loader: LoaderSettings = field(default_factory=LoaderSettings)
    writer: WriterSettings = field(default_factory=WriterSettings)


class BlobTier:
    """Implements `router.engine.tier.Tier` over the blob servers.

    Args:
        store: The servers.
        sizes: Of the model's values.
        settings: Bounds.
    """

    def __init__(
        self, store: KvStore, sizes: ValueSizes, settings: TierSettings | None = None
    ) -> None:
        self.settings = settings or TierSettings()
        self.cost = CostModel(self.settings.cost)
        self._store = store
        self._sizes = sizes
        self._counters = Counters()
        stored = StoredKeys(self.settings.writer.num_remembered, self.settings.writer.remember_s)
        self._loader = Loader(
            store, sizes, self.cost, self._counters, stored.forget, self.settings.loader
        )
        self._writer = Writer(
            store, self._counters, stored, lambda: self._loader.num_loads > 0, self.settings.writer
        )
        self._probes: queue.Queue[Callable[[Links], None] | None]
        self._probes = queue.Queue(self.settings.max_probes)
        self._candidates_of: OrderedDict[bytes, tuple[int, ...]] = OrderedDict()
        """Longest candidate's position hash -> the shorter ones that its probe found."""
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="blob-probe", daemon=True)
        self._thread.start()

    # The protocol --------------------------------------------------------------------------------

    def probe(self, query: Probe, done: Callable[[ProbeResult], None]) -> None:
        """See `Tier.probe`."""
        try:
            if self._is_closed.is_set():
                raise queue.Full
            asked_s = time.monotonic()
            self._probes.put_nowait(lambda links: self._probed(links, query, done, asked_s))
        except queue.Full:
            reason = "closed" if self._is_closed.is_set() else "busy"
            self._counters.add(f"probes_{reason}")
            done(_nothing(reason))

    def load(self, job: LoadJob, done: Callable[[LoadResult], None]) -> None:
        """See `Tier.load`."""
        known = self._candidates_of.get(job.chain.position_hash(job.num_tokens), ())
        self._loader.load(job, {*known, *job.snapshot_positions}, done)

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
        """See `Tier.put_block`."""
        ttl_s = block_ttl_s(ttl_class, num_tokens)
        return self._writer.put_block(key, parent, read, num_bytes, release, ttl_s)

    def put_snapshot(
        self,
        key: bytes,
        snapshot: Snapshot,
        ttl_class: TtlClass,
        stored: Callable[[bool], None],
    ) -> bool:
        """See `Tier.put_snapshot`."""
        stream = SnapshotStream(
            key=key,
            num_tokens=snapshot.num_tokens,
            state_bytes=snapshot.state_bytes,
            tail_bytes=snapshot.num_bytes - snapshot.state_bytes,
        )
        values = memoryview(snapshot.values.data).cast("B")
        ttl_s = snapshot_ttl_s(ttl_class, snapshot.num_tokens)
        return self._writer.put_snapshot(stream, values, ttl_s, stored)

    def touch(self, chain: HashChain, num_tokens: int, num_shared: int) -> None:
        """See `Tier.touch`."""
        if not self._is_closed.is_set():
            with contextlib.suppress(queue.Full):
                self._probes.put_nowait(
                    lambda links: self._touched(links, chain, num_tokens, num_shared)
                )

    def note_prefill(self, num_tokens: int, context: int, seconds: float) -> None:
        """See `Tier.note_prefill`."""
        self.cost.note_prefill(num_tokens, context, seconds)

    def stats(self) -> TierStats:
        """See `Tier.stats`."""
        counters = self._counters.values()

        def count(name: str) -> int:
            return int(counters.get(name, 0))

        return TierStats(
            num_queued_bytes=self._writer.queued_bytes,
            is_open=all(breaker.state is BreakerState.CLOSED for breaker in self._store.breakers),
            hit_tokens=count("restored_tokens"),
            read_bytes=count("restore_bytes"),
            read_s=counters.get("restore_seconds", 0.0),
            written_bytes=count("put_bytes"),
            dropped_bytes=count("put_dropped_bytes"),
            corrupt=count("corrupt_total"),
            loads=count("loads"),
            load_failures=count("loads") - count("loads_ok"),
            counters=counters,
            gauges={
                "bandwidth_bytes_per_s": self.cost.bytes_per_s,
                "prefill_tokens_per_s": self.cost.prefill_tokens_per_s,
                "loads_under_way": self._loader.num_loads,
            },
            breakers={breaker.name: breaker.state.value for breaker in self._store.breakers},
        )

    def server_info(self, timeout_s: float = 1.0) -> dict[str, Mapping[str, str]]:
        """Ask every blob server for INFO memory, stats and clients; for status, not for serving.

        Returns:
            Server -> fields, among them `used_memory`, `maxmemory`, `evicted_keys` and
            `mem_clients_normal`; a server in trouble is left out.
        """
        links = self._store.links()
        try:
            return links.info(time.monotonic() + timeout_s)
        finally:
            links.close()

    def close(self) -> None:
        """See `Tier.close`."""
        if self._is_closed.is_set():
            return
        self._is_closed.set()
        self._probes.put(None)
        self._thread.join()
        self._loader.close()
        self._writer.close()

    # Probing -------------------------------------------------------------------------------------

    def _run(self) -> None:
        links = self._store.links()
        while (call := self._probes.get()) is not None:
            call(links)
        links.close()

    def _touched(self, links: Links, chain: HashChain, num_tokens: int, num_shared: int) -> None:
        keys, ttl_s = [], []
        for index in range(num_tokens // CACHE_BLOCK):
            stop = (index + 1) * CACHE_BLOCK
            ttl_class = TtlClass.SHARED if stop <= num_shared else TtlClass.SESSION
            keys.append(self._store.block_key(chain.block_hash(index)))
            ttl_s.append(block_ttl_s(ttl_class, stop))
        settings = self.settings
        deadline = time.monotonic() + settings.probe_s + settings.probe_key_s * 2 * len(keys)
        links.touch(keys, ttl_s, HEADER_BYTES + self._sizes.block_bytes, deadline)
        self._counters.add("touched_blocks", len(keys))

    def _probed(
        self, links: Links, query: Probe, done: Callable[[ProbeResult], None], asked_s: float
    ) -> None:
        try:
            result = self._answer(links, query, asked_s)
        except Exception:
            logger.exception("event=blob_probe_failed")
            links.close()
            result = _nothing("error")
        self._counters.add("probes")
        self._counters.add("restore_seconds_probe", time.monotonic() - asked_s)
        outcome = f"decision_{result.decision}" if result.num_tokens else result.reason
        self._counters.add(f"probes_{outcome}")
        try:
            done(result)
        except Exception:
            logger.exception("event=blob_probe_callback_failed")

    def _answer(self, links: Links, query: Probe, asked_s: float) -> ProbeResult:
        """Find the candidates, and choose."""
        if self._is_closed.is_set():
            return _nothing("closed")
        chain, store = query.chain, self._store
        first = query.start // CACHE_BLOCK
        indices = range(first, query.limit // CACHE_BLOCK)
        settings = self.settings
        deadline = asked_s + settings.probe_s + settings.probe_key_s * 2 * len(indices)
        keys = [store.block_key(chain.block_hash(i)) for i in indices]
        there = links.exists(keys, deadline, value_bytes=HEADER_BYTES + self._sizes.block_bytes)
        num_blocks = first + (there.index(False) if False in there else len(there))
        kv_tokens = max(num_blocks * CACHE_BLOCK, query.start)
        candidates = self._candidates(links, query, num_blocks, deadline)
        num_tokens = candidates[0] if candidates else query.start
        self._counters.add("hit_tokens_kv", kv_tokens - query.start)
        self._counters.add("hit_tokens_resumable", num_tokens - query.start)
        self._counters.add("lost_reuse_tokens", max(0, kv_tokens - num_tokens))
        if not candidates:
            return _nothing(self._why_none(query, kv_tokens, deadline))
        self._remember(chain.position_hash(num_tokens), tuple(candidates))
        num_bytes = self._sizes.load_bytes(query.start, num_tokens)
        streamed = 0
        if query.streaming is not None:
            read_tokens = query.streaming.read_tokens(query.start, num_tokens)
            streamed = read_tokens * self._sizes.block_bytes // CACHE_BLOCK
        choice = self.cost.choose(
            query.start, num_tokens, num_bytes, time.monotonic(), streamed_bytes=streamed
        )
        return ProbeResult(
            num_tokens=num_tokens,
            decision=choice.decision,
            reason=choice.reason,
            predicted_load_s=choice.load_s,
            predicted_prefill_s=choice.prefill_s,
        )

    def _remember(self, position_hash: bytes, candidates: tuple[int, ...]) -> None:
        """Keep what a load may fall back to, for as many sequences as may be probed at once."""
        self._candidates_of[position_hash] = candidates
        self._candidates_of.move_to_end(position_hash)
        if len(self._candidates_of) > self.settings.max_probes:
            self._candidates_of.popitem(last=False)

    def _candidates(
        self, links: Links, query: Probe, num_blocks: int, deadline: float
    ) -> list[int]:
        """Return positions with a whole snapshot before which `num_blocks` have no hole, longest
        first; no more than a few."""
        chain, key = query.chain, self._store.stripe_key
        aligned = range(
            query.start // CACHE_BLOCK * CACHE_BLOCK, num_blocks * CACHE_BLOCK + 1, CACHE_BLOCK
        )
        positions = sorted(
            n
            for n in {*aligned, *query.snapshot_positions}
            if query.start < n <= query.limit and n // CACHE_BLOCK <= num_blocks
        )
        hashes = [chain.position_hash(n) for n in positions]
        there = links.exists([key(position_hash, 0) for position_hash in hashes], deadline)
        found = [
            (n, position_hash)
            for n, position_hash, is_there in zip(positions, hashes, there, strict=True)
            if is_there
        ][-_MAX_CANDIDATES:]
        rest = [
            (n, key(position_hash, part))
            for n, position_hash in found
            for part in range(1, self._sizes.stream(position_hash, n).num_stripes)
        ]
        there = links.exists([stripe_key for _, stripe_key in rest], deadline)
        broken = {n for (n, _), is_there in zip(rest, there, strict=True) if not is_there}
        return [n for n, _ in reversed(found) if n not in broken]

    def _why_none(self, query: Probe, kv_tokens: int, deadline: float) -> str:
        if time.monotonic() >= deadline:
            return "late"
        if any(breaker.state is not BreakerState.CLOSED for breaker in self._store.breakers):
            return "breaker_open"
        return "no_snapshot" if kv_tokens > query.start else "absent"


def _nothing(reason: str) -> ProbeResult:
    return ProbeResult(num_tokens=0, decision="prefill", reason=reason)
