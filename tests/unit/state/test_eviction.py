"""Which values a full server gives up: of one prefix the tail, never what the rest stands on."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from router.engine.chain import CACHE_BLOCK, HashChain
from router.engine.tier import TtlClass
from router.state.kv_store import KvStore, block_ttl_s
from router.state.tier import BlobTier
from tests.eventually import eventually
from tests.unit.state.blob_servers import (
    KINDS,
    SIZES,
    BlobServer,
    Pool,
    blob_server,
    chain_of,
    fill,
    start_load,
    tier_of,
)

NUM_BLOCKS = 64


@pytest.fixture(params=KINDS)
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BlobServer]:
    options = "--maxmemory-policy", "volatile-ttl", "--maxmemory-samples", "10"
    with blob_server(request.param, tmp_path, *options) as running:
        yield running


@pytest.fixture
def tier(server: BlobServer) -> Iterator[BlobTier]:
    made = tier_of(server)
    yield made
    made.close()


def keys_of(server: BlobServer, chain: HashChain) -> list[bytes]:
    store = KvStore([server.endpoint], "0123456789abcdef")
    return [store.block_key(chain.block_hash(index)) for index in range(chain.num_blocks)]


def ttls_ms(server: BlobServer, keys: list[bytes]) -> list[int]:
    return [int(server.command(b"PTTL", key)[1:]) for key in keys]


def used_memory(tier: BlobTier) -> int:
    (info,) = tier.server_info().values()
    return int(info["used_memory"])


def assert_heads_last(ttls: list[int]) -> None:
    """Every block outlives the next one, by more than what it takes to compute or read one."""
    steps = [before - after for before, after in pairwise(ttls)]
    assert min(steps) > 5000, steps


def test_what_is_read_keeps_its_rank(server: BlobServer, tier: BlobTier) -> None:
    """A read lets every value live on as long as its place in the prefix says, and no longer."""
    chain = chain_of(NUM_BLOCKS * CACHE_BLOCK)
    end = chain.num_tokens
    fill(tier, chain, end)
    keys = keys_of(server, chain)
    for key in keys:
        server.command(b"EXPIRE", key, b"60")
    pool = Pool()
    assert start_load(tier, chain, pool, end).get().num_tokens == end
    assert_heads_last(ttls_ms(server, keys))


def test_a_full_server_gives_up_tails(server: BlobServer, tier: BlobTier) -> None:
    """Two sessions, one of them read again; both snapshots, which stand on the tails, and half as
    many blocks as a session has must go."""
    chains = [chain_of(NUM_BLOCKS * CACHE_BLOCK, seed) for seed in (1, 2)]
    for seed, chain in enumerate(chains, 1):
        fill(tier, chain, chain.num_tokens, seed=seed)
    assert start_load(tier, chains[0], Pool(), chains[0].num_tokens).get().error == ""
    there: list[list[bool]] = []

    def is_half_gone() -> bool:
        """Lower the limit a little; the next write makes the server keep it."""
        limit = used_memory(tier) - 2 * SIZES.block_bytes
        server.command(b"CONFIG", b"SET", b"maxmemory", b"%d" % limit)
        server.command(b"SET", b"one-more", b"x", b"EX", b"100000")
        there[:] = [[ttl > 0 for ttl in ttls_ms(server, keys_of(server, c))] for c in chains]
        return sum(not is_there for blocks in there for is_there in blocks) >= NUM_BLOCKS // 2

    eventually(is_half_gone, 30, interval_s=0.001)
    for blocks in there:
        # Servers look at a few keys at a time, so the edge is not sharp.
        assert all(blocks[: NUM_BLOCKS // 2]), blocks


def test_a_turn_lets_its_whole_prefix_live_on(server: BlobServer, tier: BlobTier) -> None:
    """The head was written hours ago and has stayed in the router's pool since: nobody read it."""
    chain = chain_of(NUM_BLOCKS * CACHE_BLOCK)
    fill(tier, chain, chain.num_tokens)
    keys = keys_of(server, chain)
    for key in keys[:50]:
        server.command(b"EXPIRE", key, b"60")
    server.command(b"DEL", keys[7])
    shared = 2 * CACHE_BLOCK
    tier.touch(chain, 60 * CACHE_BLOCK + 5, shared)
    eventually(lambda: ttls_ms(server, keys[:1])[0] > 80_000_000)
    ttls = ttls_ms(server, keys)
    assert ttls[7] == -2
    assert min(ttls[:2]) > 80_000_000  # a day: what sessions share
    assert_heads_last([*ttls[2:7], *ttls[8:]])
    assert ttls[2] > 1000 * (block_ttl_s(TtlClass.SESSION, 3 * CACHE_BLOCK) - 60)
