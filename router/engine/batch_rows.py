"""Builds the batch of each step out of tensors that live as long as the engine.

Decoding sequences own dense rows `0 .. num_decoding - 1`, which are kept up to date instead of
rebuilt: a step adds one to their positions and writes their new tokens. Batch sequences have the
first rows, so that a step without them begins behind them. The prefill chunks of a step are written
behind all rows. Every tensor of a batch is a view, valid until the next step.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from router.engine.batch import Batch
from router.engine.cold_store import ShelvedPast
from router.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """The tokens of a prefilling sequence that one step computes."""

    sequence: Sequence
    start: int
    stop: int
    prompt_rows: range
    """Positions whose logits give a prompt token's log-probability."""

    @property
    def is_final(self) -> bool:
        """Whether the sequence draws a token after it."""
        return self.stop == self.sequence.num_tokens

    @property
    def is_alone(self) -> bool:
        """Whether it has its step for itself."""
        return self.sequence.cold is not None


@dataclass(slots=True)
class BuiltBatch:
    """A batch and whose logits it asks for."""

    batch: Batch
    sampled: list[Sequence]
    """Sequences that draw a token: the decoding ones by row, then those whose prefill ends."""

    sampled_logits: list[int] | None = None
    """Their rows among the logits; None: these are all the rows, in this order."""

    prompt_logits: list[tuple[PrefillChunk, int]] = field(default_factory=list)
    """Chunks with prompt rows and where these begin among the logits."""

    past: ShelvedPast | None = None
    """What the only sequence has outside the pool; None: the batch is of all decoding rows."""


