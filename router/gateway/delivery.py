"""From the engine thread to the event loop: all outputs of a step with one wake-up.

Waking a loop from another thread writes to a pipe and takes the interpreter lock from the engine,
so it is done once a step, and not at all while the loop has not yet come to the step before.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque

from router.engine.request import Sink, StepOutput

logger = logging.getLogger(__name__)


class LoopDelivery:
    """The engine's `deliver`; calls the sinks in the event loop.

    Made before engine and loop, because the engine wants it at construction:

        delivery = LoopDelivery()
        engine = Engine(model, config, deliver=delivery)
        ...
        delivery.bind(asyncio.get_running_loop())
        engine.start()
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._steps: deque[list[tuple[Sink, StepOutput]]] = deque()
        self._is_scheduled = False

    def bind(self, loop: asyncio.AbstractEventLoop) -> None:
        """Say which loop the sinks run in."""
        self._loop = loop

    def __call__(self, outputs: list[tuple[Sink, StepOutput]]) -> None:
        """Hand over a step's outputs; never raises, never blocks. The list belongs to us now."""
        self._steps.append(outputs)
        if self._is_scheduled or self._loop is None:
            return
        self._is_scheduled = True
        try:
            self._loop.call_soon_threadsafe(self._drain)
        except RuntimeError:  # the loop is closed, and with it every stream
            self._steps.clear()

    def _drain(self) -> None:
        # First the flag: a step that comes meanwhile schedules anew, at worst for nothing.
        self._is_scheduled = False
        steps = self._steps
        while steps:
            for sink, output in steps.popleft():
                try:
                    sink(output)
                except Exception:  # one stream's fault must not cost the others their outputs
                    logger.exception("sink.failed id=%s", output.request_id)
