"""A tier over two servers that hold what was written, and how its tests talk to it."""

from __future__ import annotations

from router.engine.chain import HashChain
from router.engine.tier import TtlClass
from router.state.loader import LoaderSettings
from router.state.tier import BlobTier, TierSettings
from tests.unit.state.blob_servers import (
    SIZES,
    block_bytes,
)

POSITIONS = (512, 1024, 1300)
PATIENT = TierSettings(
    probe_s=20.0, loader=LoaderSettings(connections_per_server=2, min_load_s=20.0)
)
"""Shared cores: no test depends on how fast they are."""


def counters(tier: BlobTier) -> dict[str, float]:
    return {**tier.stats().counters}


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
