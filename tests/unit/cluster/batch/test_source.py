"""How the input is cut, and that every row is in exactly one part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.batch import source
from cluster.batch.parts import Found, Part, Plan, Planner
from cluster.batch.rows import id_of, parse_line
from cluster.batch.source import PartReader, files_of, scan
from cluster.batch.storage import Place
from protos.errors import ConfigurationError, InvalidFieldError


def place(path: Path | str) -> Place:
    return Place.of(str(path), "input")


@settings(max_examples=100, deadline=None)
@given(
    files=st.lists(st.lists(st.integers(0, 9), max_size=12), min_size=1, max_size=4),
    part_rows=st.integers(1, 5),
    limit=st.one_of(st.none(), st.integers(1, 30)),
)
def test_parts_cover_every_row_once(
    files: list[list[int]], part_rows: int, limit: int | None
) -> None:
    planner = Planner(part_rows=part_rows, limit=limit)
    for number, ids in enumerate(files):
        rows = [Found(f"id{i}", at, at + 1) for at, i in enumerate(ids)]
        planner.add_file(f"f{number}", rows)
    flat = [(f"f{n}", at, i) for n, ids in enumerate(files) for at, i in enumerate(ids)][:limit]
    covered = [
        (part.path, at, part.first_row + at - part.start)
        for part in planner.parts
        for at in range(part.start, part.stop)
    ]
    assert covered == [(path, at, row) for row, (path, at, _) in enumerate(flat)]
    assert [part.number for part in planner.parts] == list(range(len(planner.parts)))
    assert all(1 <= part.num_rows <= part_rows for part in planner.parts)
    duplicates = {row for part in planner.parts for row in part.duplicates}
    ids = [i for _, _, i in flat]
    assert duplicates == {row for row, i in enumerate(ids) if i in ids[:row]}
    for part in planner.parts:
        assert Part.from_json(part.to_json()) == part


def test_lines_are_found_across_read_blocks_and_blank_ones_are_no_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "READ_BYTES", 7)
    lines = [json.dumps({"custom_id": f"r{i}", "prompt": "x" * i}) for i in range(6)]
    lines[3] = "no json"
    file = tmp_path / "in.jsonl"
    file.write_text("\n\n".join(lines[:4]) + "\r\n" + "\n".join(lines[4:]))  # no last line feed
    kind, plan = scan(place(file), id_field="custom_id", part_rows=4, limit=None)
    assert (kind, plan.num_rows, [part.num_rows for part in plan.parts]) == ("jsonl", 6, [4, 2])
    reader = PartReader(place(file), kind)
    read = [line for part in plan.parts for line in reader.read(part)]
    assert [line.strip().decode() for line in read] == lines  # type: ignore[union-attr]


def test_a_folder_of_tables_is_read_in_row_ranges(tmp_path: Path) -> None:
    for name, start in (("b.parquet", 10), ("a.parquet", 0)):
        ids = [f"r{i}" for i in range(start, start + 10)]
        table = pa.table({"custom_id": ids, "prompt": ["p"] * 10, "max_tokens": [3] * 10})
        pq.write_table(table, tmp_path / name, row_group_size=4)
    (tmp_path / "notes.txt").write_text("not ours")
    kind, plan = scan(place(f"file://{tmp_path}"), id_field="custom_id", part_rows=3, limit=17)
    reader = PartReader(place(tmp_path), kind)
    rows = [row for part in plan.parts for row in reader.read(part)]
    assert [row["custom_id"] for row in rows] == [f"r{i}" for i in range(17)]  # type: ignore[index]
    assert rows[0] == {"custom_id": "r0", "prompt": "p", "max_tokens": 3}


def test_the_digest_is_of_what_is_asked(tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"

    def digest(text: str, limit: int | None = None) -> str:
        file.write_text(text)
        return scan(place(file), id_field="custom_id", part_rows=2, limit=limit)[1].digest

    assert digest('{"a": 1}\n{"a": 2}\n') != digest('{"a": 1}\n{"a": 3}\n')
    assert digest('{"a": 1}\n{"a": 2}\n', 1) == digest('{"a": 1}\n{"a": 3}\n', 1)


def test_what_is_no_input(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="input must exist"):
        files_of(place(tmp_path / "none.jsonl"))
    with pytest.raises(ConfigurationError, match=r"must be one kind of files \(\.jsonl"):
        files_of(place(tmp_path))
    with pytest.raises(ConfigurationError, match="must be a path or URI"):
        place("nowhere://x/y")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ConfigurationError, match="must have at least one row"):
        scan(place(tmp_path), id_field="custom_id", part_rows=2, limit=None)
    (tmp_path / "x.parquet").write_text("no table")
    with pytest.raises(ConfigurationError, match="must be one kind of files"):
        files_of(place(tmp_path))
    with pytest.raises(ConfigurationError, match="must be readable"):
        scan(place(tmp_path / "x.parquet"), id_field="custom_id", part_rows=2, limit=None)


def jsonl(file: Path, content: bytes, part_rows: int = 100) -> tuple[Plan, list[bytes]]:
    """Return how a JSONL file is cut, and its rows as a client reads them."""
    file.write_bytes(content)
    kind, plan = scan(place(file), id_field="custom_id", part_rows=part_rows, limit=None)
    reader = PartReader(place(file), kind)
    return plan, [row for part in plan.parts for row in reader.read(part)]  # type: ignore[misc]


def test_odd_lines_are_rows_all_the_same(tmp_path: Path) -> None:
    lines = [
        b'\xef\xbb\xbf{"custom_id": "bom"}',
        b'{"custom_id": "crlf"}\r',
        b"  \t\r",  # none
        b"",  # none
        b'{"custom_id": "\xff\xfe"}',  # no UTF-8
        b'{"custom_id": "crlf"}',  # once more
        b"\x00",
        b'{"custom_id": 7}',
        b'{"custom_id": "7"}',  # once more
        b'{"custom_id": "long", "prompt": "' + b"x" * (9 << 20) + b'"}',
    ]
    plan, rows = jsonl(tmp_path / "in.jsonl", b"\n".join(lines), part_rows=3)
    assert plan.num_rows == len(rows) == 8
    assert [line.strip() for line in rows] == [line.strip() for line in lines if line.strip()]
    assert [row for part in plan.parts for row in part.duplicates] == [3, 6]
    assert parse_line(rows[0]) == {"custom_id": "bom"}


def test_input_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    plan, _ = jsonl(file, b'{"custom_id": "a"}\n{"custom_id": "b"}\n')
    file.write_bytes(b'{"custom_id": "a"}\n\n\n')
    with pytest.raises(ConfigurationError, match="must not change while it is read: 2 rows"):
        PartReader(place(file), "jsonl").read(plan.parts[0])


def test_the_digest_tells_which_file_a_row_is_in(tmp_path: Path) -> None:
    def digest(*files: str) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for number, text in enumerate(files):
            (folder / f"{number}.jsonl").write_text(text)
        return scan(place(folder), id_field="custom_id", part_rows=9, limit=None)[1].digest

    assert digest("1\n2\n", "3\n") == digest("1\n2\n", "3\n")
    assert digest("1\n2\n", "3\n") != digest("1\n", "2\n3\n")


@pytest.mark.parametrize(
    ("values", "kind", "ids"),
    [
        (["a", None, "a", "b"], pa.large_string(), ["a", None, "a", "b"]),
        ([5, None, 5, 6], pa.int32(), ["5", None, "5", "6"]),
        ([2**64 - 1, 0, 0, 1], pa.uint64(), [str(2**64 - 1), "0", "0", "1"]),
        (["a", None, "a", "b"], pa.dictionary(pa.int8(), pa.string()), ["a", None, "a", "b"]),
        ([b"a", b"b", b"a", None], pa.binary(), [None] * 4),
        ([1.5, 2.0, 1.5, None], pa.float64(), [None] * 4),
        ([None] * 4, pa.null(), [None] * 4),
    ],
)
def test_ids_of_tables_are_text_or_whole_numbers(
    tmp_path: Path, values: list[Any], kind: pa.DataType, ids: list[str | None]
) -> None:
    columns = {"name": pa.array(values, type=kind), "prompt": ["p"] * 4}
    pq.write_table(pa.table(columns), tmp_path / "in.parquet", row_group_size=3)
    found, plan = scan(place(tmp_path), id_field="name", part_rows=3, limit=None)
    rows = [row for part in plan.parts for row in PartReader(place(tmp_path), found).read(part)]
    assert [_id_of(row) for row in rows] == ids
    duplicates = {row for part in plan.parts for row in part.duplicates}
    assert duplicates == {n for n, i in enumerate(ids) if i is not None and i in ids[:n]}


def _id_of(row: Any) -> str | None:
    try:
        return id_of(row, "name")
    except InvalidFieldError:
        return None


def test_a_table_without_the_column_of_ids_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": [1], "prompt": ["p"]}), tmp_path / "in.parquet")
    with pytest.raises(
        ConfigurationError, match=r"id_column must be a column of .* \(id, prompt\)"
    ):
        scan(place(tmp_path), id_field="custom_id", part_rows=3, limit=None)
