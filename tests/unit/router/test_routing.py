"""Which router serves: warm prefixes, queues, full routers, ties; sums by hand."""

from __future__ import annotations

import random

import pytest

from router.engine.chain import CACHE_BLOCK, HashChain
from router.gateway.routing import (
    FULL_WAIT_S,
    MAX_WARM,
    MIN_GAIN_S,
    MIN_GAIN_SHARE,
    WARM_BYTES,
    Choice,
    PeerView,
    RouterLoad,
    choose,
    unpack_warm,
    warm_set,
)

NUM_TOKENS = 4096
RATE = 1000.0
CHAIN = HashChain("ns")
CHAIN.extend(range(NUM_TOKENS))
BLOCKS = tuple(range(CACHE_BLOCK, NUM_TOKENS + 1, CACHE_BLOCK))


def view(
    router_id: str,
    *,
    warm: tuple[int, ...] = (),
    queued: int = 0,
    running: int = 0,
    rate: float = RATE,
) -> PeerView:
    return PeerView(
        router_id=router_id,
        address=f"{router_id}:1",
        load=RouterLoad(
            prefill_tokens_per_s=rate, queued_tokens=queued, num_running=running, max_running=8
        ),
        warm=unpack_warm(warm_set(CHAIN.position_hash(n) for n in warm)),
    )


def pick(*views: PeerView, own: str = "a", candidates: tuple[int, ...] = BLOCKS) -> Choice:
    hashes = {position: CHAIN.position_hash(position) for position in candidates}
    return choose(views, own, hashes, NUM_TOKENS)


def test_the_sum_of_the_module_docstring() -> None:
    choice = pick(view("a"), view("b", warm=(128, 3968), queued=500))
    assert choice.view.router_id == "b"
    assert choice.warm_tokens == 3968
    assert choice.own_cost_s == pytest.approx(4.096)
    assert choice.cost_s == pytest.approx((500 + NUM_TOKENS - 3968) / RATE)


def test_a_router_keeps_what_it_is_as_good_for() -> None:
    assert pick(view("a"), view("b")).view.router_id == "a"
    assert pick(view("b"), view("a"), own="b").view.router_id == "b"
    assert pick(view("a", warm=(3968,)), view("b", warm=(3968,))).view.router_id == "a"


def test_of_two_equal_others_the_lower_id_serves() -> None:
    others = [view("c", warm=(3968,)), view("b", warm=(3968,))]
    assert pick(view("a"), *others).view.router_id == "b"


@pytest.mark.parametrize(
    ("own_queue", "gain_s", "forwards"),
    [
        # cost of own = (queue + 4096) / 1000; the other one's is 4.096 s.
        (0, 0.0, False),
        (1000, 1.0, False),  # 20 % of 5.096 s
        (2000, 2.0, True),  # 33 % of 6.096 s
    ],
)
def test_only_a_clear_gain_is_worth_a_hop(own_queue: int, gain_s: float, forwards: bool) -> None:
    choice = pick(view("a", queued=own_queue), view("b"))
    assert (choice.view.router_id == "b") is forwards
    assert (gain_s > max(MIN_GAIN_S, MIN_GAIN_SHARE * choice.own_cost_s)) is forwards


def test_a_short_prompt_is_never_worth_a_hop() -> None:
    others = view("b")  # 40 tokens: 40 ms
    assert choose([view("a"), others], "a", {}, 40).view.router_id == "a"
    assert choose([view("a", queued=5), others], "a", {}, 40).view.router_id == "a"


def test_an_overloaded_warm_router_is_passed_over() -> None:
    # 5,000 tokens wait there: 5.1 s against 4.1 s here.
    assert pick(view("a"), view("b", warm=(3968,), queued=5000)).view.router_id == "a"
    third = view("c", warm=(2048,))  # 2.0 s
    assert pick(view("a"), view("b", warm=(3968,), queued=5000), third).view.router_id == "c"


def test_a_full_router_costs_a_wait() -> None:
    full = pick(view("a", running=8), view("b", running=7), candidates=())
    assert full.own_cost_s == pytest.approx(NUM_TOKENS / RATE + FULL_WAIT_S)
    assert full.view.router_id == "a"  # 1 s of 5.1 s is no clear gain
    assert pick(view("a", running=8, warm=(3968,)), view("b", warm=(3968,))).view.router_id == "b"


def test_a_sessions_unaligned_snapshot_counts() -> None:
    session = (*BLOCKS, 4001)
    near = pick(view("a", warm=(3968,)), view("b", warm=(4001,)), candidates=session)
    assert near.view.router_id == "a", "33 tokens are no clear gain"
    cold = pick(view("a"), view("b", warm=(4001,)), candidates=session)
    assert (cold.view.router_id, cold.warm_tokens) == ("b", 4001)


def test_the_last_token_is_always_computed() -> None:
    choice = pick(view("a", warm=(NUM_TOKENS, 128)))
    assert choice.warm_tokens == 128


def test_a_router_without_a_measured_rate_is_taken_for_a_usual_one() -> None:
    choice = pick(view("a", queued=8000), view("b", rate=0.0))
    assert choice.view.router_id == "b"
    assert choice.cost_s == pytest.approx(4.096)
    assert pick(view("a", rate=0.0), view("b", rate=0.0)).view.router_id == "a"


def test_the_warm_set_is_bounded_and_keeps_the_newest() -> None:
    hashes = [random.Random(i).randbytes(32) for i in range(MAX_WARM + 5)]
    packed = warm_set(iter(hashes))
    assert len(packed) == MAX_WARM * WARM_BYTES
    assert unpack_warm(packed) == {h[:WARM_BYTES] for h in hashes[:MAX_WARM]}
    assert unpack_warm(packed[:-3]) == {h[:WARM_BYTES] for h in hashes[: MAX_WARM - 1]}
    assert unpack_warm(b"") == frozenset()


def test_a_load_survives_its_journey() -> None:
    load = view("a", queued=7, running=3, rate=12.5).load
    assert RouterLoad.unpack(load.pack()) == load
    with pytest.raises(ValueError, match="load of 3 bytes"):
        RouterLoad.unpack(b"abc")


def test_the_asking_router_must_be_among_the_views() -> None:
    with pytest.raises(ValueError, match="no view of a"):
        pick(view("b"))


def test_the_choice_is_never_clearly_worse_than_staying() -> None:
    random_views = random.Random(7)
    for _ in range(200):
        views = [
            view(
                name,
                warm=tuple(random_views.sample(BLOCKS, random_views.randrange(3))),
                queued=random_views.randrange(9000),
                running=random_views.randrange(9),
                rate=random_views.choice([0.0, 300.0, 1000.0]),
            )
            for name in "abc"
        ]
        choice = pick(*views)
        assert choice.cost_s <= choice.own_cost_s
        if choice.view.router_id != "a":
            gain_s = choice.own_cost_s - choice.cost_s
            assert gain_s >= max(MIN_GAIN_S, MIN_GAIN_SHARE * choice.own_cost_s)
