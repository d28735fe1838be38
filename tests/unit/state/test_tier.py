from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from router.engine.chain import HashChain
from router.engine.tier import LoadResult, TtlClass
from router.state.breaker import BreakerSettings
from router.state.codec import STRIPE_BYTES
from router.state.cost import CostSettings
from router.state.kv_store import KvStore
from router.state.loader import LoaderSettings
from router.state.tier import BlobTier, TierSettings
from tests.eventually import eventually
from tests.unit.state.blob_servers import (
    KINDS,
    NAMESPACE,
    SIZES,
    BlobServer,
    Pool,
    Proxy,
    blob_server,
    block_bytes,
    chain_of,
    fill,
    probe,
    start_load,
    tier_of,
)

POSITIONS = (512, 1024, 1300)
PATIENT = TierSettings(
    probe_s=20.0, loader=LoaderSettings(connections_per_server=2, min_load_s=20.0)
)
"""Shared cores: no test depends on how fast they are."""


@pytest.fixture(params=KINDS)
def servers(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[list[BlobServer]]:
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(blob_server(request.param, tmp_path, name=name))
            for name in ("one", "two")
        ]


@pytest.fixture
def chain() -> HashChain:
    return chain_of(2000)


@pytest.fixture
def tier(servers: list[BlobServer], chain: HashChain) -> Iterator[BlobTier]:
    """A tier whose servers hold snapshots at `POSITIONS` and all blocks before the last."""
    with contextlib.closing(tier_of(*servers, settings=PATIENT)) as tier:
        fill(tier, chain, *POSITIONS)
        yield tier


def store(*servers: BlobServer) -> KvStore:
    return KvStore([server.endpoint for server in servers], NAMESPACE)


def at(servers: list[BlobServer], key: bytes) -> BlobServer:
    """The server that keeps `key`."""
    return servers[store(*servers).server_of(key)]


def block_key(chain: HashChain, index: int) -> bytes:
    return b"qs1:b:%s:%s" % (NAMESPACE.encode(), chain.block_hash(index)[:16].hex().encode())


def stripe_key(chain: HashChain, position: int, part: int) -> bytes:
    name = chain.position_hash(position)[:16].hex().encode()
    return b"qs1:g:%s:%s:%d" % (NAMESPACE.encode(), name, part)


def counters(tier: BlobTier) -> dict[str, float]:
    return {**tier.stats().counters}


# What is found ----------------------------------------------------------------------------------


def test_what_was_written_is_found_and_restored_bit_by_bit(
    tier: BlobTier, chain: HashChain
) -> None:
    found = probe(tier, chain, 0, None, 1300)
    assert (found.num_tokens, found.decision, found.reason) == (1300, "load", "unmeasured")
    pool = Pool()
    result = start_load(tier, chain, pool, 1300).get()
    assert (result.num_tokens, result.error) == (1300, "")
    assert result.num_bytes == SIZES.load_bytes(0, 1300)
    pool.assert_holds(0, 1300)
    stats = tier.stats()
    assert (stats.hit_tokens, stats.loads, stats.load_failures) == (1300, 1, 0)
    assert (stats.read_bytes, stats.corrupt) == (result.num_bytes, 0)
    assert set(stats.breakers.values()) == {"closed"}


def test_only_candidates_behind_the_start_and_up_to_the_limit(
    tier: BlobTier, chain: HashChain
) -> None:
    assert probe(tier, chain, 0, 1299, 1300).num_tokens == 1024
    assert probe(tier, chain, 0, 1023).num_tokens == 512
    assert probe(tier, chain, 512, 1023).num_tokens == 0
    assert probe(tier, chain, 511, 1023).num_tokens == 512
    assert probe(tier, chain, 0, 100).num_tokens == 0


def test_an_unaligned_snapshot_is_found_only_by_who_knows_of_it(
    tier: BlobTier, chain: HashChain
) -> None:
    assert probe(tier, chain).num_tokens == 1024
    assert probe(tier, chain, 0, None, 77, 1300, 1999).num_tokens == 1300


