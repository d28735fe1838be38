"""Fetches values from the blob servers into the router's pool, verified, several at a time.

Decides who fetches what and when a restore is late; what is fetched is the plan's business. One or
two threads per server, each with its own connection, keep two values on the way: while one is
verified and unpacked, the next arrives in the socket. Stripes are received in place into one buffer
per restore, blocks into one reused buffer per thread.

A restore has two bounds. At the first nothing more is hoped for, and the restore is cut to what is
in place; up to the second the snapshot for that may still come. A thread that watches ends what no
other thread is busy with.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from router.engine.chain import CACHE_BLOCK
from router.engine.tier import LoadJob, LoadResult, TtlClass
from router.state.bulk_connection import BulkCancelledError, BulkError, BulkLateError
from router.state.codec import HEADER_BYTES, Fault, SnapshotStream
from router.state.cost import CostModel
from router.state.counters import Counters
from router.state.kv_store import KvStore, Link, block_ttl_s, fault_of, snapshot_ttl_s
from router.state.restore import Item, RestorePlan, ValueSizes

logger = logging.getLogger(__name__)

_WATCH_S = 0.02
_DEPTH = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderSettings:
    """Bounds of loading."""

    connections_per_server: int = 0
    """0: one on hosts with up to 4 cores, two on others. A second thread pays only where there is
    a core for it; else both wait for each other and for the interpreter lock."""
    max_loads: int = 64
    """Restores under way or waiting; more are refused as `busy`."""
    min_load_s: float = 0.25
    """No restore is cut before this."""
    lateness: float = 1.5
    """A restore is cut when it takes this many times what was predicted, unless values still come:
    then not before its job's deadline nears, or `stall_s` pass without one."""
    stall_s: float = 0.25
    """A late restore without a value for so long has stopped."""


class _Load:
    """One restore under way: its plan, its snapshot's buffer, its bounds."""

    def __init__(
        self,
        plan: RestorePlan,
        done: Callable[[LoadResult], None],
        *,
        cut_s: float,
        latest_cut_s: float,
        grace_s: float,
    ) -> None:
        self.plan = plan
        self.done = done
        self.started_s = time.monotonic()
        self.cut_s = cut_s
        """Monotonic seconds of the first bound."""
        self.end_s = cut_s + grace_s
        """Of the second."""
        self.stop = threading.Event()
        """Ends all waits."""
        self.is_cut = False
        self.is_finished = False
        self.num_bytes = 0
        self._seen_bytes = 0
        self._latest_cut_s = latest_cut_s
        self.buffers: dict[int, bytearray] = {}
        """Position -> the snapshot stream that is being put together."""
        self.lock = threading.Lock()

    def bear_with(self, now: float, stall_s: float) -> None:
        """Move the bounds on while values come, as far as the job's deadline allows."""
        if self.num_bytes == self._seen_bytes or self.is_cut:
            return
        self._seen_bytes = self.num_bytes
        later_s = min(now + stall_s, self._latest_cut_s) - self.cut_s
        if later_s > 0:
            self.cut_s += later_s
            self.end_s += later_s

    def end(self, reason: str) -> None:
        """Fetch nothing any more, and wait for nothing."""
        self.plan.end(reason)
        self.stop.set()

    @property
    def bound_s(self) -> float:
        """What the sockets may wait for now."""
        return self.end_s if self.is_cut else self.cut_s


