"""Counts of token-expert pairs: what the planner balances and `WatchLoad` streams."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


class LoadCounters:
    """Pairs routed to each logical expert since the process started; counts only grow.

    One writer at a time (the owner's compute lock); readers take `snapshot`.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.num_experts = num_experts
        self._counts = np.zeros((num_layers, num_experts), np.int64)

    def add(self, layer_id: int, expert_ids: npt.NDArray[np.int32]) -> None:
        """Count one pair for each entry of `expert_ids`, which are in range."""
        self._counts[layer_id] += np.bincount(expert_ids, minlength=self.num_experts)

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """The live array, for the one writer that counts in place."""
        return self._counts

    def snapshot(self) -> npt.NDArray[np.int64]:
        """Return a copy, `[num_layers, num_experts]`."""
        return self._counts.copy()
