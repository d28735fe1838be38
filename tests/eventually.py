"""Wait for a condition instead of for a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def eventually(check: Callable[[], T], timeout_s: float = 10.0, interval_s: float = 0.02) -> T:
    """Call `check` until it answers something true, and return that.

    An `AssertionError` inside `check` counts as "not yet"; the last one is raised at the end.

    Raises:
        AssertionError: `check` never held within `timeout_s`.
    """
    pause = threading.Event()
    deadline = time.monotonic() + timeout_s
    while True:
        failure: AssertionError | None = None
        try:
            result = check()
            if result:
                return result
        except AssertionError as error:
            failure = error
        if time.monotonic() >= deadline:
            raise failure or AssertionError(f"{check} did not hold within {timeout_s} s")
        pause.wait(interval_s)
