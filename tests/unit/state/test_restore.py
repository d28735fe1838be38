from __future__ import annotations

import random
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.engine.chain import CACHE_BLOCK
from router.engine.tier import LoadJob
from router.state.restore import Item, RestorePlan, ValueSizes
from tests.unit.state.blob_servers import chain_of

SIZES = ValueSizes(block_bytes=1280, state_bytes=9 << 20)
"""Three stripes a snapshot."""
CHAIN = chain_of(1500)


def plan_of(
    num_tokens: int, candidates: tuple[int, ...] = (), start: int = 0, servers: int = 2
) -> RestorePlan:
    job = LoadJob(
        chain=CHAIN,
        start=start,
        num_tokens=num_tokens,
        snapshot_positions=(),
        block_sink=lambda index, values: None,
        state_sink=lambda position, state, tail: None,
        cancelled=threading.Event(),
        deadline_s=1.0,
    )
    return RestorePlan(
        job,
        candidates,
        SIZES,
        num_servers=servers,
        server_of=lambda key: key[0] % servers,
        block_key=lambda block_hash: block_hash,
        stripe_key=lambda position_hash, part: position_hash + b"%d" % part,
    )


def drain(plan: RestorePlan, servers: int = 2) -> list[Item]:
    """Take all that is to be had, without settling."""
    return [item for server in range(servers) for item in iter(lambda s=server: plan.take(s), None)]


def test_stripes_come_before_blocks_and_blocks_head_first() -> None:
    plan = plan_of(1300, servers=1)
    items = drain(plan, servers=1)
    assert [item.stream is not None for item in items] == [True] * 3 + [False] * 10
    assert [item.index for item in items] == [0, 1, 2, *range(10)]
    for item in items:
        assert not plan.is_over
        plan.settle(item)
    assert plan.is_complete
    assert plan.is_over
    assert plan.aim == 1300


def test_tokens_in_place_are_not_fetched_but_their_last_block_is() -> None:
    plan = plan_of(1300, start=300, servers=1)
    assert [item.index for item in drain(plan, 1) if item.stream is None] == [*range(2, 10)]


def test_a_candidate_in_the_same_block_needs_its_snapshot_only() -> None:
    plan = plan_of(310, start=300, servers=1)
    items = drain(plan, 1)
    assert all(item.stream is not None for item in items)
    for item in items:
        plan.settle(item)
    assert plan.is_complete


def test_labels_name_the_block_and_the_one_before() -> None:
    blocks = [item for item in drain(plan_of(640, servers=1), 1) if item.stream is None]
    assert blocks[0].label.parent == CHAIN.position_hash(0)
    assert blocks[2].label.key == CHAIN.block_hash(2)
    assert blocks[2].label.parent == CHAIN.block_hash(1)


def test_a_broken_connection_is_tried_once_more() -> None:
    plan = plan_of(256, servers=1)
    items = drain(plan, 1)
    assert plan.retry(items[0])
    again = plan.take(0)
    assert again is items[0]
    assert not plan.retry(again)
    for item in items:
        plan.settle(item)
    assert plan.is_complete


def test_late_aims_at_what_is_in_place() -> None:
    """Blocks 0..4 are there: 512 and 700 = 5 blocks + 60 tokens are possible, 900 is not."""
    plan = plan_of(900, (512, 700), servers=1)
    for item in drain(plan, 1):
        if item.stream is None and item.index < 5:
            plan.settle(item)
        elif item.stream is None:
            assert plan.retry(item)
    plan.cut_to_what_is_there("late")
    assert plan.aim == 700
    assert plan.error == "late"
    stripes = drain(plan, 1)
    assert [item.label.num_tokens for item in stripes] == [700] * 3


def test_late_without_a_candidate_in_place_restores_nothing() -> None:
    plan = plan_of(900, (512,), servers=1)
    items = drain(plan, 1)
    plan.cut_to_what_is_there("late")
    assert plan.aim == 0
    for item in items:
        plan.settle(item)
    assert plan.is_over
    assert not plan.is_complete


def test_an_ended_plan_hands_out_nothing_and_waits_for_what_is_out() -> None:
    plan = plan_of(900, (512,))
    item = plan.take(0) or plan.take(1)
    assert item is not None
    plan.end("cancelled")
    assert not drain(plan)
    assert not plan.is_over
    plan.settle(item)
    assert plan.is_over
    assert (plan.aim, plan.error) == (0, "cancelled")


@given(data=st.data())
def test_the_highest_complete_candidate_is_restored(data: st.DataObject) -> None:
    """Whatever is missing, on whatever server, in whatever order it is noticed."""
    start = data.draw(st.integers(0, 400), "start")
    positions = data.draw(st.sets(st.integers(1, 1500), min_size=1, max_size=6), "candidates")
    lost_blocks = data.draw(st.sets(st.integers(0, 11), max_size=3), "blocks")
    lost_stripes = data.draw(
        st.sets(st.tuples(st.sampled_from(sorted(positions)), st.integers(0, 2)), max_size=3),
        "stripes",
    )
    order = random.Random(data.draw(st.integers(0, 10**6), "order"))
    plan = plan_of(max(positions), tuple(positions), start, servers=3)
    out: list[Item] = []
    fetched: list[Item] = []
    while not plan.is_over:
        item = plan.take(order.randrange(3))
        if item is not None:
            out.append(item)
        if out and (item is None or order.random() < 0.5):
            settled = out.pop(order.randrange(len(out)))
            if settled.stream is None:
                is_lost = settled.index in lost_blocks
            else:
                is_lost = (settled.label.num_tokens, settled.index) in lost_stripes
            plan.settle(settled, "missing" if is_lost else "")
            fetched += [] if is_lost else [settled]

    def is_whole(n: int) -> bool:
        blocks = range(start // CACHE_BLOCK, n // CACHE_BLOCK)
        return not lost_blocks & {*blocks} and not any(
            (n, part) in lost_stripes for part in (0, 1, 2)
        )

    wanted = max((n for n in positions if n > start and is_whole(n)), default=start)
    assert plan.aim == wanted
    assert plan.is_complete == (wanted > start)
    if wanted > start:
        there = {item.index for item in fetched if item.stream is None}
        assert there >= {*range(start // CACHE_BLOCK, wanted // CACHE_BLOCK)}
        parts = [i.index for i in fetched if i.stream and i.label.num_tokens == wanted]
        assert sorted(parts) == [0, 1, 2]


@pytest.mark.parametrize(("start", "num_tokens"), [(0, 1300), (300, 1300), (0, 100)])
def test_load_bytes_is_what_a_restore_reads(start: int, num_tokens: int) -> None:
    items = drain(plan_of(num_tokens, start=start, servers=1), 1)
    assert sum(item.label.nbytes for item in items) == SIZES.load_bytes(start, num_tokens)
