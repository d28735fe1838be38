from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from router.engine.chain import HashChain
from router.engine.tier import TtlClass
from router.state.bulk import Bulk
from router.state.kv_store import KvStore
from router.state.restore import ValueSizes
from router.state.tier import BlobTier, TierSettings
from router.state.writer import StoredKeys, WriterSettings
from tests.eventually import eventually
from tests.unit.state.blob_servers import (
    KINDS,
    NAMESPACE,
    SIZES,
    Answer,
    BlobServer,
    Pool,
    blob_server,
    block_bytes,
    chain_of,
    fill,
    snapshot,
    start_load,
    tier_of,
)


@pytest.fixture(params=KINDS)
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BlobServer]:
    with blob_server(request.param, tmp_path) as server:
        yield server


@pytest.fixture
def chain() -> HashChain:
    return chain_of(4000)


@pytest.fixture
def tier(server: BlobServer) -> Iterator[BlobTier]:
    with contextlib.closing(tier_of(server)) as tier:
        yield tier


def put(
    tier: BlobTier,
    chain: HashChain,
    index: int,
    release: Callable[[], None] = lambda: None,
    on_read: Callable[[int], None] = lambda index: None,
) -> bool:
    def read(out: memoryview) -> None:
        on_read(index)
        out[:] = block_bytes(index)

    return tier.put_block(
        chain.block_hash(index),
        chain.position_hash(128 * index),
        read,
        SIZES.block_bytes,
        release,
        TtlClass.SESSION,
        num_tokens=128 * (index + 1),
    )


def count(tier: BlobTier, name: str) -> float:
    return tier.stats().counters.get(name, 0)


def test_the_block_is_let_go_once_it_is_copied_and_before_it_is_stored(
    tier: BlobTier, server: BlobServer, chain: HashChain
) -> None:
    assert put(tier, chain, 0)
    eventually(lambda: count(tier, "put_values") == 1)
    server.freeze()
    try:
        released = threading.Event()
        # EXISTS is asked first, so a frozen server holds the block; after that it does not.
        assert put(tier, chain, 1, released.set)
        assert not released.is_set()
        server.thaw()
        assert released.wait(20)
    finally:
        server.thaw()


def test_the_queue_is_bounded_and_drops_what_is_newest(
    server: BlobServer, chain: HashChain
) -> None:
    settings = TierSettings(writer=WriterSettings(max_queue_bytes=3 * SIZES.block_bytes))
    with contextlib.closing(tier_of(server, settings=settings)) as tier:
        hold, entered = threading.Event(), threading.Event()

        def on_read(index: int) -> None:
            entered.set()
            assert hold.wait(20)

        released: list[int] = []
        accepted = [
            put(tier, chain, i, lambda i=i: released.append(i), on_read)  # type: ignore[misc]
            for i in range(6)
        ]
        assert accepted == [True] * 3 + [False] * 3
        assert entered.wait(20)
        assert tier.stats().num_queued_bytes <= 3 * SIZES.block_bytes
        hold.set()
        eventually(lambda: released == [0, 1, 2])
        eventually(lambda: tier.stats().num_queued_bytes == 0)
        assert count(tier, "put_dropped_queue") == 3
        assert tier.stats().dropped_bytes == 3 * SIZES.block_bytes
        assert put(tier, chain, 3), "there is room again"


def test_a_snapshot_that_does_not_fit_is_dropped_whole(
    server: BlobServer, chain: HashChain
) -> None:
    settings = TierSettings(writer=WriterSettings(max_queue_bytes=1 << 20))
    with contextlib.closing(tier_of(server, settings=settings)) as tier:
        stored: Answer[bool] = Answer()
        key = chain.position_hash(300)
        assert not tier.put_snapshot(key, snapshot(300), TtlClass.SESSION, stored)
        assert not stored.values
        assert server.command(b"DBSIZE") == b":0"


