"""Keeps the oldest KV of a sequence that does not fit the pool, and hands it to the layers.

Decides where it lies: in host memory up to a budget, beyond that in a cold tier (the blob servers).
Who spills, and when, is `router.engine.spill`'s. Knows neither Redis nor sockets.

Words: *cold* cache blocks are the first ones of a sequence, 128 tokens each, without a gap; a
*shelf* holds `SHELF_BLOCKS` of them, in memory or in the tier, and is what a layer attends to at a
time. In memory a shelf is layer-major, so a layer's part of it is one slice that nobody copies.

Cache blocks come from the pool, one by one, or all at once from the tier, when a long session goes
on in another router: room is *reserved* for them, each is *placed*, and what is whole is *settled*.
A cold value is read back as it was written, or `ColdKvError` is raised: never other bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from protos.errors import ColdKvError
from router.engine.chain import CACHE_BLOCK

logger = logging.getLogger(__name__)

Bytes = NDArray[np.uint8]

SHELF_BLOCKS = 32
"""Cache blocks of a shelf: 4096 tokens. A read from the tier is so many slices in one go."""


class ColdTier(Protocol):
    """Where cold cache blocks go that have no room in memory. Bounded waits; any thread."""

    def put(self, key: bytes, parent: bytes, values: Bytes, *, num_tokens: int) -> Any:
        """Store one cache block `[layers, bytes]` that ends at `num_tokens`, or find it stored.

        Returns:
            What `read` wants to find and verify it; None where it is not stored for certain.
        """
        ...

    def read(self, handles: Sequence[Any], layer: int, out: Bytes) -> bool:
        """Read one layer's part of some cache blocks into `out`, `[len(handles), bytes]`.

        Returns:
            Whether every part is there and is what was put.
        """
        ...

    def adopt(self, key: bytes, values: Bytes, *, num_tokens: int) -> Any:
        """Return what `read` wants for a cache block `[layers, bytes]` that lies in the tier.

        It was read from there a moment ago and verified; nothing is sent. Any number of threads.
        """
        ...


@dataclass(slots=True)
class _Shelf:
    values: Bytes | None
    """`[layers, SHELF_BLOCKS, bytes]`; None where it lies in the tier."""
    handles: list[Any] = field(default_factory=lambda: [None] * SHELF_BLOCKS)
    """Of the tier, one a cache block."""
    num_blocks: int = 0


class ColdStore:
    """Cold cache blocks of all sequences.

    Args:
        num_layers: Full-attention layers.
        block_bytes: Bytes of one cache block, all layers together.
        max_bytes: Host memory for them, in whole shelves.
        tier: Takes the rest; None: there is no rest.
    """

    def __init__(
        self, *, num_layers: int, block_bytes: int, max_bytes: int, tier: ColdTier | None = None
    ) -> None:
        assert block_bytes % num_layers == 0, "all layers have the same KV"
        self.num_layers = num_layers
        self.block_bytes = block_bytes
        self.layer_bytes = block_bytes // num_layers
        self.tier = tier
        self._max_shelves = max_bytes // (SHELF_BLOCKS * block_bytes)
        self._num_shelves = 0
        self._reader = ThreadPoolExecutor(1, "cold-reader") if tier is not None else None

    @property
    def num_bytes(self) -> int:
        """Host memory in use."""
        return self._num_shelves * SHELF_BLOCKS * self.block_bytes

    @property
    def max_memory_tokens(self) -> int:
        """Tokens that fit into memory."""
        return self._max_shelves * SHELF_BLOCKS * CACHE_BLOCK

    @property
    def max_tokens(self) -> int | None:
        """Tokens that fit; None: as many as the tier takes."""
        return None if self.tier is not None else self.max_memory_tokens

    def new_sequence(self) -> ColdSequence:
        """Return a place for the cold cache blocks of one sequence."""
        return ColdSequence(self)

    def take_shelf(self) -> _Shelf:
        """Return an empty shelf, in memory if the budget has room.

        Raises:
            ColdKvError: Neither memory nor a tier.
        """
        if self._num_shelves < self._max_shelves:
            self._num_shelves += 1
            return _Shelf(np.empty((self.num_layers, SHELF_BLOCKS, self.layer_bytes), np.uint8))
        if self.tier is None:
            raise ColdKvError(f"all {self._max_shelves * SHELF_BLOCKS} places in memory are taken")
        return _Shelf(None)

    def give_back(self, shelf: _Shelf) -> None:
        """Free a shelf."""
        if shelf.values is not None:
            shelf.values = None
            self._num_shelves -= 1

    def prefetch(self, read: Callable[[], bool]) -> Future[bool]:
        """Let the reader's thread read from the tier."""
        assert self._reader is not None, "only a tier is read ahead"
        return self._reader.submit(read)

    def close(self) -> None:
        """End the reader's thread."""
        if self._reader is not None:
            self._reader.shutdown()


