"""What a tier finds in its servers, and what it does about values that are wrong."""

from __future__ import annotations

import contextlib

import pytest

from router.engine.chain import HashChain
from router.engine.tier import LoadResult
from router.state.codec import STRIPE_BYTES
from router.state.kv_store import KvStore
from router.state.tier import BlobTier
from tests.eventually import eventually
from tests.unit.state.blob_servers import (
    NAMESPACE,
    SIZES,
    BlobServer,
    Pool,
    chain_of,
    fill,
    probe,
    start_load,
    tier_of,
)
from tests.unit.state.tiers import PATIENT, POSITIONS, counters, put_again


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
