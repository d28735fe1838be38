"""What the output folder says is done, whatever died between two writes."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from cluster.batch import storage
from cluster.batch.identity import Identity, identity_of
from cluster.batch.ledger import DONE, JOB, Ledger
from cluster.batch.outcomes import Counts, Outcome, refused
from cluster.batch.rows import RowDefaults
from cluster.batch.source import Format
from cluster.batch.status import folder_status, list_folders
from cluster.batch.storage import TEMPORARY, Place
from protos.errors import BatchChangedError, ConfigurationError, InvalidFieldError
from protos.v1 import generation_pb2

USAGE = {"prompt_tokens": 3, "completion_tokens": 2}
BODY = {"choices": [{"text": "hi\u2028", "finish_reason": "stop"}], "usage": USAGE}
GOOD = Outcome(number=0, custom_id="a", response={"status_code": 200, "body": BODY}, **USAGE)
BAD = refused(1, None, InvalidFieldError("row", "must be JSON", "{"))
JOB_DOCUMENT: dict[str, Any] = {"config_hash": "c", "input": "in", "identity": {}}


def ledger(path: Path, kind: Format = "jsonl") -> Ledger:
    return Ledger(Place.of(str(path), "output"), kind)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_part_is_done_once_its_file_is_there(tmp_path: Path, kind: Format) -> None:
    own = ledger(tmp_path, kind)
    assert own.begun_with() is None
    own.begin(JOB_DOCUMENT)
    own.try_part(3)
    committed = own.commit(3, [GOOD, BAD])
    assert committed.counts == Counts(rows=2, failed=1, prompt_tokens=3, completion_tokens=2)
    assert own.done() == {3: committed}
    (tmp_path / DONE / "00000003.json").unlink()  # the writer died before its note
    assert own.done() == {3: committed}
    assert ledger(tmp_path, kind).begun_with() == JOB_DOCUMENT


def test_a_part_committed_twice_is_there_once(tmp_path: Path) -> None:
    own = ledger(tmp_path)
    own.begin(JOB_DOCUMENT)
    for _ in range(2):
        own.try_part(0)
        own.commit(0, [GOOD, BAD])
    [file] = tmp_path.glob("part-*")
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    assert [(line["row"], line["custom_id"]) for line in lines] == [(0, "a"), (1, None)]
    assert lines[0]["error"] is lines[1]["response"] is None
    assert lines[1]["error"] == {
        "code": "INVALID_ARGUMENT",
        "reason": "INVALID_FIELD",
        "message": 'invalid request: row must be JSON, got "{"',
    }
    manifest = own.finish(JOB_DOCUMENT, list(own.done().values()))
    assert own.manifest() == manifest
    assert (manifest["rows"], manifest["failed"], manifest["parts_repeated"]) == (2, 1, 1)


def test_what_a_crashed_writer_left_is_no_part(tmp_path: Path) -> None:
    own = ledger(tmp_path)
    own.begin(JOB_DOCUMENT)
    left = tmp_path / f"{TEMPORARY}part-00000000.jsonl-12"
    left.write_text("{")
    assert own.done() == {}
    assert left.exists(), "its writer may live"
    os.utime(left, (1, 1))
    assert own.done() == {}
    assert not left.exists()


def test_a_noted_part_whose_file_is_gone_is_not_done(tmp_path: Path) -> None:
    own = ledger(tmp_path)
    own.begin(JOB_DOCUMENT)
    part = own.commit(0, [GOOD, BAD])
    assert own.committed(0) == part
    (tmp_path / part.file).unlink()
    assert (own.committed(0), own.done()) == (None, {})


def test_of_two_that_begin_at_once_one_does(tmp_path: Path) -> None:
    barrier = threading.Barrier(8)

    def begin(number: int) -> bool:
        own = ledger(tmp_path)
        barrier.wait(10)
        return own.begin({**JOB_DOCUMENT, "input": number})

    with ThreadPoolExecutor(8) as threads:
        begun = list(threads.map(begin, range(8)))
    assert begun.count(True) == 1
    job = ledger(tmp_path).begun_with()
    assert job is not None
    assert job["input"] == begun.index(True)
    assert [path.name for path in (tmp_path / "_batch").iterdir()] == ["job.json"]


class Killed(BaseException):
    """What a SIGKILL looks like from within: nothing behind it is done any more."""


class Disk:
    """Dies at the `dies_at`-th change of a file system, before or after it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, dies_at: int) -> None:
        self.changes = 0
        self._dies_at = dies_at
        for name in ("fsync", "replace", "link", "unlink"):
            monkeypatch.setattr(storage.os, name, self._dying(getattr(os, name)))

    def _dying(self, change: Callable[..., None]) -> Callable[..., None]:
        def changed(*arguments: Any) -> None:
            self.changes += 1
            if 2 * self.changes - 1 >= self._dies_at:
                raise Killed
            change(*arguments)
            if 2 * self.changes >= self._dies_at:
                raise Killed

        return changed


