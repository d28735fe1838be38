"""Blocks have one owner or none, and none is lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.engine.block_manager import BlockManager


@pytest.mark.parametrize(
    ("tokens", "blocks"), [(0, 0), (1, 1), (15, 1), (16, 1), (17, 2), (32, 2), (33, 3)]
)
def test_blocks_for_rounds_up(tokens: int, blocks: int) -> None:
    assert BlockManager(8, 16).blocks_for(tokens) == blocks


@given(st.integers(1, 20), st.lists(st.tuples(st.booleans(), st.integers(0, 20)), max_size=60))
def test_no_block_is_owned_twice_or_lost(num_blocks: int, moves: list[tuple[bool, int]]) -> None:
    manager = BlockManager(num_blocks, 4)
    owners: list[list[int]] = []
    for takes, amount in moves:
        if takes and amount <= manager.num_free:
            owners.append(manager.allocate(amount))
        elif not takes and owners:
            manager.release(owners.pop(amount % len(owners)))
        owned = [block for blocks in owners for block in blocks]
        assert len(owned) == len(set(owned)) == manager.num_used
        assert all(0 <= block < num_blocks for block in owned)
    for blocks in owners:
        manager.release(blocks)
    assert sorted(manager.allocate(num_blocks)) == list(range(num_blocks))


def test_a_second_release_is_a_bug() -> None:
    manager = BlockManager(4, 4)
    blocks = manager.allocate(2)
    manager.release(blocks)
    with pytest.raises(AssertionError, match="block 0 has no owner"):
        manager.release(blocks)
