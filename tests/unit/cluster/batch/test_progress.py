"""What a run says of itself while it works, and when it has seen enough."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.batch.drive import take_parts
from cluster.batch.ledger import DonePart
from cluster.batch.options import BatchOptions
from cluster.batch.outcomes import Counts
from cluster.batch.progress import Meter
from cluster.batch.rows import RowDefaults
from cluster.ray_data import Pool
from protos.errors import ConfigurationError
from protos.tls import Access


def part(number: int, failed: int = 0) -> DonePart:
    counts = Counts(rows=10, failed=failed, prompt_tokens=100, completion_tokens=50)
    return DonePart(number=number, file=f"part-{number}", sha256="", counts=counts)


def test_rates_are_of_this_run_and_counts_of_all() -> None:
    now = [100.0]
    meter = Meter(100, Counts(rows=40, failed=1, completion_tokens=7), lambda: now[0])
    assert meter.document()["tokens_per_s"] is meter.document()["eta_s"] is None
    now[0] += 5.0
    meter.add(part(4, failed=2).counts)
    assert meter.document() == {
        "rows": 50,
        "total": 100,
        "failed": 3,
        "prompt_tokens": 100,
        "completion_tokens": 57,
        "tokens_per_s": 10.0,  # 50 tokens in 5 s
        "eta_s": 25,  # 50 rows at 2 rows a second
        "elapsed_s": 5.0,
    }


def test_a_broken_batch_stops_as_soon_as_it_cannot_come_under_its_rate() -> None:
    taken: list[int] = []

    def committed() -> Iterator[DonePart]:
        for number in range(10):
            taken.append(number)
            yield part(number, failed=2)

    done: dict[int, DonePart] = {}
    meter = Meter(100, Counts())
    assert take_parts(committed(), done, meter, 0.05 * 100, lambda: False) == "stopped"
    assert taken == [0, 1, 2]  # 6 of 100 failed
    assert sorted(done) == [0, 1, 2]
    # A run that goes on knows it before its first part.
    going_on = Meter(100, meter.counts)
    assert take_parts(committed(), {}, going_on, 5.0, lambda: False) == "stopped"
    assert taken == [0, 1, 2]
    assert take_parts(committed(), {}, Meter(100, Counts()), 20.0, lambda: False) == "completed"


def test_a_cancelled_batch_stops_after_the_part() -> None:
    done: dict[int, DonePart] = {}
    parts = (part(number) for number in range(10))
    ended = take_parts(parts, done, Meter(100, Counts()), 100.0, lambda: len(done) == 2)
    assert (ended, sorted(done)) == ("cancelled", [0, 1])


def options(**changes: object) -> BatchOptions:
    values: dict[str, object] = {
        "input_uri": "in",
        "output_uri": "out",
        "url": "x",
        "access": Access(api_key="secret"),
        "pool": Pool(min_clients=1, max_clients=1),
        "defaults": RowDefaults(),
    }
    return BatchOptions(**(values | changes))  # type: ignore[arg-type]


def test_options_survive_in_the_output_without_what_gives_access() -> None:
    begun = options(limit=5, defaults=RowDefaults(temperature=0.5))
    text = json.dumps(begun.document())
    assert "secret" not in text
    again = BatchOptions.of(json.loads(text), Access(), "y")
    assert (again.limit, again.defaults, again.pool) == (5, begun.defaults, begun.pool)
    assert again.url == "y"
    moved = BatchOptions.of(json.loads(text), Access(), None, "file:///moved")
    assert (moved.url, moved.output_uri) == ("x", "file:///moved")


def test_paths_mean_the_same_in_every_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    here = options(input_uri="rows.jsonl", output_uri="../out").located()
    assert (here.input_uri, here.output_uri) == (
        str(tmp_path / "rows.jsonl"),
        str(tmp_path.parent / "out"),
    )
    there = options(input_uri="s3://b/rows", output_uri="file:///out")
    assert there.located() == there


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_failure_rate": 1.5}, r"batch.max_failure_rate must be in \[0, 1\], got 1.5"),
        ({"part_rows": 0}, "batch.part_rows must be at least 1, got 0"),
        ({"limit": 0}, "batch.limit must be at least 1, got 0"),
        (
            {"pool": Pool(min_clients=3, max_clients=1)},
            'batch.clients must be MIN:MAX with 1 <= MIN <= MAX, got "3:1"',
        ),
    ],
)
def test_options_out_of_range_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        options(**changes)
