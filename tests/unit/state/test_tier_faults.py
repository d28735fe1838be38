"""A tier whose servers are gone, frozen or cut off, and loads that are cancelled or closed."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

import pytest

from router.engine.chain import HashChain
from router.state.breaker import BreakerSettings
from router.state.codec import STRIPE_BYTES
from router.state.cost import CostSettings
from router.state.kv_store import KvStore
from router.state.loader import LoaderSettings
from router.state.tier import BlobTier, TierSettings
from tests.eventually import eventually
from tests.unit.state.blob_servers import (
    NAMESPACE,
    SIZES,
    BlobServer,
    Pool,
    Proxy,
    blob_server,
    block_bytes,
    fill,
    probe,
    start_load,
    tier_of,
)
from tests.unit.state.tiers import PATIENT, counters, put_again

# Servers in trouble -----------------------------------------------------------------------------


def test_no_server_at_all(tmp_path: Path, chain: HashChain) -> None:
    with blob_server("redis", tmp_path) as server:
        server.kill()
        with contextlib.closing(tier_of(server, settings=PATIENT)) as tier:
            assert probe(tier, chain).num_tokens == 0
            result = start_load(tier, chain, Pool(), 1024).get()
            assert result.num_tokens == 0
            assert result.error in ("unreachable", "breaker_open")


def test_a_frozen_server_costs_a_load_its_bound_and_no_more(
    servers: list[BlobServer], chain: HashChain
) -> None:
    settings = TierSettings(
        cost=CostSettings(prior_bytes_per_s=1e12), loader=LoaderSettings(min_load_s=0.5)
    )
    with contextlib.closing(tier_of(*servers, settings=PATIENT)) as writing:
        fill(writing, chain, 1300)
    with contextlib.closing(tier_of(*servers, settings=settings, io_s=60)) as tier:
        for server in servers:
            server.freeze()
        try:
            assert probe(tier, chain).reason == "late"
            result = start_load(tier, chain, Pool(), 1300).get()
            assert (result.num_tokens, result.error) == (0, "late")
            assert 0.5 <= result.seconds < 10
        finally:
            for server in servers:
                server.thaw()
        eventually(lambda: start_load(tier, chain, Pool(), 1300).get().num_tokens == 1300)


def test_a_connection_cut_once_is_retried(servers: list[BlobServer], chain: HashChain) -> None:
    proxy = Proxy(servers[0].endpoint)
    with (
        contextlib.closing(proxy),
        contextlib.closing(tier_of(proxy.endpoint, settings=PATIENT)) as tier,
    ):
        fill(tier, chain, 1300)
        # Every connection carries one stripe and a half: each value comes on the second try.
        proxy.cut_after = 3 * STRIPE_BYTES // 2
        settings = PATIENT
        again = BlobTier(
            KvStore([proxy.endpoint], NAMESPACE, breaker=BreakerSettings(max_failures=10**6)),
            SIZES,
            settings,
        )
        with contextlib.closing(again):
            pool = Pool()
            result = start_load(again, chain, pool, 1300).get()
            assert result.num_tokens == 1300
            pool.assert_holds(0, 1300)


@pytest.mark.parametrize("cut_after", [0, 10, 1000, 5_000_000])
def test_a_server_that_cuts_every_reply_is_a_miss(
    servers: list[BlobServer], chain: HashChain, cut_after: int
) -> None:
    with contextlib.closing(tier_of(servers[0], settings=PATIENT)) as writing:
        fill(writing, chain, 1300)
    proxy = Proxy(servers[0].endpoint)
    proxy.cut_after = cut_after
    with (
        contextlib.closing(proxy),
        contextlib.closing(tier_of(proxy.endpoint, settings=PATIENT)) as tier,
    ):
        pool = Pool()
        result = start_load(tier, chain, pool, 1300).get()
        if cut_after < STRIPE_BYTES:
            assert result.num_tokens == 0
            assert result.error in ("unreachable", "breaker_open")
        for index, values in pool.blocks.items():
            assert values == block_bytes(index), "what was handed over is right, always"


def test_an_open_breaker_makes_no_call(servers: list[BlobServer], chain: HashChain) -> None:
    proxy = Proxy(servers[0].endpoint)
    proxy.cut_after = 0
    store = KvStore([proxy.endpoint], NAMESPACE, breaker=BreakerSettings(first_wait_s=1000))
    with contextlib.closing(proxy), contextlib.closing(BlobTier(store, SIZES, PATIENT)) as tier:
        eventually(lambda: probe(tier, chain).reason == "breaker_open" and not tier.stats().is_open)
        before = proxy.num_connections
        assert probe(tier, chain).reason == "breaker_open"
        result = start_load(tier, chain, Pool(), 1300).get()
        assert (result.num_tokens, result.error) == (0, "breaker_open")
        assert put_again(tier, chain, 3)
        eventually(lambda: counters(tier).get("put_dropped_breaker") == 1)
        assert tier.server_info() == {}
        assert proxy.num_connections == before
        assert tier.stats().breakers == {store.servers[0]: "open"}


# Cancelling and closing -------------------------------------------------------------------------


def test_a_cancel_lets_go_though_the_servers_are_frozen(
    tier: BlobTier, servers: list[BlobServer], chain: HashChain
) -> None:
    for server in servers:
        server.freeze()
    try:
        pool, cancelled = Pool(), threading.Event()
        answer = start_load(tier, chain, pool, 1300, cancelled=cancelled)
        cancelled.set()
        result = answer.get()
        assert (result.num_tokens, result.error) == (0, "cancelled")
        assert not pool.state
    finally:
        for server in servers:
            server.thaw()
    assert start_load(tier, chain, Pool(), 1300).get().num_tokens == 1300


def test_a_cancel_in_the_middle_calls_no_sink_after_done(tier: BlobTier, chain: HashChain) -> None:
    """`Pool` asserts it; whatever the moment, the answer comes once."""
    for number in range(10):
        cancelled = threading.Event()
        seen: list[int] = []

        def on_block(
            index: int,
            seen: list[int] = seen,
            cancelled: threading.Event = cancelled,
            n: int = number,
        ) -> None:
            seen.append(index)
            if len(seen) == n:
                cancelled.set()

        pool = Pool(on_block=on_block)
        result = start_load(tier, chain, pool, 1300, cancelled=cancelled).get()
        assert result.num_tokens in (0, 1300)
        assert bool(pool.state) == (result.num_tokens == 1300)
    assert tier.stats().corrupt == 0


def test_a_load_that_waits_for_others_is_cancelled_too(tier: BlobTier, chain: HashChain) -> None:
    hold, entered = threading.Event(), threading.Event()

    def on_block(index: int) -> None:
        entered.set()
        assert hold.wait(20)

    blocked = [start_load(tier, chain, Pool(on_block=on_block), 1300) for _ in range(4)]
    assert entered.wait(20)
    cancelled = threading.Event()
    waiting = start_load(tier, chain, Pool(), 1300, cancelled=cancelled)
    cancelled.set()
    assert waiting.get().error == "cancelled"
    hold.set()
    assert [answer.get().num_tokens for answer in blocked] == [1300] * 4


def test_close_answers_everything(servers: list[BlobServer], chain: HashChain) -> None:
    tier = tier_of(*servers, settings=PATIENT)
    fill(tier, chain, 1300)
    for server in servers:
        server.freeze()
    try:
        loads = [start_load(tier, chain, Pool(), 1300) for _ in range(3)]
        tier.close()
        tier.close()
        assert {answer.get().num_tokens for answer in loads} == {0}
        assert {answer.get().error for answer in loads} <= {"closed", "late", "unreachable"}
        assert start_load(tier, chain, Pool(), 1300).get().error == "closed"
        assert probe(tier, chain).reason == "closed"
        assert not put_again(tier, chain, 1)
    finally:
        for server in servers:
            server.thaw()
    assert not [t.name for t in threading.enumerate() if t.name.startswith("blob-")]


def test_too_many_loads_are_refused(servers: list[BlobServer], chain: HashChain) -> None:
    settings = TierSettings(loader=LoaderSettings(max_loads=1, min_load_s=20.0))
    with contextlib.closing(tier_of(*servers, settings=settings)) as tier:
        fill(tier, chain, 1300)
        hold = threading.Event()

        def on_block(index: int) -> None:
            assert hold.wait(20)

        first = start_load(tier, chain, Pool(on_block=on_block), 1300)
        assert start_load(tier, chain, Pool(), 1300).get().error == "busy"
        hold.set()
        assert first.get().num_tokens == 1300
