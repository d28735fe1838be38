"""State slots have one owner or none."""

from __future__ import annotations

import pytest

from router.engine.state_pool import StatePool


def test_slots_are_distinct_and_come_back() -> None:
    pool = StatePool(3)
    slots = [pool.acquire() for _ in range(3)]
    assert sorted(slots) == [0, 1, 2]
    assert (pool.num_free, pool.num_used) == (0, 3)
    pool.release(slots[1])
    assert pool.num_free == 1
    assert pool.acquire() == slots[1]


def test_a_second_release_is_a_bug() -> None:
    pool = StatePool(2)
    slot = pool.acquire()
    pool.release(slot)
    with pytest.raises(AssertionError, match="state slot 0 has no owner"):
        pool.release(slot)
