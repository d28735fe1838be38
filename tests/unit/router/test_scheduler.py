"""Who is in the next step."""

from __future__ import annotations

import numpy as np

from router.engine.batch_rows import BatchRows, PrefillChunk
from router.engine.block_manager import BlockManager
from router.engine.priority import BATCH_EVERY, BATCH_PROMPT_PART, QUIET_S
from router.engine.request import EngineRequest, Priority, SamplingParams, StoppingParams
from router.engine.scheduler import Scheduler
from router.engine.sequence import Sequence, SequenceState
from router.engine.state_pool import StatePool


class Table:
    """A scheduler with sequences, and a model that draws token 1 for all of them."""

    def __init__(
        self,
        *,
        num_blocks: int = 100,
        slots: int = 8,
        max_num_seqs: int = 8,
        budget: int = 16,
        prompt_rows: int = 4,
    ) -> None:
        self.blocks = BlockManager(num_blocks, 4)
        self.slots = StatePool(slots)
        self.rows = BatchRows(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_prompt_rows=prompt_rows,
            max_blocks=50,
            block_size=4,
        )
        self.scheduler = Scheduler(
            blocks=self.blocks,
            state_slots=self.slots,
            rows=self.rows,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_prompt_rows=prompt_rows,
        )
        self.arrivals = 0

    def add(
        self,
        prompt_len: int,
        prompt_logprobs: int | None = None,
        priority: Priority = Priority.INTERACTIVE,
    ) -> Sequence:
        prompt = [1] * prompt_len
        sequence = Sequence(
            EngineRequest(
                request_id=f"r{self.arrivals}",
                prompt_ids=prompt,
                sampling=SamplingParams(temperature=0.0),
                stopping=StoppingParams(max_tokens=50),
                prompt_logprobs=prompt_logprobs,
                priority=priority,
            ),
            0,
            lambda output: None,
            prompt=np.array(prompt, dtype=np.int64),
            arrival=self.arrivals,
            now=0.0,
            max_model_len=200,
        )
        self.arrivals += 1
        self.scheduler.add(sequence)
        return sequence

    def add_batch(self, prompt_len: int) -> Sequence:
        return self.add(prompt_len, priority=Priority.BATCH)

    def step(self, now: float = 0.0) -> list[PrefillChunk]:
        chunks = self.scheduler.schedule(now)
        sampled = self.rows.build(chunks).sampled
        decoding = self.rows.sequences.copy()
        for chunk in chunks:
            chunk.sequence.num_computed = chunk.stop
        self.rows.advance(np.ones(len(sampled), dtype=np.int64))
        for sequence in sampled:
            sequence.append(1, 0.0)
            if sequence in decoding:
                sequence.num_computed += 1
            else:
                self.scheduler.end_prefill(sequence)
        return chunks


def spans(chunks: list[PrefillChunk]) -> list[tuple[int, int, int]]:
    return [(chunk.sequence.arrival, chunk.start, chunk.stop) for chunk in chunks]


def test_prefill_is_cut_to_the_budget_oldest_first() -> None:
    table = Table(budget=10)
    for length in (14, 5, 9):
        table.add(length)
    assert spans(table.step()) == [(0, 0, 10)]
    assert spans(table.step()) == [(0, 10, 14), (1, 0, 5), (2, 0, 1)]
    # Two decode tokens leave 8 of the budget of 10: all that sequence 2 has left.
    assert spans(table.step()) == [(2, 1, 9)]
    assert spans(table.step()) == []
    assert table.rows.num_decoding == 3


def test_decodes_go_first_and_share_the_step_with_prefill() -> None:
    table = Table(budget=8)
    table.add(3)
    table.step()
    table.add(20)
    assert spans(table.step()) == [(1, 0, 7)]
    assert table.rows.sequences[0].num_generated == 2


def test_admission_counts_blocks_and_keeps_one_per_running_sequence() -> None:
    table = Table(num_blocks=7)
    first, second = table.add(12), table.add(16)  # 3 and 4 blocks
    table.step()
    assert first.state is SequenceState.RUNNING
    assert second.state is SequenceState.WAITING  # 4 + 1 > 4
    third = table.add(1)  # would fit, but nobody passes the head of the queue
    table.step()
    assert third.state is SequenceState.WAITING
    table.scheduler.finish(first)
    table.step()  # all of the budget goes to the second
    table.step()
    assert second.state is third.state is SequenceState.RUNNING


def test_admission_counts_state_slots_and_sequences() -> None:
    for table in (Table(slots=2), Table(max_num_seqs=2)):
        sequences = [table.add(2) for _ in range(3)]
        table.step()
        assert [s.state for s in sequences] == [SequenceState.RUNNING] * 2 + [SequenceState.WAITING]


def test_the_newest_gives_way_and_comes_back_with_all_its_tokens() -> None:
    table = Table(num_blocks=5)
    old, new = table.add(4), table.add(4)
    while new.state is not SequenceState.PREEMPTED:
        table.step()
    # Both grow together: 2 blocks each hold 8 tokens; the fifth block goes to the older one.
    assert (old.num_tokens, new.num_tokens) == (10, 9)
    assert (new.num_computed, new.blocks, new.state_slot, new.row) == (0, [], -1, -1)
    assert list(table.scheduler.waiting) == [new]
    assert table.slots.num_used == 1
    table.scheduler.finish(old)
    assert spans(table.step()) == [(1, 0, 9)]
    assert new.num_tokens == 10
    assert new.num_preemptions == table.scheduler.num_preemptions == 1