def test_a_value_is_written_once(tier: BlobTier, server: BlobServer, chain: HashChain) -> None:
    """By this router because it remembers, by another because it asks."""
    fill(tier, chain, 300)
    written = count(tier, "put_values")
    assert not put(tier, chain, 0)
    stored: Answer[bool] = Answer()
    tier.put_snapshot(chain.position_hash(300), snapshot(300), TtlClass.SESSION, stored)
    assert stored.get()
    assert count(tier, "put_values") == written
    with contextlib.closing(tier_of(server)) as other:
        reads: list[int] = []
        released = threading.Event()
        assert put(other, chain, 0, released.set, reads.append)
        assert released.wait(20)
        eventually(lambda: count(other, "put_skipped") == 1)
        assert not reads
        assert count(other, "put_values") == 0


def test_two_routers_that_write_the_same_at_once(server: BlobServer, chain: HashChain) -> None:
    with (
        contextlib.closing(tier_of(server)) as one,
        contextlib.closing(tier_of(server)) as other,
    ):
        threads = [
            threading.Thread(target=fill, args=(tier, chain, 640, 1300)) for tier in (one, other)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert server.command(b"DBSIZE") == b":%d" % (10 + 2 * 3)
        for tier in (one, other):
            pool = Pool()
            assert start_load(tier, chain, pool, 1300).get().num_tokens == 1300
            pool.assert_holds(0, 1300)


def test_every_value_expires_and_the_head_last(
    tier: BlobTier, server: BlobServer, chain: HashChain
) -> None:
    fill(tier, chain, 3900)
    store = KvStore([server.endpoint], NAMESPACE)

    def ttl_s(key: bytes) -> int:
        return int(server.command(b"TTL", key)[1:])

    lives = [ttl_s(store.block_key(chain.block_hash(index))) for index in range(30)]
    assert all(2 * 3600 - 60 < ttl <= 6 * 3600 for ttl in lives)
    assert lives[0] > lives[-1]
    for part in range(3):  # as long as the block that they stand on
        assert abs(ttl_s(store.stripe_key(chain.position_hash(3900), part)) - lives[-1]) < 60
    assert server.command(b"DBSIZE") == b":33"


def test_a_full_server_drops_and_pauses(
    tier: BlobTier, server: BlobServer, chain: HashChain
) -> None:
    server.command(b"CONFIG", b"SET", b"maxmemory", b"1mb")
    stored: Answer[bool] = Answer()
    assert tier.put_snapshot(chain.position_hash(300), snapshot(300), TtlClass.SESSION, stored)
    assert not stored.get()
    assert count(tier, "put_dropped_oom") == 3
    released = threading.Event()
    assert put(tier, chain, 0, released.set)
    assert released.wait(20)
    assert tier.stats().is_open, "a full server answers: that is no failure"


def test_an_evicting_server_keeps_what_matters_more(server: BlobServer, chain: HashChain) -> None:
    """volatile-ttl: the shared and the heads outlive the tails."""
    server.command(b"CONFIG", b"SET", b"maxmemory-policy", b"volatile-ttl")
    server.command(b"CONFIG", b"SET", b"maxmemory-samples", b"64")
    server.command(b"CONFIG", b"SET", b"maxmemory", b"12mb")
    sizes = ValueSizes(block_bytes=512 << 10, state_bytes=1000)
    with contextlib.closing(tier_of(server, sizes=sizes)) as tier:
        classes = [TtlClass.SHARED] * 3 + [TtlClass.SESSION] * 27
        for index, ttl_class in enumerate(classes):
            assert tier.put_block(
                chain.block_hash(index),
                chain.position_hash(128 * index),
                lambda out: None,
                sizes.block_bytes,
                lambda: None,
                ttl_class,
                num_tokens=128 * (index + 1),
            )
        eventually(lambda: count(tier, "put_values") == 30)
        assert int(tier.server_info().popitem()[1]["evicted_keys"]) > 5
    store = KvStore([server.endpoint], NAMESPACE)
    with contextlib.closing(Bulk(server.endpoint)) as bulk:
        there = bulk.exists([store.block_key(chain.block_hash(index)) for index in range(30)])
    assert there[:8] == [True] * 8
    assert not any(there[-2:-6:-1]), "only the last one written has not yet had to go"


def test_a_dead_server_drops_within_its_bound(
    tier: BlobTier, server: BlobServer, chain: HashChain
) -> None:
    server.kill()
    released: list[int] = []
    for index in range(20):
        put(tier, chain, index, lambda i=index: released.append(i))  # type: ignore[misc]
    eventually(lambda: len(released) == 20)
    assert tier.stats().num_queued_bytes == 0
    assert tier.stats().written_bytes == 0
    assert not tier.stats().is_open


def test_a_read_that_raises_costs_its_own_batch_only(
    tier: BlobTier, server: BlobServer, chain: HashChain
) -> None:
    def fail(index: int) -> None:
        raise RuntimeError("a bug of the engine")

    released = threading.Event()
    assert put(tier, chain, 0, released.set, fail)
    assert released.wait(20)
    eventually(lambda: count(tier, "put_dropped_error") == 1)
    assert put(tier, chain, 1)
    eventually(lambda: count(tier, "put_values") == 1)


def test_restores_go_before_writes(tier: BlobTier, server: BlobServer, chain: HashChain) -> None:
    fill(tier, chain, 1300)
    hold, entered = threading.Event(), threading.Event()
    order: list[str] = []

    def on_block(index: int) -> None:
        entered.set()
        assert hold.wait(20)
        order.append("restore")

    answer = start_load(tier, chain, Pool(on_block=on_block), 1300)
    assert entered.wait(20)
    assert put(tier, chain, 20, on_read=lambda index: order.append("write"))
    hold.set()
    assert answer.get().num_tokens == 1300
    eventually(lambda: "write" in order)
    assert order == ["restore"] * 10 + ["write"]


def test_snapshots_go_before_blocks(server: BlobServer, chain: HashChain) -> None:
    with contextlib.closing(tier_of(server)) as tier:
        hold, entered = threading.Event(), threading.Event()

        def on_read(index: int) -> None:
            entered.set()
            assert hold.wait(20)

        assert put(tier, chain, 0, on_read=on_read)
        assert entered.wait(20)
        reads: list[int] = []
        stored: Answer[bool] = Answer()
        for index in range(1, 10):
            assert put(tier, chain, index, on_read=reads.append)
        stored_before: list[int] = []
        assert tier.put_snapshot(
            chain.position_hash(300),
            snapshot(300),
            TtlClass.SESSION,
            lambda is_stored: (stored_before.extend(reads), stored(is_stored))[1],
        )
        hold.set()
        assert stored.get()
        assert not stored_before


def test_stored_keys_are_forgotten() -> None:
    stored = StoredKeys(max_keys=2, remember_s=1000)
    for key in (b"a", b"b", b"a", b"c"):
        stored.note(key)
    assert [key in stored for key in (b"a", b"b", b"c")] == [True, False, True]
    stored.forget(b"a")
    stored.forget(b"never")
    assert b"a" not in stored
    brief = StoredKeys(max_keys=2, remember_s=0)
    brief.note(b"a")
    assert b"a" not in brief


def test_close_lets_go_of_all_that_is_queued(server: BlobServer, chain: HashChain) -> None:
    tier = tier_of(server)
    server.freeze()
    try:
        released: list[int] = []
        stored: Answer[bool] = Answer()
        for index in range(20):
            assert put(tier, chain, index, lambda i=index: released.append(i))  # type: ignore[misc]
        tier.put_snapshot(chain.position_hash(300), snapshot(300), TtlClass.SESSION, stored)
        tier.close()
        assert sorted(released) == list(range(20))
        assert not stored.get()
        assert tier.stats().num_queued_bytes == 0
        assert not put(tier, chain, 21)
    finally:
        server.thaw()
    with contextlib.closing(Bulk(server.endpoint)) as bulk:
        assert bulk.exists([b"x"]) == [False]
