"""When a call is sent again, and to which router. Sends nothing itself."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc

from protos.calls import Stream
from protos.errors import ExpertMeshError, SessionBusyError, from_rpc_error
from protos.routers import LEARN_AFTER_S, KnownRouters, RouterConnection


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
    """The sends of one call: to which router, by when, and whether there is another.

    Routers are asked one after the other; only when all were asked there is a wait. Before each
    send ask for `next_router` and `left_s`, and say what became of it.

    Args:
        config: How patient.
        routers: Those that can be asked.
        stream: What is asked, where the answer is a stream.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        config: ClientConfig,
        routers: KnownRouters,
        stream: Stream[Any] | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._routers = routers
        if stream is None:
            self._timeout_s, self._is_endless = config.short_timeout_s, False
        else:
            self._timeout_s = stream.timeout_s or config.timeout_s
            self._is_endless = stream.is_endless
        self._can_resume = stream is not None and stream.can_resume and config.max_attempts > 1
        self._clock = clock
        self._begun = clock()
        self._end = math.inf if self._is_endless else self._begun + self._timeout_s
        self._give_up = self._end
        self._num_failed = 0
        self._is_open = False
        self._router: RouterConnection
        """That was asked last."""

    def next_router(self) -> RouterConnection:
        """Return the router to ask now."""
        self._router = self._routers.current()
        return self._router

    def left_s(self) -> float:
        """Return what is left of the deadline."""
        return min(self._timeout_s, max(0.001, self._end - self._clock()))

    def arrived(self) -> None:
        """Note that something came: a failure after this is the first again."""
        self._is_open = True
        self._num_failed = 0

    def should_learn(self) -> bool:
        """Return whether it is time to ask which other routers there are: a stream lasts."""
        now = self._clock()
        is_useful = self._config.max_attempts > 1 and now - self._begun >= LEARN_AFTER_S
        return is_useful and self._routers.should_learn(now)

    def failed(self, error: grpc.RpcError) -> float:
        """Return how long to wait before the next send, in seconds.

        Raises:
            ExpertMeshError: There is to be no next send.
        """
        if self._is_endless and self._is_open and _is_deadline(error):
            return 0.0
        wait_s = self._wait_s(error)
        self._routers.failed(self._router)
        return wait_s

    def _wait_s(self, error: grpc.RpcError) -> float:
        ours = from_rpc_error(error)
        # Our own call may have left the lease behind, with a router that died under it.
        is_held = isinstance(ours, SessionBusyError) and self._num_failed > 0
        # A server that ends resets a stream that it has just accepted, without a word of ours.
        is_cut = error.code() == grpc.StatusCode.CANCELLED and error.details() == "CANCELLED"
        if ours.code != grpc.StatusCode.UNAVAILABLE and not (is_held or is_cut):
            raise ours from error
        if self._is_open and not self._can_resume:
            raise ours from error
        now = self._clock()
        if self._num_failed == 0:
            self._give_up = min(self._end, now + self._config.resume_timeout_s)
        self._num_failed += 1
        num_routers = len(self._routers)
        is_last = self._num_failed >= self._config.max_attempts * num_routers
        is_patient = self._is_open or is_held
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


def _is_deadline(error: grpc.RpcError) -> bool:
    return bool(error.code() == grpc.StatusCode.DEADLINE_EXCEEDED)
