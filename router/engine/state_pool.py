"""Which state slots are free and which are owned.

A state slot holds the conv and recurrent state of one sequence in every Gated DeltaNet layer. Slots
are not cleared: the model starts from zero where a batch says that a sequence has no context yet.
"""

from __future__ import annotations


class StatePool:
    """The pool of state slots."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._free = list(range(num_slots - 1, -1, -1))
        self._owned = bytearray(num_slots)

    @property
    def num_free(self) -> int:
        """Slots without an owner."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Slots with an owner."""
        return self.num_slots - len(self._free)

    def acquire(self) -> int:
        """Take a slot; the caller has checked `num_free`."""
        slot = self._free.pop()
        self._owned[slot] = 1
        return slot

    def release(self, slot: int) -> None:
        """Give a slot back, exactly once."""
        assert self._owned[slot], f"state slot {slot} has no owner"
        self._owned[slot] = 0
        self._free.append(slot)
