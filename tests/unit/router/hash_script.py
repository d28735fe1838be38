"""Models that can be stopped after any step, behind the gateway's tokeniser."""

from __future__ import annotations

import threading
from typing import Any

from tests.eventually import eventually
from tests.unit.router.gateway_service import ScriptModel
from tests.unit.router.hash_model import HashModel


class Brake:
    """Lets a test say how many steps run."""

    runs: threading.Event
    """Cleared: the next step waits."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        """Between a step that is about to wait and the test that lets it run on."""
        self._steps_left: int | None = None

    def stop_after(self, steps: int | None) -> None:
        """Let so many more steps run, then wait; None lets it run on."""
        with self._lock:
            self._steps_left = steps
            if steps is None:
                self.runs.set()

    def go_on(self, steps: int) -> None:
        """Let the step that waits run, and so many in all, then wait again."""
        self.wait_until_stopped()
        with self._lock:
            self._steps_left = steps - 1
            self.runs.set()

    @property
    def is_stopped(self) -> bool:
        """Whether a step waits."""
        return not self.runs.is_set()

    def wait_until_stopped(self) -> None:
        """Wait until a step waits: a client sees a token before the next step comes to that."""
        eventually(lambda: self.is_stopped)

    def brake(self, batch: Any) -> None:
        """Wait, where the steps are used up."""
        with self._lock:
            if self._steps_left == 0:
                self.runs.clear()
            elif self._steps_left is not None:
                self._steps_left -= 1
        assert self.runs.wait(30)


class HashScript(Brake, HashModel):
    """Every token depends on all before it."""

    def __init__(self) -> None:
        Brake.__init__(self)
        HashModel.__init__(self, vocab=260)
        self.runs = threading.Event()
        self.runs.set()
        self.before_forward = self.brake


class BrakedScript(Brake, ScriptModel):
    """Recites, up to the step at which it is stopped."""

    def __init__(self, script: str | list[int]) -> None:
        Brake.__init__(self)
        ScriptModel.__init__(self, script)
        self.before_forward = self.brake
