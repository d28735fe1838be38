"""A model for engine tests: logits are a pure hash of the tokens seen through blocks and slots.

It reads every earlier token back through the block table, and a running hash through the state
slot, so a wrong table, a wrong slot, a stale position or a missed recomputation changes every
token after it. Each logit row is computed from its own sequence alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from router.engine.batch import Batch
from router.engine.chain import CACHE_BLOCK

MASK = 2**64 - 1


def mix(value: int) -> int:
    """Scramble 64 bits (the finaliser of SplitMix64)."""
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def logits_of(token_ids: list[int], vocab: int, levels: int = 64) -> np.ndarray:
    """Return the float32 logits after `token_ids`; few levels, so that ties are common."""
    content = state = 0
    for token in token_ids:
        state = mix(state ^ token)
    for position, token in enumerate(token_ids):
        content ^= mix((position << 20) | token)
    return _row(mix(content ^ mix(state)), vocab, levels)


def _row(seed: int, vocab: int, levels: int) -> np.ndarray:
    with np.errstate(over="ignore"):
        bits = (np.arange(vocab, dtype=np.uint64) + np.uint64(1)) * np.uint64(seed | 1)
        bits ^= bits >> np.uint64(29)
        bits *= np.uint64(0xBF58476D1CE4E5B9)
        bits ^= bits >> np.uint64(32)
    return ((bits % np.uint64(levels)).astype(np.float32) - levels / 2) / 8


@dataclass
class HashCaches:
    """One page of token ids a block, one running hash a state slot; both begin as garbage."""

    tokens: list[list[int]]
    states: list[int]


class HashModel:
    """Implements `router.engine.model.Model`."""

    def __init__(self, vocab: int = 40, levels: int = 64) -> None:
        self.vocab = vocab
        self.levels = levels
        self.batches: list[tuple[int, int]] = []
        """(tokens, sequences) of every step."""
        self.dispatch_s = 0.0
        self.before_forward: Callable[[Batch], None] = lambda batch: None
        self.change_logits: Callable[[Batch, np.ndarray], None] = lambda batch, logits: None

    def allocate_caches(self, num_blocks: int, block_size: int, num_state_slots: int) -> HashCaches:
        self.block_size = block_size
        garbage = iter(range(10**6, 10**9))
        return HashCaches(
            [[next(garbage) for _ in range(block_size)] for _ in range(num_blocks)],
            [next(garbage) for _ in range(num_state_slots)],
        )

    def forward(self, batch: Batch, caches: HashCaches) -> Tensor:
        self.before_forward(batch)
        check_batch(batch, self.block_size)
        self.batches.append((batch.num_tokens, batch.num_sequences))
        token_ids, positions = batch.token_ids.tolist(), batch.positions.tolist()
        starts = batch.query_start.tolist()
        wanted = {row: i for i, row in enumerate(batch.logit_rows.tolist())}
        logits = np.empty((len(wanted), self.vocab), dtype=np.float32)
        for s, (begin, end) in enumerate(pairwise(starts)):
            slot = int(batch.state_slots[s])
            table = batch.block_tables[s]
            state = caches.states[slot] if batch.context_lens[s] else 0
            for row in range(begin, end):
                token, position = token_ids[row], positions[row]
                page = caches.tokens[int(table[position // self.block_size])]
                page[position % self.block_size] = token
                state = mix(state ^ token)
                if row in wanted:
                    content = 0
                    for p in range(position + 1):
                        seen = caches.tokens[int(table[p // self.block_size])]
                        content ^= mix((p << 20) | seen[p % self.block_size])
                    seed = mix(content ^ mix(state))
                    logits[wanted[row]] = _row(seed, self.vocab, self.levels)
            caches.states[slot] = state
        self.change_logits(batch, logits)
        return torch.from_numpy(logits)


class HashCacheIo:
    """`router.engine.model.CacheIo` of a `HashModel`: eight bytes a token, eight a state."""

    kv_block_bytes = 8 * CACHE_BLOCK
    state_bytes = 8
    layout: Mapping[str, Any] = {"layout": "hash"}

    def __init__(self, caches: HashCaches, block_size: int) -> None:
        self.caches = caches
        self.block_size = block_size

    def tail_bytes(self, num_tokens: int) -> int:
        return 8 * num_tokens

    def read_blocks(self, blocks: Sequence[int], out: Any) -> None:
        self.read_tail(blocks, CACHE_BLOCK, out)

    def write_blocks(self, blocks: Sequence[int], values: Any) -> None:
        self.write_tail(blocks, CACHE_BLOCK, values)

    def read_tail(self, blocks: Sequence[int], num_tokens: int, out: Any) -> None:
        tokens = [token for block in blocks for token in self.caches.tokens[block]]
        np.frombuffer(out, np.int64)[:] = tokens[:num_tokens]

    def write_tail(self, blocks: Sequence[int], num_tokens: int, values: Any) -> None:
        for position, token in enumerate(np.frombuffer(values, np.int64).tolist()):
            assert position < num_tokens
            page = self.caches.tokens[blocks[position // self.block_size]]
            page[position % self.block_size] = token

    def read_state(self, slot: int, out: Any) -> None:
        np.frombuffer(out, np.uint64)[:] = self.caches.states[slot]

    def write_state(self, slot: int, values: Any) -> None:
        self.caches.states[slot] = int(np.frombuffer(values, np.uint64)[0])


class ReusingHashModel(HashModel):
    """A `HashModel` that gives access to its caches."""

    def cache_io(self, caches: HashCaches) -> HashCacheIo:
        return HashCacheIo(caches, self.block_size)


def check_batch(batch: Batch, block_size: int) -> None:
    """Assert what `Batch` promises, and that nothing is written that another sequence reads."""
    assert batch.num_tokens > 0
    starts = batch.query_start.tolist()
    assert starts[0] == 0
    assert starts[-1] == batch.num_tokens
    lengths = [end - begin for begin, end in pairwise(starts)]
    assert min(lengths) > 0
    assert max(lengths) == batch.max_query_len
    contexts = [c + n for c, n in zip(batch.context_lens.tolist(), lengths, strict=True)]
    assert max(contexts) == batch.max_context_len
    rows = batch.logit_rows.tolist()
    assert rows == sorted(set(rows))
    assert len(set(batch.state_slots.tolist())) == batch.num_sequences
    readers: Counter[int] = Counter()
    written: set[int] = set()
    for s, context in enumerate(contexts):
        first = int(batch.context_lens[s])
        assert batch.positions[starts[s] : starts[s + 1]].tolist() == list(range(first, context))
        blocks = batch.block_tables[s, : -(-context // block_size)].tolist()
        assert len(blocks) == len(set(blocks))
        readers.update(blocks)
        written.update(blocks[first // block_size :])
    assert all(readers[block] == 1 for block in written)
    for tensor in (batch.token_ids, batch.positions, batch.block_tables, batch.logit_rows):
        assert tensor.is_contiguous()
