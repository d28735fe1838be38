"""Writes values to the blob servers, behind the engine's back and within bounded memory.

Decides what is written, in what order, and what is dropped; it never makes anyone wait. One thread
per server takes stripes of snapshots before blocks (KV without a snapshot is no hit), leaves out
what the server has already, unless it was seen damaged, and pauses while something is being
restored. A full queue drops what is newest: the head of a prefix is worth more than its tail.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass

from router.state.bulk_connection import BulkError
from router.state.codec import HEADER_BYTES, Bytes, Label, SnapshotStream, block_label
from router.state.counters import Counters
from router.state.kv_store import KvStore, Link

logger = logging.getLogger(__name__)

_BATCH = 8
_FULL_PAUSE_S = 1.0
_PUT_BOUND_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WriterSettings:
    """Bounds of the writer."""

    max_queue_bytes: int = 256 << 20
    """Values queued at once; blocks among them stay in the pool until they are written."""
    num_remembered: int = 1 << 16
    """Keys remembered as stored."""
    remember_s: float = 300.0
    """For how long a key is taken as stored without asking; it may be evicted meanwhile."""
    yield_s: float = 0.5
    """How long one value waits for restores to end, at most."""


class StoredKeys:
    """Keys that were on their server not long ago, the least recently noted forgotten first."""

    def __init__(self, max_keys: int, remember_s: float) -> None:
        self._max_keys = max_keys
        self._remember_s = remember_s
        self._lock = threading.Lock()
        self._until_s: OrderedDict[bytes, float] = OrderedDict()

    def note(self, key: bytes) -> None:
        """Remember `key`."""
        with self._lock:
            self._until_s[key] = time.monotonic() + self._remember_s
            self._until_s.move_to_end(key)
            if len(self._until_s) > self._max_keys:
                self._until_s.popitem(last=False)

    def forget(self, key: bytes) -> None:
        """Forget `key`: it was missed on its server."""
        with self._lock:
            self._until_s.pop(key, None)

    def __contains__(self, key: bytes) -> bool:
        with self._lock:
            return self._until_s.get(key, 0.0) > time.monotonic()


class _Write:
    """One value on its way: where its bytes come from, and who is told."""

    def __init__(
        self,
        key: bytes,
        label: Label,
        ttl_s: int,
        fill: Callable[[memoryview], list[memoryview]],
        ended: Callable[[bool], None],
    ) -> None:
        self.key = key
        self.label = label
        self.ttl_s = ttl_s
        self.fill = fill
        """Returns the payload in pieces; may use the scratch buffer it is given."""
        self.ended = ended
        """Told once whether the value is on its server."""


class _Once:
    """Calls what it is given the first time; one thread at a time has it."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call: Callable[[], None] | None = call

    def __call__(self) -> None:
        call, self._call = self._call, None
        if call is not None:
            call()


class _Latch:
    """Calls `ended` when all of `count` parts have ended: with True if all are stored."""

    def __init__(self, count: int, ended: Callable[[bool], None]) -> None:
        self._lock = threading.Lock()
        self._left = count
        self._is_stored = True
        self._ended = ended

    def __call__(self, is_stored: bool) -> None:
        with self._lock:
            self._left -= 1
            self._is_stored &= is_stored
            is_last = not self._left
        if is_last:
            self._ended(self._is_stored)


