"""Cold cache blocks on real servers: they come back as they went, or not at all."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from router.engine.cold_store import SHELF_BLOCKS, ColdStore
from router.state.breaker import BreakerSettings
from router.state.codec import HEADER_BYTES
from router.state.cold import BlobCold, ColdSettings, ColdStats
from router.state.kv_store import KvStore
from tests.unit.state.blob_servers import KINDS, NAMESPACE, BlobServer, blob_server

LAYERS, LAYER_BYTES = 3, 640


@pytest.fixture(params=KINDS)
def servers(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[list[BlobServer]]:
    with (
        blob_server(request.param, tmp_path, name="a") as one,
        blob_server(request.param, tmp_path, name="b") as other,
    ):
        yield [one, other]


@pytest.fixture
def cold(servers: list[BlobServer]) -> Iterator[BlobCold]:
    store = KvStore([server.endpoint for server in servers], NAMESPACE, io_s=0.3)
    tier = BlobCold(store, ColdSettings(put_s=1.0, read_s=1.0))
    yield tier
    tier.close()


def block(index: int) -> NDArray[np.uint8]:
    return np.random.default_rng(index).integers(0, 256, (LAYERS, LAYER_BYTES), dtype=np.uint8)


def name(index: int) -> bytes:
    return hashlib.sha256(index.to_bytes(4, "big")).digest()


def put_all(cold: BlobCold, count: int) -> list[object]:
    handles = [cold.put(name(i + 1), name(i), block(i), num_tokens=128) for i in range(count)]
    assert None not in handles
    return handles


def test_every_layers_part_comes_back(cold: BlobCold) -> None:
    handles = put_all(cold, 40)
    for layer in range(LAYERS):
        out = np.zeros((40, LAYER_BYTES), np.uint8)
        assert cold.read(handles, layer, out)  # type: ignore[arg-type]
        assert all(np.array_equal(out[i], block(i)[layer]) for i in range(40))


def test_values_lie_on_both_servers_and_are_the_prefixes_own(
    cold: BlobCold, servers: list[BlobServer]
) -> None:
    handles = put_all(cold, 40)
    sizes = [int(server.command(b"DBSIZE")[1:]) for server in servers]
    assert min(sizes) > 0
    assert sum(sizes) == 40
    key = handles[0].key  # type: ignore[attr-defined]
    lengths = [server.command(b"STRLEN", key) for server in servers]
    assert b":%d" % (HEADER_BYTES + LAYERS * LAYER_BYTES) in lengths
    put_all(cold, 40)  # found, not sent again
    assert [int(server.command(b"DBSIZE")[1:]) for server in servers] == sizes


def test_what_was_sent_and_read_back_is_counted(cold: BlobCold) -> None:
    assert cold.stats() == ColdStats()
    handles = put_all(cold, 5)
    put_all(cold, 5)  # found, not sent again
    out = np.zeros((5, LAYER_BYTES), np.uint8)
    for layer in range(LAYERS - 1):
        assert cold.read(handles, layer, out)  # type: ignore[arg-type]
    assert cold.stats() == ColdStats(
        sent_bytes=5 * LAYERS * LAYER_BYTES, read_blocks=0, read_bytes=5 * 2 * LAYER_BYTES
    )
    assert cold.read(handles, LAYERS - 1, out)  # type: ignore[arg-type]
    assert cold.stats().read_blocks == 5


def test_a_block_that_another_router_rounded_otherwise_is_read_as_it_is_stored(
    cold: BlobCold, servers: list[BlobServer]
) -> None:
    """Kernels differ in the last bit; whoever reads the stored one is not disturbed."""
    (handle,) = put_all(cold, 1)
    rounded = block(0)
    rounded[1, 17] ^= 1
    other = cold.put(name(1), name(0), rounded, num_tokens=128)
    assert other == handle
    out = np.empty((1, LAYER_BYTES), np.uint8)
    assert cold.read([other], 1, out)  # type: ignore[list-item]
    assert np.array_equal(out[0], block(0)[1])


def test_a_damaged_block_is_written_again(cold: BlobCold, servers: list[BlobServer]) -> None:
    (handle,) = put_all(cold, 1)
    out = np.empty((1, LAYER_BYTES), np.uint8)
    for offset in (HEADER_BYTES + 5, 30):  # of the payload, of the header's checksum
        server = next(s for s in servers if s.command(b"EXISTS", handle.key) == b":1")  # type: ignore[attr-defined]
        server.command(b"SETRANGE", handle.key, b"%d" % offset, b"????")  # type: ignore[attr-defined]
        assert cold.read([handle], 0, out) == (offset == 30)  # type: ignore[list-item]
        assert cold.put(name(1), name(0), block(0), num_tokens=128) == handle
        assert cold.read([handle], 0, out)  # type: ignore[list-item]
        assert np.array_equal(out[0], block(0)[0])


@pytest.mark.parametrize("harm", ["gone", "flipped", "short", "list"])
def test_a_value_that_is_not_what_was_put_is_a_miss(
    cold: BlobCold, servers: list[BlobServer], harm: str
) -> None:
    handles = put_all(cold, 8)
    key = handles[5].key  # type: ignore[attr-defined]
    offset = b"%d" % (HEADER_BYTES + LAYER_BYTES + 17)
    for server in servers:
        if server.command(b"EXISTS", key) == b":0":
            continue
        if harm == "flipped":
            old = block(5)[1, 17]
            server.command(b"SETRANGE", key, offset, bytes([old ^ 1]))
        else:
            server.command(b"DEL", key)
        if harm == "short":
            server.command(b"SET", key, b"x" * (HEADER_BYTES + LAYER_BYTES + 100))
        if harm == "list":
            server.command(b"RPUSH", key, b"x")
    out = np.empty((8, LAYER_BYTES), np.uint8)
    assert not cold.read(handles, 1, out)  # type: ignore[arg-type]
    assert cold.read(handles[:5], 1, out[:5])  # type: ignore[arg-type]


def test_a_dead_or_frozen_server_is_a_miss_within_its_bound(
    cold: BlobCold, servers: list[BlobServer]
) -> None:
    handles = put_all(cold, 32)  # of 8, once in 128 runs one server has all
    out = np.empty((32, LAYER_BYTES), np.uint8)
    servers[0].freeze()
    assert not cold.read(handles, 0, out)  # type: ignore[arg-type]
    servers[0].thaw()
    servers[1].kill()
    assert not cold.read(handles, 0, out)  # type: ignore[arg-type]
    puts = [cold.put(name(i + 101), name(i + 100), block(i), num_tokens=128) for i in range(32)]
    assert None in puts  # those of the dead server
    assert any(puts)


def test_a_full_server_takes_nothing(tmp_path: Path) -> None:
    with blob_server("redis", tmp_path, "--maxmemory", "1kb") as server:
        store = KvStore([server.endpoint], NAMESPACE, breaker=BreakerSettings())
        cold = BlobCold(store)
        assert cold.put(name(1), name(0), block(0), num_tokens=128) is None
        cold.close()


def test_the_store_reads_shelves_ahead_through_all_layers(cold: BlobCold) -> None:
    """One shelf in memory, the rest on the servers; twice, as two steps read them."""
    count = 2 * SHELF_BLOCKS + 7
    store = ColdStore(
        num_layers=LAYERS,
        block_bytes=LAYERS * LAYER_BYTES,
        max_bytes=SHELF_BLOCKS * LAYERS * LAYER_BYTES,
        tier=cold,
    )
    sequence = store.new_sequence()
    for i in range(count):
        sequence.append(name(i + 1), name(i), block(i).reshape(-1))
    assert store.num_bytes == SHELF_BLOCKS * LAYERS * LAYER_BYTES
    for _ in range(2):
        with sequence.past() as past:
            for layer in range(LAYERS):
                rows = [part.copy() for section in past.next_layer() for part in section]
                assert len(rows) == count
                assert all(np.array_equal(row, block(i)[layer]) for i, row in enumerate(rows))
    sequence.close()
    assert store.num_bytes == 0
    store.close()
