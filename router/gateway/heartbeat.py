"""Tells the other routers how this one is, every few seconds, and knows how they are.

A heartbeat is one small hash in Redis that lives 10 s (`router.state.directory`). Without Redis
there are no views, and every router serves what comes to it. Runs in the gateway's event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from protos.errors import StateUnavailableError
from router.gateway.routing import PeerView, RouterLoad, unpack_warm
from router.state.session_records import EngineRecord

logger = logging.getLogger(__name__)

INTERVAL_S = 2.0
MAX_AGE_S = 10.0
"""After this long without an answer from Redis the others' views are forgotten."""


class Directory(Protocol):
    """Where heartbeats are; `SessionStore` has it."""

    async def heartbeat(self, engine: EngineRecord) -> None:
        """Publish a router for 10 s."""
        ...

    async def engines(self) -> list[EngineRecord]:
        """Return the routers that did lately."""
        ...


class Heartbeat:
    """This router's heartbeat and the views of the others.

    Args:
        directory: Where heartbeats are.
        own: Makes this router's view, as it is now; its id is unique among all services that share
            the directory.
        boot: Of this process.
        namespace: Of the cached values; a router of another one is no use to us.
        service: What the ids of all routers of this service end in; those of others may not be
            reachable from here.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        directory: Directory,
        own: Callable[[], PeerView],
        *,
        boot: str,
        namespace: str,
        service: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._directory = directory
        self._own = own
        self._boot = boot
        self._namespace = namespace
        self._service = service
        self._clock = clock
        self._others: tuple[PeerView, ...] = ()
        self._heard_at = -MAX_AGE_S

    def others(self) -> Sequence[PeerView]:
        """Return the views of the other routers; the same objects until the next heartbeat."""
        return self._others if self._clock() - self._heard_at < MAX_AGE_S else ()

    async def run(self) -> None:
        """Beat until cancelled."""
        while True:
            try:
                await self.beat()
            except StateUnavailableError as error:
                logger.info("heartbeat.failed why=%s", error)
            await asyncio.sleep(INTERVAL_S)

    async def beat(self) -> None:
        """Publish this router and read the others, once.

        Raises:
            StateUnavailableError: Redis does not answer.
        """
        own = self._own()
        await self._directory.heartbeat(
            EngineRecord(
                engine=own.router_id,
                boot=self._boot,
                address=own.address,
                namespace=self._namespace,
                load=float(own.load.queued_tokens),
                warm=own.load.pack() + b"".join(own.warm),
            )
        )
        engines = await self._directory.engines()
        self._others = tuple(
            _view(engine)
            for engine in engines
            if engine.engine != own.router_id
            and engine.namespace == self._namespace
            and engine.engine.endswith(self._service)
            and len(engine.warm) >= RouterLoad.PACKED_BYTES
        )
        self._heard_at = self._clock()


def _view(engine: EngineRecord) -> PeerView:
    return PeerView(
        router_id=engine.engine,
        address=engine.address,
        load=RouterLoad.unpack(engine.warm[: RouterLoad.PACKED_BYTES]),
        warm=unpack_warm(engine.warm[RouterLoad.PACKED_BYTES :]),
    )
