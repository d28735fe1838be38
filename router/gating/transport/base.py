"""The seam between the dispatcher and whatever carries its frames.

A transport belongs to one router and one expert group and has at most one call in flight. It moves
whole frames and knows nothing of tokens. What breaks it is raised as `GroupLostError`; after that
the next `send` opens it anew.
"""

from __future__ import annotations

from typing import Protocol

import torch


class FrameBuffer:
    """A reused, growing byte buffer whose address native code may hold between calls.

    `tensor` is `uint8 [capacity]`; growing invalidates earlier views and addresses.
    """

    __slots__ = ("address", "tensor", "view")

    def __init__(self, capacity: int = 0) -> None:
        self.reserve_new(capacity)

    def reserve_new(self, capacity: int) -> None:
        """Replace the storage by a fresh one of `capacity` bytes."""
        self.tensor = torch.empty(capacity, dtype=torch.uint8)
        self.address = self.tensor.data_ptr()
        self.view = memoryview(self.tensor.numpy())  # type: ignore[arg-type]

    def reserve(self, capacity: int) -> bool:
        """Make room for `capacity` bytes; contents may be lost. True when the address changed."""
        if capacity <= self.tensor.numel():
            return False
        self.reserve_new(capacity + capacity // 2)
        return True


class Transport(Protocol):
    """One router's way to one expert group."""

    group_id: str
    name: str
    """`lane-unix`, `lane-tcp`, `grpc` or `local`."""

    def ensure_open(self, timeout_s: float | None = None) -> None:
        """Open the connection when there is none and it takes more than a `send`.

        Raises:
            GroupLostError: Not open within `timeout_s`; None: the transport's own bound.
        """

    def send(self, frame: memoryview) -> None:
        """Hand over one whole forward frame; opens the connection when there is none.

        Raises:
            GroupLostError: The group cannot be reached or went away.
        """

    def receive(self, header: FrameBuffer, payload: FrameBuffer, timeout_s: float) -> int:
        """Wait for the answer: 64 header bytes into `header`, the payload into `payload`; returns
        the payload's bytes.

        Raises:
            GroupLostError: Closed, silent for `timeout_s`, or answered something that is no frame
                or does not fit.
        """

    def close(self) -> None:
        """Give the connection up; a later `send` opens a new one."""