class ColdSequence:
    """The cold cache blocks of one sequence. The engine thread's."""

    def __init__(self, store: ColdStore) -> None:
        self._store = store
        self._shelves: list[_Shelf] = []
        self.num_blocks = 0
        """Cache blocks."""

    @property
    def num_tokens(self) -> int:
        """Tokens."""
        return self.num_blocks * CACHE_BLOCK

    def append(self, key: bytes, parent: bytes, values: Bytes) -> None:
        """Add the next cache block.

        Args:
            key: Its name in the tier.
            parent: The name of the one before it.
            values: The block, all layers, layer-major; copied.

        Raises:
            ColdKvError: It cannot be kept.
        """
        index = self.num_blocks
        self.reserve(index + 1)
        shelf, store = self._shelves[index // SHELF_BLOCKS], self._store
        if shelf.values is not None:
            self.place(index, key, values)
        else:
            assert store.tier is not None, "a shelf is in memory or in the tier"
            handle = store.tier.put(
                key, parent, self._parts(values), num_tokens=(index + 1) * CACHE_BLOCK
            )
            if handle is None:
                raise ColdKvError("the cold tier did not take a cache block")
            shelf.handles[index % SHELF_BLOCKS] = handle
        self.settle(index + 1)

    def reserve(self, num_blocks: int) -> None:
        """Take shelves for so many cache blocks in all, so that `place` finds one.

        Raises:
            ColdKvError: There is no room.
        """
        while len(self._shelves) * SHELF_BLOCKS < num_blocks:
            self._shelves.append(self._store.take_shelf())

    def place(self, index: int, key: bytes, values: Bytes) -> None:
        """Put a verified cache block, come from the tier, where `reserve` made room for it.

        Any thread, one a cache block. On a shelf of the tier only its handle is kept: that is what
        is read, part by part, while the layers run.
        """
        shelf, place = self._shelves[index // SHELF_BLOCKS], index % SHELF_BLOCKS
        parts = self._parts(values)
        if shelf.values is not None:
            shelf.values[:, place] = parts
        else:
            assert self._store.tier is not None, "a shelf is in memory or in the tier"
            num_tokens = (index + 1) * CACHE_BLOCK
            shelf.handles[place] = self._store.tier.adopt(key, parts, num_tokens=num_tokens)

    def settle(self, num_blocks: int) -> None:
        """Say how many cache blocks are in place; shelves reserved for more are given back."""
        changed = min(self.num_blocks, num_blocks) // SHELF_BLOCKS
        self.num_blocks = num_blocks
        num_shelves = -(-num_blocks // SHELF_BLOCKS)
        for shelf in self._shelves[num_shelves:]:
            self._store.give_back(shelf)
        del self._shelves[num_shelves:]
        for number in range(changed, num_shelves):
            filled = num_blocks - number * SHELF_BLOCKS
            self._shelves[number].num_blocks = min(SHELF_BLOCKS, filled)

    def _parts(self, values: Bytes) -> Bytes:
        return values.reshape(self._store.num_layers, self._store.layer_bytes)

    def past(self) -> ShelvedPast:
        """Return what one step reads; nothing is appended meanwhile."""
        return ShelvedPast(self._store, self._shelves, self.num_blocks)

    def close(self) -> None:
        """Free all of it."""
        for shelf in self._shelves:
            self._store.give_back(shelf)
        self._shelves, self.num_blocks = [], 0


class ShelvedPast:
    """`router.engine.batch.ColdPast` of one step.

    Shelves of the tier are read one ahead, on the reader's thread, into two buffers in turn; the
    first of a layer while the layers before it compute. Use as a context: leaving it waits for a
    read that nobody will take.
    """

    def __init__(self, store: ColdStore, shelves: list[_Shelf], num_blocks: int) -> None:
        self.num_tokens = num_blocks * CACHE_BLOCK
        self._store = store
        self._shelves = shelves
        self._layer = 0
        self._ahead: Future[bool] | None = None
        is_remote = any(shelf.values is None for shelf in shelves)
        shape = (2 if is_remote else 0, SHELF_BLOCKS, store.layer_bytes)
        self._buffers = np.empty(shape, np.uint8)
        self._turn = 0
        self._wanted = iter(
            [
                (layer, shelf)
                for layer in range(store.num_layers)
                for shelf in shelves
                if shelf.values is None
            ]
        )
        if is_remote:
            self._read_ahead()

    def next_layer(self) -> Iterator[Bytes]:
        """See `ColdPast.next_layer` of the batch.

        Raises:
            ColdKvError: A cold value is gone or damaged.
        """
        layer, self._layer = self._layer, self._layer + 1
        for shelf in self._shelves:
            if shelf.values is not None:
                yield shelf.values[layer, : shelf.num_blocks]
            else:
                yield self._fetched(shelf)

    def _read_ahead(self) -> None:
        """Begin the next read into the buffer that is not in use."""
        self._ahead = None
        job = next(self._wanted, None)
        if job is None:
            return
        layer, shelf = job
        out = self._buffers[self._turn, : shelf.num_blocks]
        tier, handles = self._store.tier, shelf.handles[: shelf.num_blocks]
        assert tier is not None, "a shelf is in memory or in the tier"
        self._ahead = self._store.prefetch(lambda: tier.read(handles, layer, out))

    def _fetched(self, shelf: _Shelf) -> Bytes:
        """Take what was read ahead, and begin the next read into the other buffer."""
        assert self._ahead is not None, "layers and shelves come in their order"
        is_sound = self._ahead.result()
        section = self._buffers[self._turn, : shelf.num_blocks]
        self._turn = 1 - self._turn
        if not is_sound:
            self._ahead = None
            raise ColdKvError("a cache block of the cold tier is gone or damaged")
        self._read_ahead()
        return section

    def __enter__(self) -> ShelvedPast:
        return self

    def __exit__(self, *_: object) -> None:
        if self._ahead is not None:
            self._ahead.cancel()
            if not self._ahead.cancelled():
                self._ahead.exception()
            self._ahead = None
