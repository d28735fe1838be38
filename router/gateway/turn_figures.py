"""What the turns of one router have gone through, counted for its metrics.

Written in the event loop; `stats` may be called by any thread.
"""

from __future__ import annotations

from dataclasses import dataclass

from router.gateway.open_turn import Turn
from router.state.counters import Distribution, Histogram
from router.state.sessions import SessionStore

COMMIT_BOUNDS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnStats:
    """Counts since the router's start, and what is not saved now."""

    commit_s: Distribution
    """Seconds from a turn's last token to its being committed, of those that were."""
    fenced: int
    """Writes that the store refused: another has the session, or its history is another."""
    leases_lost: int
    """Turns that learned that their session is another's now, or deleted."""
    conflicts: int
    """Requests refused because another one writes the session."""
    not_persisted: int
    """Turns whose last message said `persisted: false`."""
    num_unsaved: int
    """Generated tokens of running turns that are not in the store: what a death would cost now."""
    unsaved_s: float
    """Seconds that the oldest of them has waited, at most."""


class TurnFigures:
    """Collects the figures of one router's turns.

    Args:
        store: Counts what it refuses.

    Attributes:
        running: Turns whose tokens are not all committed, or given up.
        commit_s: Gets the seconds of each commit.
    """

    def __init__(self, store: SessionStore) -> None:
        self.running: set[Turn] = set()
        self.commit_s = Histogram(COMMIT_BOUNDS_S)
        self.num_conflicts = 0
        self.num_not_persisted = 0
        self._store = store

    def stats(self) -> TurnStats:
        """Return the figures as they are now."""
        running = tuple(self.running)
        return TurnStats(
            commit_s=self.commit_s.distribution(),
            fenced=self._store.num_fenced,
            leases_lost=self._store.num_lost,
            conflicts=self.num_conflicts,
            not_persisted=self.num_not_persisted,
            num_unsaved=sum(turn.num_unsaved for turn in running),
            unsaved_s=max((turn.unsaved_s for turn in running), default=0.0),
        )
