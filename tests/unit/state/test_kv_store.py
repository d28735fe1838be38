from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.engine.tier import TtlClass
from router.state.breaker import BreakerSettings, BreakerState
from router.state.codec import Fault, block_label
from router.state.endpoint import Endpoint
from router.state.kv_store import KvStore, Links, block_ttl_s, snapshot_ttl_s
from tests.unit.state.blob_servers import KINDS, NAMESPACE, BlobServer, Proxy, blob_server

KEYS = [b"key:%d" % i for i in range(2000)]
VALUE = bytes(range(256)) * 16
LABEL = block_label(b"a" * 32, b"b" * 32, len(VALUE))


def store_of(*hosts: str) -> KvStore:
    return KvStore([Endpoint(host=host) for host in hosts], NAMESPACE)


def soon() -> float:
    return time.monotonic() + 30


@given(
    hosts=st.lists(
        st.from_regex(r"[a-z]{1,8}", fullmatch=True), min_size=2, max_size=6, unique=True
    )
)
def test_a_new_server_takes_its_share_and_moves_nothing_else(hosts: list[str]) -> None:
    old, new = store_of(*hosts[:-1]), store_of(*hosts)
    before = [old.servers[old.server_of(key)] for key in KEYS]
    after = [new.servers[new.server_of(key)] for key in KEYS]
    moved = [b for a, b in zip(before, after, strict=True) if a != b]
    assert {*moved} <= {new.servers[-1]}
    share = len(moved) / len(KEYS)
    assert 0.7 / len(hosts) < share < 1.4 / len(hosts), f"{share} of {len(hosts)} servers"


def test_the_order_of_servers_does_not_matter() -> None:
    one, other = store_of("a", "b", "c"), store_of("c", "a", "b")
    for key in KEYS:
        assert one.servers[one.server_of(key)] == other.servers[other.server_of(key)]


def test_what_matters_more_lives_longer() -> None:
    """On a full server the first to expire goes: tails before heads, sessions before the shared."""
    hours = [block_ttl_s(TtlClass.SESSION, n) / 3600 for n in (0, 128, 1 << 19, 1 << 20, 1 << 22)]
    assert hours[0] == 6
    assert hours[-2:] == [2, 2]
    assert hours == sorted(hours, reverse=True)
    assert hours[0] > hours[1], "each block counts"
    assert block_ttl_s(TtlClass.SHARED, 1 << 20) == 24 * 3600
    every = [block_ttl_s(TtlClass.SESSION, 128 * n) for n in range(1, 8193)]
    assert all(before >= after for before, after in pairwise(every))
    assert all(before > after for before, after in zip(every, every[2:], strict=False))
    assert every[0] - every[155] > 3600, "20K tokens: more than a turn takes"
    for ttl_class in TtlClass:
        for num_tokens in (5, 128, 300, 1 << 20):
            last = block_ttl_s(ttl_class, num_tokens // 128 * 128)
            assert snapshot_ttl_s(ttl_class, num_tokens) == last


@pytest.fixture(params=KINDS)
def servers(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[list[BlobServer]]:
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(blob_server(request.param, tmp_path, name=name))
            for name in ("one", "two")
        ]


@pytest.fixture
def links(servers: list[BlobServer]) -> Iterator[Links]:
    store = KvStore([server.endpoint for server in servers], NAMESPACE)
    with contextlib.closing(store.links()) as links:
        yield links


def read(links: Links, key: bytes) -> tuple[Fault | None, bytes]:
    into = memoryview(bytearray(len(VALUE)))
    (fault,) = links.get([key], [LABEL], [into], ttl_s=100, deadline=soon())
    return fault, bytes(into)


def write(links: Links, key: bytes, value: bytes = VALUE) -> str:
    return links.put(key, LABEL, [memoryview(value)], ttl_s=100, deadline=soon())


def test_values_are_spread_found_and_read(servers: list[BlobServer], links: Links) -> None:
    for key in KEYS[:40:2]:
        assert write(links, key) == "OK"
    assert links.exists(KEYS[:40], soon()) == [True, False] * 20
    assert read(links, KEYS[0]) == (None, VALUE)
    assert read(links, KEYS[1])[0] is Fault.MISSING
    for server in servers:
        assert int(server.command(b"DBSIZE")[1:]) > 0
        assert server.command(b"RANDOMKEY") != b"$-1"


def test_damage_on_the_server_is_a_fault(servers: list[BlobServer], links: Links) -> None:
    write(links, KEYS[0])
    for server in servers:
        server.command(b"SETRANGE", KEYS[0], b"1000", b"!")
    assert read(links, KEYS[0])[0] in (Fault.CHECKSUM, Fault.LENGTH)
    for server in servers:
        server.command(b"SET", KEYS[0], b"x")
    assert read(links, KEYS[0])[0] is Fault.LENGTH


def test_info_of_every_server(links: Links) -> None:
    info = links.info(soon())
    assert len(info) == 2
    assert all(int(fields["used_memory"]) > 0 for fields in info.values())


def test_a_dead_server_costs_its_own_keys_only(servers: list[BlobServer], links: Links) -> None:
    for key in KEYS[:40]:
        write(links, key)
    servers[0].kill()
    found = links.exists(KEYS[:40], soon())
    assert 0 < sum(found) < 40
    for key, is_there in zip(KEYS[:40], found, strict=True):
        assert read(links, key)[0] == (None if is_there else Fault.MISSING)


def test_an_open_breaker_makes_no_call(servers: list[BlobServer]) -> None:
    proxy = Proxy(servers[0].endpoint)
    proxy.cut_after = 0
    store = KvStore([proxy.endpoint], NAMESPACE, breaker=BreakerSettings(first_wait_s=1000))
    with contextlib.closing(proxy), contextlib.closing(store.links()) as links:
        for _ in range(3):
            assert links.exists([b"k"], soon()) == [False]
        assert store.breakers[0].state is BreakerState.OPEN
        assert proxy.num_connections == 3
        assert links.exists(KEYS, soon()) == [False] * len(KEYS)
        assert read(links, b"k")[0] is Fault.MISSING
        assert write(links, b"k") == ""
        assert links.info(soon()) == {}
        assert proxy.num_connections == 3


def test_a_frozen_server_opens_the_breaker_though_every_call_was_only_late(
    servers: list[BlobServer],
) -> None:
    store = KvStore(
        [servers[0].endpoint], NAMESPACE, breaker=BreakerSettings(first_wait_s=1000), io_s=60
    )
    with contextlib.closing(store.links()) as links:
        assert links.exists([b"k"], soon()) == [False]
        servers[0].freeze()
        try:
            for _ in range(3):
                assert links.exists([b"k"], time.monotonic() + 0.06) == [False]
        finally:
            servers[0].thaw()
    assert store.breakers[0].state is BreakerState.OPEN
