"""A driver as the process that started it sees it: what it has said, and how it ended."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cluster.batch.job import error_in
from protos.errors import ExpertMeshError, InternalError
from router.state.batch_records import BatchProgress, BatchState

log = logging.getLogger(__name__)

STOP_S = 10.0
"""How long a driver gets between SIGTERM and SIGKILL."""
MAX_LINE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Ended:
    """How a driver ended."""

    how: str
    """completed, stopped, cancelled, interrupted or failed; or `died`: it said nothing."""
    error: ExpertMeshError | None = None
    """Of failed and died ones."""


class DriverProcess:
    """One driver.

    Args:
        process: That `start` made.
        progress: Of the drivers before it.
        clock: Seconds since 1970.
    """

    def __init__(
        self,
        process: Process,
        progress: BatchProgress,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._process = process
        self._clock = clock
        self._end: Ended | None = None
        self.progress = progress
        self.phase: BatchState | None = None
        """None: it has not begun with the rows."""

    @classmethod
    async def start(cls, job: bytes, progress: BatchProgress) -> DriverProcess:
        """Start a driver, in a session of its own: a Ctrl-C at `serve` is not meant for it.

        Args:
            job: Of `cluster.batch.job.job_line`.
            progress: Of the drivers before it.
        """
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "cluster.batch.driver"),
            stdin=PIPE,
            stdout=PIPE,
            start_new_session=True,
            limit=MAX_LINE_BYTES,
        )
        assert process.stdin is not None
        with contextlib.suppress(ConnectionError):  # it has died: `read` says so
            process.stdin.write(job)
            await process.stdin.drain()
        return cls(process, progress)

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    async def read(self) -> Ended:
        """Take what the driver says until it ends."""
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            try:
                said = json.loads(line)
            except ValueError:  # killed in the middle of a line
                break
            if "end" in said:
                self._take_end(said)
            else:
                self._take(said)
        code = await self._process.wait()
        if self._end is None:
            how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
            self._end = Ended("died", InternalError(f"the batch's driver ended {how}"))
        return self._end

    def stop(self) -> None:
        """Ask it to end; rows that are not committed are asked again by the next."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()

    async def close(self) -> None:
        """End it, well or not, and wait for that."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        if self._process.returncode is None:
            self.stop()
            try:
                async with asyncio.timeout(STOP_S):
                    await self._process.wait()
            except TimeoutError:
                log.warning("batch_driver_killed pid=%d", self.pid)
                with contextlib.suppress(ProcessLookupError):
                    self._process.kill()
                await self._process.wait()

    def _take(self, said: dict[str, Any]) -> None:
        """Take the numbers of a line; see `Meter.document`."""
        eta_s = said["eta_s"]
        self.phase = BatchState(said["phase"])
        self.progress = BatchProgress(
            rows_total=said["total"],
            rows_done=said["rows"],
            rows_failed=said["failed"],
            prompt_tokens=said["prompt_tokens"],
            completion_tokens=said["completion_tokens"],
            tokens_per_s=said["tokens_per_s"] or 0.0,
            eta_ms=0 if eta_s is None else round(1000 * (self._clock() + eta_s)),
        )

    def _take_end(self, said: dict[str, Any]) -> None:
        self._end = Ended(said["end"], error_in(said))
        counts = said["counts"]
        if said["end"] == "completed" and not self.progress.rows_total:
            # Somebody else had finished it: it never began with the rows.
            self.progress = BatchProgress(
                rows_total=counts["rows"],
                rows_done=counts["rows"],
                rows_failed=counts["failed"],
                prompt_tokens=counts["prompt_tokens"],
                completion_tokens=counts["completion_tokens"],
            )
