"""A turn that the store has lost: begun again where the session still stands as it was.

A failover to a replica that lags loses leases, open turns and saved tokens. Never are two histories
merged: the session must stand exactly where the turn began, or the turn is over.
"""

from __future__ import annotations

import logging

import numpy as np

from protos.errors import ExpertMeshError, SessionBusyError, SessionFencedError
from router.gateway.open_turn import Turn
from router.gateway.session_leases import SessionLeases, answers
from router.state.session_records import Lease
from router.state.sessions import SessionStore

logger = logging.getLogger(__name__)

_MAX_REOPENED = 3
"""Failovers of the store that one turn outlives."""


class TurnReopener:
    """Opens lost turns again.

    Args:
        store: Has lost them.
        leases: Takes new ones.
    """

    def __init__(self, store: SessionStore, leases: SessionLeases) -> None:
        self._store = store
        self._leases = leases

    async def take_again(self, turn: Turn, lost: Lease) -> bool:
        """Go on with a turn that the store does not know any more under its lease.

        Where nobody has taken the session since, and it stands exactly where the turn began, the
        turn is opened again; else another has gone on, and the turn is over.

        Args:
            turn: Under way.
            lost: The lease that the store refused.

        Returns:
            Whether it goes on.
        """
        async with turn.reopening:
            if turn.lease is not lost:
                return True
            turn.num_reopened += 1
            turn.is_fenced |= turn.num_reopened > _MAX_REOPENED
            if turn.is_fenced:
                return False
            lease: Lease | None = None
            try:
                await self._store.release(lost)
                lease = await self._leases.acquire((lost.tenant, lost.session_id))
                num_saved = await self._open_again(turn, lease)
            except (SessionBusyError, SessionFencedError):
                num_saved, turn.is_fenced = None, True
            except ExpertMeshError as error:
                logger.warning("turn.not_reopened id=%s why=%s", turn.request_id, error)
                num_saved = None
            if lease is None or num_saved is None:
                if lease is not None:
                    turn.is_fenced = True
                    await answers("release", self._store.release(lease))
                return False
            turn.move_to(lease, num_saved)
            logger.warning("turn.reopened id=%s session=%s", turn.request_id, lease.session_id)
            return True

    async def _open_again(self, turn: Turn, lease: Lease) -> int | None:
        """Return how many generated tokens the store has of a turn, opened again if it is not;
        None where the session does not stand where the turn began."""
        if (lease.turn, lease.num_tokens) != (turn.lease.turn, turn.lease.num_tokens):
            return None
        if not np.array_equal(await self._store.tokens(lease), turn.history):
            return None
        opened = await self._store.open_turn_of(lease)
        if opened is None:
            await self._store.open_turn(lease, turn.opening())
            return 0
        saved = opened.generated_ids.tolist()
        if opened.request_id != turn.request_id or not turn.begins_with(saved):
            return None
        return len(saved)
