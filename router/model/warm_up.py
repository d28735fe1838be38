"""The first steps of a decoder, before anybody waits for them.

They fault in weights, grow the buffers of kernels and lanes, and wake the threads of the expert
groups; without them the first long prompt took a third of a second more.
"""

from __future__ import annotations

import torch

from router.engine.batch import Chunk, build_batch
from router.model.decoder import Decoder

WARM_UP_TOKENS = 256
_BLOCK_SIZE = 32


def warm_up(decoder: Decoder, max_tokens: int = WARM_UP_TOKENS) -> None:
    """Run one prefill and one decode step over caches of their own.

    Args:
        decoder: Connected to its experts.
        max_tokens: Tokens of the prefill.

    Raises:
        ExpertMeshError: What a request would have met, e.g. an expert group that does not answer.
    """
    num_blocks = -(-(max_tokens + 1) // _BLOCK_SIZE)
    caches = decoder.allocate_caches(num_blocks, _BLOCK_SIZE, 1)
    generator = torch.Generator().manual_seed(0)  # many tokens meet many experts
    ids = torch.randint(0, decoder.config.vocab_size, (max_tokens + 1,), generator=generator)
    blocks = list(range(num_blocks))
    with torch.inference_mode():
        for start, stop in ((0, max_tokens), (max_tokens, max_tokens + 1)):
            chunk = Chunk(
                token_ids=ids[start:stop].tolist(),
                context_len=start,
                block_table=blocks,
                state_slot=0,
            )
            decoder.forward(build_batch([chunk]), caches)
