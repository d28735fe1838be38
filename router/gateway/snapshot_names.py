"""Which snapshots a session has: told to the engine, and learned from it.

A snapshot that does not stand at a multiple of 128 tokens is found only through the session's
record. Naming one is a hint: the hash says of which tokens it is, so a lost or late name costs a
recomputation and never a wrong token. Everything here but the engine's call runs in the event loop.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress

from protos.errors import ExpertMeshError
from router.engine.request import SessionHint
from router.gateway.open_turn import Turn
from router.state.sessions import SessionStore

logger = logging.getLogger(__name__)


class SnapshotNames:
    """Reads and writes the snapshots in the sessions' records.

    Args:
        store: Holds the records.
    """

    def __init__(self, store: SessionStore) -> None:
        self._store = store
        self._tasks: set[asyncio.Task[None]] = set()

    async def hint(self, turn: Turn) -> SessionHint:
        """Return what the engine should know of a turn's session."""
        loop = asyncio.get_running_loop()
        record = await self._store.get(turn.lease.tenant, turn.lease.session_id)

        def on_snapshot(num_tokens: int, position_hash: bytes) -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._add, turn, num_tokens, position_hash)

        positions = tuple(sorted(record.snapshots))
        return SessionHint(snapshot_positions=positions, on_snapshot=on_snapshot)

    def name_behind(self, turn: Turn) -> None:
        """Write a turn's new snapshots into its session's record."""
        if turn.snapshots:
            task = asyncio.create_task(self._name(turn))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _add(self, turn: Turn, num_tokens: int, position_hash: bytes) -> None:
        turn.snapshots[num_tokens] = position_hash
        self.name_behind(turn)

    async def _name(self, turn: Turn) -> None:
        lease = turn.lease
        for num_tokens, position_hash in list(turn.snapshots.items()):
            is_last_try = turn.is_committed
            try:
                # Refused beyond what is saved; then the commit tries again.
                is_named = await self._store.attach_snapshot(
                    lease.tenant, lease.session_id, num_tokens, position_hash
                )
            except ExpertMeshError as error:
                logger.info("snapshot.unnamed session=%s why=%s", lease.session_id, error)
                continue
            if is_named or is_last_try:
                turn.snapshots.pop(num_tokens, None)
