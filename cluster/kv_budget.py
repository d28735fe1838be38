"""How many KV blocks a router gets: the one rule, pure arithmetic.

Used twice: by the pre-flight check with estimated sizes, and by the router with the exact ones.
"""

from __future__ import annotations

from cluster.config import EngineSection
from protos.errors import ResourceError

FREE_SHARE = 0.25
"""Share of the memory left after the weights that a KV cache takes by default."""
FREE_SHARE_LIMIT = 0.75
"""Share that it may take, so that one sequence of full length fits."""
GIB = 1 << 30


def plan_kv_blocks(
    engine: EngineSection, *, block_bytes: int, max_model_len: int, free_bytes: float
) -> int:
    """Return the number of KV blocks of one router.

    As configured; else as many as all sequences of full length could use, within `FREE_SHARE` of
    the free memory, but at least what one sequence of full length needs.

    Args:
        engine: `num_kv_blocks`, `kv_cache_gib`, `block_size`, `max_num_seqs`.
        block_bytes: Bytes of one block, all layers together; 0 in a model without full attention.
        max_model_len: Tokens that one sequence may reach.
        free_bytes: Memory left for this router's KV cache when everything else is loaded.

    Raises:
        ResourceError: One sequence of full length does not fit; says what to change.
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
    if blocks < per_sequence:
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


def format_bytes(num_bytes: float) -> str:
    """Return `1.5 GiB`, `20.0 MiB`."""
    if abs(num_bytes) >= GIB:
        return f"{num_bytes / GIB:.1f} GiB"
    return f"{num_bytes / (1 << 20):.1f} MiB"