def test_preempted_sequences_wait_in_the_order_of_arrival() -> None:
    table = Table(num_blocks=7, budget=32)
    sequences = [table.add(4) for _ in range(3)]
    table.step()
    assert not table.scheduler.waiting
    while len(table.scheduler.waiting) < 2:
        table.step()
    late = table.add(4)
    assert list(table.scheduler.waiting) == [*sequences[1:], late]
    assert sequences[0].is_decoding


def test_prompt_logprobs_limit_the_chunk() -> None:
    table = Table(prompt_rows=4)
    sequence = table.add(10, prompt_logprobs=0)
    plain = table.add(3)
    assert spans(table.scheduler.schedule(0.0)) == [(0, 0, 4), (1, 0, 3)]
    sequence.prompt_logprobs.token_ids += [1] * 6  # type: ignore[union-attr]
    # Positions 0 to 5 are known, as after a preemption: computed again, without logits.
    [chunk, _] = table.scheduler.schedule(0.0)
    assert (chunk.start, chunk.stop, chunk.prompt_rows) == (0, 10, range(6, 9))
    assert plain.state is SequenceState.RUNNING


def test_finishing_frees_everything_wherever_the_sequence_is() -> None:
    table = Table(budget=8)
    decoding = table.add(4)
    table.step()
    prefilling, waiting = table.add(20), table.add(200)
    table.step()
    for sequence in (waiting, prefilling, decoding):
        table.scheduler.finish(sequence)
        assert sequence.is_finished
    assert not table.scheduler.has_work
    assert table.blocks.num_used == table.slots.num_used == 0


def test_interactive_goes_first_in_queue_and_tokens() -> None:
    table = Table(budget=32)
    batch, interactive = table.add_batch(40), table.add(40)
    assert spans(table.step()) == [(interactive.arrival, 0, 32)]
    assert spans(table.step()) == [(interactive.arrival, 32, 40)]
    # Beside interactive traffic a batch prompt gets a sixteenth of the step's tokens.
    assert 32 // BATCH_PROMPT_PART == 2
    assert spans(table.step()) == [(batch.arrival, 0, 2)]
    table.scheduler.finish(interactive)
    assert spans(table.step(QUIET_S - 1)) == [(batch.arrival, 2, 4)]
    assert spans(table.step(QUIET_S + 1)) == [(batch.arrival, 4, 36)]


def test_steps_with_an_interactive_prompt_leave_batch_out_but_every_eighth() -> None:
    table = Table(budget=8, num_blocks=200)
    batch = table.add_batch(3)
    table.step()
    interactive = table.add(150)
    grew = []
    while not interactive.is_decoding:
        before = batch.num_generated
        table.step()
        grew.append(batch.num_generated > before)
    # 7 tokens a step: the row of the batch sequence keeps its place in the budget.
    assert len(grew) == 22
    assert [step for step, did in enumerate(grew, 1) if did] == [BATCH_EVERY, 2 * BATCH_EVERY]
    before = batch.num_generated
    table.step()
    assert batch.num_generated == before + 1


def test_rows_keep_their_place_when_both_kinds_come_and_go() -> None:
    table = Table(budget=16, num_blocks=200)
    kinds = "bibbiibi"
    made = [table.add_batch(2) if kind == "b" else table.add(2) for kind in kinds]
    while not all(sequence.is_decoding for sequence in made):
        table.step()
    for sequence in (made[2], made[4], made[0], made[7]):
        table.scheduler.finish(sequence)
        rows = table.rows
        num_batch = sum(not s.is_interactive for s in rows.sequences)
        assert rows.num_batch == num_batch
        assert all(not s.is_interactive for s in rows.sequences[:num_batch])
        assert [s.row for s in rows.sequences] == list(range(rows.num_decoding))
        built = rows.build([]).batch
        assert built.state_slots.tolist() == [s.state_slot for s in rows.sequences]
        assert built.positions.tolist() == [s.num_computed for s in rows.sequences]


def test_a_step_without_batch_rows_counts_from_its_own_first_row() -> None:
    table = Table(budget=16, num_blocks=200)
    batch, old = table.add_batch(3), table.add(3)
    while not (batch.is_decoding and old.is_decoding):
        table.step()
    new = table.add(5)
    chunks = table.scheduler.schedule(0.0)
    built = table.rows.build(chunks)
    assert built.sampled == [old, new]
    assert built.batch.query_start.tolist() == [0, 1, 6]
    assert built.batch.logit_rows.tolist() == [0, 5]
    assert built.batch.state_slots.tolist() == [old.state_slot, new.state_slot]
    assert built.batch.positions.tolist() == [old.num_computed, *range(5)]


def test_batch_gives_its_seat_and_its_blocks_to_interactive() -> None:
    for table in (Table(max_num_seqs=2), Table(slots=2), Table(num_blocks=5)):
        first, second = table.add_batch(4), table.add_batch(4)
        table.step()
        assert [s.state for s in (first, second)] == [SequenceState.RUNNING] * 2
        third, interactive = table.add_batch(4), table.add(4)
        table.step()
        assert interactive.state is first.state is SequenceState.RUNNING
        assert second.state is SequenceState.PREEMPTED
        assert list(table.scheduler.waiting) == [second, third]


def test_interactive_takes_nothing_from_interactive() -> None:
    table = Table(max_num_seqs=1)
    running, waiting = table.add(4), table.add(4)
    table.step()
    assert running.state is SequenceState.RUNNING
    assert waiting.state is SequenceState.WAITING


def test_when_blocks_run_out_batch_gives_way_whatever_its_age() -> None:
    table = Table(num_blocks=5)
    batch, interactive = table.add_batch(4), table.add(4)
    while batch.state is not SequenceState.PREEMPTED:
        table.step()
    assert interactive.is_decoding
    assert interactive.num_preemptions == 0