def test_a_load_goes_on_from_what_is_in_place(tier: BlobTier, chain: HashChain) -> None:
    pool = Pool()
    result = start_load(tier, chain, pool, 1300, start=700).get()
    assert result.num_tokens == 1300
    assert sorted(pool.blocks) == [5, 6, 7, 8, 9]
    pool.assert_holds(700, 1300)


def test_other_tokens_other_values(tier: BlobTier) -> None:
    other = chain_of(2000, seed=1)
    found = probe(tier, other)
    assert (found.num_tokens, found.decision, found.reason) == (0, "prefill", "absent")
    pool = Pool()
    result = start_load(tier, other, pool, 1024).get()
    assert (result.num_tokens, result.error) == (0, "missing")
    assert not pool.state


def test_kv_without_a_snapshot_is_no_hit(servers: list[BlobServer], chain: HashChain) -> None:
    with contextlib.closing(tier_of(*servers, settings=PATIENT)) as tier:
        fill(tier, chain, 1024)
        for part in range(3):
            at(servers, stripe_key(chain, 1024, part)).command(
                b"DEL", stripe_key(chain, 1024, part)
            )
        found = probe(tier, chain)
        assert (found.num_tokens, found.reason) == (0, "no_snapshot")
        assert counters(tier)["lost_reuse_tokens"] == 1024
        assert counters(tier)["hit_tokens_kv"] == 1024
        assert counters(tier)["hit_tokens_resumable"] == 0


def test_a_snapshot_behind_a_hole_is_no_hit(
    tier: BlobTier, servers: list[BlobServer], chain: HashChain
) -> None:
    at(servers, block_key(chain, 5)).command(b"DEL", block_key(chain, 5))
    assert probe(tier, chain, 0, None, 1300).num_tokens == 512


@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_snapshot_without_a_stripe_is_no_hit(
    tier: BlobTier, servers: list[BlobServer], chain: HashChain, part: int
) -> None:
    key = stripe_key(chain, 1300, part)
    at(servers, key).command(b"DEL", key)
    assert probe(tier, chain, 0, None, 1300).num_tokens == 1024


def test_the_cost_model_decides(tier: BlobTier, chain: HashChain) -> None:
    tier.note_prefill(1000, 0, 1e-3)
    found = probe(tier, chain)
    assert (found.num_tokens, found.decision, found.reason) == (1024, "prefill", "slower")
    assert found.predicted_load_s > found.predicted_prefill_s > 0
    for _ in range(200):
        tier.note_prefill(1000, 0, 1000.0)
    assert probe(tier, chain).decision == "load"
    assert counters(tier)["probes_decision_prefill"] == 1
    assert counters(tier)["probes_decision_load"] == 1


# What is wrong ----------------------------------------------------------------------------------


def restored(tier: BlobTier, chain: HashChain, wanted: int = 1300) -> tuple[Pool, LoadResult]:
    """Probe, so that the tier knows the candidates, and load what was there before the damage."""
    pool = Pool()
    return pool, start_load(tier, chain, pool, wanted, *POSITIONS).get()


DAMAGE = ("flip", "short", "long", "empty", "other_key", "gone", "list")


def damage(servers: list[BlobServer], key: bytes, other: bytes, how: str) -> None:
    server, source = at(servers, key), at(servers, other)
    if how == "flip":
        server.command(b"SETBIT", key, b"5000", b"1")
        server.command(b"SETRANGE", key, b"700", b"flipped")
    elif how == "short":
        server.command(b"SET", key, b"QKV1")
    elif how == "long":
        server.command(b"APPEND", key, b"x")
    elif how == "empty":
        server.command(b"SET", key, b"")
    elif how == "gone":
        server.command(b"DEL", key)
    elif how == "list":
        server.command(b"DEL", key)
        server.command(b"RPUSH", key, b"x")
    else:
        links = store(*servers).links()
        into = bytearray(64 + SIZES.block_bytes)
        link = links._links[store(*servers).server_of(other)]
        link.bulk.send_get(other, 100)
        length = link.bulk.receive([memoryview(into)])
        value = bytes(into) if length == len(into) else bytes(STRIPE_BYTES + 64)
        links.close()
        assert source
        with contextlib.closing(store(*servers).links()) as again:
            bulk = again._links[store(*servers).server_of(key)].bulk
            assert bulk.set(key, [value], 1000) == "OK"


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_block_falls_back_to_the_candidate_before_it(
    tier: BlobTier, servers: list[BlobServer], chain: HashChain, how: str
) -> None:
    damage(servers, block_key(chain, 8), block_key(chain, 7), how)
    pool, result = restored(tier, chain)
    assert result.num_tokens == 1024
    assert result.error == ("missing" if how == "gone" else "corrupt")
    pool.assert_holds(0, 1024)
    corrupt = counters(tier).get("corrupt_total", 0)
    assert corrupt == (0 if how == "gone" else 1)
    assert tier.stats().load_failures == 1


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("part", [0, 2])
def test_a_damaged_stripe_falls_back_to_the_candidate_before_it(
    tier: BlobTier, servers: list[BlobServer], chain: HashChain, how: str, part: int
) -> None:
    other = stripe_key(chain, 1024, part)
    damage(servers, stripe_key(chain, 1300, part), other, how)
    pool, result = restored(tier, chain)
    assert result.num_tokens == 1024
    pool.assert_holds(0, 1024)


