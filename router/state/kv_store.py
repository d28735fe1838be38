"""The blob servers as one store: which server keeps a key, who may be asked, how long values live.

Decides placement (rendezvous hashing: the server with the largest xxh3_64(key || server) has the
key, so adding one of N servers moves one key in N + 1 and no other), guards every server with a
circuit breaker, and turns importance into a time to live. The servers know nothing of one another;
a value whose server is away is a miss.

Words: a *link* is one thread's connection to one server, *links* those to all servers.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Mapping, Sequence

import xxhash

from router.engine.chain import CACHE_BLOCK
from router.engine.tier import TtlClass
from router.state import redis_keys
from router.state.breaker import BreakerSettings, CircuitBreaker
from router.state.bulk import EXISTS_BATCH, Bulk
from router.state.bulk_connection import (
    CONNECT_S,
    IO_S,
    BulkCancelledError,
    BulkError,
    BulkLateError,
)
from router.state.codec import HEADER_BYTES, Fault, Label, verify
from router.state.endpoint import Endpoint

_HOUR_S = 3600
SHARED_TTL_S = 24 * _HOUR_S
SESSION_HEAD_TTL_S = 6 * _HOUR_S
SESSION_TAIL_TTL_S = 2 * _HOUR_S
SESSION_TAIL_TOKENS = 1 << 20
_LOG_TAIL = math.log1p(SESSION_TAIL_TOKENS / CACHE_BLOCK)
_MAX_DAMAGED = 4096
"""Keys remembered; a server that damages more has other troubles."""


def block_ttl_s(ttl_class: TtlClass, num_tokens: int) -> int:
    """Return how long a cache block lives that ends at `num_tokens`.

    Servers evict what expires first, so the time is also the rank: a session's tail goes before its
    head, and both go before what sessions share. Half of it falls with the logarithm: in a short
    session, too, a block then outlives the next one by more than what it takes to compute it. The
    other half falls evenly, so that a block of a long one still has a second more than the next.
    """
    if ttl_class is not TtlClass.SESSION:
        return SHARED_TTL_S
    part = min(1.0, num_tokens / SESSION_TAIL_TOKENS)
    part += min(1.0, math.log1p(num_tokens / CACHE_BLOCK) / _LOG_TAIL)
    return round(SESSION_HEAD_TTL_S - part / 2 * (SESSION_HEAD_TTL_S - SESSION_TAIL_TTL_S))


def snapshot_ttl_s(ttl_class: TtlClass, num_tokens: int) -> int:
    """Return how long the snapshot at `num_tokens` lives: as long as the last cache block before
    it. Without that it is of no use, and it is larger."""
    return block_ttl_s(ttl_class, num_tokens - num_tokens % CACHE_BLOCK)


class KvStore:
    """The blob servers; shared by all threads, each with its own links.

    Args:
        endpoints: At least one; their order does not matter, their names do.
        namespace: Stands in every key, for people and access lists; what keeps values apart is the
            hash.
        breaker: When a server's breaker opens.
        connect_s: Bound of connecting to a server.
        io_s: Bound of a wait without progress.

    Raises:
        ConfigurationError: A server's certificates cannot be read.
    """

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        namespace: str,
        *,
        breaker: BreakerSettings | None = None,
        connect_s: float = CONNECT_S,
        io_s: float = IO_S,
    ) -> None:
        self.endpoints = tuple(endpoints)
        self.servers = tuple(str(endpoint) for endpoint in endpoints)
        self.breakers = tuple(CircuitBreaker(name, breaker) for name in self.servers)
        self.namespace = namespace
        self._names = tuple(name.encode() for name in self.servers)
        self._connect_s = connect_s
        self._io_s = io_s
        self._damaged: set[bytes] = set()
        for endpoint in endpoints:
            endpoint.ssl_context()

    def distrust(self, key: bytes) -> None:
        """Note that the value under `key` is not what it should be: who has it writes it again,
        though there is one. Any thread, as the next two."""
        if len(self._damaged) < _MAX_DAMAGED:
            self._damaged.add(key)

    def trust(self, key: bytes) -> None:
        """Note that the value under `key` was written again."""
        self._damaged.discard(key)

    def is_damaged(self, key: bytes) -> bool:
        """Say whether the value under `key` was seen damaged, and not written again."""
        return key in self._damaged

    def block_key(self, block_hash: bytes) -> bytes:
        """Return the key of a cache block."""
        return redis_keys.block_key(self.namespace, block_hash)

    def stripe_key(self, position_hash: bytes, part: int) -> bytes:
        """Return the key of a snapshot's stripe."""
        return redis_keys.stripe_key(self.namespace, position_hash, part)

    def server_of(self, key: bytes) -> int:
        """Return which server keeps `key`; equal scores, which do not occur, go to the first."""
        if len(self._names) == 1:
            return 0
        scores = [xxhash.xxh3_64_intdigest(key + name) for name in self._names]
        return scores.index(max(scores))

    def link(self, server: int) -> Link:
        """Return a new link, not yet connected, for the calling thread."""
        bulk = Bulk(self.endpoints[server], connect_s=self._connect_s, io_s=self._io_s)
        return Link(bulk, self.breakers[server])

    def links(self) -> Links:
        """Return new links to all servers, for the calling thread."""
        return Links(self)


