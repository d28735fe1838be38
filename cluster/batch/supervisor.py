"""Runs the batches that clients have submitted, in the process of `serve`.

Looks every second for batches of its model that have not ended, takes a lease on the oldest ones,
`max_running` at a time, and drives each (`cluster.batch.driving`). Everything that matters is in
the batches' records and output folders: where this process dies, the next one goes on. Lives in a
thread with an event loop of its own; the thread that calls Ray never waits for it.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from cluster.autoscale_batches import BatchWork
from cluster.batch.driving import BatchDrive
from cluster.batch.figures import SETTING, BatchFigures, BatchTally, batch_metrics_text
from cluster.batch.job import job_line, options_of
from cluster.config import BatchSection
from cluster.metrics import MetricsServer
from cluster.security import Security
from protos.errors import InvalidFieldError, NotReadyError, StateUnavailableError, Violation
from router.gateway.batch_roots import BatchRoots
from router.state.batch_records import BatchRecord
from router.state.batches import BatchStore, Records
from router.state.endpoint import Endpoint

log = logging.getLogger(__name__)

LOOK_S = 1.0
CLOSE_TIMEOUT_S = 20.0
"""How long the drivers get to end with `serve`; they end by themselves soon after."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSite:
    """Where batches run."""

    model: str
    """That clients use."""
    section: BatchSection
    security: Security
    meta: Endpoint
    """The server of sessions, which has the batches' records."""
    ray_address: str
    routers: Callable[[], Mapping[str, str]]
    """Returns router_id -> gRPC address; any thread may call."""
    holder: str
    """Name of this process in leases."""
    metrics_host: str = "127.0.0.1"
    """Address of the port of Prometheus metrics, where there is one."""

    def job(self, record: BatchRecord) -> bytes:
        """Return what a driver of a batch is told.

        Raises:
            InvalidFieldError: Its files lie outside of the roots as they are now.
            UnauthenticatedError: Its tenant has no key any more.
            NotReadyError: No router is up.
        """
        roots = BatchRoots(self.section.roots)
        places = {"input_uri": record.input_uri, "output_uri": record.output_uri}
        found: list[Violation | None] = [
            roots.violation(name, uri, record.tenant) for name, uri in places.items()
        ]
        if wrong := [violation for violation in found if violation is not None]:
            raise InvalidFieldError(violations=wrong)
        addresses = list(self.routers().values())
        if not addresses:
            raise NotReadyError("no router is up")
        access = self.security.as_tenant(record.tenant)
        return job_line(options_of(record, addresses, access, self.ray_address))


@dataclass(slots=True)
class BatchSupervisor:
    """Drives batches from `start` to `close`."""

    site: BatchSite
    figures: BatchFigures = field(default_factory=BatchFigures)
    """As of the last look; any thread may read."""
    _stopped: asyncio.Event = field(default_factory=asyncio.Event)
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)
    _driven: dict[tuple[str, str], _Driven] = field(default_factory=dict)
    _tally: BatchTally = field(default_factory=BatchTally)
    _metrics: MetricsServer | None = None
    _thread: threading.Thread | None = None

    @property
    def work(self) -> BatchWork | None:
        """What is left to do in all batches; None: there is none."""
        return self.figures.work

    @property
    def metrics_port(self) -> int | None:
        """Of Prometheus metrics; None: there is none."""
        return self._metrics.port if self._metrics is not None else None

    def start(self) -> None:
        """Begin to look for batches.

        Raises:
            ConfigurationError: The port of metrics is taken.
        """
        port = self.site.section.metrics_port
        if port is not None:
            self._metrics = MetricsServer(
                self.site.metrics_host,
                port,
                lambda: batch_metrics_text(self.figures, self.site.model),
                SETTING,
            )
        self._thread = threading.Thread(target=self._main, name="batches", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the drivers and give the batches back: the next `serve` goes on with them at once."""
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
        if self._thread is None or not self._thread.is_alive():
            return
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join(CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            log.warning("batches_left_behind count=%d", len(self._driven))

    def _main(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._run())
        finally:
            self._loop.close()

    async def _run(self) -> None:
        store = BatchStore.connect(self.site.meta)
        try:
            while not self._stopped.is_set():
                try:
                    await self._look(store)
                except StateUnavailableError as error:
                    log.warning("batches_not_seen why=%s", error.message)
                except Exception:  # outermost loop: one bad record is no reason to stop
                    log.exception("batches_look_failed")
                stop = asyncio.create_task(self._stopped.wait())
                await asyncio.wait(
                    [stop, *(driven.task for driven in self._driven.values())],
                    timeout=LOOK_S,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                stop.cancel()
        finally:
            tasks = [driven.task for driven in self._driven.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await store.close()

    async def _look(self, store: BatchStore) -> None:
        """Take note of what ended, and begin what may begin."""
        for key, driven in list(self._driven.items()):
            drive, task = driven.drive, driven.task
            self._tally.take(key, drive.progress, drive.starts)
            if task.done():
                del self._driven[key]
                self._tally.forget(key, drive.state)
                if not task.cancelled() and (error := task.exception()) is not None:
                    log.error("batch_drive_failed batch=%s", key[1], exc_info=error)
        waiting = await store.waiting(self.site.model)
        await self._begin(store, waiting)
        self.figures = self._tally.figures(waiting, len(self._driven))

    async def _begin(self, store: BatchStore, waiting: Records) -> None:
        """Take the oldest of the batches that wait, as many as may run."""
        for record in waiting:
            key = (record.tenant, record.name)
            if len(self._driven) >= self.site.section.max_running:
                return
            if key in self._driven:
                continue
            lease = await store.acquire(record, self.site.holder)
            if lease is not None:
                record = await store.get(*key)  # as the holder before left it
                drive = BatchDrive(store, record, lease, self.site.job)
                self._tally.take(key, drive.progress, drive.starts)
                self._driven[key] = _Driven(drive, asyncio.create_task(drive.run()))


@dataclass(frozen=True, slots=True)
class _Driven:
    """A batch that this process drives."""

    drive: BatchDrive
    task: asyncio.Task[None]
