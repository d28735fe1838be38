"""Whether to load cached values or to compute them again: a prediction of both, from measurements.

Pure: it is told what took how long, and when; knows neither sockets nor the engine. Both sides are
straight lines in two terms, fitted by least squares over the last measurements:

    load    = r + s * bytes                   r: a round trip, 1 / s: bandwidth
    prefill = a * n + b * n * (c + n / 2)     n tokens behind c: linear layers, attention

A sequence that does not fit the pool is loaded like any other, each value once; its prefill reads
what has left the pool once a step, at the bandwidth that loads have shown.

One worked sum: at a = 1 ms and b = 1 us a prefill of n = 2,000 tokens from the start takes
2 s + 2 s; a load of 40 MB at 100 MB/s takes 0.4 s, so the store is asked.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class CostSettings:
    """When loading is worth it."""

    advantage: float = 0.8
    """Load only if it takes less than this part of the prefill; in (0, 1]."""
    load_memory: float = 0.8
    """Weight that a load's measurement keeps when the next comes; in (0, 1)."""
    prefill_memory: float = 0.95
    """The same of prefills, of which there are many more."""
    prior_round_trip_s: float = 0.002
    prior_bytes_per_s: float = 0.5e9
    """What is believed of the store before it is measured."""
    remeasure_s: float = 30.0
    """A prediction of the store older than this does not refuse a load by itself: one slow minute
    of the network would else switch the cache off for good."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What to do, why, and what was expected."""

    decision: str
    """`load` or `prefill`."""
    reason: str
    """`faster`, `slower`, `unmeasured` (no prefill seen yet), `remeasure`, or `streamed`: faster
    because a prefill would read KV that has left the pool again and again."""
    load_s: float
    prefill_s: float
    """Infinite before the first prefill was seen."""


class TwoTermFit:
    """y = f * (p * u + q * v) with p, q >= 0, fitted to the last few dozen measurements.

    Errors count relative to y, so short and long measurements weigh alike. That alone would follow
    a change for the worse slowly, since what once was fast weighs more than what is slow now: so f
    follows the ratio of measured to fitted, in logarithms, where both directions weigh alike.
    Where the measurements do not tell the two terms apart, the fit leans on the shape it is given:
    p : q as in `prior`.
    """

    def __init__(self, prior: tuple[float, float], memory: float) -> None:
        self.num_measured = 0
        self._prior = prior
        self._memory = memory
        self._uu = self._uv = self._vv = self._uy = self._vy = 0.0
        self._fitted = prior
        self._log_ratio = 0.0

    @property
    def terms(self) -> tuple[float, float]:
        """(f * p, f * q)."""
        ratio = math.exp(self._log_ratio)
        return self._fitted[0] * ratio, self._fitted[1] * ratio

    def predict(self, u: float, v: float) -> float:
        """Return f * (p * u + q * v)."""
        p, q = self.terms
        return p * u + q * v

    def add(self, u: float, v: float, y: float) -> None:
        """Take one measurement of y seconds; below a microsecond it is none."""
        if not (y >= 1e-6 and math.isfinite(y)):
            return
        keep = self._memory
        self._uu = keep * self._uu + (u / y) ** 2
        self._uv = keep * self._uv + (u / y) * (v / y)
        self._vv = keep * self._vv + (v / y) ** 2
        self._uy = keep * self._uy + u / y
        self._vy = keep * self._vy + v / y
        self.num_measured += 1
        p, q = self._fitted = self._solve()
        fitted = max(p * u + q * v, 1e-9)
        self._log_ratio = keep * self._log_ratio + (1 - keep) * math.log(y / fitted)

    def _solve(self) -> tuple[float, float]:
        """Minimise sum of (1 - (p u + q v) / y)^2, with a light pull towards the prior's shape."""
        p0, q0 = self._prior
        # The prior scaled to fit best; then a faint ridge around it.
        on_u, on_v = p0 * self._uu + q0 * self._uv, p0 * self._uv + q0 * self._vv
        square = p0 * on_u + q0 * on_v
        scale = (p0 * self._uy + q0 * self._vy) / square if square > 0 else 1.0
        p0, q0 = p0 * scale, q0 * scale
        ridge = 1e-4
        uu, vv = self._uu * (1 + ridge), self._vv * (1 + ridge)
        uy, vy = self._uy + ridge * self._uu * p0, self._vy + ridge * self._vv * q0
        determinant = uu * vv - self._uv**2
        if determinant > 0:
            p = (uy * vv - vy * self._uv) / determinant
            q = (vy * uu - uy * self._uv) / determinant
            if p >= 0 and q >= 0:
                return p, q
        only_p = (uy / uu if uu > 0 else p0), 0.0
        only_q = 0.0, (vy / vv if vv > 0 else q0)
        return min(only_p, only_q, key=self._error)

    def _error(self, terms: tuple[float, float]) -> float:
        p, q = terms
        return (
            p * p * self._uu
            + 2 * p * q * self._uv
            + q * q * self._vv
            - 2 * (p * self._uy + q * self._vy)
        )