def test_two_faults_fall_back_twice(
    tier: BlobTier, servers: list[BlobServer], chain: HashChain
) -> None:
    damage(servers, stripe_key(chain, 1300, 1), b"", "flip")
    damage(servers, block_key(chain, 6), b"", "flip")
    pool, result = restored(tier, chain)
    assert result.num_tokens == 512
    pool.assert_holds(0, 512)


def test_without_a_candidate_the_state_is_left_alone(
    tier: BlobTier, servers: list[BlobServer], chain: HashChain
) -> None:
    damage(servers, block_key(chain, 0), b"", "gone")
    pool, result = restored(tier, chain)
    assert (result.num_tokens, result.error) == (0, "missing")
    assert not pool.state


def test_the_tier_remembers_what_its_probe_found(
    tier: BlobTier, servers: list[BlobServer], chain: HashChain
) -> None:
    """Aligned candidates stand in no session's record."""
    assert probe(tier, chain, 0, None, 1300).num_tokens == 1300
    damage(servers, stripe_key(chain, 1300, 1), b"", "flip")
    pool = Pool()
    assert start_load(tier, chain, pool, 1300).get().num_tokens == 1024
    pool.assert_holds(0, 1024)


def test_a_missed_key_is_written_again(
    tier: BlobTier, servers: list[BlobServer], chain: HashChain
) -> None:
    """Evicted while this router remembers it as stored."""
    damage(servers, block_key(chain, 8), b"", "gone")
    restored(tier, chain)
    written = counters(tier)["put_values"]
    assert put_again(tier, chain, 8)
    eventually(lambda: counters(tier)["put_values"] == written + 1)
    assert not put_again(tier, chain, 7), "this one is known to be there"


def put_again(tier: BlobTier, chain: HashChain, index: int) -> bool:
    def read(out: memoryview) -> None:
        out[:] = block_bytes(index)

    return tier.put_block(
        chain.block_hash(index),
        chain.position_hash(128 * index),
        read,
        SIZES.block_bytes,
        lambda: None,
        TtlClass.SESSION,
    )


def test_a_sink_that_raises_ends_its_load_only(tier: BlobTier, chain: HashChain) -> None:
    def fail(index: int) -> None:
        raise RuntimeError("a bug of the engine")

    broken = Pool(on_block=fail)
    result = start_load(tier, chain, broken, 1300).get()
    assert (result.num_tokens, result.error) == (0, "sink")
    pool = Pool()
    assert start_load(tier, chain, pool, 1300).get().num_tokens == 1300


def test_many_loads_at_once(tier: BlobTier, chain: HashChain) -> None:
    pools = [Pool() for _ in range(12)]
    answers = [start_load(tier, chain, pool, 1300) for pool in pools]
    for pool, answer in zip(pools, answers, strict=True):
        assert answer.get().num_tokens == 1300
        pool.assert_holds(0, 1300)


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
        cost=CostSettings(prior_bytes_per_s=1e12), loader=LoaderSettings(min_load_s=0.1)
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
            assert 0.1 <= result.seconds < 10
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
