"""What batches still need, how fast they go with the members there are, and what that asks. Pure.

Rows count when their part is committed, so tokens come in bursts. The *pace* is measured from a
commit on, over `SPAN_S`, and begins anew whenever the number of routers or groups that serve
changes: what batches got of two groups says nothing certain of three. Until it is known, batches
neither ask for members nor let any go.

One worked sum: 3,000,000 tokens are left, and 2 groups gave 500 a second. That is 6,000 s, for
which a target of 3,600 s asks for 2 * 6,000 / 3,600 = 3.3 groups. It asks the pool in which the
time goes by, and only where its members are used. As the rest shrinks, so does the demand.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from cluster.autoscale_signals import (
    KEEP_MARGIN,
    RAISE_MARGIN,
    Load,
    Pool,
    Signal,
    Targets,
    hinders_idle,
    raises_to_of,
)

SPAN_S = 300.0
"""The pace is over so long at most, or over the last three commits where those lasted longer."""
MOST_STEP = 2
"""Times the members there are that are asked for at most, before the pace is measured again: that
twice as many go twice as fast is hoped, not known."""
LEAST_S = 30.0
"""The pace is not known earlier: parts that run side by side are committed close together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchWork:
    """Of all batches that have not ended."""

    tokens_left: float
    """Of prompts and answers of rows that are not done, as long as those of the done ones; where
    none are done a row counts as one token: it is work, and nobody knows how much."""
    tokens_done: int
    """Of rows that were done since this process began; only grows."""


@dataclass(slots=True)
class BatchPace:
    """Measures; times are seconds on any clock that only grows."""

    _members: tuple[int, int] = (0, 0)
    _tokens: int | None = None
    """Done at the last look; None: there was no batch."""
    _commits: deque[tuple[float, int]] = field(default_factory=deque)
    """When tokens were seen to be done, and how many there were then."""

    def note(self, now_s: float, work: BatchWork | None, routers: int, groups: int) -> None:
        """Take a look at the batches, and at how many members serve."""
        if work is None or (routers, groups) != self._members:
            self._commits.clear()
            self._members = (routers, groups)
            self._tokens = work.tokens_done if work else None
            return
        if self._tokens is not None and work.tokens_done > self._tokens:
            self._commits.append((now_s, work.tokens_done))
        self._tokens = work.tokens_done
        while len(self._commits) > 3 and self._commits[1][0] <= now_s - SPAN_S:
            self._commits.popleft()

    def tokens_per_s(self, now_s: float) -> float | None:
        """Return the pace; None: not known, as there were too few commits with these members.

        The first commit only begins the time: part of its tokens were computed before. The time
        since the last one counts as far as it is longer than those between commits.
        """
        if len(self._commits) < 2:
            return None
        (begun_s, before), (last_s, after) = self._commits[0], self._commits[-1]
        if now_s - begun_s < LEAST_S:
            return None
        times = len(self._commits) - 1
        return (after - before) / max(last_s - begun_s, (now_s - begun_s) * times / (times + 1))


def batch_signals(
    load: Load,
    targets: Targets,
    pool: Pool,
    signals: Sequence[Signal],
    *,
    is_blamed: bool,
    is_settled: bool,
) -> list[Signal]:
    """Return what the rest of all batches asks of a pool; nothing where there is no batch.

    Args:
        load: Measured.
        targets: Wanted.
        pool: That is asked.
        signals: Its other signals: how much its members are used.
        is_blamed: The time goes by in this pool.
        is_settled: All members have started.
    """
    if not load.batch_tokens:
        return []
    count = pool.count
    text = f"{load.batch_tokens:,.0f} tokens of batches are left"
    if not load.batch_tokens_per_s:
        text += "; their pace with the members of now is not measured yet"
        return [Signal(name="batch", demand=count, raises_to=0, needs=count, text=text)]
    left_s = load.batch_tokens / load.batch_tokens_per_s
    text += (
        f", {left_s:,.0f} s at {load.batch_tokens_per_s:,.0f}/s, the pace with {pool.ready},"
        f" target {targets.batch_s:g} s"
    )
    demand = pool.ready * left_s / targets.batch_s
    raises_to = min(raises_to_of(demand, count, RAISE_MARGIN), MOST_STEP * count)
    hinders = ""
    if raises_to:
        use = max((signal.demand for signal in signals), default=0.0)
        if not is_settled:
            hinders = "; counts when all members have started"
        else:
            hinders = hinders_idle(use, count) if is_blamed else ", lost elsewhere"
    return [
        Signal(
            name="batch",
            demand=demand,
            raises_to=0 if hinders else raises_to,
            needs=demand * (1 + KEEP_MARGIN),
            text=text + hinders,
        )
    ]
