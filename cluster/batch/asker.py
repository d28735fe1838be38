"""Asks the routers for rows, a bounded number at a time, and decides what a failure means.

- The row's own fault (a field, the context window, an unknown model): an error row, at once.
- A fault on the way (an expert group's computation, a deadline): again, `max_retries` times.
- The service's state (no router answers, a full queue, a group that is gone): wait, as long as
  RetryInfo says, and ask again. Where nothing was answered for `give_up_s`, the batch ends and can
  be resumed; a row that fails so `MAX_LONE_FAILURES` times while others are answered is refused:
  it may be what kills the routers.

A stream that breaks is resumed on another router by the client library, token by token. Routers
that come while the batch runs are asked, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from dataclasses import dataclass
from enum import Enum

import grpc

from cluster.batch.outcomes import Outcome, answered, refused
from cluster.batch.rows import Row
from protos.async_client import AsyncClient
from protos.errors import (
    DeadlineExceededError,
    ExpertMeshError,
    QueueFullError,
    RequestCancelledError,
    RequestError,
    Retry,
    ServiceUnavailableError,
    UnauthenticatedError,
)
from protos.events import Completion, FinishReason, events_of
from protos.retry import ClientConfig
from protos.tls import Access
from protos.v1 import generation_pb2

log = logging.getLogger(__name__)

READY = "READY"
TLS_SCHEME = "grpcs://"
FIRST_BACKOFF_S = 0.2
MAX_BACKOFF_S = 5.0
MAX_LONE_FAILURES = 10
LOOK_S = 10.0
"""Between two looks for routers that have come."""


class Fault(Enum):
    """Whose fault a failure is."""

    ROW = "row"
    WAY = "way"
    SERVICE = "service"
    BATCH = "batch"
    """Every row would fail with it: the batch ends."""


def fault_of(error: ExpertMeshError) -> Fault:
    """Return whose fault an error is."""
    if isinstance(error, UnauthenticatedError):
        return Fault.BATCH
    is_unavailable = error.code == grpc.StatusCode.UNAVAILABLE
    if is_unavailable or isinstance(error, ServiceUnavailableError):
        return Fault.SERVICE
    if isinstance(error, DeadlineExceededError) or error.retry is not Retry.NEVER:
        return Fault.WAY
    return Fault.ROW if isinstance(error, RequestError) else Fault.WAY


@dataclass(frozen=True, slots=True, kw_only=True)
class AskerSettings:
    """How to ask."""

    addresses: tuple[str, ...]
    """Of the routers."""
    access: Access
    model: str
    """Name in the answers."""
    concurrency: int
    """Most rows at a time."""
    max_retries: int = 3
    """Further tries of a row after faults on the way."""
    row_timeout_s: float = 3600.0
    """Of one try of a row."""
    give_up_s: float = 600.0
    """How long no row may be answered before the batch ends."""


class Asker:
    """The connections to the routers; make and use it inside the event loop."""

    def __init__(self, settings: AskerSettings) -> None:
        self._settings = settings
        self._seats = asyncio.Semaphore(settings.concurrency)
        addresses = list(settings.addresses)
        # One client per router; each knows the others, for when its own dies.
        self._clients = {
            address: _client(addresses[i:] + addresses[:i], settings)
            for i, address in enumerate(addresses)
        }
        self._load = dict.fromkeys(addresses, 0)
        self._heard_at = time.monotonic()
        self._looking = asyncio.create_task(self._look_for_routers())

    async def ask(self, row: Row) -> Outcome:
        """Return what became of a row.

        Raises:
            ExpertMeshError: The service is not there any more, or refuses every row.
        """
        async with self._seats:
            failures = _Failures(self._settings, time.monotonic())
            while True:
                try:
                    outcome = await self._try(row)
                except ExpertMeshError as error:
                    if failures.is_last(error, time.monotonic(), self._heard_at):
                        return refused(row.number, row.custom_id, error)
                    await asyncio.sleep(failures.wait_s(error))
                else:
                    self._heard_at = time.monotonic()
                    return outcome

    async def _try(self, row: Row) -> Outcome:
        address = min(self._load, key=self._load.__getitem__)
        request = generation_pb2.GenerateRequest()
        request.CopyFrom(row.request)  # a try gets an id of its own
        completion = Completion()
        self._load[address] += 1
        try:
            async for message in self._clients[address].messages(request):
                for event in events_of(message):
                    completion.add(event)
        finally:
            self._load[address] -= 1
        if any(c.finish_reason is FinishReason.CANCELLED for c in completion.choices):
            raise RequestCancelledError(detail="somebody cancelled the row")
        return answered(row, completion, self._settings.model)

    async def look(self) -> None:
        """Take note of the routers that there are; one that left stays known, and costs a try.

        Raises:
            ExpertMeshError: None of them answers.
        """
        known = list(self._clients)
        scheme = TLS_SCHEME if known[0].startswith(TLS_SCHEME) else ""
        status = await self._clients[min(self._load, key=self._load.__getitem__)].status()
        for router in status.routers:
            address = scheme + router.grpc_address
            if router.state == READY and router.grpc_address and address not in self._clients:
                self._clients[address] = _client([address, *known], self._settings)
                self._load[address] = 0
                log.info("batch_router_found address=%s", address)

    async def _look_for_routers(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            with contextlib.suppress(ExpertMeshError):  # rows say it, if it lasts
                await self.look()

    async def close(self) -> None:
        """Close the connections."""
        self._looking.cancel()
        for client in self._clients.values():
            await client.close()


class _Failures:
    """Of one row.

    Args:
        settings: How patient.
        now: Monotonic seconds.
    """

    def __init__(self, settings: AskerSettings, now: float) -> None:
        self._settings = settings
        self._failed_at = now
        self._begun = now
        self._num_on_the_way = self._num_lone = self._num = 0

    def is_last(self, error: ExpertMeshError, now: float, heard_at: float) -> bool:
        """Note a failure; return whether the row is given up.

        Args:
            error: What failed.
            now: Monotonic seconds.
            heard_at: When any row was last answered.

        Raises:
            ExpertMeshError: `error`, where it ends the batch.
        """
        fault = fault_of(error)
        is_gone = now - max(self._begun, heard_at) > self._settings.give_up_s
        if fault is Fault.BATCH or (fault is Fault.SERVICE and is_gone):
            raise error
        self._num += 1
        self._num_on_the_way += fault is Fault.WAY
        is_full = isinstance(error, QueueFullError)
        self._num_lone += fault is Fault.SERVICE and not is_full and heard_at > self._failed_at
        self._failed_at = now
        return (
            fault is Fault.ROW
            or self._num_on_the_way > self._settings.max_retries
            or self._num_lone >= MAX_LONE_FAILURES
        )

    def wait_s(self, error: ExpertMeshError) -> float:
        """Return how long to wait before the next try."""
        grown = min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** min(self._num - 1, 16))
        backoff_s: float = grown * random.uniform(0.75, 1.25)
        return max(backoff_s, error.retry_after_s or 0.0)


def _client(addresses: list[str], settings: AskerSettings) -> AsyncClient:
    config = ClientConfig(timeout_s=settings.row_timeout_s, max_attempts=3)
    access = settings.access
    return AsyncClient(addresses, config, tls=access.tls, api_key=access.api_key)
