"""What the autoscaler and Prometheus are told of the batches that `serve` runs."""

from __future__ import annotations

from dataclasses import replace

from cluster.autoscale_batches import BatchWork
from cluster.batch.figures import BatchFigures, BatchTally, batch_metrics_text, tokens_left
from router.state.batch_records import BatchProgress, BatchRecord, BatchState
from tests.unit.cluster.batch.test_job import record
from tests.unit.cluster.test_metrics import LINE

KEY, OTHER = ("", "batch-a"), ("team", "batch-b")


def batch(**progress: int) -> BatchRecord:
    return replace(record(), progress=BatchProgress(**progress))


def test_the_rest_is_rows_left_times_tokens_a_row() -> None:
    begun = batch(rows_total=100, rows_done=40, prompt_tokens=400, completion_tokens=600)
    assert tokens_left([]) is None
    # 60 rows left of 25 tokens each.
    assert tokens_left([begun]) == 1500
    # 10 rows of another that has none done: 25 tokens each, too.
    assert tokens_left([begun, batch(rows_total=10)]) == 1750
    # One whose rows nobody has counted is a row at least, and work even alone.
    assert tokens_left([begun, batch()]) == 1525
    assert tokens_left([batch()]) == 1
    assert tokens_left([batch(rows_total=4, rows_done=4, prompt_tokens=40)]) == 0


def test_what_is_done_here_only_grows() -> None:
    tally = BatchTally()

    def take(key: tuple[str, str], done: int, failed: int = 0, starts: int = 1) -> BatchFigures:
        progress = BatchProgress(rows_done=done, rows_failed=failed, prompt_tokens=10 * done)
        tally.take(key, progress, starts)
        return tally.figures([], 0)

    assert take(KEY, 40, 2).rows_done == 0, "what another process did is that process's"
    assert take(KEY, 50, 3).rows_done == 10
    # A new driver counts anew from what it finds, and then goes on.
    assert take(KEY, 45, 3, starts=2).rows_done == 10
    assert take(KEY, 52, 4, starts=2).rows_done == 12
    take(OTHER, 0, starts=0)
    found = take(OTHER, 5, 5)
    assert (found.rows_done, found.rows_failed, found.prompt_tokens) == (17, 7, 170)
    assert found.driver_starts == 2
    tally.forget(OTHER, BatchState.IN_PROGRESS)
    tally.forget(KEY, BatchState.COMPLETED)
    take(KEY, 60)
    assert tally.figures([], 0).ended == (("completed", 1),)
    assert tally.figures([], 0).rows_done == 17


def test_the_autoscaler_is_told_of_batches_that_have_not_ended() -> None:
    assert BatchFigures().work is None
    waiting = batch(rows_total=100, rows_done=40, prompt_tokens=400, completion_tokens=600)
    figures = BatchTally().figures([waiting, batch()], 1)
    assert figures.work == BatchWork(tokens_left=1525.0, tokens_done=0)
    assert (figures.running, figures.waiting, figures.rows_left) == (1, 1, 60)
    assert BatchTally().figures([waiting], 0).work is None, "another `serve` drives it"


def test_every_line_of_the_metrics_is_well_formed_and_has_a_type() -> None:
    figures = BatchFigures(
        rows_done=10, rows_failed=3, ended=(("completed", 2), ("failed", 1)), running=1
    )
    text = batch_metrics_text(figures, 'a "model"')
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(LINE.match(line) for line in lines), text
    names = {line.split("{")[0] for line in lines}
    assert names == {line.split()[2] for line in text.splitlines() if line.startswith("#")}
    model = 'model_name="a \\"model\\""'
    assert f'expertmesh_batch_rows_total{{{model},state="completed"}} 7' in lines
    assert f'expertmesh_batch_rows_total{{{model},state="failed"}} 3' in lines
    assert f'expertmesh_batches_ended_total{{{model},state="failed"}} 1' in lines
    assert f'expertmesh_batches{{{model},state="running"}} 1' in lines
