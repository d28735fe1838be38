"""When a call is sent again. Sends nothing itself."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import grpc

from protos.errors import ExpertMeshError, SessionBusyError, from_rpc_error


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientConfig:
    """How patient a client is."""

    timeout_s: float = 600.0
    """Deadline of a generation, all retries together."""
    short_timeout_s: float = 30.0
    """Deadline of every other call."""
    max_attempts: int = 5
    """Sends of one call to each router, the first included, before anything has arrived. With 1 a
    stream that breaks is not resumed either."""
    resume_timeout_s: float = 60.0
    """How long a stream that broke looks for a router that goes on with it."""
    first_backoff_s: float = 0.1
    """Wait before the second send where the server names none; doubles, with jitter."""
    max_backoff_s: float = 2.0


class Attempts:
    """The sends of one call, under one deadline.

    Args:
        config: How patient.
        timeout_s: Seconds for all sends together.
        num_routers: Returns how many routers can be asked; they are asked one after the other, and
            only then there is a wait.
    """

    def __init__(
        self, config: ClientConfig, timeout_s: float, num_routers: Callable[[], int]
    ) -> None:
        self._config = config
        self._num_routers = num_routers
        self._begun = time.monotonic()
        self._end = self._begun + timeout_s
        self._give_up = self._end
        self._num_failed = 0

    def left_s(self) -> float:
        """Return what is left of the deadline."""
        return max(0.001, self._end - time.monotonic())

    @property
    def age_s(self) -> float:
        """Return how long the call has lasted."""
        return time.monotonic() - self._begun

    @property
    def may_resume(self) -> bool:
        """Whether a stream that breaks is resumed at all."""
        return self._config.max_attempts > 1

    def note_progress(self) -> None:
        """Something arrived: a failure after this is the first again."""
        self._num_failed = 0

    def wait_before_next(self, error: grpc.RpcError, *, is_open: bool, can_resume: bool) -> float:
        """Return how long to wait before the next send.

        Args:
            error: Of the last one.
            is_open: Whether something has arrived, now or before.
            can_resume: Whether the call can go on where it broke.

        Raises:
            ExpertMeshError: There is to be no next send.
        """
        ours = from_rpc_error(error)
        # Our own call may have left the lease behind, with a router that died under it.
        is_held = isinstance(ours, SessionBusyError) and self._num_failed > 0
        # A server that ends resets a stream that it has just accepted, without a word of ours.
        is_cut = error.code() == grpc.StatusCode.CANCELLED and error.details() == "CANCELLED"
        if ours.code != grpc.StatusCode.UNAVAILABLE and not (is_held or is_cut):
            raise ours from error
        if is_open and not (can_resume and self.may_resume):
            raise ours from error
        now = time.monotonic()
        if self._num_failed == 0:
            self._give_up = min(self._end, now + self._config.resume_timeout_s)
        self._num_failed += 1
        num_routers = max(1, self._num_routers())
        is_last = self._num_failed >= self._config.max_attempts * num_routers
        is_patient = is_open or is_held
        is_next_free = self._num_failed < num_routers and not is_held
        wait_s = 0.0 if is_next_free else self._backoff_s(ours, num_routers)
        if (is_last and not is_patient) or now + wait_s >= self._give_up:
            raise ours from error
        return wait_s

    def _backoff_s(self, error: ExpertMeshError, num_routers: int) -> float:
        config = self._config
        rounds = min(self._num_failed // num_routers, 16)
        grown = config.first_backoff_s * 2.0 ** max(0, rounds - 1)
        backoff_s: float = min(config.max_backoff_s, grown) * random.uniform(0.75, 1.25)
        return max(backoff_s, error.retry_after_s or 0.0)
