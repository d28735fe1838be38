"""When a process that died starts again, and when it is given up. Pure: the caller has the clock.

The first restart is at once, then after 1, 2, 4 s. A process that `MAX_QUICK_DEATHS` times in a
row did not stay up for `QUICK_S`, or did not start at all, is given up.
"""

from __future__ import annotations

from dataclasses import dataclass

QUICK_S = 5.0
MAX_QUICK_DEATHS = 5
FIRST_BACKOFF_S = 1.0


@dataclass(slots=True)
class Restarts:
    """The deaths of one member, through all its processes."""

    up_since_s: float | None = None
    """When the process came up that runs; None: none is up."""
    quick_deaths: int = 0
    """In a row."""

    def is_up(self, now_s: float) -> None:
        """Note that a process came up."""
        self.up_since_s = now_s

    def died(self, now_s: float) -> float | None:
        """Note a death, or a start that failed.

        Returns:
            Seconds until the next start; None: it is given up.
        """
        was_long = self.up_since_s is not None and now_s - self.up_since_s >= QUICK_S
        self.up_since_s = None
        self.quick_deaths = 0 if was_long else self.quick_deaths + 1
        return None if self.quick_deaths >= MAX_QUICK_DEATHS else backoff_s(self.quick_deaths)


def backoff_s(quick_deaths: int) -> float:
    """Return the seconds before the next start, after so many quick deaths in a row."""
    return 0.0 if quick_deaths <= 1 else FIRST_BACKOFF_S * 2.0 ** (quick_deaths - 2)


def next_step(delay_s: float | None) -> str:
    """Return what `Restarts.died` decided, for people."""
    if delay_s is None:
        return f"{MAX_QUICK_DEATHS} times in a row; it is given up"
    return f"it starts again {f'in {delay_s:g} s' if delay_s else 'now'}"
