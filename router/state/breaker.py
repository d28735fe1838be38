"""A circuit breaker for one server: after a few failures nobody waits for it any more.

Pure but for the clock, which is passed in; knows no sockets. `closed` lets every call through,
`open` none, and `half-open` one probe, whose result decides.

    closed --3 failures in a row, or p95 over budget--> open --after 1, 2, 4 .. 30 s--> half-open
    half-open --the probe succeeds--> closed        half-open --it fails--> open, for twice as long
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum


class BreakerState(Enum):
    """What a breaker does with the next call."""

    CLOSED = "closed"
    HALF_OPEN = "half-open"
    OPEN = "open"


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerSettings:
    """When a breaker opens and for how long."""

    max_failures: int = 3
    """Failures in a row that open it, 1 or more."""
    budget_s: float | None = None
    """Seconds that 95 of 100 calls may take; None does not look at durations."""
    window: int = 64
    """The last calls whose durations count; it takes a third of them to judge."""
    first_wait_s: float = 1.0
    """Seconds until the first probe; doubles with each that fails."""
    max_wait_s: float = 30.0
    """Bound of that."""
    jitter: float = 0.25
    """A wait is longer or shorter by up to this part, so that processes do not probe in step."""
    probe_timeout_s: float = 5.0
    """A probe that reports nothing for so long has failed: its caller is gone."""


class CircuitBreaker:
    """The breaker of one server; any thread may call it.

    Whoever got True from `allow` reports once: `succeeded` or `failed`. A call that was let through
    before the breaker opened may report late; while it is open that changes nothing.

    Args:
        name: The server, as it is shown.
        settings: When to open.
        clock: Monotonic seconds.
        generator: Draws the jitter.
    """

    def __init__(
        self,
        name: str,
        settings: BreakerSettings | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        generator: random.Random | None = None,
    ) -> None:
        self.name = name
        self._settings = settings or BreakerSettings()
        self._clock = clock
        self._random = generator or random.Random()
        self._lock = threading.Lock()
        self._state = BreakerState.CLOSED
        self._failures = 0
        self._seconds: deque[float] = deque(maxlen=self._settings.window)
        self._waits = 0  # times it opened since it was last closed
        self._next_s = 0.0  # open: when a probe may go; half-open: when the probe is given up
        self._num_opened = 0

    @property
    def state(self) -> BreakerState:
        """What the next call would find."""
        with self._lock:
            self._advance()
            if self._state is BreakerState.OPEN and self._clock() >= self._next_s:
                return BreakerState.HALF_OPEN
            return self._state

    @property
    def num_opened(self) -> int:
        """How often it has opened."""
        with self._lock:
            return self._num_opened

    @property
    def retry_after_s(self) -> float:
        """Seconds until a call may be let through; 0 when it is now."""
        with self._lock:
            self._advance()
            if self._state is BreakerState.CLOSED:
                return 0.0
            return max(0.0, self._next_s - self._clock())

    def allow(self) -> bool:
        """Whether a call may be made now; True obliges the caller to report its result."""
        with self._lock:
            self._advance()
            if self._state is BreakerState.CLOSED:
                return True
            if self._state is BreakerState.OPEN and self._clock() >= self._next_s:
                self._state = BreakerState.HALF_OPEN
                self._next_s = self._clock() + self._settings.probe_timeout_s
                return True
            return False

    def succeeded(self, seconds: float) -> None:
        """Report a call that was answered, after `seconds`."""
        with self._lock:
            self._advance()
            budget = self._settings.budget_s
            if self._state is BreakerState.OPEN:
                return
            if self._state is BreakerState.HALF_OPEN:
                if budget is not None and seconds > budget:
                    self._open()
                    return
                self._state = BreakerState.CLOSED
                self._waits = 0
                self._seconds.clear()
            self._failures = 0
            self._seconds.append(seconds)
            if budget is not None and self._p95() > budget:
                self._open()

    def failed(self) -> None:
        """Report a call that got no answer."""
        with self._lock:
            self._advance()
            self._failures += 1
            if self._state is BreakerState.HALF_OPEN or (
                self._state is BreakerState.CLOSED and self._failures >= self._settings.max_failures
            ):
                self._open()

    def _advance(self) -> None:
        """Count a probe that never reported as failed."""
        if self._state is BreakerState.HALF_OPEN and self._clock() >= self._next_s:
            self._open()

    def _open(self) -> None:
        settings = self._settings
        wait_s = min(settings.max_wait_s, settings.first_wait_s * 2.0 ** min(self._waits, 32))
        wait_s *= self._random.uniform(1 - settings.jitter, 1 + settings.jitter)
        self._state = BreakerState.OPEN
        self._next_s = self._clock() + wait_s
        self._waits += 1
        self._num_opened += 1
        self._failures = 0
        self._seconds.clear()

    def _p95(self) -> float:
        """The duration that 95 of 100 calls did not exceed; 0 before there are enough."""
        if 3 * len(self._seconds) < self._settings.window:
            return 0.0
        return sorted(self._seconds)[(95 * len(self._seconds) - 1) // 100]
