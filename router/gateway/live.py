"""The generations that run in this process, each with the ways in which it can end.

A generation's handler is one task, and what ends it early is an error: a client that reads nothing
any more, a call that resumes the stream elsewhere, a lease that is lost. `LiveRequest.fail` brings
the error into the handler, wherever it waits. Everything here runs in the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Protocol

import grpc

from protos.errors import (
    ClientStalledError,
    DuplicateRequestError,
    ExpertMeshError,
    RequestCancelledError,
)
from protos.v1 import generation_pb2
from router.engine.request import EngineRequest, Sink

logger = logging.getLogger(__name__)

STALL_TIMEOUT_S = 60.0
"""A client that takes nothing from its connection for so long is given up."""
TAKEOVER_TIMEOUT_S = 5.0
"""How long a call that resumes a stream waits until the stream's first handler has ended."""

Context = grpc.aio.ServicerContext[Any, Any]
Key = tuple[str, str]
"""Tenant and request id."""


class EngineCalls(Protocol):
    """What the gateway needs of the engine; its sinks run in the event loop (`LoopDelivery`)."""

    def submit(self, request: EngineRequest, sink: Sink) -> int:
        """Queue a request; return how many wait before it."""
        ...

    def cancel(self, request: str | EngineRequest, reason: str = "") -> bool:
        """End a live request; return whether it was live.

        Given the object that was submitted, no other request of the same id is ever hit.
        """
        ...


class LiveRequest:
    """One generation and its handler.

    Attributes:
        key: Tenant and request id.
        engine_id: The engine's name of it. One that takes over has another one than the request:
            the engine may know the first until its next step.
        error: What is to end the handler, or has.
        is_ending: Set while the handler cleans up, which nothing may cut short.
        ended: Set when the handler has let go of everything.
    """

    __slots__ = (
        "_cancelled",
        "_context",
        "_engine",
        "_submitted",
        "_task",
        "ended",
        "engine_id",
        "error",
        "is_ending",
        "key",
        "request_id",
        "writing_since",
    )

    def __init__(
        self, key: Key, engine: EngineCalls, context: Context, *, takes_over: bool
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        tenant, request_id = key
        self.key = key
        self.request_id = request_id
        name = f"{request_id}@{tenant}" if tenant else request_id  # no request id has an @
        self.engine_id = f"{name}~{secrets.token_hex(4)}" if takes_over else name
        self.error: ExpertMeshError | None = None
        self.is_ending = False
        self.ended = asyncio.Event()
        self.writing_since: float | None = None
        self._engine = engine
        self._context = context
        self._task = task
        self._submitted: EngineRequest | None = None
        self._cancelled = False

    def submit(self, request: EngineRequest, sink: Sink) -> int:
        """Hand the request to the engine; see `Engine.submit`."""
        position = self._engine.submit(request, sink)
        self._submitted = request
        if self._cancelled:
            self._engine.cancel(request, "CancelRequests")
        return position

    def cancel(self, reason: str) -> bool:
        """End the generation as `CancelRequests` does; return whether it still runs."""
        if self._submitted is not None:
            return self._engine.cancel(self._submitted, reason)
        self._cancelled = True
        return True

    def release(self, reason: str) -> None:
        """End what the engine may still do for the generation; it has no reader any more."""
        if self._submitted is not None:
            self._engine.cancel(self._submitted, reason)

    def fail(self, error: ExpertMeshError) -> None:
        """End the handler with an error, unless another one has."""
        if self.error is None and not self.is_ending:
            self.error = error
            self._task.cancel()

    async def write(self, message: generation_pb2.GenerateResponse) -> None:
        """Send a message; `LiveRequests` watches how long the client lets it wait."""
        self.writing_since = asyncio.get_running_loop().time()
        await self._context.write(message)
        self.writing_since = None


class LiveRequests:
    """All generations of one router.

    Args:
        engine: Runs them.
        stall_timeout_s: See `STALL_TIMEOUT_S`.
    """

    def __init__(self, engine: EngineCalls, stall_timeout_s: float = STALL_TIMEOUT_S) -> None:
        self._engine = engine
        self._stall_timeout_s = stall_timeout_s
        self._live: dict[Key, LiveRequest] = {}
        self._is_watching = False

    def get(self, tenant: str, request_id: str) -> LiveRequest | None:
        """Return a running generation."""
        return self._live.get((tenant, request_id))

    @asynccontextmanager
    async def enter(
        self, tenant: str, request_id: str, context: Context, *, takes_over: bool
    ) -> AsyncIterator[LiveRequest]:
        """Be the generation of this id while the body runs.

        Args:
            tenant: Whose it is; other tenants' generations of the same id are others.
            request_id: Not empty.
            context: The call's.
            takes_over: The call resumes a stream: end the handler that still writes to the lost
                one, and wait until it has. Otherwise an id that is taken is an error.

        Raises:
            DuplicateRequestError: The id is taken.
            ExpertMeshError: What `LiveRequest.fail` got.
        """
        key = (tenant, request_id)
        before = self._live.get(key)
        if before is not None:
            if not takes_over:
                raise DuplicateRequestError(request_id)
            await self._end(before)
        live = LiveRequest(key, self._engine, context, takes_over=takes_over)
        self._live[key] = live
        self._watch()
        try:
            yield live
        except asyncio.CancelledError:
            if live.error is None:
                raise
            raise live.error from None
        finally:
            live.release("stream ended")
            del self._live[key]
            live.ended.set()

    async def _end(self, before: LiveRequest) -> None:
        before.fail(RequestCancelledError(before.request_id, "another call resumes its stream"))
        try:
            async with asyncio.timeout(TAKEOVER_TIMEOUT_S):
                await before.ended.wait()
        except TimeoutError:
            raise DuplicateRequestError(before.request_id) from None
        if before.key in self._live:  # two calls resume one stream: the first has it
            raise DuplicateRequestError(before.request_id)

    def _watch(self) -> None:
        """Look for stalled clients, as long as there are any."""
        if not self._is_watching:
            self._is_watching = True
            self._watch_later(self._check_stalls)

    def _watch_later(self, check: Callable[[], None]) -> None:
        asyncio.get_running_loop().call_later(self._stall_timeout_s / 4, check)

    def _check_stalls(self) -> None:
        if not self._live:
            self._is_watching = False
            return
        now = asyncio.get_running_loop().time()
        for live in list(self._live.values()):
            since = live.writing_since
            if since is not None and now - since > self._stall_timeout_s:
                logger.info("request.stalled id=%s stalled_s=%.1f", live.request_id, now - since)
                live.fail(ClientStalledError(self._stall_timeout_s))
        self._watch_later(self._check_stalls)
