"""Which KV blocks are free and which are owned.

Decides nothing but that: a block has one owner or none, and none is ever lost. Who gets blocks is
the scheduler's choice.
"""

from __future__ import annotations


class BlockManager:
    """The pool of KV blocks of all full-attention layers; block b is the same page number in every
    layer."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))
        self._owned = bytearray(num_blocks)

    @property
    def num_free(self) -> int:
        """Blocks without an owner."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks with an owner."""
        return self.num_blocks - len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks, most recently freed first; the caller has checked `num_free`."""
        assert count <= len(self._free), f"{count} blocks wanted, {len(self._free)} free"
        split = len(self._free) - count
        blocks = self._free[split:][::-1]
        del self._free[split:]
        for block in blocks:
            self._owned[block] = 1
        return blocks

    def release(self, blocks: list[int]) -> None:
        """Give blocks back, each exactly once."""
        for block in blocks:
            assert self._owned[block], f"block {block} has no owner"
            self._owned[block] = 0
        self._free += reversed(blocks)
