"""The leases of sessions, as one router's turns take and give them back.

A session that is let go of behind its call is still this router's until that is done: `settle`
waits for it, so that the session's next turn does not meet its own router.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from protos.errors import ExpertMeshError, SessionBusyError, StateUnavailableError
from router.state.session_records import Lease
from router.state.sessions import SessionStore

logger = logging.getLogger(__name__)

NEWS_PAUSE_S = 0.05
SETTLE_TIMEOUT_S = 5.0
"""How long a turn waits until this router has given back the lease of the turn before."""

SessionKey = tuple[str, str]
"""Tenant and session id."""


class SessionLeases:
    """Takes and gives back leases; everything runs in the event loop.

    Args:
        store: Holds them.
        clock: The store's.
    """

    def __init__(self, store: SessionStore, clock: Callable[[], float]) -> None:
        self._store = store
        self._clock = clock
        self._closing: dict[SessionKey, asyncio.Task[None]] = {}

    async def acquire(self, key: SessionKey, wait_s: float = 0.0) -> Lease:
        """Take the lease, held by another for `wait_s` at most.

        Raises:
            SessionBusyError: Another still has it.
            SessionNotFoundError: There is no such session.
            StateUnavailableError: The store does not answer.
        """
        until = self._clock() + wait_s
        while True:
            try:
                return await self._acquire_now(key)
            except SessionBusyError:
                if self._clock() + NEWS_PAUSE_S > until:
                    raise
            await asyncio.sleep(NEWS_PAUSE_S)

    async def _acquire_now(self, key: SessionKey) -> Lease:
        """Take the lease; a client that is lost meanwhile does not leave it behind."""
        task = asyncio.ensure_future(self._store.acquire(*key))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            self.close_behind(key, self._give_back(task))
            raise

    async def _give_back(self, acquiring: asyncio.Future[Lease]) -> None:
        try:
            await self._store.release(await acquiring)
        except ExpertMeshError as error:
            logger.info("lease.not_taken why=%s", error)

    async def settle(self, key: SessionKey) -> None:
        """Wait until this router has let go of the session."""
        if (task := self._closing.get(key)) is not None:
            await asyncio.wait([task], timeout=SETTLE_TIMEOUT_S)

    @property
    def is_settled(self) -> bool:
        """Whether this router has let go of every session that it does not serve."""
        return not self._closing

    async def settle_all(self) -> None:
        """Wait until this router has let go of every session."""
        if self._closing:
            await asyncio.wait(list(self._closing.values()), timeout=SETTLE_TIMEOUT_S)

    def close_behind(self, key: SessionKey, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Do work, which gives the lease back, that the session's next turn waits for."""
        task = asyncio.create_task(work)
        self._closing[key] = task

        def forget(done: asyncio.Task[None]) -> None:
            if self._closing.get(key) is done:
                del self._closing[key]

        task.add_done_callback(forget)
        return task


async def answers(what: str, call: Coroutine[Any, Any, object]) -> bool:
    """Await a call of the store that may fail to answer; return whether it did answer."""
    try:
        await call
    except StateUnavailableError as error:
        logger.warning("session.%s_failed why=%s", what, error)
        return False
    return True
