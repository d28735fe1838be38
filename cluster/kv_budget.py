"""How many KV blocks a router gets, and how much host memory what does not fit them: the one rule,
pure arithmetic.

Used twice: by the pre-flight check with estimated sizes, and by the router with the exact ones.
"""

from __future__ import annotations

import logging

from cluster.config import EngineSection
from protos.errors import ResourceError

log = logging.getLogger(__name__)

FREE_SHARE = 0.25
"""Share of the memory left after the weights that a KV cache takes by default."""
FREE_SHARE_LIMIT = 0.75
"""Share that it may take, so that one sequence of full length fits."""
COLD_SHARE = 0.5
"""Share of the memory left after the KV cache that may hold the older KV of a long sequence."""
STREAMING_TOKENS = 512
"""A pool of fewer tokens holds no window of a longer sequence (`router.engine.spill`)."""
CACHE_BLOCK_TOKENS = 128
GIB = 1 << 30


def plan_cold_bytes(engine: EngineSection, *, kv_bytes: float, free_bytes: float) -> int:
    """Return the host memory for KV that has left the cache, as configured or `COLD_SHARE`.

    Args:
        engine: `cold_kv_gib`.
        kv_bytes: Of the KV cache.
        free_bytes: Memory left for the KV cache and this.
    """
    if engine.cold_kv_gib is not None:
        return int(engine.cold_kv_gib * GIB)
    return int(max(0.0, free_bytes - kv_bytes) * COLD_SHARE)


def plan_kv_blocks(
    engine: EngineSection,
    *,
    block_bytes: int,
    max_model_len: int,
    free_bytes: float,
    has_blob_tier: bool = False,
) -> int:
    """Return the number of KV blocks of one router.

    As configured; else as many as all sequences of full length could use, within `FREE_SHARE` of
    the free memory, but at least what one sequence of full length needs.

    Args:
        engine: `num_kv_blocks`, `kv_cache_gib`, `block_size`, `max_num_seqs`.
        block_bytes: Bytes of one block, all layers together; 0 in a model without full attention.
        max_model_len: Tokens that one sequence may reach.
        free_bytes: Memory left for this router's KV cache when everything else is loaded.
        has_blob_tier: Blob servers take the KV of a sequence that fits neither cache nor memory.

    Raises:
        ResourceError: One sequence of full length fits neither the blocks nor, streamed, what is
            behind them; says what to change.
    """
    per_sequence = -(-max_model_len // engine.block_size)
    wanted = per_sequence * engine.max_num_seqs
    if block_bytes == 0:
        return wanted
    if engine.num_kv_blocks is not None:
        blocks, source = engine.num_kv_blocks, "--num-kv-blocks"
    elif engine.kv_cache_gib is not None:
        blocks, source = int(engine.kv_cache_gib * GIB // block_bytes), "--kv-cache-gib"
    else:
        share = int(max(0.0, free_bytes) * FREE_SHARE // block_bytes)
        limit = int(max(0.0, free_bytes) * FREE_SHARE_LIMIT // block_bytes)
        blocks, source = min(wanted, max(share, min(per_sequence, limit))), ""
    if blocks < per_sequence and _can_stream(
        engine, blocks, per_sequence, block_bytes, free_bytes, has_blob_tier
    ):
        log.info(
            "kv_cache.smaller_than_window cache_tokens=%d window_tokens=%d: longer sequences are"
            " streamed, one at a time and slower",
            *(blocks * engine.block_size, max_model_len),
        )
    elif blocks < per_sequence:
        fitting = blocks * engine.block_size
        hint = f"lower --max-model-len to {fitting}" if fitting else "free memory"
        raise ResourceError(
            what="KV cache for one sequence of the context window",
            need=f"{per_sequence} blocks ({format_bytes(per_sequence * block_bytes)})"
            f" for {max_model_len} tokens",
            have=f"{blocks} blocks ({format_bytes(blocks * block_bytes)})",
            hint=hint + (f" or raise {source}" if source else " or set --kv-cache-gib"),
        )
    if source and blocks * block_bytes > free_bytes:
        raise ResourceError(
            what="memory for the KV cache",
            need=format_bytes(blocks * block_bytes),
            have=f"{format_bytes(free_bytes)} after the weights",
            hint=f"lower {source}",
        )
    return blocks


def _can_stream(
    engine: EngineSection,
    blocks: int,
    per_sequence: int,
    block_bytes: int,
    free_bytes: float,
    has_blob_tier: bool,
) -> bool:
    """Say whether a sequence of full length runs with its older part outside the blocks."""
    is_too_small = blocks * engine.block_size < STREAMING_TOKENS
    if is_too_small or CACHE_BLOCK_TOKENS % engine.block_size:
        return False
    if has_blob_tier and engine.enable_prefix_caching:
        return True
    cold_bytes = plan_cold_bytes(engine, kv_bytes=blocks * block_bytes, free_bytes=free_bytes)
    # Half of the blocks hold the window of its newest tokens.
    return (per_sequence - blocks // 2) * block_bytes <= cold_bytes


def format_bytes(num_bytes: float) -> str:
    """Return `1.5 GiB`, `20.0 MiB`."""
    if abs(num_bytes) >= GIB:
        return f"{num_bytes / GIB:.1f} GiB"
    return f"{num_bytes / (1 << 20):.1f} MiB"
