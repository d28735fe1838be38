"""Runs the model, step after step, for all requests at once: its parts, its thread, its calls.

One thread owns everything below `submit`, `cancel`, `drain`, `stop` and `stats`, which any thread
may call; what that thread does in a step is in `router.engine.core`. An idle engine sleeps on a
condition variable.

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

import numpy as np

from protos.errors import (
    EngineStoppedError,
    ExpertMeshError,
    InternalError,
    QueueFullError,
)
from router.engine.batch_rows import BatchRows
from router.engine.block_manager import BlockManager
from router.engine.checks import check_request
from router.engine.cold_store import ColdTier
from router.engine.config import EngineConfig, EngineStats, ReuseStats
from router.engine.core import EngineCore
from router.engine.inbox import Inbox
from router.engine.model import Model
from router.engine.outbox import Deliver, Outbox
from router.engine.request import EngineRequest, Priority, Sink
from router.engine.restore import Restorer, reuse_of
from router.engine.scheduler import Scheduler
from router.engine.sequence import Sequence
from router.engine.spill import spill_of
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
        caches = model.allocate_caches(config.num_blocks, config.block_size, config.num_state_slots)
        self._blocks = BlockManager(config.num_blocks, config.block_size)
        self._state_slots = StatePool(config.num_state_slots)
        self._inbox = Inbox()
        post = self._inbox.post
        reuse = reuse_of(model, caches, self._blocks, config, tier, post)
        self._spill = spill_of(model, caches, self._blocks, config, cold_tier, reuse)
        restorer = None
        if tier is not None and reuse is not None:
            restorer = Restorer(tier, reuse, self._spill, config, post, clock)
        self._reuse = reuse
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
        self._core = EngineCore(
            model=model,
            caches=caches,
            scheduler=self._scheduler,
            inbox=self._inbox,
            outbox=self._outbox,
            reuse=reuse,
            restorer=restorer,
            clock=clock,
        )
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

    def sleep(self, on_request: Callable[[], None]) -> bool:
        """Run nothing until `wake`: there is nobody to compute experts.

        Requests are taken, and wait; they may be cancelled, and their deadlines hold.

        Args:
            on_request: Called for each request that comes meanwhile, by whoever submits it.

        Returns:
            False where a request is live, and so the engine goes on.
        """
        return self._inbox.sleep(on_request)

    def wake(self) -> None:
        """Run what has come meanwhile."""
        self._inbox.wake()

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
            self._core.abandon(EngineStoppedError())

    @property
    def num_live(self) -> int:
        """Requests that have not ended; exact at any moment, unlike `stats`."""
        return self._inbox.num_live

    def stats(self) -> EngineStats:
        """Return a snapshot; numbers of a step that is under way may be half there."""
        scheduler, core = self._scheduler, self._core
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting + self._inbox.num_submitted,
            is_asleep=self._inbox.is_asleep,
            num_queued_tokens=scheduler.num_queued_tokens,
            num_blocks_used=self._blocks.num_used,
            num_blocks=self._blocks.num_blocks,
            num_state_slots_used=self._state_slots.num_used,
            num_state_slots=self._state_slots.num_slots,
            prompt_tokens=core.prompt_tokens,
            generation_tokens=core.generation_tokens,
            preemptions=scheduler.num_preemptions,
            steps=core.steps,
            step_s=core.step_s,
            dispatch_s=float(getattr(self._model, "dispatch_s", 0.0)),
            num_cold_bytes=0 if self._spill is None else self._spill.num_cold_bytes,
            spilled_blocks=0 if self._spill is None else self._spill.num_spilled_blocks,
            latency=core.latencies.stats(),
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

    def step(self) -> bool:
        """Do one step, of an engine that was not started; return whether the model ran."""
        return self._core.step()

    def _run(self) -> None:
        """Step until stopped. An unexpected error ends the engine, and every request with it."""
        logger.info("engine.started num_blocks=%d", self.config.num_blocks)
        reason: ExpertMeshError = EngineStoppedError()
        core = self._core
        try:
            did_run = True
            while core.await_work(did_run):
                did_run = core.step()
        except Exception as error:
            logger.exception("engine.failed")
            reason = InternalError(f"the engine failed: {type(error).__name__}: {error}")
        core.abandon(reason)
        logger.info("engine.stopped steps=%d", core.steps)
