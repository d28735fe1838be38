"""Runs a sequence that does not fit the pool: its oldest cache blocks leave, its newest stay.

Decides which sequences those are, how many blocks such a one keeps, and what leaves before a step;
where it goes is the cold store's matter. One of them runs at a time, alone in its steps, which take
turns with the steps of the others; while it decodes, too, its step is a chunk of one token:

    at admission    it gets a window of blocks; what the pool has of its prefix leaves or stays
    in a load       what the tier has of its prefix goes the same ways: newest blocks into the
                    window, older ones into the cold store, where they may stay in the tier
    before a step   the oldest full cache blocks leave until the step's tokens fit the window
    in a step       each full-attention layer attends to what has left, then to the blocks

So the pool holds at most a window of it, the cold store is bounded by itself, and a step needs a
fixed room besides (`ShelvedPast`, `NativeOps`). Where a cold value cannot be kept or read back, the
sequence starts over once, from what the tier still has, and then fails with `ColdKvError`.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from router.engine.batch import Chunk, build_batch
from router.engine.batch_rows import BuiltBatch, PrefillChunk
from router.engine.block_manager import BlockManager
from router.engine.chain import CACHE_BLOCK
from router.engine.cold_store import ColdStore, ColdTier
from router.engine.config import EngineConfig
from router.engine.model import CacheIo, Model
from router.engine.reuse import Reuse
from router.engine.sequence import Sequence
from router.engine.tier import Streaming

logger = logging.getLogger(__name__)

_LEAST_WINDOW = 2
"""Cache blocks: the one being filled and one of new tokens."""
MAX_RESTARTS = 1
"""Times that a sequence starts over because its cold KV was lost."""


class Spill:
    """Keeps one long sequence within its window.

    Args:
        blocks: The pool.
        io: Its memory.
        store: Takes what leaves.
        reuse: Shares cache blocks among sequences; None where no prefixes are reused.
    """

    def __init__(
        self, blocks: BlockManager, io: CacheIo, store: ColdStore, reuse: Reuse | None
    ) -> None:
        self._blocks = blocks
        self._io = io
        self._store = store
        self._reuse = reuse
        self._per = CACHE_BLOCK // blocks.block_size
        self._window = max(_LEAST_WINDOW, blocks.num_blocks // self._per // 2)
        self.num_spilled_blocks = 0
        """Cache blocks that have left the pool."""

    @property
    def num_cold_bytes(self) -> int:
        """Host memory of cold cache blocks."""
        return self._store.num_bytes

    @property
    def window_blocks(self) -> int:
        """Blocks that a long sequence takes at its admission."""
        return self._window * self._per

    def is_long(self, sequence: Sequence) -> bool:
        """Say whether a sequence does not fit the pool, even alone."""
        return self._blocks.blocks_for(sequence.num_tokens) > self._blocks.num_blocks

    def can_hold(self, num_tokens: int) -> bool:
        """Say whether a sequence of so many tokens fits pool and cold store together."""
        most = self._store.max_tokens
        return most is None or num_tokens <= most + (self._window - 1) * CACHE_BLOCK

    def begin(self, sequence: Sequence, load_to: int) -> None:
        """Let a sequence spill, beginning with what it shares of its prefix: less than its window
        stays, so that its next token has room.

        Args:
            sequence: Shares cache blocks, and has none of its own.
            load_to: Tokens that are about to be loaded; room is made for them, too. 0: none.

        Raises:
            ColdKvError: A cache block cannot be kept.
        """
        cold = sequence.cold = self._store.new_sequence()
        num_cold = self.num_cold_blocks(load_to)
        while len(sequence.blocks) >= self.window_blocks or (
            sequence.blocks and cold.num_blocks < num_cold
        ):
            self._spill(sequence)
        cold.reserve(num_cold)
        logger.info(
            "spill.begin id=%s tokens=%d window_tokens=%d",
            *(sequence.request_id, sequence.num_tokens, self._window * CACHE_BLOCK),
        )

    def end(self, sequence: Sequence) -> None:
        """Free the cold cache blocks of a sequence."""
        assert sequence.cold is not None, "the sequence does not spill"
        sequence.cold.close()
        sequence.cold = None

    def num_cold_blocks(self, num_tokens: int) -> int:
        """Return how many cache blocks of so many tokens do not stay: the next token has room."""
        return max(0, num_tokens // CACHE_BLOCK + 1 - self._window)

    def streaming(self, max_step_tokens: int) -> Streaming:
        """Return how a long sequence prefills, for the prediction of what that takes.

        Args:
            max_step_tokens: Most tokens of any step.
        """
        in_memory = self._store.max_memory_tokens if self._store.tier is not None else None
        kept = None if in_memory is None else in_memory + self._window * CACHE_BLOCK
        # A step has room for the window but for what is left of the last one: half, as a rule.
        step = max(CACHE_BLOCK, min(max_step_tokens, (self._window - 1) * CACHE_BLOCK))
        return Streaming(kept_tokens=kept, step_tokens=step)

    def room(self, sequence: Sequence) -> int:
        """Return how many tokens its next step may have, once all that can leave has left."""
        return self._window * CACHE_BLOCK - sequence.num_computed % CACHE_BLOCK

    def make_room(self, sequence: Sequence, stop: int) -> bool:
        """Let the oldest cache blocks leave, and take blocks for tokens up to `stop`.

        Returns:
            False where blocks lack that others hold; try again when some were freed.

        Raises:
            ColdKvError: A cache block cannot be kept.
        """
        cold = sequence.cold
        assert cold is not None, "the sequence does not spill"
        needed = -(-(stop - cold.num_tokens) // CACHE_BLOCK)
        full = sequence.num_computed // CACHE_BLOCK - cold.num_blocks
        for _ in range(min(max(0, needed - self._window), full)):
            self._spill(sequence)
        missing = self._blocks.blocks_for(stop - cold.num_tokens) - len(sequence.blocks)
        if missing > self._blocks.num_free:
            return False
        if missing > 0:
            sequence.blocks += self._blocks.allocate(missing)
        return True

    def _spill(self, sequence: Sequence) -> None:
        """Copy the oldest cache block out and let go of its blocks."""
        cold, use = sequence.cold, sequence.prefix
        assert cold is not None, "the sequence does not spill"
        blocks = sequence.blocks[: self._per]
        key = parent = b""
        if use is not None:
            key = use.chain.block_hash(cold.num_blocks)
            parent = use.chain.position_hash(cold.num_tokens)
        values = np.empty(self._io.kv_block_bytes, np.uint8)
        self._io.read_blocks(blocks, values)
        cold.append(key, parent, values)
        self.num_spilled_blocks += 1
        del sequence.blocks[: self._per]
        if self._reuse is not None:
            self._reuse.let_go_of_first(sequence, values)
        else:
            self._blocks.release(blocks)


def build_alone(chunk: PrefillChunk) -> BuiltBatch:
    """Return the batch of a spilling sequence's chunk, and of nobody else."""
    sequence = chunk.sequence
    assert sequence.cold is not None, "the sequence does not spill"
    past = sequence.cold.past()
    batch = build_batch(
        [
            Chunk(
                token_ids=sequence.tokens_between(chunk.start, chunk.stop).tolist(),
                context_len=chunk.start,
                block_table=sequence.blocks,
                state_slot=sequence.state_slot,
                num_logits=0,
            )
        ]
    )
    rows = [position - chunk.start for position in chunk.prompt_rows]
    if chunk.is_final:
        rows.append(chunk.stop - chunk.start - 1)
    return BuiltBatch(
        batch=replace(batch, cold=past, logit_rows=torch.tensor(rows, dtype=torch.int64)),
        sampled=[sequence] if chunk.is_final else [],
        sampled_logits=[len(chunk.prompt_rows)],
        prompt_logits=[(chunk, 0)] if chunk.prompt_rows else [],
        past=past,
    )


def spill_of(
    model: Model,
    caches: Any,
    blocks: BlockManager,
    config: EngineConfig,
    tier: ColdTier | None,
    reuse: Reuse | None,
) -> Spill | None:
    """Return what runs sequences beyond the pool; None where that is not possible, and log why."""
    make_io = getattr(model, "cache_io", None)
    io: CacheIo | None = None if make_io is None else make_io(caches)
    least = _LEAST_WINDOW * CACHE_BLOCK
    if not config.max_cold_bytes and tier is None:
        reason = "there is neither host memory nor a tier for it"
    elif io is None or not io.num_kv_layers:
        reason = "the model gives no access to KV"
    elif CACHE_BLOCK % config.block_size:
        reason = f"block_size {config.block_size} does not divide {CACHE_BLOCK}"
    elif config.num_blocks * config.block_size < 2 * least:
        reason = f"the pool has fewer than {2 * least} tokens"
    else:
        store = ColdStore(
            num_layers=io.num_kv_layers,
            block_bytes=io.kv_block_bytes,
            max_bytes=config.max_cold_bytes,
            tier=None if reuse is None else tier,
        )
        return Spill(blocks, io, store, reuse)
    logger.info("spill.off reason=%s", reason)
    return None
