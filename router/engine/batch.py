"""The tokens of one step: what the engine hands to the model.

A `Batch` holds T tokens of S sequences, flattened one sequence after the other, prefill chunks and
decode tokens mixed, without padding. It says where each token stands and where its cached past
lies; it knows neither the model's sizes nor how the caches are laid out.

A batch of one sequence may have a *cold* past: keys and values of its oldest tokens that are not in
the blocks and come section by section, while the layers run. Its block table then begins behind
them.

Words: a *block* is a page of KV cache, a *block table* the pages of one sequence in order, a *state
slot* the place of one sequence's conv and recurrent state in every Gated DeltaNet layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """The tokens that one sequence adds in one step."""

    token_ids: Sequence[int]
    """At least one token; the first stands at position `context_len`."""

    context_len: int
    """Tokens of the sequence that earlier steps have put into the caches."""

    block_table: Sequence[int]
    """Blocks that hold positions `0 .. context_len + len(token_ids) - 1`, in order."""

    state_slot: int
    """The sequence's state slot."""

    num_logits: int = 1
    """Logits are wanted for the last `num_logits` tokens of the chunk; 0 inside a prefill."""


class ColdPast(Protocol):
    """Keys and values of a sequence's oldest tokens, kept outside the blocks."""

    @property
    def num_tokens(self) -> int:
        """How many tokens: a multiple of 128."""
        ...

    def next_layer(self) -> Iterator[NDArray[np.uint8]]:
        """Yield the sections of the next full-attention layer, the oldest tokens first.

        Called once per full-attention layer, in their order. A section is `[B, bytes]`: this
        layer's part of B >= 1 cache blocks as `Ops.read_kv` gives it, K `[128, Hkv, hd]` before V.
        It is contiguous, and valid until the next one is asked for.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The tokens of one step, flattened. All tensors are contiguous and on the model's device."""

    token_ids: Tensor
    """int64 `[T]`."""

    positions: Tensor
    """int64 `[T]`."""

    query_start: Tensor
    """int32 `[S + 1]`: sequence s owns the tokens `query_start[s] .. query_start[s + 1] - 1`."""

    context_lens: Tensor
    """int32 `[S]`: tokens already cached. 0 means: conv and recurrent state start from zero,
    whatever the slot holds."""

    block_tables: Tensor
    """int32 `[S, max_blocks]`: KV blocks; entries behind the sequence's last block are never
    read."""

    state_slots: Tensor
    """int32 `[S]`: distinct within a batch."""

    logit_rows: Tensor
    """int64 `[L]`: rows whose logits are wanted, strictly increasing."""

    max_query_len: int
    """Largest number of tokens that one sequence has in this batch."""

    max_context_len: int
    """Largest context, this step's tokens included."""

    cold: ColdPast | None = None
    """The past of the batch's only sequence that is not in its blocks; `block_tables` begins behind
    it, `positions` and `context_lens` count it."""

    @property
    def num_cold_tokens(self) -> int:
        """Tokens in front of those that `block_tables` holds."""
        return 0 if self.cold is None else self.cold.num_tokens

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.token_ids.shape[0]

    @property
    def num_sequences(self) -> int:
        """S."""
        return self.context_lens.shape[0]

    def to(self, device: torch.device) -> Batch:
        """Return the batch with every tensor on `device`."""
        return replace(
            self,
            token_ids=self.token_ids.to(device),
            positions=self.positions.to(device),
            query_start=self.query_start.to(device),
            context_lens=self.context_lens.to(device),
            block_tables=self.block_tables.to(device),
            state_slots=self.state_slots.to(device),
            logit_rows=self.logit_rows.to(device),
        )


def build_batch(chunks: Sequence[Chunk]) -> Batch:
    """Flatten the chunks of one step, in the given order, into a batch on the CPU.

    Args:
        chunks: At least one, each with at least one token.
    """
    token_ids: list[int] = []
    positions: list[int] = []
    query_start = [0]
    logit_rows: list[int] = []
    max_query_len = max_context_len = max_blocks = 0
    for chunk in chunks:
        length = len(chunk.token_ids)
        context_len = chunk.context_len
        end = context_len + length
        token_ids += chunk.token_ids
        positions += range(context_len, end)
        total = len(token_ids)
        query_start.append(total)
        logit_rows += range(total - chunk.num_logits, total)
        max_query_len = max(max_query_len, length)
        max_context_len = max(max_context_len, end)
        max_blocks = max(max_blocks, len(chunk.block_table))
    tables = [
        [*chunk.block_table, *([0] * (max_blocks - len(chunk.block_table)))] for chunk in chunks
    ]
    return Batch(
        token_ids=torch.tensor(token_ids, dtype=torch.int64),
        positions=torch.tensor(positions, dtype=torch.int64),
        query_start=torch.tensor(query_start, dtype=torch.int32),
        context_lens=torch.tensor([chunk.context_len for chunk in chunks], dtype=torch.int32),
        block_tables=torch.tensor(tables, dtype=torch.int32).view(len(chunks), max_blocks),
        state_slots=torch.tensor([chunk.state_slot for chunk in chunks], dtype=torch.int32),
        logit_rows=torch.tensor(logit_rows, dtype=torch.int64),
        max_query_len=max_query_len,
        max_context_len=max_context_len,
    )