class Link:
    """One thread's connection to one server, behind the server's breaker.

    Ask `allow` before each exchange, send inside `sending`, take the answer inside `answering`.
    """

    def __init__(self, bulk: Bulk, breaker: CircuitBreaker) -> None:
        self.bulk = bulk
        self._breaker = breaker

    def allow(self) -> bool:
        """Whether the server may be asked now; False makes no socket call."""
        return self._breaker.allow()

    def sending(self) -> _Exchange:
        """Tell the breaker if the block fails; that bytes left says nothing about the server.

        A `BulkError` passes through; the connection is closed then.
        """
        return _Exchange(self.bulk, self._breaker, is_answer=False)

    def answering(self) -> _Exchange:
        """Tell the breaker how the block ended, in which the server answered.

        A `BulkError` passes through; the connection is closed then.
        """
        return _Exchange(self.bulk, self._breaker, is_answer=True)

    def close(self) -> None:
        """Close the connection."""
        self.bulk.close()


class _Exchange:
    """One block of calls on a connection; not a generator, because every value passes two."""

    __slots__ = ("_breaker", "_bulk", "_is_answer", "_started_s")

    def __init__(self, bulk: Bulk, breaker: CircuitBreaker, *, is_answer: bool) -> None:
        self._bulk = bulk
        self._breaker = breaker
        self._is_answer = is_answer
        self._started_s = time.monotonic()

    def __enter__(self) -> Bulk:
        return self._bulk

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            if self._is_answer:
                self._breaker.succeeded(time.monotonic() - self._started_s)
        elif isinstance(error, BulkError):
            is_late = isinstance(error, BulkLateError) and not error.is_stalled
            if not is_late and not isinstance(error, BulkCancelledError):
                self._breaker.failed()
        else:
            self._bulk.close()


