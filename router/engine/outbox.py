"""The outputs of a step, and how they reach their sinks.

Belongs to the engine thread. Knows from the last outputs how fast places become free.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from router.engine.request import Sink, StepOutput

logger = logging.getLogger(__name__)

Deliver = Callable[[list[tuple[Sink, StepOutput]]], None]


class Outbox:
    """Collects outputs and hands them out at once.

    Args:
        deliver: Takes a step's outputs at once and must not raise; None calls each sink.
        cancel: Ends the request of a sink that fails.
    """

    def __init__(self, deliver: Deliver | None, cancel: Callable[[str, str], object]) -> None:
        self.finish_interval_s = 1.0
        """A running mean: a place in the queue is likely free after about this long."""
        self._deliver = deliver
        self._cancel = cancel
        self._outputs: list[tuple[Sink, StepOutput]] = []
        self._last_finish_s: float | None = None

    def add(self, sink: Sink, output: StepOutput) -> None:
        """Queue an output."""
        self._outputs.append((sink, output))

    def add_last(self, sink: Sink, output: StepOutput, now: float) -> None:
        """Queue a sequence's last output."""
        self._outputs.append((sink, output))
        if self._last_finish_s is not None:
            interval_s = 0.8 * self.finish_interval_s + 0.2 * (now - self._last_finish_s)
            self.finish_interval_s = min(max(interval_s, 0.1), 30.0)
        self._last_finish_s = now

    def hand_out(self) -> None:
        """Give all outputs to their sinks, in the order they came."""
        if not self._outputs:
            return
        outputs, self._outputs = self._outputs, []
        if self._deliver is not None:
            self._deliver(outputs)
            return
        for sink, output in outputs:
            try:
                sink(output)
            except Exception:  # the sink is the caller's code: only its own request ends
                logger.exception("sink.failed id=%s", output.request_id)
                self._cancel(output.request_id, "its sink failed")