class Writer:
    """Queues and threads, one of each per server.

    Args:
        store: The servers.
        counters: Raised: `put_bytes`, `put_values`, `put_skipped`, `put_dropped_<reason>`,
            `put_dropped_bytes`.
        stored: Keys that need not be written.
        is_restoring: Whether to keep out of the way now.
        settings: Bounds.
    """

    def __init__(
        self,
        store: KvStore,
        counters: Counters,
        stored: StoredKeys,
        is_restoring: Callable[[], bool],
        settings: WriterSettings | None = None,
    ) -> None:
        self._settings = settings or WriterSettings()
        self._stored = stored
        self._store = store
        self._counters = counters
        self._is_restoring = is_restoring
        self._condition = threading.Condition()
        self._queued_bytes = 0
        self._closing = threading.Event()
        self._stripes: list[deque[_Write]] = [deque() for _ in store.servers]
        self._blocks: list[deque[_Write]] = [deque() for _ in store.servers]
        self._full_until_s = [0.0 for _ in store.servers]
        self._threads = [
            threading.Thread(target=self._run, args=(server,), name=f"blob-write-{server}")
            for server in range(len(store.servers))
        ]
        for thread in self._threads:
            thread.daemon = True
            thread.start()

    @property
    def queued_bytes(self) -> int:
        """Bytes of values that are queued or being written."""
        with self._condition:
            return self._queued_bytes

    def put_block(
        self,
        key: bytes,
        parent: bytes,
        read: Callable[[memoryview], None],
        num_bytes: int,
        release: Callable[[], None],
        ttl_s: int,
    ) -> bool:
        """Queue a block unless it is known to be stored; see `Tier.put_block`."""
        name = self._store.block_key(key)
        if name in self._stored and not self._store.is_damaged(name):
            self._counters.add("put_skipped")
            return False
        done_with_block = _Once(release)

        def fill(scratch: memoryview) -> list[memoryview]:
            payload = scratch[:num_bytes]
            read(payload)
            done_with_block()
            return [payload]

        def ended(_: bool) -> None:
            done_with_block()

        write = _Write(name, block_label(key, parent, num_bytes), ttl_s, fill, ended)
        return self._enqueue([write], self._blocks)

    def put_snapshot(
        self, stream: SnapshotStream, values: Bytes, ttl_s: int, stored: Callable[[bool], None]
    ) -> bool:
        """Queue all stripes of a snapshot, or none; see `Tier.put_snapshot`."""
        latch = _Latch(stream.num_stripes, stored)
        writes = []
        for part in range(stream.num_stripes):

            def fill(_: memoryview, part: int = part) -> list[memoryview]:
                return stream.stripe(part, values)

            name = self._store.stripe_key(stream.key, part)
            writes.append(_Write(name, stream.label(part), ttl_s, fill, latch))
        return self._enqueue(writes, self._stripes)

    def _enqueue(self, writes: list[_Write], queues: list[deque[_Write]]) -> bool:
        nbytes = sum(write.label.nbytes for write in writes)
        with self._condition:
            if self._closing.is_set():
                reason = "closed"
            elif self._queued_bytes + nbytes > self._settings.max_queue_bytes:
                reason = "queue"
            else:
                reason = ""
                self._queued_bytes += nbytes
                for write in writes:
                    queues[self._store.server_of(write.key)].append(write)
                self._condition.notify_all()
        if reason:
            self._counters.add(f"put_dropped_{reason}", len(writes))
            self._counters.add("put_dropped_bytes", nbytes)
        return not reason

    def close(self) -> None:
        """Drop what is queued, finish what is being written, end the threads."""
        with self._condition:
            self._closing.set()
            dropped = [write for queue in self._stripes + self._blocks for write in queue]
            for queue in self._stripes + self._blocks:
                queue.clear()
            self._condition.notify_all()
        for write in dropped:
            self._end(write, "closed")
        for thread in self._threads:
            thread.join()

    # Threads -------------------------------------------------------------------------------------

    def _take(self, server: int) -> list[_Write]:
        """Wait for writes to `server`: stripes first, a few at a time; empty when closed."""
        queues = self._stripes[server], self._blocks[server]
        with self._condition:
            self._condition.wait_for(lambda: any(queues) or self._closing.is_set())
            queue = queues[0] or queues[1]
            return [queue.popleft() for _ in range(min(_BATCH, len(queue)))]

    def _run(self, server: int) -> None:
        if sys.platform == "linux":
            with contextlib.suppress(OSError):  # a sandbox may forbid it; it is only faster
                # This thread only: it does not preempt the engine's as it wakes.
                os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        link = self._store.link(server)
        scratch = [bytearray(), bytearray()]
        while batch := self._take(server):
            try:
                self._write_all(server, link, batch, scratch)
            except BulkError as error:
                logger.info("event=blob_write_failed server=%s", error)
            except Exception:
                # Of a callback: a bug on the other side must not end the writing.
                logger.exception("event=blob_write_broken server=%s", self._store.servers[server])
                link.close()
            for write in batch:
                self._end(write, "error")
        link.close()

    def _write_all(
        self, server: int, link: Link, batch: list[_Write], scratch: list[bytearray]
    ) -> None:
        """Write a batch; each write is taken out of it as it ends."""
        if time.monotonic() < self._full_until_s[server]:
            self._end_all(batch, "oom")
            return
        if not link.allow():
            self._end_all(batch, "breaker")
            return
        with link.answering() as bulk:
            bulk.bound(time.monotonic() + _PUT_BOUND_S, self._closing)
            known = bulk.touch(
                [w.key for w in batch],
                [w.ttl_s for w in batch],
                [HEADER_BYTES + w.label.nbytes for w in batch],
            )
        for write, is_known in zip([*batch], known, strict=True):
            if is_known and not self._store.is_damaged(write.key):
                batch.remove(write)
                self._end(write, "")
                self._counters.add("put_skipped")
        under_way: _Write | None = None
        for index, write in enumerate([*batch]):
            self._yield_to_restores()
            # The next value is gathered and hashed while the server still takes the last one.
            payload = write.fill(self._buffer(scratch, index % 2, write.label.nbytes))
            header = write.label.header(payload)
            if under_way is not None:
                self._settle(server, link, under_way, batch)
            if not link.allow():
                self._end_all(batch, "breaker")
                return
            with link.sending() as bulk:
                bulk.bound(time.monotonic() + _PUT_BOUND_S, self._closing)
                bulk.send_set(write.key, [header, *payload], write.ttl_s)
            under_way = write
        if under_way is not None:
            self._settle(server, link, under_way, batch)

    def _buffer(self, scratch: list[bytearray], which: int, nbytes: int) -> memoryview:
        if len(scratch[which]) < nbytes:
            scratch[which] = bytearray(nbytes)
        return memoryview(scratch[which])

    def _settle(self, server: int, link: Link, write: _Write, batch: list[_Write]) -> None:
        """Take the server's answer to `write`."""
        with link.answering() as bulk:
            bulk.bound(time.monotonic() + _PUT_BOUND_S, self._closing)
            status = bulk.receive_status()
        batch.remove(write)
        if status == "OK":
            self._counters.add("put_bytes", HEADER_BYTES + write.label.nbytes)
            self._counters.add("put_values")
            self._store.trust(write.key)
            self._end(write, "")
        elif status.startswith("OOM"):
            # Pushing megabytes that are refused helps nobody.
            self._full_until_s[server] = time.monotonic() + _FULL_PAUSE_S
            self._end(write, "oom")
        else:
            logger.warning(
                "event=blob_write_refused server=%s status=%s",
                self._store.servers[server],
                status[:80],
            )
            self._end(write, "refused")

    def _end_all(self, batch: list[_Write], reason: str) -> None:
        while batch:
            self._end(batch.pop(0), reason)

    def _end(self, write: _Write, reason: str) -> None:
        """Tell the owner, and count the drop if there is a reason."""
        with self._condition:
            self._queued_bytes -= write.label.nbytes
        if reason:
            self._counters.add(f"put_dropped_{reason}")
            self._counters.add("put_dropped_bytes", write.label.nbytes)
        else:
            self._stored.note(write.key)
        try:
            write.ended(not reason)
        except Exception:
            logger.exception("event=blob_write_callback_failed")

    def _yield_to_restores(self) -> None:
        """Wait until nothing is being restored, at most `yield_s`."""
        deadline = time.monotonic() + self._settings.yield_s
        with self._condition:
            while (
                self._is_restoring() and not self._closing.is_set() and time.monotonic() < deadline
            ):
                self._condition.wait(0.01)