class BatchRows:
    """The decoding sequences by row, and the tensors of the batch."""

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_prompt_rows: int,
        max_blocks: int,
        block_size: int,
    ) -> None:
        self.sequences: list[Sequence] = []
        """The decoding sequences, by row: those of batch priority first."""
        self.num_batch = 0
        self.skips_batch = False
        """Whether the next step is without the batch sequences."""
        self._block_size = block_size
        self._token_ids = np.zeros(max_num_batched_tokens, dtype=np.int64)
        self._positions = np.zeros(max_num_batched_tokens, dtype=np.int64)
        self._query_start = np.arange(max_num_seqs + 1, dtype=np.int32)
        self._context_lens = np.zeros(max_num_seqs, dtype=np.int32)
        self._block_tables = np.zeros((max_num_seqs, max_blocks), dtype=np.int32)
        self._state_slots = np.zeros(max_num_seqs, dtype=np.int32)
        self._logit_rows = np.arange(max_num_seqs + max_prompt_rows, dtype=np.int64)
        self._room = np.zeros(max_num_seqs, dtype=np.int64)
        """By row: tokens that the sequence's blocks hold."""
        self._views: dict[int, list[Tensor]] = {}
        """The tensors of a batch of only n decoding sequences, by n."""

    @property
    def num_decoding(self) -> int:
        """Rows in use."""
        return len(self.sequences)

    @property
    def num_stepping(self) -> int:
        """Rows in the next step."""
        return len(self.sequences) - self._first

    @property
    def _first(self) -> int:
        return self.num_batch if self.skips_batch else 0

    def add(self, sequence: Sequence) -> None:
        """Give a sequence whose newest token is its only one to compute a row."""
        row = len(self.sequences)
        self.sequences.append(sequence)
        if not sequence.is_interactive:
            if self.num_batch < row:  # the first interactive one makes room
                self._move(self.num_batch, row)
                row = self.num_batch
            self.num_batch += 1
        self.sequences[row] = sequence
        sequence.row = row
        self._token_ids[row] = sequence.output_ids[-1]
        self._positions[row] = self._context_lens[row] = sequence.num_computed
        # Chunks were written behind the rows there were.
        last = len(self.sequences) - 1
        self._query_start[last + 1] = last + 1
        self._logit_rows[last] = last
        self._write_blocks(row, sequence)

    def _write_blocks(self, row: int, sequence: Sequence) -> None:
        blocks = sequence.blocks
        self._block_tables[row, : len(blocks)] = blocks
        self._state_slots[row] = sequence.state_slot
        self._room[row] = len(blocks) * self._block_size

    def remove(self, sequence: Sequence) -> None:
        """Free the sequence's row; the last row moves into it, of a batch one the last such."""
        row, sequence.row = sequence.row, -1
        if row < self.num_batch:
            self.num_batch -= 1
            self._move(self.num_batch, row)
            row = self.num_batch
        self._move(len(self.sequences) - 1, row)
        self.sequences.pop()

    def _move(self, last: int, row: int) -> None:
        """Move what row `last` holds to `row`, over what is there."""
        if row == last:
            return
        moved = self.sequences[last]
        self.sequences[row] = moved
        moved.row = row
        for column in (
            self._token_ids,
            self._positions,
            self._context_lens,
            self._state_slots,
            self._room,
        ):
            column[row] = column[last]
        num_blocks = len(moved.blocks)
        self._block_tables[row, :num_blocks] = self._block_tables[last, :num_blocks]

    def needing_a_block(self) -> list[Sequence]:
        """Return the decoding sequences whose next token does not fit their blocks, in their
        order."""
        count = len(self.sequences)
        full = self._positions[:count] >= self._room[:count]
        if not full.any():
            return []
        needy = [self.sequences[row] for row in np.flatnonzero(full).tolist()]
        return sorted(needy, key=lambda sequence: sequence.order)

    def append_block(self, sequence: Sequence, block: int) -> None:
        """Give a decoding sequence one more block."""
        self._block_tables[sequence.row, len(sequence.blocks)] = block
        sequence.blocks.append(block)
        self._room[sequence.row] += self._block_size

    def rewrite(self, sequence: Sequence) -> None:
        """Take over a changed block table of a decoding sequence."""
        self._write_blocks(sequence.row, sequence)

    def advance(self, token_ids: NDArray[np.int64]) -> None:
        """Move every row of the step on: its token is computed, that of `token_ids` is its next."""
        first, count = self._first, len(self.sequences)
        self._token_ids[first:count] = token_ids[: count - first]
        self._positions[first:count] += 1
        self._context_lens[first:count] += 1

    def build(self, chunks: list[PrefillChunk]) -> BuiltBatch:
        """Return the batch of the step's rows and these chunks; at least one of either."""
        first_row, count = self._first, len(self.sequences)
        stepping = self._context_lens[first_row:count]
        context_len = int(stepping.max()) + 1 if len(stepping) else 0
        if not chunks:
            views = self._views.get(count)
            if views is None:
                views = self._views[count] = self._tensors(0, count, count, count)
            return BuiltBatch(_batch(views, 1, context_len), self.sequences.copy())
        sampled = self.sequences[first_row:]
        sampled_logits = list(range(count - first_row))
        prompt_logits: list[tuple[PrefillChunk, int]] = []
        num_tokens = num_logits = row = count
        query_len = 1
        for chunk in chunks:
            sequence, start, stop = chunk.sequence, chunk.start, chunk.stop
            end = num_tokens + stop - start
            self._token_ids[num_tokens:end] = sequence.tokens_between(start, stop)
            self._positions[num_tokens:end] = np.arange(start, stop)
            self._context_lens[row] = start
            self._write_blocks(row, sequence)
            row += 1
            self._query_start[row] = end
            if chunk.prompt_rows:
                prompt_logits.append((chunk, num_logits - first_row))
                behind = num_logits + len(chunk.prompt_rows)
                first = num_tokens + chunk.prompt_rows.start - start
                self._logit_rows[num_logits:behind] = np.arange(
                    first, first + len(chunk.prompt_rows)
                )
                num_logits = behind
            if chunk.is_final:
                sampled.append(sequence)
                sampled_logits.append(num_logits - first_row)
                self._logit_rows[num_logits] = end - 1
                num_logits += 1
            query_len = max(query_len, stop - start)
            context_len = max(context_len, stop)
            num_tokens = end
        return BuiltBatch(
            _batch(self._tensors(first_row, num_tokens, row, num_logits), query_len, context_len),
            sampled,
            sampled_logits if prompt_logits else None,
            prompt_logits,
        )

    def _tensors(
        self, first: int, num_tokens: int, num_sequences: int, num_logits: int
    ) -> list[Tensor]:
        """Return views of a batch's tensors, in the order of its fields, from row `first` on."""
        query_start = self._query_start[first : num_sequences + 1]
        logit_rows = self._logit_rows[first:num_logits]
        if first:  # both count within the batch
            query_start, logit_rows = query_start - np.int32(first), logit_rows - first
        return [
            torch.from_numpy(array)
            for array in (
                self._token_ids[first:num_tokens],
                self._positions[first:num_tokens],
                query_start,
                self._context_lens[first:num_sequences],
                self._block_tables[first:num_sequences],
                self._state_slots[first:num_sequences],
                logit_rows,
            )
        ]


def _batch(tensors: list[Tensor], query_len: int, context_len: int) -> Batch:
    token_ids, positions, query_start, context_lens, block_tables, state_slots, rows = tensors
    return Batch(
        token_ids=token_ids,
        positions=positions,
        query_start=query_start,
        context_lens=context_lens,
        block_tables=block_tables,
        state_slots=state_slots,
        logit_rows=rows,
        max_query_len=query_len,
        max_context_len=context_len,
    )
