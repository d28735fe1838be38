"""Chooses the sequences of the next step.

One step is all decoding sequences, one token each, and then prefill chunks, oldest first, within
the token budget. Decides admission (first come, first served; a sequence that does not fit holds
back those behind it, so none starves), and who gives way when blocks run out: the newest. Knows
neither the model nor the sampler nor time, except the moment it is told.

Blocks for all tokens that a sequence has are taken at its admission, so a prefill never runs dry
half way; a decoding sequence takes one block at a time. The oldest running sequence never gives
way to another, and alone it always fits (`Engine.submit` sees to that): there is always progress.
"""

from __future__ import annotations

from collections import deque

from router.engine.batch_rows import BatchRows, PrefillChunk
from router.engine.block_manager import BlockManager
from router.engine.sequence import Sequence, SequenceState
from router.engine.state_pool import StatePool


class Scheduler:
    """Owns the queue, the prefilling sequences and, through `rows`, the decoding ones."""

    def __init__(
        self,
        *,
        blocks: BlockManager,
        state_slots: StatePool,
        rows: BatchRows,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_prompt_rows: int,
    ) -> None:
        self.waiting: deque[Sequence] = deque()
        """Oldest first: only newer sequences than all running ones wait."""
        self.prefilling: list[Sequence] = []
        """Oldest first."""
        self.rows = rows
        self.num_preemptions = 0
        self._blocks = blocks
        self._state_slots = state_slots
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_prompt_rows = max_prompt_rows

    @property
    def num_running(self) -> int:
        """Sequences that own blocks and a state slot."""
        return len(self.prefilling) + self.rows.num_decoding

    @property
    def has_work(self) -> bool:
        """Whether any sequence is not finished."""
        return bool(self.waiting or self.prefilling or self.rows.sequences)

    def add(self, sequence: Sequence) -> None:
        """Put a new sequence at the end of the queue."""
        self.waiting.append(sequence)

    def schedule(self, now: float) -> list[PrefillChunk]:
        """Choose the next step: all decoding rows, and the chunks returned.

        Gives every decoding sequence room for its token, preempting the newest where blocks lack,
        and admits waiting sequences if nothing had to give way.
        """
        preempted_before = self.num_preemptions
        for sequence in self.rows.needing_a_block():
            self._make_room(sequence)
        if not self.prefilling and not self.waiting:
            return []
        budget = self._max_num_batched_tokens - self.rows.num_decoding
        if self.num_preemptions == preempted_before:
            self._admit(budget - sum(s.num_to_compute for s in self.prefilling), now)
        return self._chunks(budget)

    def _make_room(self, sequence: Sequence) -> None:
        """Give a decoding sequence a block, unless it gives way itself or already has."""
        while sequence.is_decoding:
            if self._blocks.num_free:
                self.rows.append_block(sequence, self._blocks.allocate(1)[0])
                return
            self._preempt(max(self._running(), key=lambda running: running.arrival))

    def _running(self) -> list[Sequence]:
        return self.prefilling + self.rows.sequences

    def _preempt(self, sequence: Sequence) -> None:
        """Send a running sequence back to the head of the queue with all its tokens."""
        self._release(sequence)
        sequence.state = SequenceState.PREEMPTED
        sequence.num_computed = 0
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(sequence)

    def _admit(self, budget: int, now: float) -> None:
        """Admit waiting sequences while tokens, rows, state slots and blocks are left.

        One block per running sequence stays free, so that an admission does not cause a
        preemption in the next few steps.
        """
        while budget > 0 and self.waiting and self._state_slots.num_free:
            num_running = self.num_running
            sequence = self.waiting[0]
            need = self._blocks.blocks_for(sequence.num_tokens)
            if num_running >= self._max_num_seqs or need + num_running > self._blocks.num_free:
                return
            self.waiting.popleft()
            sequence.blocks = self._blocks.allocate(need)
            sequence.state_slot = self._state_slots.acquire()
            sequence.state = SequenceState.RUNNING
            if sequence.admitted_s is None:
                sequence.admitted_s = now
            self.prefilling.append(sequence)
            budget -= sequence.num_to_compute

    def _chunks(self, budget: int) -> list[PrefillChunk]:
        """Share the budget among the prefilling sequences, oldest first."""
        chunks = []
        prompt_rows_left = self._max_prompt_rows
        for sequence in self.prefilling:
            if budget == 0:
                break
            start = sequence.num_computed
            stop = start + min(sequence.num_to_compute, budget)
            prompt_rows = range(0)
            if due := sequence.num_prompt_logprobs_due:
                first = sequence.prompt_len - 1 - due
                last = min(stop, sequence.prompt_len - 1)
                if last - max(first, start) > prompt_rows_left:
                    stop = last = max(first, start) + prompt_rows_left
                prompt_rows = range(max(first, start), max(first, start, last))
                prompt_rows_left -= len(prompt_rows)
            if stop > start:
                budget -= stop - start
                chunks.append(PrefillChunk(sequence, start, stop, prompt_rows))
        return chunks

    def end_prefill(self, sequence: Sequence) -> None:
        """Let a sequence whose prefill has ended, and that has drawn a token, decode."""
        self.prefilling.remove(sequence)
        self.rows.add(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and free all it owns."""
        if sequence.state is SequenceState.RUNNING:
            self._release(sequence)
        else:
            self.waiting.remove(sequence)
        sequence.state = SequenceState.FINISHED

    def _release(self, sequence: Sequence) -> None:
        if sequence.is_decoding:
            self.rows.remove(sequence)
        else:
            self.prefilling.remove(sequence)
        self._blocks.release(sequence.blocks)
        self._state_slots.release(sequence.state_slot)
        sequence.blocks = []
        sequence.state_slot = -1
