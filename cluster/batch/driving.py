"""Drives one batch under a lease: one driver after the other until the batch has ended.

A driver that dies, or fails by a fault that may pass, is started again after 1, 2, 4, ...
`MAX_BACKOFF_S` seconds, from the beginning once rows were committed. The batch fails where another
driver would only fail again: by a typed error of the batch itself, or after `MAX_IDLE` drivers in a
row that committed nothing, unless what they lacked was the service.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

import grpc

from cluster.batch.driver_process import DriverProcess, Ended
from cluster.batch.status import mark_cancelled
from protos.errors import (
    BatchFailuresError,
    BatchFencedError,
    BatchNotFoundError,
    ExpertMeshError,
    InternalError,
    RequestError,
    ServiceUnavailableError,
    SetupError,
    StateUnavailableError,
    UnreachableError,
)
from protos.v1 import batch_pb2
from router.state.batch_records import BatchLease, BatchProgress, BatchRecord, BatchState
from router.state.batches import BatchStore

log = logging.getLogger(__name__)

BEAT_S = 1.0
"""Between two writes of how far a batch is; each renews the lease."""
FIRST_BACKOFF_S = 1.0
MAX_BACKOFF_S = 30.0
MAX_IDLE = 6
NO_ERROR = b""


class BatchDrive:
    """One batch that this process drives.

    Args:
        store: Where its record is.
        record: As it was when the lease was taken.
        lease: Ours.
        make_job: Returns what a driver is told; asked before each start.
    """

    def __init__(
        self,
        store: BatchStore,
        record: BatchRecord,
        lease: BatchLease,
        make_job: Callable[[BatchRecord], bytes],
    ) -> None:
        self._store = store
        self._record = record
        self._lease = lease
        self._make_job = make_job
        self._state = record.state
        self._progress = record.progress
        self._starts = record.starts

    @property
    def progress(self) -> BatchProgress:
        """How far the batch is."""
        return self._progress

    @property
    def starts(self) -> int:
        """Of its drivers, those of earlier leases included."""
        return self._starts

    @property
    def state(self) -> BatchState:
        """As this process left it, or read it last."""
        return self._state

    async def run(self) -> None:
        """Drive the batch until it has ended, or is not ours any more."""
        name = self._record.name
        log.info("batch_taken batch=%s epoch=%d", name, self._lease.epoch)
        try:
            await self._drive()
        except (BatchFencedError, BatchNotFoundError) as error:
            log.warning("batch_lost batch=%s why=%s", name, error.message)
        finally:
            with contextlib.suppress(StateUnavailableError):
                await self._store.release(self._lease)

    async def _drive(self) -> None:
        idle = 0
        while True:
            done = self._progress.rows_done
            if self._state is BatchState.CANCELLING:
                await self._end(BatchState.CANCELLED)
                return
            try:
                ended = await self._run_driver()
            except (RequestError, SetupError) as error:  # there is no job to be told
                if isinstance(error, BatchFencedError | BatchNotFoundError):
                    raise
                ended = Ended("failed", error)
            except ServiceUnavailableError as error:
                ended = Ended("failed", error)
            idle = 0 if self._progress.rows_done > done else idle + 1
            if await self._take_end(ended, idle):
                return
            await self._pause(min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** min(idle, 16)))

    async def _run_driver(self) -> Ended:
        """Run a driver to its end."""
        driver = await DriverProcess.start(self._make_job(self._record), self._progress)
        reading = asyncio.create_task(driver.read())
        self._starts += 1
        log.info("batch_driver_started batch=%s pid=%d", self._record.name, driver.pid)
        try:
            while not reading.done():
                await self._beat(driver.phase)
                if self._state is BatchState.CANCELLING:
                    break
                await asyncio.wait([reading], timeout=BEAT_S)
                self._progress = driver.progress
            if not reading.done():
                await driver.close()
            ended = await reading
            self._progress = driver.progress
            return ended
        finally:
            await driver.close()
            reading.cancel()

    async def _take_end(self, ended: Ended, idle: int) -> bool:
        """Write what the end of a driver means; return whether it is the batch's, too."""
        error = ended.error
        if error is not None:
            log.warning("batch_driver_ended batch=%s why=%s", self._record.name, error.message)
        if ended.how == "completed":
            return await self._end(BatchState.COMPLETED)
        if ended.how == "cancelled" or self._state is BatchState.CANCELLING:
            return await self._end(BatchState.CANCELLED)
        if ended.how == "stopped":
            progress = self._progress
            options = batch_pb2.BatchOptions.FromString(self._record.options)
            rate = options.max_failure_rate
            return await self._end(
                BatchState.FAILED,
                BatchFailuresError(progress.rows_failed, progress.rows_total, rate),
            )
        is_away = error is not None and (
            error.code == grpc.StatusCode.UNAVAILABLE
            or isinstance(error, ServiceUnavailableError | UnreachableError)
        )
        is_final = isinstance(error, RequestError | SetupError) and not is_away
        if is_final or (idle >= MAX_IDLE and not is_away):
            return await self._end(BatchState.FAILED, error)
        await self._beat(None, error)
        return False

    async def _end(self, state: BatchState, error: ExpertMeshError | None = None) -> bool:
        """Write the batch's end, however long the store is away."""
        if state is BatchState.CANCELLED:
            try:
                await asyncio.to_thread(mark_cancelled, self._record.output_uri)
            except (OSError, ExpertMeshError) as why:  # the folder is for people; the record counts
                log.warning("batch_folder_not_marked batch=%s why=%s", self._record.name, why)
        if state is BatchState.FAILED and error is None:
            error = InternalError("the batch's driver failed")
        payload = error.to_status().SerializeToString() if error else NO_ERROR
        while True:
            try:
                await self._store.update(
                    self._lease, state, self._progress, error=payload, starts=self._starts
                )
            except StateUnavailableError as away:
                log.warning("batch_not_written batch=%s why=%s", self._record.name, away.message)
                await asyncio.sleep(BEAT_S)
            else:
                log.info("batch_ended batch=%s state=%s", self._record.name, state)
                self._state = state
                return True

    async def _beat(self, phase: BatchState | None, error: ExpertMeshError | None = None) -> None:
        """Write how far the batch is, and learn whether it is to be cancelled.

        Raises:
            BatchFencedError: It is not ours any more.
        """
        payload = None if error is None else error.to_status().SerializeToString()
        try:
            self._state = await self._store.update(
                self._lease, phase, self._progress, error=payload, starts=self._starts
            )
        except StateUnavailableError as away:  # the driver goes on; a lost lease shows later
            log.warning("batch_not_written batch=%s why=%s", self._record.name, away.message)

    async def _pause(self, pause_s: float) -> None:
        """Wait, keep the lease, and hear a cancel."""
        loop = asyncio.get_running_loop()
        until = loop.time() + pause_s
        while (left_s := until - loop.time()) > 0 and self._state is not BatchState.CANCELLING:
            await asyncio.sleep(min(BEAT_S, left_s))
            await self._beat(None)