def run_parts(path: Path) -> dict[str, Any]:
    """Do what a run does with its output, for two parts of two rows."""
    own = ledger(path)
    job = own.begun_with()
    if job is None:
        own.begin(job := JOB_DOCUMENT)
    done = own.done()
    for number in range(2):
        if number not in done and own.committed(number) is None:
            own.try_part(number)
            rows = [replace(GOOD, number=2 * number), replace(BAD, number=2 * number + 1)]
            done[number] = own.commit(number, rows)
    return own.manifest() or own.finish(job, [done[number] for number in sorted(done)])


def test_every_row_is_there_once_wherever_a_run_was_killed(tmp_path: Path) -> None:
    expected = run_parts(tmp_path / "undisturbed")
    num_kills = 0
    while True:
        path = tmp_path / str(num_kills)
        with pytest.MonkeyPatch.context() as monkeypatch:
            Disk(monkeypatch, dies_at=num_kills + 1)
            try:
                run_parts(path)
                break
            except Killed:
                num_kills += 1
        found = run_parts(path)
        files = [file.read_text(encoding="utf-8") for file in sorted(path.glob("part-*"))]
        rows = [json.loads(line)["row"] for text in files for line in text.split("\n") if line]
        assert rows == list(range(4)), num_kills
        assert found["parts_repeated"] <= 1
        for name in ("finished_unix_s", "parts_repeated"):
            found[name] = expected[name]
        assert found == expected, num_kills
    assert num_kills > 2 * 2 * (1 + 2 * 3 + 1), "each file: before and after sync and rename"


def test_a_table_has_columns_for_readers_who_want_the_text(tmp_path: Path) -> None:
    own = ledger(tmp_path, "parquet")
    own.commit(0, [GOOD, BAD])
    [file] = tmp_path.glob("part-*.parquet")
    first, second = pq.read_table(file).to_pylist()
    assert (first["text"], first["finish_reason"], first["error_code"]) == (
        "hi\u2028",
        "stop",
        None,
    )
    assert (second["row"], second["error_reason"]) == (1, "INVALID_FIELD")


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match="output must be empty, or the output of this"):
        ledger(tmp_path).begun_with()
    assert not (tmp_path / JOB).exists()


def identity(**changes: Any) -> Identity:
    model = generation_pb2.Model(
        name="tiny", weights_digest=changes.pop("weights", "w1"), text_digest="t1"
    )
    values: dict[str, Any] = {
        "input_digest": "d1",
        "num_rows": 4,
        "input_format": "jsonl",
        "output_format": "jsonl",
        "id_field": "custom_id",
        "part_rows": 2,
        "limit": None,
        "defaults": RowDefaults(),
    }
    return identity_of(**(values | changes), model=model)


def test_going_on_with_something_else_is_refused_by_name() -> None:
    begun = json.loads(json.dumps(identity().values))
    identity().check_same(begun, "/out")
    assert identity().config_hash == identity().config_hash
    changed = identity(weights="w2", defaults=RowDefaults(temperature=0.0), input_digest="d2")
    assert changed.config_hash != identity().config_hash
    with pytest.raises(BatchChangedError) as caught:
        changed.check_same(begun, "/out")
    names = [text.split(":")[0] for text in caught.value.fields["changed"]]  # type: ignore[union-attr]
    assert names == ["input.digest", "model.weights", "sampling.defaults"]
    assert 'model.weights: begun with "w1", now "w2"' in caught.value.message


def test_folders_tell_the_state_of_their_batches(tmp_path: Path) -> None:
    job = {**JOB_DOCUMENT, "identity": {"input.rows": 4}, "num_parts": 2}
    for name in ("a", "b", "c"):
        own = ledger(tmp_path / name)
        own.begin(job)
        own.try_part(0)
        own.commit(0, [GOOD, BAD])
    ledger(tmp_path / "b").cancel()
    own.finish(job | {"config_hash": "c"}, list(own.done().values()))
    (tmp_path / "other").mkdir()
    found = list_folders(f"file://{tmp_path}")
    assert [(one["output"][-1], one["state"]) for one in found] == [
        ("a", "in_progress"),
        ("b", "cancelled"),
        ("c", "completed"),
    ]
    assert (found[0]["rows"], found[0]["failed"], found[0]["total"]) == (2, 1, 4)
    ledger(tmp_path / "b").go_on()
    assert folder_status(str(tmp_path / "b"))["state"] == "in_progress"
    with pytest.raises(ConfigurationError, match="output must be the output folder of a batch"):
        folder_status(str(tmp_path / "other"))
