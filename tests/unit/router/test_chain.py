from __future__ import annotations

import hashlib
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.engine.chain import CACHE_BLOCK, HashChain, namespace_digest

# From the slow twin, in a process of its own: position -> hash of `range(position)`.
GOLDEN = {
    0: "2a7dffbb80b90981886d066523ef4323bc6c52fcbff4b9c822ea58daa42521c8",
    1: "94f32958fd8919f8bd5d990bf9fc41d24fbc92a29054290e41fa602f7bd445df",
    128: "2ce12c75d276228b89e520ab782c404ab62f2067dde75cb75b369e7bf842724a",
    256: "13794788a96433f006d236ea9d6b90e22b3fbabfd8e63e9feb15d487d0c7ff60",
    300: "5187dcdf65e6117745338169edcfd98868ce20b3011d0f0c6ad92c292d23414a",
}
GOLDEN_NAMESPACE = "5dd0e40c786f969e"


def chain_of(ids: list[int] | np.ndarray, namespace: str = "ns") -> HashChain:
    chain = HashChain(namespace)
    chain.extend(ids)
    return chain


def slow_twin(ids: list[int], namespace: str) -> bytes:
    """The position hash of all of `ids`, block by block as the module's docstring writes it."""
    last = hashlib.sha256(b"qs1|" + namespace.encode()).digest()
    for start in range(0, len(ids), 128):
        block = b"".join(i.to_bytes(4, "little") for i in ids[start : start + 128])
        last = hashlib.sha256(last + block).digest()
    return last


def test_golden_vectors() -> None:
    """Values on servers are named by these: a change makes every stored value unreachable."""
    chain = chain_of(list(range(300)), "0123456789abcdef")
    assert chain.position_hash(0).hex() == GOLDEN[0]
    assert chain.position_hash(1).hex() == GOLDEN[1]
    assert chain.block_hash(0).hex() == GOLDEN[128]
    assert chain.block_hash(1).hex() == GOLDEN[256]
    assert chain.position_hash(300).hex() == GOLDEN[300]


@given(
    ids=st.lists(st.integers(0, 2**32 - 1), max_size=700),
    cuts=st.lists(st.integers(0, 700), max_size=8),
)
def test_growth_in_any_pieces_equals_all_at_once(ids: list[int], cuts: list[int]) -> None:
    chain = HashChain("ns")
    edges = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    for start, stop in pairwise(edges):
        chain.extend(ids[start:stop])
    assert chain.num_tokens == len(ids)
    assert chain.num_blocks == len(ids) // CACHE_BLOCK
    assert chain.token_ids.tolist() == ids
    for position in {*edges, *range(0, len(ids) + 1, 61)}:
        assert chain.position_hash(position) == slow_twin(ids[:position], "ns")
    for block in range(chain.num_blocks):
        assert chain.block_hash(block) == chain.position_hash(128 * (block + 1))


def test_a_chain_that_grows_token_by_token_keeps_its_earlier_hashes() -> None:
    ids = np.random.default_rng(0).integers(0, 151936, 2000)
    chain, seen = HashChain("ns"), []
    for token in ids.tolist():
        chain.extend([token])
        seen.append(chain.position_hash(chain.num_tokens))
    whole = chain_of(ids)
    assert seen == [whole.position_hash(n) for n in range(1, 2001)]


def test_array_and_list_of_the_same_ids_agree() -> None:
    ids = np.arange(1000, 1500)
    assert chain_of(ids).position_hash(500) == chain_of(ids.tolist()).position_hash(500)
    strided = np.arange(0, 1000, dtype=np.int64)[::2]
    assert chain_of(strided).position_hash(500) == chain_of(strided.tolist()).position_hash(500)


def test_namespace_and_every_token_matter() -> None:
    ids = list(range(200))
    hashes = {chain_of(ids, "a").position_hash(200), chain_of(ids, "b").position_hash(200)}
    for changed in range(200):
        other = [*ids]
        other[changed] += 1
        hashes.add(chain_of(other, "a").position_hash(200))
    assert len(hashes) == 202


def test_errors_name_their_numbers() -> None:
    chain = chain_of(list(range(130)))
    with pytest.raises(IndexError, match="cache block 1 of 1"):
        chain.block_hash(1)
    with pytest.raises(IndexError, match="cache block -1 of 1"):
        chain.block_hash(-1)
    with pytest.raises(IndexError, match="position 131 of 130"):
        chain.position_hash(131)
    with pytest.raises(ValueError, match=r"in \[0, 2\*\*32\): -1 \.\. 7"):
        chain.extend([7, -1])
    with pytest.raises(ValueError, match="4294967296"):
        chain.extend([2**32])
    assert chain.num_tokens == 130


def test_namespace_digest_knows_values_and_not_their_order() -> None:
    fields = {"schema": 1, "model": "m", "rope": {"theta": 1e7, "scaling": None}}
    digest = namespace_digest(fields)
    assert len(digest) == 16
    assert int(digest, 16) >= 0
    assert digest == namespace_digest(dict(reversed(fields.items())))
    yarn = {**fields, "rope": {"theta": 1e7, "scaling": {"factor": 4.0}}}
    assert namespace_digest(yarn) != digest
    assert namespace_digest({**fields, "tenant_salt": "t"}) != digest
    assert digest == GOLDEN_NAMESPACE


def test_namespace_digest_refuses_what_json_cannot_say() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        namespace_digest({"theta": float("nan")})
    with pytest.raises(TypeError, match="not JSON serializable"):
        namespace_digest({"dtype": np.float32})
