"""Lets the dispatchers of one router follow placements, in two phases.

First every dispatcher connects to the groups of a placement to come, then, when all routers have,
each follows it from its next call on. Asking twice for the same is allowed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping

from experts.placement import Placement
from protos.errors import DeadlineExceededError, NotReadyError
from router.gating.dispatch import ExpertDispatcher
from router.gating.route import Route


class PlacementFollower:
    """The dispatchers of one router; any thread may call."""

    def __init__(self) -> None:
        self._dispatchers: list[ExpertDispatcher] = []
        self._prepared: list[Route] = []
        self._prepared_epoch = 0
        self._offered_epoch = 0
        self._lock = threading.Lock()

    @property
    def epoch(self) -> int:
        """Of the placement in force; 0 in a dense model."""
        return min((d.placement.epoch for d in self._dispatchers), default=0)

    def add(self, dispatcher: ExpertDispatcher) -> None:
        """Let one more follow."""
        self._dispatchers.append(dispatcher)

    def prepare(self, placement: Placement, addresses: Mapping[str, str]) -> None:
        """Connect to the groups of a placement, beside those in use.

        Args:
            placement: To come.
            addresses: group_id -> `host:port` of its gRPC server.

        Raises:
            GroupLostError: A group cannot be reached; nothing has changed.
        """
        with self._lock:
            self._forget()
            routes: list[Route] = []
            try:
                for dispatcher in self._dispatchers:
                    routes.append(dispatcher.prepare(placement, addresses))
            except BaseException:
                self._prepared = routes
                self._forget()
                raise
            self._prepared, self._prepared_epoch = routes, placement.epoch

    def switch(self, epoch: int, timeout_s: float) -> None:
        """Follow the prepared placement from the next call on, and wait for the last one before.

        Raises:
            NotReadyError: Another placement was prepared last.
            DeadlineExceededError: A call of before lasts longer than `timeout_s`.
        """
        with self._lock:
            if epoch > self._offered_epoch:
                if epoch != self._prepared_epoch:
                    raise NotReadyError(f"placement epoch {epoch} is not connected")
                for dispatcher, route in zip(self._dispatchers, self._prepared, strict=True):
                    dispatcher.offer(route)
                self._prepared, self._offered_epoch = [], epoch
        deadline = time.monotonic() + timeout_s
        for dispatcher in self._dispatchers:
            if not dispatcher.wait_adopted(epoch, max(0.0, deadline - time.monotonic())):
                raise DeadlineExceededError("a call by the placement before", timeout_s)

    def give_up(self) -> None:
        """Let calls that wait for a group fail: the router ends."""
        for dispatcher in self._dispatchers:
            dispatcher.give_up()

    def _forget(self) -> None:
        """Close what was prepared and never used."""
        for dispatcher, route in zip(self._dispatchers, self._prepared, strict=False):
            dispatcher.discard(route)
        self._prepared, self._prepared_epoch = [], 0
