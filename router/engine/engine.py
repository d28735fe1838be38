"""Runs the model, step after step, for all requests at once.

One thread owns everything below `submit`, `cancel`, `drain`, `stop` and `stats`, which any thread
may call. A step: take what was submitted and cancelled, expire deadlines, schedule, build the
batch, run the model, draw tokens, hand out outputs. An idle engine sleeps on a condition variable.

Outputs: `submit` takes one sink per request. Sinks run in the engine thread, one call per sequence
and step. Where waking the receiver is the expensive part (an event loop's `call_soon_threadsafe`
writes to a pipe), give the engine a `deliver` instead: it gets all (sink, output) pairs of a step
in one call, so 32 streams cost one wake-up:

    def deliver(outputs): loop.call_soon_threadsafe(call_sinks, outputs)
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from protos.errors import (
    ColdKvError,
    DeadlineExceededError,
    EngineStoppedError,
    ExpertMeshError,
    InternalError,
    NonFiniteError,
    QueueFullError,
)
from router.engine.batch_rows import BatchRows, BuiltBatch, PrefillChunk
from router.engine.block_manager import BlockManager
from router.engine.candidates import token_logprobs
from router.engine.checks import check_request
from router.engine.cold_store import ColdTier
from router.engine.config import EngineConfig, EngineStats, ReuseStats
from router.engine.inbox import Inbox
from router.engine.latencies import Latencies
from router.engine.model import Model
from router.engine.outbox import Deliver, Outbox
from router.engine.request import EngineRequest, FinishReason, Priority, Sink, StepOutput
from router.engine.restore import Restorer, reuse_of
from router.engine.sampler import sample
from router.engine.scheduler import Scheduler
from router.engine.sequence import Sequence, SequenceState
from router.engine.spill import MAX_RESTARTS, build_alone, spill_of
from router.engine.state_pool import StatePool
from router.engine.tier import Tier

logger = logging.getLogger(__name__)


class Engine:
    """Continuous batching over one model."""

    def __init__(
        self,
        model: Model,
        config: EngineConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
        deliver: Deliver | None = None,
        tier: Tier | None = None,
        cold_tier: ColdTier | None = None,
    ) -> None:
        """Allocate the caches; `start` begins to run.

        Args:
            model: Used by the engine thread only.
            config: Sizes.
            clock: Monotonic seconds; deadlines and timings are on it.
            deliver: Takes a step's outputs at once and must not raise; None calls each sink.
            tier: Holds prefixes beyond the pool; None: the pool is all. Closed by its owner, after
                the engine has stopped.
            cold_tier: Takes the KV of a sequence longer than the pool, behind `max_cold_bytes` of
                host memory; closed by its owner alike.
        """
        self.config = config
        self._model = model
        self._clock = clock
        self._caches = model.allocate_caches(
            config.num_blocks, config.block_size, config.num_state_slots
        )
        self._blocks = BlockManager(config.num_blocks, config.block_size)
        self._state_slots = StatePool(config.num_state_slots)
        self._inbox = Inbox()
        post = self._inbox.post
        reuse = reuse_of(model, self._caches, self._blocks, config, tier, post)
        self._spill = spill_of(model, self._caches, self._blocks, config, cold_tier, reuse)
        restorer = None
        if tier is not None and reuse is not None:
            restorer = Restorer(tier, reuse, self._spill, config, post, clock)
        self._reuse, self._restorer = reuse, restorer
        self._scheduler = Scheduler(
            blocks=self._blocks,
            state_slots=self._state_slots,
            rows=BatchRows(
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=config.max_num_batched_tokens,
                max_prompt_rows=config.max_prompt_rows,
                max_blocks=min(self._blocks.blocks_for(config.max_model_len), config.num_blocks),
                block_size=config.block_size,
            ),
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_prompt_rows=config.max_prompt_rows,
            reuse=reuse,
            load=None
            if restorer is None
            else lambda s: restorer.load(s, self._scheduler.end_restore),
            spill=self._spill,
        )
        self._outbox = Outbox(deliver, self.cancel)
        self._next_deadline = float("inf")
        self._prompt_tokens = self._generation_tokens = self._steps = 0
        self._step_s = 0.0
        self._latencies = Latencies()
        self._thread: threading.Thread | None = None

    # What any thread may call.

    def start(self) -> None:
        """Start the engine thread."""
        assert self._thread is None, "the engine was started before"
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: EngineRequest, sink: Sink) -> int:
        """Queue a request.

        Args:
            request: What to generate.
            sink: Gets the outputs of its n sequences, in the engine thread; must be cheap.

        Returns:
            How many sequences wait before it.

        Raises:
            InvalidFieldError: A field that would break the step it is part of.
            ContextLengthExceededError: Prompt and `max_tokens` do not fit the context window.
            ResourceError: It would not fit the KV blocks even alone.
            DuplicateRequestError: A request of this id is live.
            QueueFullError: Too many sequences wait; carries when to retry.
            DrainingError: The engine takes no more requests.
            EngineStoppedError: The engine has stopped.
        """
        config = self.config
        prompt = np.array(request.prompt_ids, dtype=np.int64)
        check_request(request, prompt, config, self._blocks, self._spill)
        sequences = [
            Sequence(
                request,
                index,
                sink,
                prompt=prompt,
                arrival=0,
                now=self._clock(),
                max_model_len=config.max_model_len,
                eos_token_ids=config.eos_token_ids,
                prefix=None if self._reuse is None else self._reuse.new_use(request, prompt),
            )
            for index in range(request.sampling.n)
        ]

        def count_ahead(num_submitted: int) -> int:
            ahead = self._scheduler.num_waiting + num_submitted
            places = max(0, config.max_num_seqs - self._scheduler.num_running)
            # Batch requests leave half of the queue to others.
            is_batch = request.priority is Priority.BATCH
            max_queued = config.max_queued // 2 if is_batch else config.max_queued
            if ahead + len(sequences) > max_queued + places:
                raise QueueFullError(ahead, max_queued, self._outbox.finish_interval_s)
            return ahead

        return self._inbox.submit(sequences, count_ahead)

    def cancel(self, request: str | EngineRequest, reason: str = "") -> bool:
        """End a live request: its sequences' last outputs come within one step.

        Args:
            request: Its id, or what was submitted: then no other request of the same id is hit.
            reason: For the log.

        Returns:
            Whether the request was live.
        """
        request_id = request if isinstance(request, str) else request.request_id
        if not self._inbox.cancel(request_id, None if isinstance(request, str) else request):
            return False
        logger.info("request.cancelled id=%s reason=%s", request_id, reason or "-")
        return True

    def drain(self) -> None:
        """Take no more requests; those that are live run to their end."""
        self._inbox.drain()

    def stop(self, *, drain: bool = True, timeout_s: float | None = None) -> None:
        """Stop the engine thread and wait for it. Does nothing the second time.

        Args:
            drain: Let live requests end first.
            timeout_s: How long; after it they fail with `EngineStoppedError`, as without `drain`.
        """
        self.drain()
        if drain and self._thread is not None:
            self._thread.join(timeout_s)
        self._inbox.stop()
        if self._thread is not None:
            self._thread.join()
        else:
            self._abandon(EngineStoppedError())

    @property
    def num_live(self) -> int:
        """Requests that have not ended; exact at any moment, unlike `stats`."""
        return self._inbox.num_live

    def stats(self) -> EngineStats:
        """Return a snapshot; numbers of a step that is under way may be half there."""
        scheduler = self._scheduler
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting + self._inbox.num_submitted,
            num_queued_tokens=scheduler.num_queued_tokens,
            num_blocks_used=self._blocks.num_used,
            num_blocks=self._blocks.num_blocks,
            num_state_slots_used=self._state_slots.num_used,
            num_state_slots=self._state_slots.num_slots,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            preemptions=scheduler.num_preemptions,
            steps=self._steps,
            step_s=self._step_s,
            dispatch_s=float(getattr(self._model, "dispatch_s", 0.0)),
            num_cold_bytes=0 if self._spill is None else self._spill.num_cold_bytes,
            spilled_blocks=0 if self._spill is None else self._spill.num_spilled_blocks,
            latency=self._latencies.stats(),
            reuse=ReuseStats()
            if self._reuse is None
            else self._reuse.stats(len(scheduler.probing) + len(scheduler.restoring)),
        )

    def warm_positions(self) -> list[bytes]:
        """Return the hashes of the positions that the pool can go on from, last used first."""
        return [] if self._reuse is None else self._reuse.cache.snapshot_keys()

    @property
    def is_running(self) -> bool:
        """Whether the engine thread lives; False before `start` and after the end."""
        return self._thread is not None and self._thread.is_alive()

    # The engine thread.

    def _run(self) -> None:
        """Step until stopped. An unexpected error ends the engine, and every request with it."""
        logger.info("engine.started num_blocks=%d", self.config.num_blocks)
        reason: ExpertMeshError = EngineStoppedError()
        try:
            did_run = True
            while self._await_work(did_run):
                did_run = self.step()
        except Exception as error:
            logger.exception("engine.failed")
            reason = InternalError(f"the engine failed: {type(error).__name__}: {error}")
        self._abandon(reason)
        logger.info("engine.stopped steps=%d", self._steps)

    def _await_work(self, did_run: bool) -> bool:
        """Sleep until there is something to do; return False when the engine is to end.

        A step that ran nothing left nothing to run: until a call or a deadline comes, what is live
        waits for the tier.
        """
        if did_run and self._scheduler.has_work and not self._inbox.is_stopped:
            return True
        return self._inbox.wait(lambda: self._next_deadline - self._clock())

    def step(self) -> bool:
        """Do one step. Tests without a thread call this; otherwise only the engine thread does.

        Returns:
            Whether the model ran.
        """
        begin = self._clock()
        if self._inbox.has_calls:
            self._take_calls(begin)
        if begin >= self._next_deadline:
            self._expire(begin)
        chunks = self._scheduler.schedule(begin)
        for sequence, error in self._scheduler.take_lost():
            self._lose(sequence, error)
        has_batch = bool(chunks or self._scheduler.rows.sequences)
        if has_batch:
            num_decoding = self._scheduler.rows.num_stepping
            is_alone = bool(chunks) and chunks[0].is_alone
            self._compute(chunks)
            self._steps += 1
            seconds = self._clock() - begin
            self._step_s += seconds
            self._latencies.note_step(begin + seconds, num_decoding)
        self._outbox.hand_out()
        if chunks:
            self._scheduler.keep_prefilled(chunks)
            if self._restorer is not None and not is_alone:
                self._restorer.note_step(chunks, num_decoding, seconds)
        return has_batch

    def _take_calls(self, now: float) -> None:
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
        self._prompt_tokens += max(0, computed)

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
            self._generation_tokens += 1
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
            self._latencies.note_first(now - sequence.submitted_s)

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

    def _abandon(self, error: ExpertMeshError) -> None:
        """End everything that is live, and take nothing more."""
        self._inbox.stop()
        now = self._clock()
        self._take_calls(now)
        for sequence in self._inbox.live_sequences():
            self._fail(sequence, error, now)
        self._outbox.hand_out()
