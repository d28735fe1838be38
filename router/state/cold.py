"""The blob servers as the place of KV that has left the pool of a router that still needs it.

Implements `router.engine.cold_store.ColdTier`. A cold cache block is the very value that prefixes
are stored as, so what write-through has stored already is not sent again, and other routers may
find it. A layer's part of it is a range of the value. A range cannot be checked against the
header's checksum, so the router keeps one of each layer's part itself: 8 bytes for 128 tokens of a
layer. What is gone, short or changed is a miss, and the caller's matter.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from router.engine.tier import TtlClass
from router.state.bulk_connection import BulkError
from router.state.codec import HEADER_BYTES, block_label
from router.state.kv_store import KvStore, block_ttl_s


@dataclass(frozen=True, slots=True, kw_only=True)
class ColdSettings:
    """Bounds of one call."""

    put_s: float = 2.0
    """To store a cache block; a spilling step waits for it."""
    read_s: float = 5.0
    """To read one layer's part of a few dozen cache blocks."""


@dataclass(frozen=True, slots=True)
class ColdValue:
    """A cache block on a server."""

    key: bytes
    """The server's key."""
    sums: tuple[int, ...]
    """xxh3_64 of every layer's part."""
    ttl_s: int
    """Seconds that it lives after its last use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ColdStats:
    """What has gone to the servers and come back, since the start."""

    sent_bytes: int = 0
    """Of cache blocks that the servers did not have already."""
    read_blocks: int = 0
    """Cache blocks of which all layers were read; each step of a spilling sequence reads them."""
    read_bytes: int = 0


class BlobCold:
    """`ColdTier` over the blob servers.

    `put` and `read` may be called by two different threads, each by one.

    Args:
        store: The servers.
        settings: Bounds.
    """

    def __init__(self, store: KvStore, settings: ColdSettings | None = None) -> None:
        self.settings = settings or ColdSettings()
        self._store = store
        self._writing = store.links()
        self._reading = store.links()
        # Each is raised by one thread.
        self._sent_bytes = self._read_blocks = self._read_bytes = 0

    def stats(self) -> ColdStats:
        """Return what was done; any thread."""
        return ColdStats(
            sent_bytes=self._sent_bytes,
            read_blocks=self._read_blocks,
            read_bytes=self._read_bytes,
        )

    def put(
        self, key: bytes, parent: bytes, values: NDArray[np.uint8], *, num_tokens: int
    ) -> ColdValue | None:
        """See `ColdTier.put`."""
        store_key = self._store.block_key(key)
        deadline = time.monotonic() + self.settings.put_s
        label = block_label(key, parent, values.nbytes)
        payload = memoryview(values.reshape(-1).data)
        ttl_s = block_ttl_s(TtlClass.SESSION, num_tokens)
        known = None
        if not self._store.is_damaged(store_key):
            known = self._writing.header(store_key, ttl_s=ttl_s, deadline=deadline)
        if known == label.header([payload]):
            return self.adopt(key, values, num_tokens=num_tokens)
        if known is not None:
            # Computed elsewhere, rounded otherwise, and perhaps being read: that one counts.
            stored = np.empty_like(values)
            into = memoryview(stored.reshape(-1).data)
            found = self._writing.get([store_key], [label], [into], ttl_s=ttl_s, deadline=deadline)
            if found == [None]:
                return self.adopt(key, stored, num_tokens=num_tokens)
        status = self._writing.put(store_key, label, [payload], ttl_s=ttl_s, deadline=deadline)
        if status != "OK":
            return None
        self._sent_bytes += values.nbytes
        self._store.trust(store_key)
        return self.adopt(key, values, num_tokens=num_tokens)

    def adopt(self, key: bytes, values: NDArray[np.uint8], *, num_tokens: int) -> ColdValue:
        """See `ColdTier.adopt`."""
        ttl_s = block_ttl_s(TtlClass.SESSION, num_tokens)
        sums = tuple(_sum_of(part) for part in values)
        return ColdValue(self._store.block_key(key), sums, ttl_s)

    def read(self, handles: Sequence[ColdValue], layer: int, out: NDArray[np.uint8]) -> bool:
        """See `ColdTier.read`."""
        start = HEADER_BYTES + layer * out.shape[1]
        value_bytes = HEADER_BYTES + len(handles[0].sums) * out.shape[1]
        by_server: dict[int, list[int]] = {}
        for index, value in enumerate(handles):
            by_server.setdefault(self._store.server_of(value.key), []).append(index)
        deadline = time.monotonic() + self.settings.read_s
        for server, indices in by_server.items():
            link = self._reading.of(server)
            if not link.allow():
                return False
            keys = [handles[index].key for index in indices]
            ttl_s = [handles[index].ttl_s for index in indices]
            try:
                with link.answering() as bulk:
                    bulk.bound(deadline)
                    bulk.send_get_ranges(keys, start, out.shape[1], ttl_s, value_bytes)
                    lengths = [bulk.receive([memoryview(out[index].data)]) for index in indices]
            except BulkError:
                return False
            if any(length != out.shape[1] for length in lengths):
                for index, length in zip(indices, lengths, strict=True):
                    if length != out.shape[1]:
                        self._store.distrust(handles[index].key)
                return False
        self._read_bytes += out.nbytes
        self._read_blocks += sum(layer == len(value.sums) - 1 for value in handles)
        is_sound = True
        for part, value in zip(out, handles, strict=True):
            if _sum_of(part) != value.sums[layer]:
                self._store.distrust(value.key)
                is_sound = False
        return is_sound

    def close(self) -> None:
        """Close all connections; nothing is put or read any more."""
        self._writing.close()
        self._reading.close()


def _sum_of(part: NDArray[np.uint8]) -> int:
    return int(xxhash.xxh3_64_intdigest(part.data))
