"""What the engine thread does: one step after another.

A step: take what was submitted and cancelled, expire deadlines, schedule, build the batch, run the
model, draw tokens, hand out outputs. Knows no threads and no queue of requests before they are
sequences: `router.engine.engine` starts it, and tells it of calls through the inbox.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from protos.errors import (
    ColdKvError,
    DeadlineExceededError,
    ExpertMeshError,
    InternalError,
    NonFiniteError,
)
from router.engine.batch_rows import BuiltBatch, PrefillChunk
from router.engine.candidates import token_logprobs
from router.engine.inbox import Inbox
from router.engine.latencies import Latencies
from router.engine.model import Model
from router.engine.outbox import Outbox
from router.engine.request import FinishReason, Priority, StepOutput
from router.engine.restore import Restorer
from router.engine.reuse import Reuse
from router.engine.sampler import sample
from router.engine.scheduler import Scheduler
from router.engine.sequence import Sequence, SequenceState
from router.engine.spill import MAX_RESTARTS, build_alone

logger = logging.getLogger(__name__)

PROBE_WAIT_S = 0.005
"""A tier that is near answers in less than a millisecond."""


class EngineCore:
    """Steps of one model; the engine thread's alone, but for the counts.

    Args:
        model: Runs the batches.
        caches: Its own, as it allocated them.
        scheduler: Chooses what a step computes.
        inbox: Brings calls of other threads.
        outbox: Takes outputs.
        reuse: Prefixes in the pool; None: they are not reused.
        restorer: Prefixes behind the pool; None: the pool is all.
        clock: Monotonic seconds; deadlines and timings are on it.

    Attributes:
        steps: Steps that ran the model.
        step_s: Seconds that they took.
        prompt_tokens: Prompt tokens computed.
        generation_tokens: Tokens drawn.
        latencies: How long clients waited.
    """

    def __init__(
        self,
        *,
        model: Model,
        caches: Any,
        scheduler: Scheduler,
        inbox: Inbox,
        outbox: Outbox,
        reuse: Reuse | None,
        restorer: Restorer | None,
        clock: Callable[[], float],
    ) -> None:
        self.steps = self.prompt_tokens = self.generation_tokens = 0
        self.step_s = 0.0
        self.latencies = Latencies()
        self._model = model
        self._caches = caches
        self._scheduler = scheduler
        self._inbox = inbox
        self._outbox = outbox
        self._reuse, self._restorer = reuse, restorer
        self._clock = clock
        self._next_deadline = float("inf")

    def await_work(self, did_run: bool) -> bool:
        """Sleep until there is something to do; return False when the engine is to end.

        A step that ran nothing left nothing to run: until a call or a deadline comes, what is live
        waits for the tier.
        """
        if did_run and self._scheduler.has_work and not self._inbox.is_stopped:
            return True
        return self._inbox.wait(lambda: self._next_deadline - self._clock())

    def step(self) -> bool:
        """Do one step.

        Returns:
            Whether the model ran.
        """
        begin = self._clock()
        if self._inbox.has_calls and self._take_calls(begin):
            self._await_probes(begin)
            begin = self._clock()
        if begin >= self._next_deadline:
            self._expire(begin)
        chunks = [] if self._inbox.is_asleep else self._scheduler.schedule(begin)
        for sequence, error in self._scheduler.take_lost():
            self._lose(sequence, error)
        has_batch = bool(chunks or self._scheduler.rows.sequences)
        if has_batch:
            num_decoding = self._scheduler.rows.num_stepping
            is_alone = bool(chunks) and chunks[0].is_alone
            self._compute(chunks)
            self.steps += 1
            seconds = self._clock() - begin
            self.step_s += seconds
            self.latencies.note_step(begin + seconds, num_decoding)
        self._outbox.hand_out()
        if chunks:
            self._scheduler.keep_prefilled(chunks)
            if self._restorer is not None and not is_alone:
                self._restorer.note_step(chunks, num_decoding, seconds)
        return has_batch

    def _await_probes(self, now: float) -> None:
        """Give the tier a moment to answer for new interactive sequences, where they would wait out
        a step of batch work for it."""
        until = time.monotonic() + PROBE_WAIT_S
        while self._scheduler.probes_beside_batch and time.monotonic() < until:
            self._inbox.wait(lambda: until - time.monotonic())
            if self._inbox.is_stopped:
                return
            self._take_calls(now)

    def _take_calls(self, now: float) -> bool:
        """Do what other threads asked for; return whether sequences came."""
        scheduler = self._scheduler

        def queue(sequence: Sequence) -> None:
            if self._restorer is None:
                scheduler.add(sequence)
            else:
                scheduler.begin_probe(sequence)

        submitted, cancelled = self._inbox.take(queue)
        for sequence in submitted:
            if sequence.request.deadline is not None:
                self._next_deadline = min(self._next_deadline, sequence.request.deadline)
            if self._restorer is not None:
                self._restorer.probe(sequence, scheduler.end_probe)
        for sequence in cancelled:
            if not sequence.is_finished:
                self._finish(sequence, self._output(sequence), FinishReason.CANCELLED, now)
        for call in self._inbox.take_posted():
            call()
        return bool(submitted)

    def _expire(self, now: float) -> None:
        """End the sequences whose deadline has passed and find the next deadline."""
        self._next_deadline = float("inf")
        for sequence in self._inbox.live_sequences():
            deadline = sequence.request.deadline
            if deadline is None:
                continue
            if deadline <= now:
                timeout_s = deadline - sequence.submitted_s
                error = DeadlineExceededError(f"request {sequence.request_id}", timeout_s)
                self._fail(sequence, error, now)
            else:
                self._next_deadline = min(self._next_deadline, deadline)

    def _compute(self, chunks: list[PrefillChunk]) -> None:
        """Run the model over all decoding rows and these chunks, and draw tokens."""
        is_alone = bool(chunks) and chunks[0].is_alone
        built = build_alone(chunks[0]) if is_alone else self._scheduler.rows.build(chunks)
        try:
            with torch.inference_mode(), built.past or nullcontext():
                logits = self._model.forward(built.batch, self._caches)
        except ColdKvError as error:
            self._lose(chunks[0].sequence, error)
            return
        except ExpertMeshError as error:
            self._fail_step(built, chunks, error)
            return
        except Exception as error:
            logger.exception("step.failed")
            detail = f"the step failed: {type(error).__name__}: {error}"
            self._fail_step(built, chunks, InternalError(detail))
            return
        for chunk, first in built.prompt_logits:
            self._note_prompt_logprobs(chunk, logits[first : first + len(chunk.prompt_rows)])
        for chunk in chunks:
            self._note_progress(chunk)
        if built.sampled:
            if built.sampled_logits is not None:
                logits = logits[built.sampled_logits]
            self._draw(built, logits)

    def _fail_step(
        self, built: BuiltBatch, chunks: list[PrefillChunk], error: ExpertMeshError
    ) -> None:
        """End the sequences of a step whose caches are now in an unknown state, and only those."""
        now = self._clock()
        prefilling = [chunk.sequence for chunk in chunks if not chunk.is_final]
        logger.warning(
            "step.failed sequences=%d error=%s", len(built.sampled) + len(prefilling), error
        )
        for sequence in built.sampled + prefilling:
            self._fail(sequence, error, now)

    def _lose(self, sequence: Sequence, error: ColdKvError) -> None:
        """Let a sequence start over whose cold KV is lost, or end it."""
        is_last = sequence.num_restarts >= MAX_RESTARTS
        logger.warning("spill.lost id=%s ends=%s error=%s", sequence.request_id, is_last, error)
        if is_last:
            self._fail(sequence, error, self._clock())
        else:
            self._scheduler.start_over(sequence)
            if self._restorer is None:
                self._scheduler.add(sequence)
            else:
                self._scheduler.begin_probe(sequence)
                self._restorer.probe(sequence, self._scheduler.end_probe)

    def _note_prompt_logprobs(self, chunk: PrefillChunk, logits: Tensor) -> None:
        sequence = chunk.sequence
        assert sequence.prompt_logprobs is not None
        values = logits.cpu().numpy()
        if not np.isfinite(values.max(1)).all():
            where = f"prompt logits of request {sequence.request_id}"
            self._fail(sequence, NonFiniteError(where), self._clock())
            return
        positions = chunk.prompt_rows
        tops = np.full(len(positions), sequence.request.prompt_logprobs, dtype=np.int64)
        targets = sequence.prompt[positions.start + 1 : positions.stop + 1]
        sequence.prompt_logprobs.extend(token_logprobs(values, targets, tops))

    def _note_progress(self, chunk: PrefillChunk) -> None:
        """Count a chunk's tokens as computed; report it unless its first token does."""
        sequence = chunk.sequence
        if sequence.is_finished:
            return
        sequence.num_computed = chunk.stop
        if chunk.is_final:
            return
        before = sequence.prompt_reported
        if (progress := sequence.report_prefill()) is not None:
            self._count_prompt(sequence, before)
            output = self._output(sequence)
            output.prefill = progress
            self._outbox.add(sequence.sink, output)

    def _count_prompt(self, sequence: Sequence, before: int) -> None:
        """Count prompt tokens computed since the last report."""
        computed = sequence.prompt_reported - max(before, sequence.num_cached)
        self.prompt_tokens += max(0, computed)

    def _draw(self, built: BuiltBatch, logits: Tensor) -> None:
        """Draw a token for each sampled sequence, one a row of the logits, and move them on."""
        scheduler, sampled = self._scheduler, built.sampled
        samples = sample(logits, [sequence.sampler for sequence in sampled])
        now = self._clock()
        if built.past is None:
            scheduler.rows.advance(samples.token_ids)
        failed = samples.failed_rows
        logprobs = samples.logprobs
        add = self._outbox.add
        for row, (sequence, token_id) in enumerate(
            zip(sampled, samples.token_ids.tolist(), strict=True)
        ):
            if sequence.is_finished:
                continue
            if failed and row in failed:
                where = (
                    f"logits of request {sequence.request_id} index {sequence.index} "
                    f"at position {sequence.num_tokens}"
                )
                self._fail(sequence, NonFiniteError(where), now)
                continue
            output = StepOutput(sequence.request_id, sequence.index, [token_id])
            if logprobs:
                output.logprobs = logprobs.get(row)
            is_decoding = sequence.is_decoding
            if is_decoding:
                sequence.num_computed += 1
            else:
                before = sequence.prompt_reported
                output.prefill = sequence.report_prefill()
                self._count_prompt(sequence, before)
            try:
                reason = sequence.append(token_id, now)
            except Exception as error:  # the stop checker is the caller's code
                logger.exception("stop_checker.failed id=%s", sequence.request_id)
                detail = f"the stop checker failed: {type(error).__name__}: {error}"
                self._fail(sequence, InternalError(detail, sequence.request_id), now)
                continue
            self.generation_tokens += 1
            if sequence.first_token_s == now and not is_decoding:
                self._note_first(sequence, now)
            if reason is not None:
                if reason is FinishReason.STOP and token_id in sequence.stop_ids:
                    output.stop_token_id = token_id
                self._finish(sequence, output, reason, now)
                continue
            add(sequence.sink, output)
            if not is_decoding:
                scheduler.end_prefill(sequence)

    def _note_first(self, sequence: Sequence, now: float) -> None:
        if sequence.request.priority is not Priority.BATCH:
            self.latencies.note_first(now - sequence.submitted_s)

    def _output(self, sequence: Sequence) -> StepOutput:
        return StepOutput(sequence.request_id, sequence.index, [])

    def _fail(self, sequence: Sequence, error: ExpertMeshError, now: float) -> None:
        output = self._output(sequence)
        output.error = error
        self._finish(sequence, output, None, now)

    def _finish(
        self, sequence: Sequence, output: StepOutput, reason: FinishReason | None, now: float
    ) -> None:
        """Free all that a sequence owns and queue its last output."""
        if self._reuse is not None and sequence.state is SequenceState.RUNNING:
            if reason is not None:
                self._reuse.leave(sequence)
            elif isinstance(output.error, NonFiniteError):
                self._reuse.distrust(sequence)
        self._scheduler.finish(sequence)
        output.finish_reason = reason
        output.timings = sequence.timings(now)
        self._outbox.add_last(sequence.sink, output, now)
        self._inbox.remove(sequence)

    def abandon(self, error: ExpertMeshError) -> None:
        """End everything that is live, and take nothing more."""
        self._inbox.stop()
        now = self._clock()
        self._take_calls(now)
        for sequence in self._inbox.live_sequences():
            self._fail(sequence, error, now)
        self._outbox.hand_out()
