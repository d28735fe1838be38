"""`HashModel` behind the gateway's tokeniser: every token depends on all before it."""

from __future__ import annotations

import threading

from tests.unit.router.hash_model import HashModel


class HashScript(HashModel):
    """A `HashModel` with the vocabulary and the brake of `gateway_service.ScriptModel`."""

    def __init__(self) -> None:
        super().__init__(vocab=260)
        self.runs = threading.Event()
        """Cleared: the next step waits."""
        self.runs.set()
        self.before_forward = lambda batch: self._wait()

    def _wait(self) -> None:
        assert self.runs.wait(30)
