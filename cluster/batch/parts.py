"""Cuts the input into parts: what is asked, committed and, after a crash, repeated as one.

The cut depends on the input and on `part_rows` alone, so a run that goes on finds the same parts. A
part never spans two files. Of rows with one id the first is asked; the later ones fail.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Consecutive rows of one file."""

    number: int
    path: str
    """Of the file, in the input's file system."""
    start: int
    """First byte of a JSONL part; first row of a table's."""
    stop: int
    """Behind the last one."""
    first_row: int
    """Number of the first row, in the whole input."""
    num_rows: int
    duplicates: tuple[int, ...] = ()
    """Numbers of the rows whose id an earlier row has."""

    def to_json(self) -> str:
        """Return it as text, for the journey to a client."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Part:
        """Return what `to_json` described."""
        values = json.loads(text)
        return cls(**{**values, "duplicates": tuple(values["duplicates"])})


@dataclass(frozen=True, slots=True)
class Found:
    """A row that the scan of a file met."""

    row_id: str | None
    """None: it has none; asking it will say why."""
    start: int
    """As in `Part`."""
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The whole input, cut."""

    parts: tuple[Part, ...]
    num_rows: int
    digest: str
    """Of the input's bytes, as far as they were read."""


@dataclass(slots=True)
class Planner:
    """Takes the rows of all files, in order, and cuts.

    Args:
        part_rows: Most rows of a part.
        limit: Most rows in all; None: all there are.
    """

    part_rows: int
    limit: int | None = None
    num_rows: int = 0
    _parts: list[Part] = field(default_factory=list)
    _seen: set[bytes] = field(default_factory=set)

    @property
    def is_full(self) -> bool:
        """Whether `limit` is reached."""
        return self.limit is not None and self.num_rows >= self.limit

    @property
    def parts(self) -> Sequence[Part]:
        """What was cut so far."""
        return self._parts

    def add_file(self, path: str, rows: Iterable[Found]) -> None:
        """Cut the rows of one file; stops reading at the limit."""
        pending: list[Found] = []
        duplicates: list[int] = []
        for found in rows:
            if self.is_full:
                break
            if self._is_duplicate(found.row_id):
                duplicates.append(self.num_rows)
            pending.append(found)
            self.num_rows += 1
            if len(pending) == self.part_rows:
                self._cut(path, pending, duplicates)
                pending, duplicates = [], []
        if pending:
            self._cut(path, pending, duplicates)

    def _is_duplicate(self, row_id: str | None) -> bool:
        if row_id is None:
            return False
        key = hashlib.blake2b(row_id.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if key in self._seen:
            return True
        self._seen.add(key)
        return False

    def _cut(self, path: str, rows: list[Found], duplicates: list[int]) -> None:
        self._parts.append(
            Part(
                number=len(self._parts),
                path=path,
                start=rows[0].start,
                stop=rows[-1].stop,
                first_row=self.num_rows - len(rows),
                num_rows=len(rows),
                duplicates=tuple(duplicates),
            )
        )
