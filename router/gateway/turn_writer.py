"""A turn's way into the store: saved behind its stream, committed at its end.

Every write goes under the turn's lease. One that the store refuses is given to `TurnReopener`: a
store that has lost the turn gets it again, and a session that went on elsewhere ends the turn.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from protos.errors import ExpertMeshError, SessionFencedError, StateUnavailableError
from router.gateway.live import LiveRequest
from router.gateway.open_turn import Turn
from router.gateway.session_leases import SessionLeases, answers
from router.gateway.snapshot_names import SnapshotNames
from router.gateway.turn_figures import TurnFigures
from router.gateway.turn_reopening import TurnReopener
from router.state.session_records import Lease
from router.state.sessions import SessionStore

logger = logging.getLogger(__name__)

COMMIT_PAUSE_S = 0.2


class TurnWriter:
    """Writes the turns of one router; everything runs in the event loop.

    Args:
        store: Holds the sessions.
        leases: Takes new ones for turns that the store has lost.
        snapshots: Names those of committed turns.
        figures: Gets the seconds of commits.
        clock: The store's.
    """

    def __init__(
        self,
        store: SessionStore,
        leases: SessionLeases,
        snapshots: SnapshotNames,
        figures: TurnFigures,
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._reopener = TurnReopener(store, leases)
        self._snapshots = snapshots
        self._figures = figures
        self._clock = clock

    async def check_lease(self, turn: Turn) -> None:
        """Return when a token may be sent.

        A process that slept through its lease learns here that another has the session. While the
        store does not answer, the stream goes on and ends with `persisted` false: nobody else can
        get the session from a store that is down.
        """
        if not turn.lease.may_emit(self._clock()):
            lease = turn.lease
            try:
                await answers("renew", self._store.renew(lease))
            except SessionFencedError:
                if not await self._reopener.take_again(turn, lease):
                    raise

    async def save_behind(self, turn: Turn, live: LiveRequest) -> None:
        """Save tokens and renew the lease, never in front of a token."""
        try:
            while await turn.wait_savable():
                lease = turn.lease
                try:
                    await self._save(turn)
                except SessionFencedError:
                    if not await self._reopener.take_again(turn, lease):
                        raise
        except ExpertMeshError as error:
            live.fail(error)

    async def _save(self, turn: Turn) -> None:
        """Save what waits, or renew the lease."""
        lease = turn.lease
        ids = turn.take_savable()
        if ids:
            save = self._store.checkpoint(lease, ids, len(turn.prompt_ids) + turn.num_saved)
            if await answers("checkpoint", save) and lease is turn.lease:
                turn.note_saved(len(ids))
        elif self._clock() - lease.renewed_at >= lease.ttl_s / 3:
            await answers("renew", self._store.renew(lease))

    async def commit(self, turn: Turn, until: float) -> bool:
        """Make the turn part of the history; return whether it is.

        Args:
            turn: Has ended.
            until: On the clock: how long a store that does not answer is asked again.

        Raises:
            SessionFencedError: It never will be: another has the session.
        """
        record = turn.record()
        begun = self._clock()
        while not turn.is_committed:
            lease = turn.lease
            try:
                await self._store.commit_turn(lease, turn.request_id, record, turn.unsaved_ids())
                turn.is_committed = True
                self._figures.commit_s.add(self._clock() - begun)
                self._snapshots.name_behind(turn)
            except SessionFencedError:
                if not await self._reopener.take_again(turn, lease):
                    raise
            except StateUnavailableError as error:
                if self._clock() + COMMIT_PAUSE_S > until:
                    logger.warning("turn.unwritten id=%s why=%s", turn.request_id, error)
                    return False
                await asyncio.sleep(COMMIT_PAUSE_S)
        return True

    async def let_go(self, lease: Lease, turn: Turn | None) -> None:
        """Commit what has ended, as long as the lease can still be ours; leave the rest open."""
        try:
            if turn is not None and turn.is_fenced:
                return
            if turn is not None:
                lease = turn.lease
            if turn is not None and turn.has_ended:
                await self.commit(turn, lease.renewed_at + lease.ttl_s)
                lease = turn.lease
            elif turn is not None and (ids := turn.take_savable()):
                await self._store.checkpoint(lease, ids, len(turn.prompt_ids) + turn.num_saved)
            await self._store.release(lease)
        except ExpertMeshError as error:
            logger.warning("turn.left session=%s why=%s", lease.session_id, error)
        finally:
            if turn is not None:
                self._figures.running.discard(turn)
