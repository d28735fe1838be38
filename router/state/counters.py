"""Counters that several threads raise, under the names of the metrics."""

from __future__ import annotations

import threading
from collections.abc import Mapping


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
