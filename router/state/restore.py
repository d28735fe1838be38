"""The plan of one restore: what is still to fetch, and what is left when something is missing.

Pure but for a lock; knows neither sockets nor threads. A restore aims at one candidate: all stripes
of its snapshot, then all blocks before it, head first. When a value is missing, damaged or late, it
aims at the next lower candidate that can still be complete; KV without a snapshot counts nothing.

    aim = 900 tokens, block 4 (512..639) is missing  ->  only candidates up to 512 + 127 are left
    aim = 900, a stripe of it is missing             ->  all candidates below 900 are left
    aim = 900, time is up with blocks 0..3 in place  ->  candidates up to 512 + 127, blocks done
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from router.engine.chain import CACHE_BLOCK
from router.engine.tier import LoadJob
from router.state.codec import Label, SnapshotStream, block_label


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueSizes:
    """What the model makes of a cache block and of a snapshot."""

    block_bytes: int
    """KV of 128 tokens in all full-attention layers."""
    state_bytes: int
    """State of all other layers, without a tail."""

    def stream(self, key: bytes, num_tokens: int) -> SnapshotStream:
        """Return the layout of the snapshot at `num_tokens`."""
        tail = num_tokens % CACHE_BLOCK
        return SnapshotStream(
            key=key,
            num_tokens=num_tokens,
            state_bytes=self.state_bytes,
            tail_bytes=tail * self.block_bytes // CACHE_BLOCK,
        )

    def load_bytes(self, start: int, num_tokens: int) -> int:
        """Return what restoring `num_tokens` reads when `start` are in place."""
        num_blocks = num_tokens // CACHE_BLOCK - start // CACHE_BLOCK
        return num_blocks * self.block_bytes + self.stream(b"", num_tokens).nbytes


@dataclass(frozen=True, slots=True, eq=False)
class Item:
    """One value to fetch."""

    key: bytes
    label: Label
    index: int
    """Of the block in the sequence, or of the stripe in the stream."""
    stream: SnapshotStream | None
    """Of a stripe."""


class RestorePlan:
    """Hands out the values of one restore and takes what became of them; thread-safe.

    `take` and `settle` come in pairs: the restore is over when `is_over` and nothing is out.

    Args:
        job: What the engine wants.
        candidates: Positions to fall back to, in any order.
        sizes: Of its values.
        num_servers: Values are handed out by server.
        server_of: Redis key -> server.
        block_key: Block hash -> Redis key.
        stripe_key: Position hash, part -> Redis key.
    """

    def __init__(
        self,
        job: LoadJob,
        candidates: Iterable[int],
        sizes: ValueSizes,
        *,
        num_servers: int,
        server_of: Callable[[bytes], int],
        block_key: Callable[[bytes], bytes],
        stripe_key: Callable[[bytes, int], bytes],
    ) -> None:
        self.job = job
        self.error = ""
        """Why the restore aims lower than it was asked to; the first reason stays."""
        self._sizes = sizes
        self._server_of = server_of
        self._block_key = block_key
        self._stripe_key = stripe_key
        self._lock = threading.Lock()
        wanted = {n for n in (job.num_tokens, *candidates) if job.start < n <= job.num_tokens}
        self._candidates = sorted(wanted)  # the highest is the aim
        self._first_block = job.start // CACHE_BLOCK
        self._in_place = bytearray(max(0, job.num_tokens // CACHE_BLOCK - self._first_block))
        self._blocks = [self._blocks_of(server) for server in range(num_servers)]
        self._stripes: list[deque[Item]] = [deque() for _ in range(num_servers)]
        self._retried: set[bytes] = set()
        self._again: list[deque[Item]] = [deque() for _ in range(num_servers)]
        self._num_out = 0
        self._num_stripes_left = 0
        self._is_ended = False
        self.stream: SnapshotStream | None = None
        """Of the aim; None when there is none left."""
        self._aim()

    @property
    def aim(self) -> int:
        """The candidate being restored; `job.start` when there is none left."""
        return self.stream.num_tokens if self.stream else self.job.start

    @property
    def is_complete(self) -> bool:
        """Whether everything before the aim, and its snapshot, is in place."""
        with self._lock:
            return self._is_complete()

    @property
    def is_over(self) -> bool:
        """Whether nothing will be handed out any more and nothing is out."""
        with self._lock:
            return not self._num_out and (
                self._is_ended or self.stream is None or self._is_complete()
            )

    def end(self, reason: str) -> None:
        """Give up: hand out nothing any more, restore nothing."""
        with self._lock:
            self._is_ended = True
            self._candidates = []
            self.stream = None
            self.error = self.error or reason

    def take(self, server: int) -> Item | None:
        """Return the next value to fetch from `server`; None: nothing, for now or for good."""
        with self._lock:
            if self._is_ended or self.stream is None:
                return None
            item = self._next(server)
            if item is not None:
                self._num_out += 1
            return item

    def settle(self, item: Item, reason: str = "") -> None:
        """Take what became of an item that was out: in place, or missing for `reason`."""
        with self._lock:
            self._num_out -= 1
            if reason:
                self._miss(item, reason)
            elif item.stream is None:
                self._in_place[item.index - self._first_block] = 1
            elif item.stream is self.stream:
                self._num_stripes_left -= 1

    def retry(self, item: Item) -> bool:
        """Put an item back whose connection broke; False: it was put back once already."""
        with self._lock:
            if item.key in self._retried or self._is_ended:
                return False
            self._retried.add(item.key)
            self._num_out -= 1
            self._again[self._server_of(item.key)].append(item)
            return True

    def cut_to_what_is_there(self, reason: str) -> None:
        """Aim at the highest candidate all of whose blocks are in place."""
        with self._lock:
            reached = self._first_block + self._num_leading()
            if not (self.stream and self.stream.num_tokens // CACHE_BLOCK <= reached):
                self._lower(lambda n: n // CACHE_BLOCK <= reached, reason)

    # Under the lock ------------------------------------------------------------------------------

    def _num_leading(self) -> int:
        hole = self._in_place.find(0)
        return len(self._in_place) if hole < 0 else hole

    def _is_complete(self) -> bool:
        if self.stream is None or self._num_stripes_left:
            return False
        return self._num_leading() >= self.stream.num_tokens // CACHE_BLOCK - self._first_block

    def _next(self, server: int) -> Item | None:
        if self._stripes[server]:
            return self._stripes[server].popleft()
        while self._again[server]:
            item = self._again[server].popleft()
            if self._is_wanted(item):
                return item
        block = next(self._blocks[server], None)
        return block if block is not None and self._is_wanted(block) else None

    def _is_wanted(self, item: Item) -> bool:
        if self.stream is None:
            return False
        if item.stream is not None:
            return item.stream is self.stream
        return (item.index + 1) * CACHE_BLOCK <= self.stream.num_tokens

    def _blocks_of(self, server: int) -> Iterator[Item]:
        """Yield the blocks that `server` keeps, head first."""
        chain = self.job.chain
        parent = chain.position_hash(self._first_block * CACHE_BLOCK)
        for index in range(self._first_block, self._first_block + len(self._in_place)):
            block_hash = chain.block_hash(index)
            key = self._block_key(block_hash)
            if self._server_of(key) == server:
                label = block_label(block_hash, parent, self._sizes.block_bytes)
                yield Item(key, label, index, None)
            parent = block_hash

    def _miss(self, item: Item, reason: str) -> None:
        if not self._is_wanted(item):
            return
        if item.stream is None:
            self._lower(lambda n: n // CACHE_BLOCK <= item.index, reason)
        else:
            self._lower(lambda n: n < item.label.num_tokens, reason)

    def _lower(self, is_possible: Callable[[int], bool], reason: str) -> None:
        self._candidates = [n for n in self._candidates if is_possible(n)]
        self.error = self.error or reason
        self._aim()

    def _aim(self) -> None:
        """Aim at the highest candidate left, and plan its stripes."""
        for queue in self._stripes:
            queue.clear()
        self._num_stripes_left = 0
        if not self._candidates:
            self.stream = None
            return
        num_tokens = self._candidates[-1]
        key = self.job.chain.position_hash(num_tokens)
        self.stream = self._sizes.stream(key, num_tokens)
        self._num_stripes_left = self.stream.num_stripes
        for part in range(self.stream.num_stripes):
            stripe_key = self._stripe_key(key, part)
            item = Item(stripe_key, self.stream.label(part), part, self.stream)
            self._stripes[self._server_of(stripe_key)].append(item)
