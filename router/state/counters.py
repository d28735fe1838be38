"""What several threads count and measure, for the metrics."""

from __future__ import annotations

import bisect
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


class Counters:
    """Name -> a sum that only grows."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, float] = {}

    def add(self, name: str, amount: float = 1) -> None:
        """Raise `name`, which begins at 0."""
        with self._lock:
            self._values[name] = self._values.get(name, 0) + amount

    def values(self) -> Mapping[str, float]:
        """Return a copy."""
        with self._lock:
            return dict(self._values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """How many values were how large."""

    bounds: tuple[float, ...]
    """Rising."""
    counts: tuple[int, ...]
    """Values up to each bound and above the one before it; one more for those above the last."""
    total: float
    """Sum of the values."""


class Histogram:
    """Collects a distribution.

    Args:
        bounds: Rising.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0
        self._lock = threading.Lock()

    def add(self, value: float, times: int = 1) -> None:
        """Count a value, once or more often."""
        with self._lock:
            self._counts[bisect.bisect_left(self._bounds, value)] += times
            self._total += value * times

    def distribution(self) -> Distribution:
        """Return what was counted so far."""
        with self._lock:
            return Distribution(bounds=self._bounds, counts=tuple(self._counts), total=self._total)
