"""Reads the input: JSONL or Parquet, one file or a folder of them.

The whole input is read once to cut it (`scan`), and each part once when it is asked (`read_part`).
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from cluster.batch.parts import Found, Part, Plan, Planner
from cluster.batch.rows import checked_id, id_of, parse_line
from cluster.batch.storage import Place
from protos.errors import ConfigurationError, InvalidFieldError

Format = Literal["jsonl", "parquet"]
ENDINGS: dict[str, Format] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
READ_BYTES = 4 << 20


def files_of(place: Place) -> tuple[Format, list[str]]:
    """Return the input's format and its files, in the order of their names.

    Raises:
        ConfigurationError: There is no file of a known format, or there are both.
    """
    info = place.filesystem.get_file_info(place.path)
    if info.type == fs.FileType.NotFound:
        raise ConfigurationError("input", "must exist", place.uri)
    paths = [place.path]
    if info.type == fs.FileType.Directory:
        selector = fs.FileSelector(place.path, recursive=True)
        found = place.filesystem.get_file_info(selector)
        paths = sorted(f.path for f in found if f.type == fs.FileType.File and _format(f.path))
    formats = {_format(path) for path in paths}
    if len(formats) != 1 or None in formats:
        rule = f"must be one kind of files ({', '.join(ENDINGS)}), and at least one"
        raise ConfigurationError("input", rule, place.uri)
    return formats.pop(), paths  # type: ignore[return-value]


def _format(path: str) -> Format | None:
    return next((kind for ending, kind in ENDINGS.items() if path.endswith(ending)), None)


def scan(place: Place, *, id_field: str, part_rows: int, limit: int | None) -> tuple[Format, Plan]:
    """Read the whole input and cut it.

    Args:
        place: File or folder.
        id_field: Field or column with the rows' ids.
        part_rows: Most rows of a part.
        limit: Most rows in all.

    Raises:
        ConfigurationError: It cannot be read, or has no rows.
    """
    kind, paths = files_of(place)
    planner = Planner(part_rows=part_rows, limit=limit)
    digest = hashlib.sha256()
    for path in paths:
        if planner.is_full:
            break
        of_file = hashlib.sha256()
        try:
            if kind == "jsonl":
                planner.add_file(path, _scan_lines(place, path, id_field, of_file))
            else:
                planner.add_file(path, _scan_table(place, path, id_field, of_file))
        except (pa.ArrowException, OSError) as error:
            raise ConfigurationError("input", f"must be readable ({error})", path) from error
        digest.update(of_file.digest())  # by file, as a part never spans two
    if not planner.num_rows:
        raise ConfigurationError("input", "must have at least one row", place.uri)
    plan = Plan(parts=tuple(planner.parts), num_rows=planner.num_rows, digest=digest.hexdigest())
    return kind, plan


def _scan_lines(place: Place, path: str, id_field: str, digest: Any) -> Iterator[Found]:
    for start, line in _lines(place, path):
        if stripped := line.strip():
            yield Found(_line_id(stripped, id_field), start, start + len(line))
        digest.update(line)  # not of a line that is beyond the limit


def _line_id(line: bytes, id_field: str) -> str | None:
    try:
        return id_of(parse_line(line), id_field)
    except InvalidFieldError:
        return None


def _lines(place: Place, path: str) -> Iterator[tuple[int, bytes]]:
    """Yield every line with its end, and where it begins."""
    start = 0
    with place.filesystem.open_input_stream(path, compression=None) as stream:
        for line in io.BufferedReader(stream, READ_BYTES):
            yield start, line
            start += len(line)


def _scan_table(place: Place, path: str, id_field: str, digest: Any) -> Iterator[Found]:
    with place.filesystem.open_input_stream(path, compression=None) as stream:
        while block := stream.read(READ_BYTES):
            digest.update(block)
    position = 0
    with place.filesystem.open_input_file(path) as file:
        table = pq.ParquetFile(file)
        if id_field not in table.schema_arrow.names:
            rule = f"must be a column of the input ({', '.join(table.schema_arrow.names)[:200]})"
            raise ConfigurationError("id_column", rule, id_field)
        for batch in table.iter_batches(columns=[id_field]):
            for value in batch.column(0).to_pylist():
                yield Found(_table_id(value, id_field), position, position + 1)
                position += 1


def _table_id(value: Any, id_field: str) -> str | None:
    try:
        return checked_id(value, id_field)
    except InvalidFieldError:
        return None


class PartReader:
    """Reads parts; keeps the piece of a table that the last one was in.

    Args:
        place: The input.
        kind: Its format.
    """

    def __init__(self, place: Place, kind: Format) -> None:
        self._place = place
        self._kind = kind
        self._kept: tuple[tuple[str, int], pa.Table] | None = None

    def read(self, part: Part) -> list[bytes] | list[dict[str, Any]]:
        """Return a part's rows: lines of a JSONL file, or a table's rows by column.

        Raises:
            ConfigurationError: The input is not what it was when it was cut.
        """
        rows = self._read_lines(part) if self._kind == "jsonl" else self._read_table(part)
        if len(rows) != part.num_rows:
            rule = f"must not change while it is read: {part.num_rows} rows were there"
            raise ConfigurationError("input", rule, f"{len(rows)} rows")
        return rows

    def _read_lines(self, part: Part) -> list[bytes]:
        with self._place.filesystem.open_input_file(part.path) as file:
            content: bytes = file.read_at(part.stop - part.start, part.start)
        return [line for line in content.split(b"\n") if line.strip()]

    def _read_table(self, part: Part) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        with self._place.filesystem.open_input_file(part.path) as file:
            table = pq.ParquetFile(file)
            begin = 0
            for group in range(table.num_row_groups):
                end = begin + table.metadata.row_group(group).num_rows
                first, last = max(part.start, begin), min(part.stop, end)
                if first < last:
                    piece = self._row_group(table, part.path, group)
                    rows += piece.slice(first - begin, last - first).to_pylist()
                begin = end
        return rows

    def _row_group(self, table: pq.ParquetFile, path: str, group: int) -> pa.Table:
        key = (path, group)
        if self._kept is None or self._kept[0] != key:
            self._kept = (key, table.read_row_group(group))
        return self._kept[1]
