"""Which KV blocks are free and which are owned.

Decides nothing but that: a block has one owner or none, and none is ever lost. An owner is a
sequence or the prefix cache, which counts the sequences that share what it owns. What the cache
holds for nobody counts as free: it is given up, oldest first, when blocks are wanted. Who gets
blocks is the scheduler's choice.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol


class Reserve(Protocol):
    """An owner that gives up blocks on demand."""

    @property
    def num_spare(self) -> int:
        """Blocks it would give up."""
        ...

    def give_up(self, count: int) -> None:
        """Release at least `count` blocks, at most `num_spare` rounded up to its own unit."""
        ...


class BlockManager:
    """The pool of KV blocks of all full-attention layers; block b is the same page number in every
    layer."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.reserve: Reserve | None = None
        self._free = list(range(num_blocks - 1, -1, -1))
        self._owned = bytearray(num_blocks)

    @property
    def num_free(self) -> int:
        """Blocks without an owner, and those that the reserve would give up."""
        return len(self._free) + (0 if self.reserve is None else self.reserve.num_spare)

    @property
    def num_used(self) -> int:
        """All other blocks."""
        return self.num_blocks - self.num_free

    def blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks, most recently freed first; the caller has checked `num_free`."""
        assert count <= self.num_free, f"{count} blocks wanted, {self.num_free} free"
        if count > len(self._free) and self.reserve is not None:
            self.reserve.give_up(count - len(self._free))
        split = len(self._free) - count
        blocks = self._free[split:][::-1]
        del self._free[split:]
        for block in blocks:
            self._owned[block] = 1
        return blocks

    def release(self, blocks: Iterable[int]) -> None:
        """Give blocks back, each exactly once."""
        given = list(blocks)
        for block in given:
            assert self._owned[block], f"block {block} has no owner"
            self._owned[block] = 0
        self._free += reversed(given)
