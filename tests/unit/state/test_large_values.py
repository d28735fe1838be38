"""Cache blocks of more than 7 MiB, as large models have in float32: several keys, one value."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from router.engine.chain import CACHE_BLOCK, HashChain
from router.engine.tier import Snapshot, TtlClass
from router.state.codec import HEADER_BYTES, MAX_VALUE_BYTES, PART_BYTES, part_lengths
from router.state.cold import BlobCold, ColdSettings
from router.state.kv_store import KvStore
from router.state.loader import LoaderSettings
from router.state.restore import ValueSizes
from router.state.tier import BlobTier, TierSettings
from tests.eventually import eventually
from tests.unit.state.blob_servers import (
    KINDS,
    NAMESPACE,
    Answer,
    BlobServer,
    Pool,
    blob_server,
    chain_of,
    probe,
    start_load,
    tier_of,
)

LAYERS, LAYER_BYTES = 3, (3 << 20) - 128
SIZES = ValueSizes(block_bytes=LAYERS * LAYER_BYTES, state_bytes=1000)
"""Three parts: 4 MiB, 4 MiB and 1 MiB; the second layer lies in two of them."""
NUM_BLOCKS = 3
END = NUM_BLOCKS * CACHE_BLOCK


@pytest.fixture(params=KINDS)
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BlobServer]:
    with blob_server(request.param, tmp_path) as running:
        yield running


@pytest.fixture
def tier(server: BlobServer) -> Iterator[BlobTier]:
    settings = TierSettings(probe_s=20.0, loader=LoaderSettings(min_load_s=20.0))
    made = tier_of(server, settings=settings, sizes=SIZES, io_s=20.0)
    yield made
    made.close()


def block(index: int) -> bytes:
    return np.random.default_rng(index).bytes(SIZES.block_bytes)


def put(tier: BlobTier, chain: HashChain, index: int) -> None:
    """Queue one block."""

    def read(out: memoryview) -> None:
        out[:] = block(index)

    key, parent = chain.block_hash(index), chain.position_hash(index * CACHE_BLOCK)
    stop = (index + 1) * CACHE_BLOCK
    assert tier.put_block(
        key, parent, read, SIZES.block_bytes, lambda: None, TtlClass.SESSION, num_tokens=stop
    )


def fill(tier: BlobTier, chain: HashChain) -> None:
    """Write all blocks, and snapshots behind the first and the last."""
    for index in range(NUM_BLOCKS):
        put(tier, chain, index)
    for position in (CACHE_BLOCK, END):
        snapshot = Snapshot(position, np.zeros(SIZES.state_bytes, np.uint8), SIZES.state_bytes)
        stored: Answer[bool] = Answer()
        tier.put_snapshot(chain.position_hash(position), snapshot, TtlClass.SESSION, stored)
        assert stored.get()
    eventually(lambda: tier.stats().num_queued_bytes == 0, 30)


def key_of(chain: HashChain, index: int, part: int) -> bytes:
    name = KvStore([], NAMESPACE).block_key(chain.block_hash(index))
    return name + (b":%d" % part if part else b"")


def test_parts_stay_below_the_bound_of_a_value() -> None:
    for nbytes in (0, 100, MAX_VALUE_BYTES, MAX_VALUE_BYTES + 1, 2 * PART_BYTES, 40 << 20):
        lengths = part_lengths(nbytes)
        assert sum(lengths) == nbytes
        assert max(lengths) <= MAX_VALUE_BYTES
        assert len(lengths) == 1 or min(lengths) > 0
    assert part_lengths(MAX_VALUE_BYTES) == [MAX_VALUE_BYTES]
    assert part_lengths(2 * PART_BYTES) == [PART_BYTES] * 2


def test_a_large_block_comes_back(server: BlobServer, tier: BlobTier) -> None:
    chain = chain_of(END)
    fill(tier, chain)
    lengths = part_lengths(HEADER_BYTES + SIZES.block_bytes)
    assert len(lengths) == 3
    for part, length in enumerate(lengths):
        assert server.command(b"STRLEN", key_of(chain, 1, part)) == b":%d" % length
        assert int(server.command(b"TTL", key_of(chain, 1, part))[1:]) > 3600
    assert probe(tier, chain, 0, END).num_tokens == END
    pool = Pool()
    assert start_load(tier, chain, pool, END).get().num_tokens == END
    assert all(pool.blocks[index] == block(index) for index in range(NUM_BLOCKS))


@pytest.mark.parametrize(("harm", "part"), [("gone", 2), ("flipped", 1), ("short", 0)])
def test_a_part_that_is_not_right_is_a_miss_of_the_whole(
    server: BlobServer, tier: BlobTier, harm: str, part: int
) -> None:
    chain = chain_of(END)
    fill(tier, chain)
    key = key_of(chain, 1, part)
    if harm == "flipped":
        server.command(b"SETRANGE", key, b"5000", b"????")
    elif harm == "short":
        server.command(b"SET", key, b"x" * 100, b"EX", b"5000")
    else:
        server.command(b"DEL", key)
        assert probe(tier, chain, 0, END).num_tokens == CACHE_BLOCK
    pool = Pool()
    result = start_load(tier, chain, pool, END, CACHE_BLOCK, END).get()
    assert result.num_tokens == CACHE_BLOCK
    assert pool.blocks[0] == block(0)
    put(tier, chain, 1)  # what is not right is written again
    eventually(lambda: tier.stats().num_queued_bytes == 0, 30)
    assert start_load(tier, chain, Pool(), END, CACHE_BLOCK).get().num_tokens == END


def test_layers_of_a_large_cold_block(server: BlobServer) -> None:
    store = KvStore([server.endpoint], NAMESPACE, io_s=20.0)
    cold = BlobCold(store, ColdSettings(put_s=20.0, read_s=20.0))
    chain = chain_of(END)
    values = [np.frombuffer(block(i), np.uint8).reshape(LAYERS, LAYER_BYTES) for i in range(2)]
    handles = []
    for i in range(2):
        names = chain.block_hash(i), chain.position_hash(i * CACHE_BLOCK)
        handle = cold.put(*names, values[i], num_tokens=(i + 1) * CACHE_BLOCK)
        assert handle is not None
        handles.append(handle)
    out = np.empty((2, LAYER_BYTES), np.uint8)
    for layer in range(LAYERS):
        assert cold.read(handles, layer, out)
        assert all(np.array_equal(out[i], values[i][layer]) for i in range(2))
    server.command(b"DEL", key_of(chain, 1, 1))
    assert cold.read(handles[:1], 1, out[:1])
    assert not cold.read(handles, 1, out)
    cold.close()