class Links:
    """One thread's connections to all servers: probing, and reading or writing a few values."""

    def __init__(self, store: KvStore) -> None:
        self._store = store
        self._links = [store.link(server) for server in range(len(store.servers))]

    def exists(self, keys: Sequence[bytes], deadline: float, *, value_bytes: int = 0) -> list[bool]:
        """Ask which values are there, all servers at once; those of a server in trouble are not.

        Args:
            keys: Any number.
            deadline: Monotonic seconds; what has not been answered by then is not there.
            value_bytes: Of each, header included; matters for large ones.
        """
        found = [False] * len(keys)
        for server, positions in self._by_server(keys).items():
            self._exists_on(server, positions, keys, deadline, value_bytes, found)
        return found

    def _exists_on(
        self,
        server: int,
        positions: Sequence[int],
        keys: Sequence[bytes],
        deadline: float,
        value_bytes: int,
        found: list[bool],
    ) -> None:
        link = self._links[server]
        for start in range(0, len(positions), EXISTS_BATCH):
            batch = positions[start : start + EXISTS_BATCH]
            if not link.allow():
                return
            try:
                with link.answering() as bulk:
                    bulk.bound(deadline)
                    answers = bulk.exists([keys[position] for position in batch], value_bytes)
            except BulkError:
                return
            for position, answer in zip(batch, answers, strict=True):
                found[position] = answer

    def touch(
        self, keys: Sequence[bytes], ttl_s: Sequence[int], value_bytes: int, deadline: float
    ) -> None:
        """Let values live at least `ttl_s` more seconds each, those that are there; the last key
        first, so that of two with the same time the first outlives the second."""
        for server, positions in self._by_server(keys).items():
            link = self._links[server]
            last_first = positions[::-1]
            for start in range(0, len(last_first), EXISTS_BATCH // 2):
                batch = last_first[start : start + EXISTS_BATCH // 2]
                if not link.allow():
                    break
                try:
                    with link.answering() as bulk:
                        bulk.bound(deadline)
                        bulk.touch(
                            [keys[i] for i in batch],
                            [ttl_s[i] for i in batch],
                            [value_bytes] * len(batch),
                        )
                except BulkError:
                    break

    def get(
        self,
        keys: Sequence[bytes],
        labels: Sequence[Label],
        into: Sequence[memoryview],
        *,
        ttl_s: int,
        deadline: float,
        cancelled: threading.Event | None = None,
    ) -> list[Fault | None]:
        """Read and verify values, one after the other.

        Args:
            keys: Of the values.
            labels: What each must be.
            into: Where each payload goes: `labels[i].nbytes` bytes.
            ttl_s: Seconds that each lives on, at least.
            deadline: Monotonic seconds.
            cancelled: Ends the wait early.

        Returns:
            Per value None, or why it is a miss; a server in trouble has none.
        """
        faults: list[Fault | None] = [Fault.MISSING] * len(keys)
        header = memoryview(bytearray(HEADER_BYTES))
        for index, (key, label, payload) in enumerate(zip(keys, labels, into, strict=True)):
            link = self._links[self._store.server_of(key)]
            if not link.allow():
                continue
            try:
                with link.answering() as bulk:
                    bulk.bound(deadline, cancelled)
                    bulk.send_get(key, ttl_s, HEADER_BYTES + label.nbytes)
                    length = bulk.receive([header, payload])
            except BulkError:
                continue
            faults[index] = fault_of(length, header, payload, label)
        return faults

    def header(self, key: bytes, *, ttl_s: int, deadline: float) -> bytes | None:
        """Return the header of a value, which lives on for `ttl_s`; None where there is none, or
        the server is in trouble."""
        link = self._links[self._store.server_of(key)]
        if not link.allow():
            return None
        header = bytearray(HEADER_BYTES)
        try:
            with link.answering() as bulk:
                bulk.bound(deadline)
                bulk.send_get_ranges([key], 0, HEADER_BYTES, [ttl_s])
                length = bulk.receive([memoryview(header)])
        except BulkError:
            return None
        return bytes(header) if length == HEADER_BYTES else None

    def put(
        self,
        key: bytes,
        label: Label,
        payload: Sequence[memoryview],
        *,
        ttl_s: int,
        deadline: float,
    ) -> str:
        """Write one value.

        Returns:
            `OK`, the server's error (`OOM ...`), or empty where the server is in trouble.
        """
        link = self._links[self._store.server_of(key)]
        if not link.allow():
            return ""
        try:
            with link.answering() as bulk:
                bulk.bound(deadline)
                return bulk.set(key, [label.header(payload), *payload], ttl_s)
        except BulkError:
            return ""

    def of(self, server: int) -> Link:
        """Return the connection to one server."""
        return self._links[server]

    def info(self, deadline: float) -> dict[str, Mapping[str, str]]:
        """Ask every server how it is; one in trouble is left out.

        Returns:
            Server -> fields of INFO memory, stats and clients.
        """
        found = {}
        for name, link in zip(self._store.servers, self._links, strict=True):
            if not link.allow():
                continue
            with contextlib.suppress(BulkError), link.answering() as bulk:
                bulk.bound(deadline)
                found[name] = bulk.info("memory", "stats", "clients")
        return found

    def close(self) -> None:
        """Close all connections."""
        for link in self._links:
            link.close()

    def _by_server(self, keys: Sequence[bytes]) -> dict[int, list[int]]:
        grouped: dict[int, list[int]] = {}
        for position, key in enumerate(keys):
            grouped.setdefault(self._store.server_of(key), []).append(position)
        return grouped


def fault_of(
    length: int | None, header: memoryview, payload: memoryview, label: Label
) -> Fault | None:
    """Return why what `Bulk.receive` gave for `[header, payload]` is a miss; None: it is sound."""
    if length is None:
        return Fault.MISSING
    if length != HEADER_BYTES + label.nbytes:
        return Fault.LENGTH
    return verify(header, payload, label)
