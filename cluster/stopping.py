"""Signals that ask `serve` to end, delivered where it is safe.

A handler that raises gets the main thread out of any wait, except out of Ray's compiled code, which
answers with a SystemError. There a signal is held back until the call returns; calls are short.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class StopRequested(BaseException):
    """A signal asked for the end; raised in the main thread."""


class StopSignals:
    """Turns signals into `StopRequested`."""

    def __init__(self) -> None:
        self._is_held = False
        self._is_pending = False

    def catch(self) -> None:
        """Install the handler; again after a library that installs its own."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)

    def ignore(self) -> None:
        """Let nothing interrupt what follows."""
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold signals back during a short call into compiled code.

        Raises:
            StopRequested: At the end, when one came meanwhile.
        """
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False
        if self._is_pending:
            self._is_pending = False
            raise StopRequested

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._is_held:
            self._is_pending = True
            return
        raise StopRequested


def ends_within(timeout_s: float, end: Callable[[], None]) -> bool:
    """Run `end` in a thread and wait for it so long; whether it ended."""
    thread = threading.Thread(target=end, name="end", daemon=True)
    thread.start()
    thread.join(timeout_s)
    return not thread.is_alive()
