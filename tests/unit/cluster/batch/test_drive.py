"""What a run checks before its first row and after its last."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.batch.drive import _check_apart, _check_whole, _usable
from cluster.batch.ledger import DonePart, Ledger
from cluster.batch.outcomes import Counts
from cluster.batch.parts import Part, Plan
from cluster.batch.storage import Place
from protos.errors import ConfigurationError, InternalError


def place(path: Path | str) -> Place:
    return Place.of(str(path), "x")


def test_an_output_in_the_input_would_be_read_as_rows(tmp_path: Path) -> None:
    file = tmp_path / "in" / "a.jsonl"
    file.parent.mkdir()
    file.touch()
    for source, output in (
        (file.parent, file.parent),
        (file.parent, file.parent / "out"),
        (file.parent, f"file://{file.parent}/deep/out/"),
        (file, file),
    ):
        with pytest.raises(ConfigurationError, match="output must not be the input"):
            _check_apart(place(source), place(output))
    for output in (tmp_path / "in2", tmp_path / "out"):
        _check_apart(place(file.parent), place(output))
    _check_apart(place(file), place(file.parent / "out"))
    with pytest.raises(ConfigurationError, match="output must be a folder, not a file"):
        _check_apart(place(tmp_path / "other.jsonl"), place(file))


@pytest.mark.parametrize("output", ["{file}/out", "/proc/nothing", "/dev/null"])
def test_an_output_that_cannot_be_written_is_the_configurations_fault(
    tmp_path: Path, output: str
) -> None:
    (tmp_path / "file").touch()
    uri = output.format(file=tmp_path / "file")
    ledger = Ledger(place(uri), "jsonl")

    def begin() -> None:
        with _usable(uri):
            ledger.begun_with()
            ledger.begin({})

    with pytest.raises(ConfigurationError, match="output must be a folder that can be written"):
        begin()


def test_a_manifest_needs_every_row(tmp_path: Path) -> None:
    parts = tuple(
        Part(number=n, path="p", start=0, stop=1, first_row=2 * n, num_rows=2) for n in range(2)
    )
    plan = Plan(parts=parts, num_rows=4, digest="d")

    def done(number: int, rows: int) -> DonePart:
        return DonePart(number=number, file="f", sha256="s", counts=Counts(rows=rows))

    _check_whole(plan, {0: done(0, 2), 1: done(1, 2)})
    with pytest.raises(InternalError, match="part 1 has 0 rows, 2 are due"):
        _check_whole(plan, {0: done(0, 2)})
    with pytest.raises(InternalError, match="part 0 has 3 rows, 2 are due"):
        _check_whole(plan, {0: done(0, 3), 1: done(1, 2)})