class CostModel:
    """Predicts load and prefill times of one router; any thread may call it."""

    def __init__(self, settings: CostSettings | None = None) -> None:
        self.settings = settings or CostSettings()
        self._lock = threading.Lock()
        self._load = TwoTermFit(
            (self.settings.prior_round_trip_s, 1 / self.settings.prior_bytes_per_s),
            self.settings.load_memory,
        )
        # A token's attention over 20,000 others costs about as much as its linear layers.
        self._prefill = TwoTermFit((1.0, 1 / 20_000), self.settings.prefill_memory)
        self._loaded_at_s = -math.inf

    @property
    def bytes_per_s(self) -> float:
        """The store's bandwidth as believed."""
        with self._lock:
            per_byte = self._load.terms[1]
        return 1 / per_byte if per_byte > 0 else math.inf

    @property
    def prefill_tokens_per_s(self) -> float:
        """Of a prompt's first tokens; 0 before one was measured."""
        with self._lock:
            per_token = self._prefill.terms[0]
            return 1 / per_token if self._prefill.num_measured and per_token > 0 else 0.0

    def note_load(self, num_bytes: int, seconds: float, now: float) -> None:
        """Take the measurement of one load."""
        with self._lock:
            self._load.add(1.0, float(num_bytes), seconds)
            self._loaded_at_s = now

    def note_prefill(self, num_tokens: int, context: int, seconds: float) -> None:
        """Take the measurement of one prefill of `num_tokens` tokens behind `context`."""
        with self._lock:
            self._prefill.add(*_prefill_terms(num_tokens, context), seconds)

    def load_s(self, num_bytes: int) -> float:
        """Predict a load."""
        with self._lock:
            return self._load.predict(1.0, float(num_bytes))

    def prefill_s(self, num_tokens: int, context: int) -> float:
        """Predict a prefill; infinite before the first was seen."""
        with self._lock:
            if not self._prefill.num_measured:
                return math.inf
            return self._prefill.predict(*_prefill_terms(num_tokens, context))

    def choose(
        self,
        start: int,
        num_tokens: int,
        num_bytes: int,
        now: float,
        *,
        streamed_bytes: int = 0,
    ) -> Choice:
        """Choose between loading `num_bytes` and computing the tokens `start .. num_tokens - 1`.

        Args:
            start: Tokens in place already.
            num_tokens: The candidate.
            num_bytes: What loading it would read.
            now: Monotonic seconds.
            streamed_bytes: What a prefill would read from the store between its steps.
        """
        load_s = self.load_s(num_bytes)
        computing_s = self.prefill_s(num_tokens - start, start)
        prefill_s = computing_s + streamed_bytes / self.bytes_per_s
        decision = "load"
        if math.isinf(computing_s):
            reason = "unmeasured"
        elif load_s < self.settings.advantage * computing_s:
            reason = "faster"
        elif load_s < self.settings.advantage * prefill_s:
            reason = "streamed"
        elif self._is_stale(num_bytes, prefill_s, now):
            reason = "remeasure"
        else:
            decision, reason = "prefill", "slower"
        return Choice(decision=decision, reason=reason, load_s=load_s, prefill_s=prefill_s)

    def _is_stale(self, num_bytes: int, prefill_s: float, now: float) -> bool:
        """Whether the store was last measured long ago, and by what was believed before any
        measurement a load would pay."""
        if now - self._loaded_at_s < self.settings.remeasure_s or not self._load.num_measured:
            return False
        prior = self.settings.prior_round_trip_s + num_bytes / self.settings.prior_bytes_per_s
        return prior < self.settings.advantage * prefill_s


def _prefill_terms(num_tokens: int, context: int) -> tuple[float, float]:
    return float(num_tokens), num_tokens * (context + num_tokens / 2)
