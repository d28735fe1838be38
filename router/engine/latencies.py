"""How long clients wait: for the first token, and from one token to the next.

The engine thread notes, any thread reads. Tokens are not timed one by one: all sequences that
decode in a step got their last token at the end of the step before, so a step is one note. Batch
requests have no say in the first tokens: they wait on purpose.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from router.state.counters import Distribution, Histogram

LATENCY_BOUNDS_S = tuple(0.001 * 2 ** (k / 2) for k in range(38))
"""1 ms to 370 s, two to an octave: a percentile read from them is at most 41 % too large."""
NO_LATENCY = Distribution(bounds=LATENCY_BOUNDS_S, counts=(0,) * 39, total=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyStats:
    """Since the engine's start, in seconds."""

    first_token: Distribution = NO_LATENCY
    """From submission."""
    between_tokens: Distribution = NO_LATENCY


@dataclass(slots=True)
class Latencies:
    """Collects both."""

    _first: Histogram = field(default_factory=lambda: Histogram(LATENCY_BOUNDS_S))
    _between: Histogram = field(default_factory=lambda: Histogram(LATENCY_BOUNDS_S))
    _last_step_s: float = 0.0

    def note_first(self, seconds: float) -> None:
        """Count a sequence's first token."""
        self._first.add(seconds)

    def note_step(self, end_s: float, num_decoding: int) -> None:
        """Count the tokens of a step's decoding sequences; `end_s` is on the engine's clock."""
        if num_decoding:
            self._between.add(end_s - self._last_step_s, num_decoding)
        self._last_step_s = end_s

    def stats(self) -> LatencyStats:
        """Return what was counted so far."""
        return LatencyStats(
            first_token=self._first.distribution(), between_tokens=self._between.distribution()
        )