class Loader:
    """All restores of one router.

    Args:
        store: The servers.
        sizes: Of the values.
        cost: Predicts how long a restore takes, and learns how long it took.
        counters: Raised: `restored_tokens`, `restore_bytes`, `restore_seconds_<part>`,
            `loads`, `loads_<outcome>`, `corrupt_total`, `missing_total`.
        forget: Told each key that was not on its server.
        settings: Bounds.
    """

    def __init__(
        self,
        store: KvStore,
        sizes: ValueSizes,
        cost: CostModel,
        counters: Counters,
        forget: Callable[[bytes], None],
        settings: LoaderSettings | None = None,
    ) -> None:
        self._store = store
        self._sizes = sizes
        self._cost = cost
        self._counters = counters
        self._forget = forget
        self._settings = settings or LoaderSettings()
        self._condition = threading.Condition()
        self._loads: list[_Load] = []
        self._is_closed = False
        self._spare: list[bytearray] = []
        num_connections = self._settings.connections_per_server
        num_connections = num_connections or (1 if (os.cpu_count() or 1) <= 4 else 2)
        self._threads = [
            threading.Thread(target=self._run, args=(server,), name=f"blob-read-{server}-{number}")
            for number in range(num_connections)
            for server in range(len(store.servers))
        ]
        self._threads.append(threading.Thread(target=self._watch, name="blob-read-watch"))
        for thread in self._threads:
            thread.daemon = True
            thread.start()

    @property
    def num_loads(self) -> int:
        """Restores under way or waiting."""
        return len(self._loads)

    def load(
        self, job: LoadJob, candidates: Iterable[int], done: Callable[[LoadResult], None]
    ) -> None:
        """Restore; `done` is called once, by this thread only if nothing can be started.

        Args:
            job: What the engine wants.
            candidates: Positions to fall back to.
            done: Told what is in place.
        """
        now = time.monotonic()
        settings, cost, sizes = self._settings, self._cost, self._sizes
        predicted_s = cost.load_s(sizes.load_bytes(job.start, job.num_tokens))
        grace_s = settings.lateness * cost.load_s(sizes.stream(b"", 0).nbytes)
        cut_s = settings.lateness * predicted_s
        cut_s, grace_s = max(settings.min_load_s, cut_s), max(settings.min_load_s, grace_s)
        grace_s = min(grace_s, job.deadline_s / 4)
        cut_s = min(cut_s, job.deadline_s - grace_s)
        plan = RestorePlan(
            job,
            candidates,
            sizes,
            num_servers=len(self._store.servers),
            server_of=self._store.server_of,
            block_key=self._store.block_key,
            stripe_key=self._store.stripe_key,
        )
        latest_s = max(cut_s, job.deadline_s - grace_s)
        load = _Load(plan, done, cut_s=now + cut_s, latest_cut_s=now + latest_s, grace_s=grace_s)
        with self._condition:
            refusal = "closed" if self._is_closed else ""
            if len(self._loads) >= self._settings.max_loads:
                refusal = refusal or "busy"
            if not refusal:
                self._loads.append(load)
                self._condition.notify_all()
        self._counters.add("loads")
        if refusal:
            self._counters.add(f"loads_{refusal}")
            done(LoadResult(num_tokens=job.start, num_bytes=0, seconds=0.0, error=refusal))

    def close(self) -> None:
        """End all restores and threads; every `done` has been called when this returns."""
        with self._condition:
            self._is_closed = True
            loads = [*self._loads]
            self._condition.notify_all()
        for load in loads:
            load.end("closed")
        for thread in self._threads:
            thread.join()
        for load in loads:
            self._finish_if_over(load)

    # The watch -----------------------------------------------------------------------------------

    def _watch(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._loads or self._is_closed)
                if self._is_closed:
                    return
                self._condition.wait(_WATCH_S)
                loads = [*self._loads]
            for load in loads:
                self._check_bounds(load)
                self._finish_if_over(load)

    def _check_bounds(self, load: _Load) -> None:
        """Cut or end a restore that was cancelled or is late."""
        now = time.monotonic()
        load.bear_with(now, self._settings.stall_s)
        if load.plan.job.cancelled.is_set():
            load.end("cancelled")
        elif now >= load.end_s:
            load.end("late")
        elif now >= load.cut_s and not load.is_cut:
            load.is_cut = True
            load.plan.cut_to_what_is_there("late")
            self._wake()

    def _wake(self) -> None:
        """Let idle threads look for values: a plan has new ones."""
        with self._condition:
            self._condition.notify_all()

    # The fetching threads ------------------------------------------------------------------------

    def _run(self, server: int) -> None:
        link = self._store.link(server)
        value = memoryview(bytearray(HEADER_BYTES + self._sizes.block_bytes))
        while (found := self._next(server)) is not None:
            load, item = found
            try:
                self._fetch(server, link, load, item, value)
            finally:
                self._check_bounds(load)
                self._finish_if_over(load)
        link.close()

    def _next(self, server: int) -> tuple[_Load, Item] | None:
        """Wait for something to fetch from `server`, oldest restore first; None when closed."""
        with self._condition:
            while not self._is_closed:
                for load in self._loads:
                    if item := load.plan.take(server):
                        return load, item
                self._condition.wait()
            return None

    def _fetch(self, server: int, link: Link, load: _Load, first: Item, value: memoryview) -> None:
        """Fetch from `server` what `load` wants, beginning with `first`, until there is no more."""
        plan = load.plan
        under_way: deque[Item] = deque()
        next_item: Item | None = first
        try:
            while next_item is not None or under_way:
                while next_item is not None:
                    if not link.allow():
                        plan.settle(next_item, "breaker_open")
                        self._wake()
                    else:
                        under_way.append(next_item)
                        with link.sending() as bulk:
                            bulk.bound(load.bound_s, load.stop)
                            value_bytes = HEADER_BYTES + next_item.label.nbytes
                            bulk.send_get(next_item.key, _ttl_s(next_item), value_bytes)
                    next_item = plan.take(server) if len(under_way) < _DEPTH else None
                if under_way:
                    self._receive(link, load, under_way[0], value)
                    under_way.popleft()
                    next_item = plan.take(server)
        except BulkError as error:
            logger.info("event=blob_read_failed error=%s", error)
            self._give_up(load, under_way, error)
        except Exception:
            # Of a sink: a bug on the other side must not end the loading.
            logger.exception("event=blob_read_broken server=%s", self._store.servers[server])
            link.close()
            plan.end("sink")
            for item in under_way:
                plan.settle(item, "sink")

    def _receive(self, link: Link, load: _Load, item: Item, value: memoryview) -> None:
        """Receive one value, verify it and put it in place."""
        nbytes = item.label.nbytes
        header = value[:HEADER_BYTES]
        payload = value[HEADER_BYTES : HEADER_BYTES + nbytes]
        if item.stream is not None:
            start, stop = item.stream.span(item.index)
            payload = self._buffer(load, item.stream)[start:stop]
        with link.answering() as bulk:
            bulk.bound(load.bound_s, load.stop)
            length = bulk.receive([header, payload])
        received_s = time.perf_counter()
        fault = fault_of(length, header, payload, item.label)
        verified_s = time.perf_counter()
        self._counters.add("restore_seconds_verify", verified_s - received_s)
        if fault is not None:
            self._forget(item.key)
            self._counters.add("corrupt_total" if fault.is_corrupt else "missing_total")
            if fault.is_corrupt:
                self._store.distrust(item.key)
                logger.warning("event=blob_corrupt fault=%s key=%s", fault.value, item.key.decode())
            load.plan.settle(item, "missing" if fault is Fault.MISSING else "corrupt")
            self._wake()
            return
        if item.stream is None:
            load.plan.job.block_sink(item.index, payload)
            self._counters.add("restore_seconds_scatter", time.perf_counter() - verified_s)
        with load.lock:
            load.num_bytes += nbytes
        load.plan.settle(item)

    def _give_up(self, load: _Load, under_way: deque[Item], error: BulkError) -> None:
        """Settle what was on the way when the connection broke."""
        if isinstance(error, BulkCancelledError):
            reason = "cancelled"
        elif isinstance(error, BulkLateError):
            reason = "late"
        else:
            reason = "unreachable"
        for item in under_way:
            if reason == "unreachable" and load.plan.retry(item):
                continue
            if reason == "late" and not load.is_cut and load.plan.retry(item):
                continue  # the cut decides what of it is still wanted
            load.plan.settle(item, reason)
        self._wake()

    def _buffer(self, load: _Load, stream: SnapshotStream) -> memoryview:
        """Return the buffer in which `stream` is put together; fresh memory costs page faults."""
        with load.lock:
            buffer = load.buffers.get(stream.num_tokens)
            if buffer is None:
                with self._condition:
                    buffer = self._spare.pop() if self._spare else bytearray()
                if len(buffer) < stream.nbytes:
                    buffer = bytearray(self._sizes.stream(b"", CACHE_BLOCK - 1).nbytes)
                load.buffers[stream.num_tokens] = buffer
            return memoryview(buffer)

    # The end -------------------------------------------------------------------------------------

    def _finish_if_over(self, load: _Load) -> None:
        """Answer a restore from which nothing more comes; exactly one thread does it."""
        with load.lock:
            if load.is_finished or not load.plan.is_over:
                return
            load.is_finished = True
        result = self._finish(load)
        with self._condition:
            self._loads = [other for other in self._loads if other is not load]
            # One buffer is kept: restores of two snapshots at once are rare.
            self._spare = [*self._spare, *load.buffers.values()][:1]
        load.done(result)

    def _finish(self, load: _Load) -> LoadResult:
        """Hand over the snapshot, if all is there, and say what is in place."""
        plan = load.plan
        stream = plan.stream
        num_tokens, error = plan.job.start, plan.error
        if stream is not None and plan.is_complete and not plan.job.cancelled.is_set():
            opened = stream.open(memoryview(load.buffers[stream.num_tokens])[: stream.nbytes])
            if isinstance(opened, Fault):
                self._counters.add("corrupt_total")
                error = "corrupt"
            else:
                try:
                    plan.job.state_sink(stream.num_tokens, *opened)
                    num_tokens = stream.num_tokens
                except Exception:
                    logger.exception("event=blob_state_sink_failed")
                    error = "sink"
        elif plan.job.cancelled.is_set():
            error = "cancelled"
        seconds = time.monotonic() - load.started_s
        if num_tokens == plan.job.num_tokens:
            self._cost.note_load(load.num_bytes, seconds, time.monotonic())
        self._counters.add("restored_tokens", num_tokens - plan.job.start)
        self._counters.add("restore_bytes", load.num_bytes)
        self._counters.add("restore_seconds", seconds)
        self._counters.add(f"loads_{error or 'ok'}")
        return LoadResult(
            num_tokens=num_tokens, num_bytes=load.num_bytes, seconds=seconds, error=error
        )


def _ttl_s(item: Item) -> int:
    """Return how long a value that was read lives on: what its place in the prefix says, else a
    session that was read once would lose its head as soon as its tail."""
    if item.stream is not None:
        return snapshot_ttl_s(TtlClass.SESSION, item.stream.num_tokens)
    return block_ttl_s(TtlClass.SESSION, (item.index + 1) * CACHE_BLOCK)
