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
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from protos.errors import (
    ConfigurationError,
    ContextLengthExceededError,
    DeadlineExceededError,
    DrainingError,
    DuplicateRequestError,
    EngineStoppedError,
    ExpertMeshError,
    InternalError,
    InvalidFieldError,
    NonFiniteError,
    QueueFullError,
    ResourceError,
)
from router.engine.batch import Batch
from router.engine.batch_rows import BatchRows, BuiltBatch, PrefillChunk
from router.engine.block_manager import BlockManager
from router.engine.candidates import token_logprobs
from router.engine.request import EngineRequest, FinishReason, Sink, StepOutput
from router.engine.sampler import sample
from router.engine.scheduler import Scheduler
from router.engine.sequence import Sequence
from router.engine.state_pool import StatePool

logger = logging.getLogger(__name__)

Deliver = Callable[[list[tuple[Sink, StepOutput]]], None]


class Model(Protocol):
    """What the engine needs of a model. A float attribute `dispatch_s`, where there is one, is the
    time it has spent waiting for experts."""

    def allocate_caches(self, num_blocks: int, block_size: int, num_state_slots: int) -> Any:
        """Return the KV blocks and state slots of all layers."""
        ...

    def forward(self, batch: Batch, caches: Any) -> Tensor:
        """Compute a batch, update the caches, return the wanted logits, float32 `[L, vocab]`.

        The engine may change the logits in place. The batch's tensors are on the CPU and valid
        during the call.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Sizes of one engine."""

    vocab_size: int
    """Width of the logits."""

    max_model_len: int
    """Most tokens of a sequence, prompt and generated."""

    num_blocks: int
    """KV blocks."""

    num_state_slots: int
    """State slots; fewer than `max_num_seqs` limit the running sequences further."""

    block_size: int = 16
    """Tokens a KV block."""

    max_num_seqs: int = 256
    """Most running sequences."""

    max_num_batched_tokens: int = 2048
    """Most tokens of a step, at least `max_num_seqs`."""

    max_queued: int = 1024
    """Most sequences that wait beyond those that `max_num_seqs` lets run."""

    max_prompt_rows: int = 256
    """Most prompt positions a step whose logits are computed for prompt log-probabilities."""

    eos_token_ids: tuple[int, ...] = ()
    """Tokens that end a sequence unless it ignores them."""

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "max_model_len",
            "num_blocks",
            "num_state_slots",
            "block_size",
            "max_num_seqs",
            "max_prompt_rows",
        ):
            if getattr(self, name) < 1:
                raise ConfigurationError(
                    f"engine.{name}", "must be at least 1", getattr(self, name)
                )
        if self.max_queued < 0:
            raise ConfigurationError("engine.max_queued", "must be at least 0", self.max_queued)
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigurationError(
                "engine.max_num_batched_tokens",
                f"must be at least max_num_seqs ({self.max_num_seqs}): every decoding sequence "
                "adds a token to every step",
                self.max_num_batched_tokens,
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """What the engine holds, and, in the counts without `num_`, has done since its start."""

    num_running: int
    num_waiting: int
    num_blocks_used: int
    num_blocks: int
    num_state_slots_used: int
    num_state_slots: int
    prompt_tokens: int
    """Computed in prefills of prompts; not counting recomputation after a preemption."""
    generation_tokens: int
    preemptions: int
    steps: int
    step_s: float
    """Time in steps that ran the model."""
    dispatch_s: float
    """Time in which the model waited for experts."""


class Engine:
    """Continuous batching over one model."""

    def __init__(
        self,
        model: Model,
        config: EngineConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
        deliver: Deliver | None = None,
    ) -> None:
        """Allocate the caches; `start` begins to run.

        Args:
            model: Used by the engine thread only.
            config: Sizes.
            clock: Monotonic seconds; deadlines and timings are on it.
            deliver: Takes a step's outputs at once and must not raise; None calls each sink.
        """
        self.config = config
        self._model = model
        self._clock = clock
        self._deliver = deliver
        self._caches = model.allocate_caches(
            config.num_blocks, config.block_size, config.num_state_slots
        )
        self._blocks = BlockManager(config.num_blocks, config.block_size)
        self._state_slots = StatePool(config.num_state_slots)
        self._scheduler = Scheduler(
            blocks=self._blocks,
            state_slots=self._state_slots,
            rows=BatchRows(
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=config.max_num_batched_tokens,
                max_prompt_rows=config.max_prompt_rows,
                max_blocks=self._blocks.blocks_for(config.max_model_len),
                block_size=config.block_size,
            ),
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_prompt_rows=config.max_prompt_rows,
        )
        self._outputs: list[tuple[Sink, StepOutput]] = []
        self._next_deadline = float("inf")
        self._last_finish_s: float | None = None
        self._finish_interval_s = 1.0
        self._prompt_tokens = self._generation_tokens = self._steps = 0
        self._step_s = 0.0
        # Shared with the callers' threads, under the lock:
        self._wake = threading.Condition()
        self._live: dict[str, list[Sequence]] = {}
        self._inbox: list[Sequence] = []
        self._cancelled: list[Sequence] = []
        self._num_submitted = 0
        self._is_draining = self._is_stopped = False
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
        self._check(request, prompt)
        count = request.sampling.n
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
            )
            for index in range(count)
        ]
        with self._wake:
            if self._is_stopped:
                raise EngineStoppedError()
            if self._is_draining:
                raise DrainingError()
            if request.request_id in self._live:
                raise DuplicateRequestError(request.request_id)
            ahead = len(self._scheduler.waiting) + len(self._inbox)
            places = max(0, config.max_num_seqs - self._scheduler.num_running)
            if ahead + count > config.max_queued + places:
                raise QueueFullError(ahead, config.max_queued, self._finish_interval_s)
            for sequence in sequences:
                sequence.arrival = self._num_submitted
                self._num_submitted += 1
            self._live[request.request_id] = sequences
            self._inbox += sequences
            self._wake.notify()
        return ahead

    def cancel(self, request: str | EngineRequest, reason: str = "") -> bool:
        """End a live request: its sequences' last outputs come within one step.

        Args:
            request: Its id, or what was submitted: then no other request of the same id is hit.
            reason: For the log.

        Returns:
            Whether the request was live.
        """
        request_id = request if isinstance(request, str) else request.request_id
        with self._wake:
            sequences = self._live.get(request_id)
            if not sequences:
                return False
            if not isinstance(request, str) and sequences[0].request is not request:
                return False
            # The sequences, not the id: it may be free and taken again before the next step.
            self._cancelled += sequences
            self._wake.notify()
        logger.info("request.cancelled id=%s reason=%s", request_id, reason or "-")
        return True

    def drain(self) -> None:
        """Take no more requests; those that are live run to their end."""
        with self._wake:
            self._is_draining = True
            self._wake.notify()

    def stop(self, *, drain: bool = True, timeout_s: float | None = None) -> None:
        """Stop the engine thread and wait for it. Does nothing the second time.

        Args:
            drain: Let live requests end first.
            timeout_s: How long; after it they fail with `EngineStoppedError`, as without `drain`.
        """
        self.drain()
        if drain and self._thread is not None:
            self._thread.join(timeout_s)
        with self._wake:
            self._is_stopped = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()
        else:
            self._abandon(EngineStoppedError())

    @property
    def num_live(self) -> int:
        """Requests that have not ended; exact at any moment, unlike `stats`."""
        with self._wake:
            return len(self._live)

    def stats(self) -> EngineStats:
        """Return a snapshot; numbers of a step that is under way may be half there."""
        scheduler = self._scheduler
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=len(scheduler.waiting) + len(self._inbox),
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
        )

    def _check(self, request: EngineRequest, prompt: np.ndarray[Any, np.dtype[np.int64]]) -> None:
        config = self.config
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
            ("resume_tokens.ids", *_ends(request.forced_ids)),
            ("sampling.logit_bias", *_ends(request.sampling.logit_bias)),
            ("stopping.stop_token_ids", *_ends(request.stopping.stop_token_ids)),
        ):
            if low < 0 or high >= config.vocab_size:
                raise InvalidFieldError(field, vocab, low if low < 0 else high)
        most = config.max_num_seqs + config.max_queued
        if not 1 <= request.sampling.n <= most:
            raise InvalidFieldError("sampling.n", f"must be in [1, {most}]", request.sampling.n)
        most_tokens = config.max_model_len if max_tokens is None else len(prompt) + max_tokens
        need = self._blocks.blocks_for(most_tokens - 1)
        if need > config.num_blocks:
            raise ResourceError(
                "KV blocks",
                str(need),
                str(config.num_blocks),
                f"{most_tokens} tokens at {config.block_size} a block: lower max_tokens "
                "or give the engine more blocks",
            )

    # The engine thread.

    def _run(self) -> None:
        """Step until stopped. An unexpected error ends the engine, and every request with it."""
        logger.info("engine.started num_blocks=%d", self.config.num_blocks)
        reason: ExpertMeshError = EngineStoppedError()
        try:
            while self._await_work():
                self.step()
        except Exception as error:
            logger.exception("engine.failed")
            reason = InternalError(f"the engine failed: {type(error).__name__}: {error}")
        self._abandon(reason)
        logger.info("engine.stopped steps=%d", self._steps)

    def _await_work(self) -> bool:
        """Sleep until there is something to do; return False when the engine is to end."""
        if self._scheduler.has_work and not self._is_stopped:
            return True
        with self._wake:
            while not (self._is_stopped or self._live):
                if self._is_draining:
                    return False
                self._wake.wait()
            return not self._is_stopped

    def step(self) -> bool:
        """Do one step. Tests without a thread call this; otherwise only the engine thread does.

        Returns:
            Whether the model ran.
        """
        begin = self._clock()
        if self._inbox or self._cancelled:
            self._take_calls(begin)
        if begin >= self._next_deadline:
            self._expire(begin)
        chunks = self._scheduler.schedule(begin)
        has_batch = bool(chunks or self._scheduler.rows.sequences)
        if has_batch:
            self._compute(chunks)
            self._steps += 1
            self._step_s += self._clock() - begin
        if self._outputs:
            self._hand_out()
        return has_batch

    def _take_calls(self, now: float) -> None:
        with self._wake:
            submitted, self._inbox = self._inbox, []
            cancelled, self._cancelled = self._cancelled, []
            # Under the lock, so that a submitted sequence is always in the inbox or in the queue.
            for sequence in submitted:
                self._scheduler.add(sequence)
                if sequence.request.deadline is not None:
                    self._next_deadline = min(self._next_deadline, sequence.request.deadline)
        for sequence in cancelled:
            if not sequence.is_finished:
                self._finish(sequence, self._output(sequence), FinishReason.CANCELLED, now)

    def _expire(self, now: float) -> None:
        """End the sequences whose deadline has passed and find the next deadline."""
        self._next_deadline = float("inf")
        with self._wake:
            sequences = [s for live in self._live.values() for s in live]
        for sequence in sequences:
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
        rows = self._scheduler.rows
        built = rows.build(chunks)
        try:
            with torch.inference_mode():
                logits = self._model.forward(built.batch, self._caches)
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
            self._draw(built.sampled, logits)

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
            self._prompt_tokens += progress.tokens_done - before
            output = self._output(sequence)
            output.prefill = progress
            self._outputs.append((sequence.sink, output))

    def _draw(self, sampled: list[Sequence], logits: Tensor) -> None:
        """Draw a token for each sequence, one a row of the logits, and move the sequences on."""
        scheduler = self._scheduler
        samples = sample(logits, [sequence.sampler for sequence in sampled])
        now = self._clock()
        scheduler.rows.advance(samples.token_ids)
        failed = samples.failed_rows
        logprobs = samples.logprobs
        outputs = self._outputs
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
                self._prompt_tokens += sequence.prompt_reported - before
            try:
                reason = sequence.append(token_id, now)
            except Exception as error:  # the stop checker is the caller's code
                logger.exception("stop_checker.failed id=%s", sequence.request_id)
                detail = f"the stop checker failed: {type(error).__name__}: {error}"
                self._fail(sequence, InternalError(detail, sequence.request_id), now)
                continue
            self._generation_tokens += 1
            if reason is not None:
                if reason is FinishReason.STOP and token_id in sequence.stop_ids:
                    output.stop_token_id = token_id
                self._finish(sequence, output, reason, now)
                continue
            outputs.append((sequence.sink, output))
            if not is_decoding:
                scheduler.end_prefill(sequence)

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
        self._scheduler.finish(sequence)
        output.finish_reason = reason
        output.timings = sequence.timings(now)
        self._outputs.append((sequence.sink, output))
        if self._last_finish_s is not None:
            # A running mean: a place in the queue is likely free after about this long.
            interval_s = 0.8 * self._finish_interval_s + 0.2 * (now - self._last_finish_s)
            self._finish_interval_s = min(max(interval_s, 0.1), 30.0)
        self._last_finish_s = now
        with self._wake:
            live = self._live[sequence.request_id]
            live.remove(sequence)
            if not live:
                del self._live[sequence.request_id]

    def _hand_out(self) -> None:
        outputs, self._outputs = self._outputs, []
        if self._deliver is not None:
            self._deliver(outputs)
            return
        for sink, output in outputs:
            try:
                sink(output)
            except Exception:  # the sink is the caller's code: only its own request ends
                logger.exception("sink.failed id=%s", output.request_id)
                self.cancel(output.request_id, "its sink failed")

    def _abandon(self, error: ExpertMeshError) -> None:
        """End everything that is live, and take nothing more."""
        with self._wake:
            self._is_stopped = True
        now = self._clock()
        self._take_calls(now)
        with self._wake:
            sequences = [s for live in self._live.values() for s in live]
        for sequence in sequences:
            self._fail(sequence, error, now)
        self._hand_out()


def _ends(ids: Any) -> tuple[int, int]:
    """Return the least and the greatest of some token ids; 0 and 0 where there are none."""
    return (min(ids), max(ids)) if ids else (0, 0)
