"""How large a router's engine is: from configuration, model, and the memory that is free."""

from __future__ import annotations

import psutil

from cluster.config import EngineSection, StateSection
from cluster.kv_budget import GIB, plan_cold_bytes, plan_kv_blocks
from cluster.members import RouterStart
from cluster.router_model import RouterModel
from router.engine.config import EngineConfig
from router.model.decoder import Decoder


def plan_engine(
    section: EngineSection,
    state: StateSection,
    start: RouterStart,
    *,
    model: RouterModel,
    decoder: Decoder,
    namespace: str,
) -> EngineConfig:
    """Size the engine of one router on this node, after the weights are loaded.

    Args:
        section: What is configured of the engine.
        state: What is configured of snapshots.
        start: Routers on this node, and the blocks of the process before this one.
        model: What it serves.
        decoder: Knows the bytes of a block and of a state slot.
        namespace: Of its cached values.

    Raises:
        ResourceError: The KV cache does not fit.
    """
    block_bytes = decoder.kv_bytes_per_block(section.block_size)
    state_bytes = decoder.state_bytes_per_slot * section.max_num_seqs
    free = psutil.virtual_memory().available / start.num_routers_here - state_bytes
    num_blocks = start.num_kv_blocks or plan_kv_blocks(
        section,
        block_bytes=block_bytes,
        max_model_len=model.max_model_len,
        free_bytes=free,
        has_blob_tier=start.state is not None,
    )
    kv_bytes = num_blocks * block_bytes
    return EngineConfig(
        vocab_size=model.config.vocab_size,
        max_model_len=model.max_model_len,
        num_blocks=num_blocks,
        num_state_slots=section.max_num_seqs,
        block_size=section.block_size,
        max_num_seqs=section.max_num_seqs,
        max_num_batched_tokens=section.max_num_batched_tokens,
        max_queued=section.max_queued,
        eos_token_ids=model.config.eos_token_ids,
        prefix_caching=section.enable_prefix_caching,
        namespace=namespace,
        max_snapshot_bytes=int(state.snapshot_cache_gib * GIB),
        snapshot_interval=state.snapshot_interval_tokens,
        max_cold_bytes=plan_cold_bytes(section, kv_bytes=kv_bytes, free_bytes=free),
    )
