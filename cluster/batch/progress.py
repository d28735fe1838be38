"""How far a batch is: a bar on a terminal, one JSON line every ten seconds without one."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from cluster.batch.outcomes import Counts
from protos.client import Client
from protos.errors import ExpertMeshError

LINE_INTERVAL_S = 10.0
BAR_INTERVAL_S = 1.0


class Meter:
    """Counts what this run has done; pure but for the clock.

    Args:
        total: Rows of the whole batch.
        before: What earlier runs did.
        clock: Monotonic seconds.
    """

    def __init__(
        self, total: int, before: Counts, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._total = total
        self._before = before
        self._run = Counts()
        self._clock = clock
        self._begun = clock()

    def add(self, counts: Counts) -> None:
        """Take a committed part."""
        self._run += counts

    @property
    def counts(self) -> Counts:
        """Of all runs."""
        return self._before + self._run

    @property
    def is_whole(self) -> bool:
        """Whether no row is left."""
        return self.counts.rows >= self._total

    def document(self) -> dict[str, Any]:
        """Return the numbers: rates are of this run, None before its first part."""
        elapsed_s = self._clock() - self._begun
        done, run = self.counts, self._run
        per_s = run.rows / elapsed_s if elapsed_s > 0 else 0.0
        left = self._total - done.rows
        return {
            "rows": done.rows,
            "total": self._total,
            "failed": done.failed,
            "prompt_tokens": done.prompt_tokens,
            "completion_tokens": done.completion_tokens,
            "tokens_per_s": round(run.completion_tokens / elapsed_s, 1) if run.rows else None,
            "eta_s": round(left / per_s) if per_s else None,
            "elapsed_s": round(elapsed_s, 1),
        }


class Numbers(Protocol):
    """What a report shows."""

    def document(self) -> dict[str, Any]:
        """Return the numbers; see `Meter.document`."""
        ...


class ProgressReport:
    """Shows a batch until its `with` block ends.

    Args:
        meter: What to show.
        console: Where.
        client: Tells how many expert groups serve.
    """

    def __init__(self, meter: Numbers, console: Console, client: Client) -> None:
        self._meter = meter
        self._console = console
        self._client = client
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._show, name="progress", daemon=True)

    def __enter__(self) -> ProgressReport:
        self._thread.start()
        return self

    def __exit__(self, *ended: object) -> None:
        self._ended.set()
        self._thread.join()

    def _show(self) -> None:
        if self._console.is_terminal:
            self._show_bar()
            return
        while not self._ended.wait(LINE_INTERVAL_S):
            self._print_line()
        self._print_line()

    def _print_line(self) -> None:
        line = json.dumps({**self._meter.document(), "groups": self._num_groups()})
        self._console.print(line, markup=False)

    def _show_bar(self) -> None:
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
        with Progress(*columns, console=self._console) as bar:
            shown = self._meter.document()
            task = bar.add_task("", total=shown["total"])
            asked_at, groups = 0.0, None
            while True:
                is_last = self._ended.wait(BAR_INTERVAL_S)
                if time.monotonic() - asked_at > LINE_INTERVAL_S:
                    asked_at, groups = time.monotonic(), self._num_groups()
                shown = self._meter.document()
                bar.update(task, completed=shown["rows"], description=_words(shown, groups))
                if is_last:
                    return

    def _num_groups(self) -> int | None:
        with suppress(ExpertMeshError):
            return sum(group.state == "READY" for group in self._client.status().groups)
        return None


def _words(shown: dict[str, Any], groups: int | None) -> str:
    rate = "-" if shown["tokens_per_s"] is None else f"{shown['tokens_per_s']:.0f}"
    eta = "-" if shown["eta_s"] is None else f"{shown['eta_s']} s"
    known = "?" if groups is None else groups
    return f"failed {shown['failed']}  {rate} tok/s  ETA {eta}  groups {known}"
