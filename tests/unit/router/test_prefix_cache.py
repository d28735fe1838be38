"""What is found, shared and given up, by name alone."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.engine.block_manager import BlockManager
from router.engine.chain import CACHE_BLOCK, HashChain
from router.engine.prefix_cache import CachedBlock, PrefixCache, thinnest
from router.engine.tier import Snapshot

BLOCK_SIZE = 64
"""Two blocks a cache block."""


def chain_of(*runs: tuple[int, int]) -> HashChain:
    """A chain of (token, count) runs."""
    chain = HashChain("test")
    for token, count in runs:
        chain.extend([token] * count)
    return chain


def snapshot_of(num_tokens: int, num_bytes: int = 10) -> Snapshot:
    return Snapshot(num_tokens, np.zeros(num_bytes, dtype=np.uint8), num_bytes)


class Pool:
    """Blocks and cache, and sequences that compute whole cache blocks."""

    def __init__(self, num_blocks: int = 20, budget: int = 1000) -> None:
        self.blocks = BlockManager(num_blocks, BLOCK_SIZE)
        self.cache = PrefixCache(self.blocks, budget)

    def compute(self, chain: HashChain, count: int) -> list[CachedBlock]:
        """Hold the first `count` cache blocks of a chain; compute what is not there."""
        held = []
        for index in range(count):
            key = chain.block_hash(index)
            entry = self.cache.find(key)
            if entry is None:
                entry = self.cache.insert(key, self.blocks.allocate(2))
            else:
                self.cache.hold(entry)
            held.append(entry)
        return held

    def let_go(self, held: list[CachedBlock]) -> None:
        for entry in reversed(held):
            self.cache.let_go(entry)


def test_a_match_needs_a_snapshot_and_all_blocks_below_it() -> None:
    pool = Pool()
    chain = chain_of((1, 500))
    held = pool.compute(chain, 3)
    assert pool.cache.match(chain, 499).kv_tokens == 384
    assert pool.cache.match(chain, 499).num_tokens == 0
    assert pool.cache.match(chain, 499).lost_tokens == 384
    for position in (100, 128, 300):
        pool.cache.add_snapshot(chain, snapshot_of(position))
    found = {limit: pool.cache.match(chain, limit).num_tokens for limit in (99, 100, 127, 128)}
    assert found == {99: 0, 100: 100, 127: 100, 128: 128}
    match = pool.cache.match(chain, 499)
    assert (match.num_tokens, match.held, match.kv_tokens) == (300, tuple(held[:2]), 384)
    assert pool.cache.match(chain, 299).num_tokens == 128
    other = chain_of((1, 290), (2, 200))
    assert pool.cache.match(other, 489).num_tokens == 128  # the tail of 300 has other tokens
    assert pool.cache.match(other, 489).kv_tokens == 256


def test_a_hole_ends_a_match() -> None:
    """The second of three cache blocks is distrusted while a sequence still uses the third."""
    pool = Pool()
    chain = chain_of((1, 400))
    held = pool.compute(chain, 3)
    pool.cache.add_snapshot(chain, snapshot_of(384))
    pool.cache.add_snapshot(chain, snapshot_of(128))
    pool.cache.forget(held[1])
    match = pool.cache.match(chain, 399)
    assert (match.num_tokens, match.kv_tokens, match.held) == (128, 128, (held[0],))
    pool.let_go(held)
    assert pool.blocks.num_used == 0
    assert pool.blocks.allocate(20)  # the forgotten one is free, too


def test_the_oldest_leaf_goes_first_and_nothing_in_use() -> None:
    pool = Pool(num_blocks=12)
    first, second = chain_of((1, 400)), chain_of((1, 130), (2, 300))
    a = pool.compute(first, 3)
    b = pool.compute(second, 3)  # shares its first cache block
    assert pool.blocks.num_used == 10
    pool.let_go(a)
    assert (pool.blocks.num_used, pool.cache.num_spare) == (6, 4)
    pool.blocks.release(pool.blocks.allocate(3))  # 2 were free: one cache block had to go
    assert [pool.cache.find(entry.key) for entry in a] == [a[0], a[1], None]
    pool.blocks.release(pool.blocks.allocate(6))
    assert [pool.cache.find(entry.key) for entry in a] == [a[0], None, None]
    assert [pool.cache.find(entry.key) for entry in b] == b
    assert pool.blocks.num_free == 6
    pool.let_go(b)
    assert pool.blocks.num_free == 12


def test_a_snapshot_goes_with_the_block_it_stands_on() -> None:
    pool = Pool(num_blocks=6)
    chain = chain_of((1, 400))
    held = pool.compute(chain, 3)
    for position in (50, 130, 256, 300, 384):
        pool.cache.add_snapshot(chain, snapshot_of(position))
    assert pool.cache.snapshot_bytes == 50
    pool.let_go(held)
    pool.blocks.release(pool.blocks.allocate(4))  # the second and third cache block go
    assert pool.cache.num_snapshots == 2
    assert pool.cache.snapshot_bytes == 20
    assert pool.cache.num_evicted_snapshots == 3
    assert pool.cache.match(chain, 399).num_tokens == 130
    pool.blocks.allocate(6)
    assert pool.cache.match(chain, 399).num_tokens == 50  # stands on nothing


def test_a_snapshot_without_its_block_is_not_kept() -> None:
    pool = Pool()
    pool.cache.add_snapshot(chain_of((1, 400)), snapshot_of(300))
    assert pool.cache.num_snapshots == 0


def test_the_least_recently_used_snapshot_leaves_the_budget() -> None:
    pool = Pool(budget=35)
    chain = chain_of((1, 120))
    for position in (40, 60, 80):
        pool.cache.add_snapshot(chain, snapshot_of(position))
    pool.cache.touch_snapshot(chain.position_hash(40))
    pool.cache.add_snapshot(chain, snapshot_of(100))
    kept = [p for p in (40, 60, 80, 100) if pool.cache.has_snapshot(chain.position_hash(p))]
    assert kept == [40, 80, 100]
    pool.cache.add_snapshot(chain, snapshot_of(110, num_bytes=36))  # larger than the budget
    assert pool.cache.num_snapshots == 3


def test_a_long_prefill_thins_its_own_snapshots_and_nobody_elses() -> None:
    """A budget of 16 snapshots; seven are of other sequences when one leaves 120 of its own."""
    pool = Pool(num_blocks=300, budget=160)
    others = [chain_of((token, 200)) for token in range(2, 9)]
    for chain in others:
        pool.compute(chain, 1)
        pool.cache.add_snapshot(chain, snapshot_of(150), own={})
    long = chain_of((1, 121 * CACHE_BLOCK))
    pool.compute(long, 120)
    own: dict[int, bytes] = {}
    for count in range(1, 121):
        pool.cache.add_snapshot(long, snapshot_of(count * CACHE_BLOCK), own=own)
        assert pool.cache.match(long, count * CACHE_BLOCK).num_tokens == count * CACHE_BLOCK
    assert all(pool.cache.match(chain, 199).num_tokens == 150 for chain in others)
    here = [n // CACHE_BLOCK for n, key in own.items() if pool.cache.has_snapshot(key)]
    assert len(here) == 16 - len(others)
    assert here[-2:] == [119, 120]
    behind = [120 - n for n in here[:-1]] + [1]
    # Wherever one goes on, the last snapshot before it is not much further from the newest.
    assert all(more <= 3 * less for more, less in pairwise(behind[:-1]))
    assert behind[0] >= 60


def test_a_sequence_alone_may_have_the_whole_budget() -> None:
    """Nothing is thinned while there is room, and the least recently used goes as ever."""
    pool = Pool(num_blocks=100, budget=40)
    chain = chain_of((1, 1000))
    pool.compute(chain, 7)
    own: dict[int, bytes] = {}
    for position in (128, 256, 384, 512):
        pool.cache.add_snapshot(chain, snapshot_of(position), own=own)
    assert pool.cache.num_snapshots == 4
    for position in (640, 768):
        pool.cache.add_snapshot(chain, snapshot_of(position), own=own)
    left = [n for n, key in own.items() if pool.cache.has_snapshot(key)]
    assert left[-2:] == [640, 768]
    assert pool.cache.snapshot_bytes == 40


def test_the_thinnest_is_missed_least() -> None:
    assert thinnest([1, 2, 3], 4) == 1
    assert thinnest([4, 5, 6], 7) == 5  # 5 of 7, 2 of 3, 2 of 2
    assert thinnest([3, 4, 5], 6) == 3  # 4 of 6, 2 of 3: a tie
    assert thinnest([7], 9) == 7


@pytest.mark.parametrize("uploaded", [0, 128])
def test_a_match_says_how_far_its_prefix_was_uploaded(uploaded: int) -> None:
    pool = Pool()
    chain = chain_of((1, 400))
    pool.compute(chain, 2)
    pool.cache.add_snapshot(chain, snapshot_of(200), uploaded)
    assert pool.cache.match(chain, 399).uploaded == uploaded


MOVES = st.lists(
    st.one_of(
        st.tuples(st.just("compute"), st.integers(0, 5), st.integers(0, 3), st.integers(1, 5)),
        st.tuples(st.just("let go"), st.integers(0, 9)),
        st.tuples(st.just("snapshot"), st.integers(0, 5), st.integers(0, 3), st.integers(1, 700)),
        st.tuples(st.just("forget"), st.integers(0, 9)),
        st.tuples(st.just("want"), st.integers(1, 12)),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(moves=MOVES, num_blocks=st.integers(12, 40))
def test_no_block_is_lost_shared_wrongly_or_given_up_in_use(
    moves: list[tuple[Any, ...]], num_blocks: int
) -> None:
    """Chains that part after `fork` cache blocks; blocks are taken and freed between."""
    pool = Pool(num_blocks, budget=55)
    users: list[list[CachedBlock]] = []

    def chain_at(seed: int, fork: int) -> HashChain:
        return chain_of((7, fork * CACHE_BLOCK), (10 + seed, (6 - fork) * CACHE_BLOCK))

    for move in moves:
        if move[0] == "compute" and pool.blocks.num_free >= 2 * move[3]:
            users.append(pool.compute(chain_at(move[1], move[2]), move[3]))
        elif move[0] == "let go" and users:
            pool.let_go(users.pop(move[1] % len(users)))
        elif move[0] == "snapshot":
            pool.cache.add_snapshot(chain_at(move[1], move[2]), snapshot_of(move[3]))
        elif move[0] == "forget" and users:
            for entry in users[move[1] % len(users)]:
                pool.cache.forget(entry)
        elif move[0] == "want" and move[1] <= pool.blocks.num_free:
            pool.blocks.release(pool.blocks.allocate(move[1]))
        used = {entry: None for held in users for entry in held}
        assert pool.blocks.num_used == 2 * len(used)
        owned = [block for entry in used for block in entry.blocks]
        assert len(owned) == len(set(owned))
        assert not set(owned) & set(pool.blocks._free)
        assert pool.cache.snapshot_bytes <= 55
        for seed in range(3):
            chain = chain_at(seed, 2)
            match = pool.cache.match(chain, 700)
            for index, entry in enumerate(match.held):
                assert entry is pool.cache.find(chain.block_hash(index))
            if match.snapshot is not None:
                assert match.snapshot.num_tokens == match.num_tokens
                assert len(match.held) == match.num_tokens // CACHE_BLOCK
                assert match.num_tokens - match.num_tokens % CACHE_BLOCK <= match.kv_tokens
    for held in users:
        pool.let_go(held)
    assert pool.blocks.num_free == num_blocks
    assert sorted(pool.blocks.allocate(num_blocks)) == list(range(num_blocks))
