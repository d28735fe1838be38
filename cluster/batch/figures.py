"""What `serve` knows of the batches that it runs: work for the autoscaler, figures for Prometheus.

Names as in `cluster.metrics`. Counters begin at 0 with the process: rows that were done before it
are another process's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from cluster.autoscale_batches import BatchWork
from cluster.metrics import metric_line
from router.state.batch_records import BatchProgress, BatchRecord, BatchState

SETTING = "batch.metrics_port"
_COUNTED = ("rows_done", "rows_failed", "prompt_tokens", "completion_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchFigures:
    """As of one look; all models but ours are left out."""

    rows_done: int = 0
    """Since this process began, as the next ones; the failed ones too."""
    rows_failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    driver_starts: int = 0
    ended: tuple[tuple[str, int], ...] = ()
    """State of batches that ended -> how many."""
    running: int = 0
    """Batches that a driver of this process works on."""
    waiting: int = 0
    """That have not ended, and nobody here works on them."""
    rows_left: int = 0
    """Of batches whose rows were counted."""
    tokens_left: float | None = None
    """See `tokens_left`."""

    @property
    def work(self) -> BatchWork | None:
        """What the autoscaler is told; None: there is no batch, or others drive all there are."""
        if self.tokens_left is None or not self.running:
            return None
        tokens = self.prompt_tokens + self.completion_tokens
        return BatchWork(tokens_left=self.tokens_left, tokens_done=tokens)


@dataclass(slots=True)
class BatchTally:
    """Adds up what the drives of a process did; a batch may be driven several times."""

    _sums: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_COUNTED, 0))
    _seen: dict[tuple[str, str], dict[str, int]] = field(default_factory=dict)
    _starts: dict[tuple[str, str], int] = field(default_factory=dict)
    _num_starts: int = 0
    _ended: dict[str, int] = field(default_factory=dict)

    def take(self, key: tuple[str, str], progress: BatchProgress, starts: int) -> None:
        """Note how far a batch is; the first time it is what others did.

        A driver that begins anew counts from what it finds: what it says may fall and rise again.
        """
        now = {name: int(getattr(progress, name)) for name in _COUNTED}
        seen = self._seen.setdefault(key, now)
        for name, value in now.items():
            self._sums[name] += max(0, value - seen[name])
        self._seen[key] = {name: max(value, seen[name]) for name, value in now.items()}
        self._num_starts += max(0, starts - self._starts.setdefault(key, starts))
        self._starts[key] = starts

    def forget(self, key: tuple[str, str], state: BatchState) -> None:
        """Note that a batch is not driven here any more."""
        self._seen.pop(key, None)
        self._starts.pop(key, None)
        if state.has_ended:
            self._ended[state.value] = self._ended.get(state.value, 0) + 1

    def figures(self, waiting: Sequence[BatchRecord], num_driven: int) -> BatchFigures:
        """Return the figures.

        Args:
            waiting: The batches that have not ended.
            num_driven: Of them, by this process.
        """
        return BatchFigures(
            **self._sums,
            driver_starts=self._num_starts,
            ended=tuple(sorted(self._ended.items())),
            running=num_driven,
            waiting=max(0, len(waiting) - num_driven),
            rows_left=sum(max(0, r.progress.rows_total - r.progress.rows_done) for r in waiting),
            tokens_left=tokens_left(waiting),
        )


def tokens_left(records: Sequence[BatchRecord]) -> float | None:
    """Return the tokens of the rows that are not done; None: no batch is there.

    Where a batch has no row done, its rows count as those of the others do, and as 1 token where
    there are none: it is work, and nobody knows yet how much.

    Args:
        records: The batches that have not ended.
    """
    if not records:
        return None
    progress = [record.progress for record in records]
    rows = sum(one.rows_done for one in progress)
    tokens = sum(one.prompt_tokens + one.completion_tokens for one in progress)
    mean = tokens / rows if rows else 1.0
    return float(
        sum(
            max(one.rows_total - one.rows_done, not one.rows_total) * (one.tokens_per_row or mean)
            for one in progress
        )
    )


def batch_metrics_text(figures: BatchFigures, model: str) -> str:
    """Return the figures in Prometheus' text format."""
    named = {"model_name": model}
    succeeded = figures.rows_done - figures.rows_failed
    metrics: dict[str, list[tuple[dict[str, str], float]]] = {
        "batch_rows_total": [
            ({"state": "completed"}, succeeded),
            ({"state": "failed"}, figures.rows_failed),
        ],
        "batch_prompt_tokens_total": [({}, figures.prompt_tokens)],
        "batch_generation_tokens_total": [({}, figures.completion_tokens)],
        "batch_driver_starts_total": [({}, figures.driver_starts)],
        "batches_ended_total": [({"state": state}, count) for state, count in figures.ended],
        "batches": [
            ({"state": "running"}, figures.running),
            ({"state": "waiting"}, figures.waiting),
        ],
        "batch_rows_left": [({}, figures.rows_left)],
        "batch_tokens_left": [({}, figures.tokens_left or 0.0)],
    }
    lines = []
    for name, values in metrics.items():
        kind = "counter" if name.endswith("_total") else "gauge"
        lines.append(f"# TYPE expertmesh_{name} {kind}")
        lines += [metric_line(name, {**named, **labels}, value) for labels, value in values]
    return "\n".join(lines) + "\n"
