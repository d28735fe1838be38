"""Chooses the sequences of the next step.

One step is all decoding sequences, one token each, and then prefill chunks, first in line first,
within the token budget. The line is interactive before batch, then by age (`Sequence.order`);
`router.engine.priority` says what batch sequences get. Decides admission (a sequence that does not
fit holds back those behind it, so none starves within its class), and who gives way when blocks run
out: the last in line. Knows neither the model nor the sampler nor time, except the moment it is
told.

Blocks for all tokens that a sequence has are taken at its admission, so a prefill never runs dry
half way; a decoding sequence takes one block at a time. The first running sequence never gives
way to another running one, and alone it always fits (`Engine.submit` sees to that): there is always
progress.

Where a sequence is, and what it owns:

    probing      nothing; the tier looks for its prefix
    waiting      nothing
    restoring    blocks, perhaps cold ones, and a state slot; the tier fills them, and must let go
                 before they are freed
    prefilling   blocks and a state slot
    decoding     blocks, a state slot and a row
    spilling     blocks of its newest tokens, cold cache blocks, and a state slot

At most one sequence spills, or is restored to that: one that does not fit the pool even alone
(`router.engine.spill`). It has every other step for itself, prefill and decode alike.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from protos.errors import ColdKvError
from router.engine.batch_rows import BatchRows, PrefillChunk
from router.engine.block_manager import BlockManager
from router.engine.chain import CACHE_BLOCK
from router.engine.prefix_cache import NO_MATCH, Match
from router.engine.priority import BatchShare
from router.engine.reuse import Reuse
from router.engine.sequence import Sequence, SequenceState
from router.engine.spill import Spill
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
        reuse: Reuse | None = None,
        load: Callable[[Sequence], None] | None = None,
        spill: Spill | None = None,
    ) -> None:
        self.probing: dict[Sequence, None] = {}
        self.waiting: deque[Sequence] = deque()
        """In their order."""
        self.restoring: list[Sequence] = []
        """Finished ones too, until the tier has let go of their blocks."""
        self.prefilling: list[Sequence] = []
        """In their order."""
        self.rows = rows
        self.spilling: Sequence | None = None
        self.num_preemptions = 0
        self._blocks = blocks
        self._state_slots = state_slots
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_prompt_rows = max_prompt_rows
        self._reuse = reuse
        self._load = load
        self._spill = spill
        self._share = BatchShare(max_num_batched_tokens)
        self._is_spilling_due = False
        self._lost: list[tuple[Sequence, ColdKvError]] = []

    @property
    def num_running(self) -> int:
        """Sequences that own blocks and a state slot."""
        num_spilling = 0 if self.spilling is None else 1
        return len(self.restoring) + len(self.prefilling) + self.rows.num_decoding + num_spilling

    @property
    def num_waiting(self) -> int:
        """Sequences that own nothing yet."""
        return len(self.probing) + len(self.waiting)

    @property
    def num_queued_tokens(self) -> int:
        """Tokens of prompts that are not computed yet. Any thread may ask; one that runs beside a
        step may count a sequence twice or not at all."""
        queued = [*list(self.waiting), *list(self.prefilling)]
        return sum(sequence.num_tokens - sequence.num_computed for sequence in queued)

    @property
    def has_work(self) -> bool:
        """Whether any sequence waits for a step."""
        return bool(self.waiting or self.prefilling or self.rows.sequences or self.spilling)

    @property
    def probes_beside_batch(self) -> bool:
        """Whether an interactive sequence is probed, and a step meanwhile were batch work alone."""
        has_probed = any(sequence.is_interactive for sequence in self.probing)
        return has_probed and self.has_work and not self._has_interactive()

    def add(self, sequence: Sequence) -> None:
        """Put a sequence into the queue, by its order."""
        _insert(self.waiting, sequence)

    def begin_probe(self, sequence: Sequence) -> None:
        """Keep a sequence that owns nothing out of the queue while the tier looks for its
        prefix."""
        sequence.state = SequenceState.PROBING
        self.probing[sequence] = None

    def end_probe(self, sequence: Sequence) -> None:
        """Queue a sequence whose prefix was looked for."""
        del self.probing[sequence]
        sequence.state = SequenceState.WAITING
        self.add(sequence)

    def end_restore(self, sequence: Sequence) -> None:
        """Let a sequence prefill, or free what it owns if it has finished meanwhile."""
        self.restoring.remove(sequence)
        if sequence.is_finished:
            self._free(sequence)
        else:
            self._run(sequence)

    def _run(self, sequence: Sequence) -> None:
        """Let a sequence that owns what it needs compute."""
        sequence.state = SequenceState.RUNNING
        if sequence.cold is not None:
            self.spilling = sequence
        else:
            _insert(self.prefilling, sequence)

    def schedule(self, now: float) -> list[PrefillChunk]:
        """Choose the next step: all decoding rows, and the chunks returned; or, where these are of
        the spilling sequence, its chunk alone.
        """
        if self._is_spilling_due and (alone := self._spilling_chunk()) is not None:
            self._is_spilling_due = False
            return [alone]
        chunks = self._schedule_others(now)
        self._is_spilling_due = self.spilling is not None
        if not chunks and not self.rows.sequences:
            alone = self._spilling_chunk()
            return [] if alone is None else [alone]
        return chunks

    def _spilling_chunk(self) -> PrefillChunk | None:
        """Return the spilling sequence's next chunk, its blocks in place; None: not now."""
        sequence = self.spilling
        if sequence is None or self._spill is None or self._lost:
            return None
        budget = min(self._max_num_batched_tokens, self._spill.room(sequence))
        chunk, _ = self._chunk(sequence, budget, self._max_prompt_rows)
        if chunk is None:
            return None
        try:
            return chunk if self._spill.make_room(sequence, chunk.stop) else None
        except ColdKvError as error:
            self._lost.append((sequence, error))
            return None

    def take_lost(self) -> list[tuple[Sequence, ColdKvError]]:
        """Return the spilling sequences that cannot go on, with why; they still run."""
        lost, self._lost = self._lost, []
        return lost

    def _schedule_others(self, now: float) -> list[PrefillChunk]:
        """Give every decoding sequence room for its token, preempting the last where blocks lack,
        admit waiting sequences if nothing had to give way, and share out the tokens."""
        self.rows.skips_batch = False
        preempted_before = self.num_preemptions
        for sequence in self.rows.needing_a_block():
            self._keep_filled(sequence)
            self._make_room(sequence)
        if not self.prefilling and not self.waiting:
            return []
        if self._has_interactive():
            self._share.note_interactive(now)
        batch_tokens = self._share.prompt_tokens(now)
        if self.num_preemptions == preempted_before:
            self._admit(batch_tokens, now)
        return self._chunks(batch_tokens)

    def _has_interactive(self) -> bool:
        lines = (self.prefilling, self.waiting)
        is_decoding = self.rows.num_decoding > self.rows.num_batch
        return is_decoding or any(line and line[0].is_interactive for line in lines)

    def _keep_filled(self, sequence: Sequence) -> None:
        """Keep a cache block that a decoding sequence has just filled. (A sequence that fills a
        cache block has filled a block.)"""
        if sequence.is_decoding and sequence.num_computed % CACHE_BLOCK == 0:
            self._keep(sequence)

    def keep_prefilled(self, chunks: list[PrefillChunk]) -> None:
        """Keep what a step has prefilled, where prefixes are reused."""
        for chunk in chunks:
            if not chunk.sequence.is_finished:
                self._keep(chunk.sequence)

    def _keep(self, sequence: Sequence) -> None:
        if self._reuse is None:
            return
        if self._reuse.note_computed(sequence) and sequence.is_decoding:
            self.rows.rewrite(sequence)

    def _make_room(self, sequence: Sequence) -> None:
        """Give a decoding sequence a block, unless it gives way itself or already has."""
        while sequence.is_decoding:
            if self._blocks.num_free:
                self.rows.append_block(sequence, self._blocks.allocate(1)[0])
                return
            self._preempt(max(self._running(), key=lambda running: running.order))

    def _running(self) -> list[Sequence]:
        spilling = [] if self.spilling is None else [self.spilling]
        return self.prefilling + self.rows.sequences + spilling

    def _preempt(self, sequence: Sequence) -> None:
        """Send a running sequence back to the queue with all its tokens."""
        if self._reuse is not None:
            self._reuse.leave(sequence)
        self._take_all(sequence)
        self.add(sequence)

    def start_over(self, sequence: Sequence) -> None:
        """Take all from a running sequence whose caches are in an unknown state; the caller queues
        it or lets the tier look for its prefix."""
        sequence.num_restarts += 1
        self._take_all(sequence)

    def _take_all(self, sequence: Sequence) -> None:
        self._release(sequence)
        sequence.state = SequenceState.PREEMPTED
        sequence.num_computed = 0
        sequence.num_preemptions += 1
        self.num_preemptions += 1

    def _admit(self, batch_tokens: int, now: float) -> None:
        """Admit waiting sequences while tokens, rows, state slots and blocks are left; for an
        interactive one batch sequences give way.

        One block per running sequence stays free, so that an admission does not cause a
        preemption in the next few steps.
        """
        budget = self._max_num_batched_tokens - self.rows.num_decoding
        prefilling = sum(s.num_to_compute for s in self.prefilling if s.is_interactive)
        left = budget - prefilling
        batch_left = min(budget, batch_tokens) - sum(s.num_to_compute for s in self.prefilling)
        while self.waiting and (sequence := self._next_waiting()) is not None:
            if (left if sequence.is_interactive else batch_left) <= 0:
                return
            num_running = self.num_running
            if num_running >= self._max_num_seqs or not self._state_slots.num_free:
                if self._gives_way(sequence):
                    continue
                return
            match = NO_MATCH if self._reuse is None else self._reuse.find(sequence)
            if match is None:
                return
            is_long = self._spill is not None and self._spill.is_long(sequence)
            if is_long and self._spill is not None:
                need = self._spill.window_blocks
            else:
                need = self._blocks.blocks_for(sequence.num_tokens) - match.num_blocks
                need += match.num_spare
            if need + num_running > self._blocks.num_free:
                if self._gives_way(sequence):
                    continue
                return
            self.waiting.remove(sequence)
            self._start(sequence, match, is_long)
            if sequence.admitted_s is None:
                sequence.admitted_s = now
            if sequence.state is SequenceState.RUNNING and not is_long:
                batch_left -= sequence.num_to_compute
                if sequence.is_interactive:
                    left -= sequence.num_to_compute

    def _gives_way(self, sequence: Sequence) -> bool:
        """Preempt the newest batch sequence for an interactive one; return whether there was
        any."""
        others = [running for running in self._running() if not running.is_interactive]
        if not (sequence.is_interactive and others):
            return False
        self._preempt(max(others, key=lambda running: running.order))
        return True

    def _next_waiting(self) -> Sequence | None:
        """Return the first that may be admitted: while one spills, or is restored to, another long
        one holds back nobody."""
        is_taken = self.spilling is not None or any(s.cold is not None for s in self.restoring)
        if self._spill is None or not is_taken:
            return self.waiting[0]
        is_long = self._spill.is_long
        return next((sequence for sequence in self.waiting if not is_long(sequence)), None)

    def _start(self, sequence: Sequence, match: Match, is_long: bool) -> None:
        """Give a sequence what it needs to run, and its prefix."""
        if self._reuse is not None:
            self._reuse.share(sequence, match)
        sequence.state_slot = self._state_slots.acquire()
        use = sequence.prefix
        load_to = 0
        if self._load is not None and use is not None and use.load_to > match.num_tokens:
            load_to = use.load_to
        wanted = self._blocks.blocks_for(sequence.num_tokens)
        if is_long and self._spill is not None:
            try:
                self._spill.begin(sequence, load_to)
            except ColdKvError as error:
                self._run(sequence)
                self._lost.append((sequence, error))
                return
            wanted = self._spill.window_blocks
        sequence.blocks += self._blocks.allocate(wanted - len(sequence.blocks))
        if self._reuse is not None:
            self._reuse.restore(sequence, match)
        if load_to and self._load is not None:
            sequence.state = SequenceState.RESTORING
            self.restoring.append(sequence)
            self._load(sequence)
        else:
            self._run(sequence)

    def _chunks(self, batch_tokens: int) -> list[PrefillChunk]:
        """Share the step's tokens among the prefilling sequences in their order, and decide whether
        batch sequences are in the step.

        Args:
            batch_tokens: Most tokens of prompts of batch sequences.
        """
        budget = self._max_num_batched_tokens - self.rows.num_decoding
        has_interactive = bool(self.prefilling) and self.prefilling[0].is_interactive
        is_without_batch = self._share.leaves_out(has_interactive)
        chunks = []
        prompt_rows_left = self._max_prompt_rows
        for sequence in self.prefilling:
            is_batch = not sequence.is_interactive
            room = min(budget, batch_tokens) if is_batch else budget
            if room == 0 or (is_batch and is_without_batch):
                break
            chunk, num_prompt_rows = self._chunk(sequence, room, prompt_rows_left)
            prompt_rows_left -= num_prompt_rows
            if chunk is not None:
                budget -= chunk.stop - chunk.start
                batch_tokens -= chunk.stop - chunk.start if is_batch else 0
                chunks.append(chunk)
        self.rows.skips_batch = is_without_batch and bool(chunks)
        return chunks

    def _chunk(
        self, sequence: Sequence, budget: int, prompt_rows_left: int
    ) -> tuple[PrefillChunk | None, int]:
        """Return the next chunk of a sequence, None without room for a token, and its rows."""
        start = sequence.num_computed
        stop = min(start + min(sequence.num_to_compute, budget), sequence.next_cut)
        prompt_rows = range(0)
        if due := sequence.num_prompt_logprobs_due:
            first = sequence.prompt_len - 1 - due
            last = min(stop, sequence.prompt_len - 1)
            if last - max(first, start) > prompt_rows_left:
                stop = last = max(first, start) + prompt_rows_left
            prompt_rows = range(max(first, start), max(first, start, last))
        chunk = PrefillChunk(sequence, start, stop, prompt_rows) if stop > start else None
        return chunk, len(prompt_rows)

    def end_prefill(self, sequence: Sequence) -> None:
        """Let a sequence whose prefill has ended, and that has drawn a token, decode."""
        if sequence is self.spilling:
            return
        self.prefilling.remove(sequence)
        self.rows.add(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and free all it owns; what a load still writes to is
        freed by `end_restore`."""
        if sequence.state is SequenceState.RUNNING:
            self._release(sequence)
        elif sequence.state is SequenceState.PROBING:
            del self.probing[sequence]
        elif sequence.state is SequenceState.RESTORING:
            assert sequence.prefix is not None
            assert sequence.prefix.loading is not None
            sequence.prefix.loading.set()
        else:
            self.waiting.remove(sequence)
        sequence.state = SequenceState.FINISHED

    def _release(self, sequence: Sequence) -> None:
        if sequence.is_decoding:
            self.rows.remove(sequence)
        elif sequence is self.spilling:
            self.spilling = None
        else:
            self.prefilling.remove(sequence)
        self._free(sequence)

    def _free(self, sequence: Sequence) -> None:
        own = sequence.blocks if self._reuse is None else self._reuse.release(sequence)
        self._blocks.release(own)
        self._state_slots.release(sequence.state_slot)
        sequence.blocks = []
        sequence.state_slot = -1
        if self._spill is not None and sequence.cold is not None:
            self._spill.end(sequence)


def _insert(queue: list[Sequence] | deque[Sequence], sequence: Sequence) -> None:
    """Insert by order, first in line first; most come at the end."""
    index = len(queue)
    while index and queue[index - 1].order > sequence.order:
        index -= 1
    queue.insert(index, sequence)
