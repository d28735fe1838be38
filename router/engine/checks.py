"""What `Engine.submit` refuses: requests that would hurt a step, and with it other requests."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from protos.errors import ContextLengthExceededError, InvalidFieldError, ResourceError
from router.engine.block_manager import BlockManager
from router.engine.config import EngineConfig
from router.engine.request import EngineRequest
from router.engine.spill import Spill


def check_request(
    request: EngineRequest,
    prompt: NDArray[np.int64],
    config: EngineConfig,
    blocks: BlockManager,
    spill: Spill | None,
) -> None:
    """Refuse what cannot run.

    Raises:
        InvalidFieldError: A field that would break the step it is part of.
        ContextLengthExceededError: Prompt and `max_tokens` do not fit the context window.
        ResourceError: It would not fit the KV blocks even alone, nor the cold store with them.
    """
    vocab = f"must be in [0, {config.vocab_size})"
    max_tokens = request.stopping.max_tokens
    if not len(prompt):
        raise InvalidFieldError("tokens.ids", "must not be empty", 0)
    if max_tokens is not None and max_tokens < 1:
        raise InvalidFieldError("stopping.max_tokens", "must be at least 1", max_tokens)
    wanted = 1 if max_tokens is None else max_tokens
    if len(prompt) + wanted > config.max_model_len:
        raise ContextLengthExceededError(len(prompt), wanted, config.max_model_len)
    for field, low, high in (
        ("tokens.ids", int(prompt.min()), int(prompt.max())),
        ("sampling.logit_bias", *_ends(request.sampling.logit_bias)),
        ("stopping.stop_token_ids", *_ends(request.stopping.stop_token_ids)),
        ("resume_tokens.ids", *_ends(request.forced_ids)),
    ):
        if low < 0 or high >= config.vocab_size:
            raise InvalidFieldError(field, vocab, low if low < 0 else high)
    most = config.max_num_seqs + config.max_queued
    if not 1 <= request.sampling.n <= most:
        raise InvalidFieldError("sampling.n", f"must be in [1, {most}]", request.sampling.n)
    if any(junction < 0 for junction in request.junctions):
        raise InvalidFieldError("junctions", "must be at least 0", min(request.junctions))
    most_tokens = config.max_model_len if max_tokens is None else len(prompt) + max_tokens
    need = blocks.blocks_for(most_tokens - 1)
    if need > config.num_blocks and (spill is None or not spill.can_hold(most_tokens)):
        raise ResourceError(
            "KV blocks",
            str(need),
            str(config.num_blocks),
            f"{most_tokens} tokens at {config.block_size} a block: lower max_tokens "
            "or give the engine more blocks",
        )


def _ends(ids: Any) -> tuple[int, int]:
    """Return the least and the greatest of some token ids; 0 and 0 where there are none."""
    return (min(ids), max(ids)) if ids else (0, 0)
