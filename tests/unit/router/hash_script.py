"""`HashModel` behind the gateway's tokeniser: every token depends on all before it."""

from __future__ import annotations

import threading
from typing import Any

from tests.unit.router.hash_model import HashModel


class HashScript(HashModel):
    """A `HashModel` with the vocabulary and the brake of `gateway_service.ScriptModel`."""

    def __init__(self) -> None:
        super().__init__(vocab=260)
        self.runs = threading.Event()
        """Cleared: the next step waits."""
        self.runs.set()
        self._steps_left: int | None = None
        self.before_forward = self._brake

    def stop_after(self, steps: int | None) -> None:
        """Let so many more steps run, then wait; None lets it run on."""
        self._steps_left = steps
        self.runs.set() if steps is None else None

    @property
    def is_stopped(self) -> bool:
        """Whether a step waits."""
        return not self.runs.is_set()

    def _brake(self, batch: Any) -> None:
        if self._steps_left is not None:
            if self._steps_left == 0:
                self.runs.clear()
            else:
                self._steps_left -= 1
        assert self.runs.wait(30)
