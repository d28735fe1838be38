"""What is done: the output folder is its own ledger.

    OUT/part-00000012.jsonl         rows of part 12, committed whole
    OUT/manifest.json               written last: counts, tokens, config hash, the parts
    OUT/_batch/job.json             what the batch is (`identity`), written before the first part
    OUT/_batch/done/00000012.json   counts of part 12; rebuilt from the part where it is missing
    OUT/_batch/tries/00000012-ab12  one for each time that part 12 was begun
    OUT/_batch/cancelled            asks a running batch to stop; the next run removes it

A part's file is the commit. Its name depends on the part alone, so a part that was asked twice (two
drivers, a client that was taken for dead) is still there once.
"""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.batch.outcomes import Counts, Outcome, to_columns, to_jsonl
from cluster.batch.source import Format
from cluster.batch.storage import Place, check_not_there, json_bytes

MANIFEST = "manifest.json"
JOB = "_batch/job.json"
DONE = "_batch/done"
TRIES = "_batch/tries"
CANCELLED = "_batch/cancelled"
READERS = 16
"""Notes that are read at a time: an object store takes a while for each."""
SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("custom_id", "text", "finish_reason")),
        *((name, pa.int64()) for name in ("row", "prompt_tokens", "completion_tokens")),
        *((f"error_{name}", pa.string()) for name in ("code", "reason", "message")),
        ("response", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DonePart:
    """A committed part."""

    number: int
    file: str
    sha256: str
    counts: Counts

    def document(self) -> dict[str, Any]:
        """Return it as JSON."""
        own = {"number": self.number, "file": self.file, "sha256": self.sha256}
        return {**own, **asdict(self.counts)}

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> DonePart:
        """Return what `document` described."""
        values = dict(document)
        number, file, sha256 = (values.pop(name) for name in ("number", "file", "sha256"))
        return cls(number=number, file=file, sha256=sha256, counts=Counts(**values))


class Ledger:
    """The output folder of one batch.

    Args:
        place: The folder.
        kind: Format of the parts.
    """

    def __init__(self, place: Place, kind: Format) -> None:
        self.place = place
        self._kind = kind

    @property
    def is_begun(self) -> bool:
        """Whether the folder is the output of a batch."""
        return self.place.read(JOB) is not None

    def begun_with(self) -> dict[str, Any] | None:
        """Return what `begin` wrote; None: nothing was begun here.

        Raises:
            ConfigurationError: The folder has files of somebody else.
        """
        job: dict[str, Any] | None = self.place.read_json(JOB)
        if job is None:
            check_not_there(self.place, JOB, "output")
        return job

    def begin(self, job: Mapping[str, Any]) -> bool:
        """Note what the batch is, before its first part; False: somebody else just did."""
        return self.place.create(JOB, json_bytes(dict(job)))

    @property
    def is_cancelled(self) -> bool:
        """Whether `cancel` was asked since the last run began."""
        return self.place.read(CANCELLED) is not None

    def cancel(self) -> None:
        """Ask the run to stop after the next part."""
        self.place.write(CANCELLED, b"")

    def go_on(self) -> None:
        """Take a `cancel` back."""
        if self.is_cancelled:
            self.place.filesystem.delete_file(self.place.child(CANCELLED))

    def done(self) -> dict[int, DonePart]:
        """Return the committed parts by number; deletes what crashed writers left."""
        for folder in ("", "_batch", DONE, TRIES):
            self.place.delete_temporary(folder)
        noted = {part.number: part for part in self.noted_parts()}
        found = {}
        for file in self.place.names():
            if file.startswith("part-"):
                number = int(file.split("-")[1].split(".")[0])
                found[number] = noted.get(number) or self._note(number, self._recount(file))
        return found

    def noted_parts(self) -> list[DonePart]:
        """Return the parts that are noted as committed; changes nothing."""
        numbers = [int(name.removesuffix(".json")) for name in self.place.names(DONE)]
        with ThreadPoolExecutor(READERS) as readers:
            return [part for part in readers.map(self.noted, numbers) if part is not None]

    def noted(self, number: int) -> DonePart | None:
        """Return a committed part; None: it is not committed, or its writer died just then."""
        document = self.place.read_json(f"{DONE}/{number:08d}.json")
        return None if document is None else DonePart.of(document)

    def committed(self, number: int) -> DonePart | None:
        """Return a part that is noted and there; None: it is to be asked."""
        file = Place(self.place.uri, self.place.filesystem, self.place.child(self._file(number)))
        return self.noted(number) if file.is_file else None

    def try_part(self, number: int) -> None:
        """Note that a part is begun."""
        self.place.write(f"{TRIES}/{number:08d}-{uuid.uuid4().hex[:8]}", b"")

    def num_repeated(self) -> int:
        """Return how many times a part was begun again."""
        tries = Counter(name.split("-")[0] for name in self.place.names(TRIES))
        return sum(tries.values()) - len(tries)

    def commit(self, number: int, outcomes: Sequence[Outcome]) -> DonePart:
        """Make a part's rows part of the output."""
        content = self._encode(outcomes)
        self.place.write(self._file(number), content)
        return self._note(number, (Counts.of(outcomes), hashlib.sha256(content).hexdigest()))

    def finish(self, job: Mapping[str, Any], parts: Sequence[DonePart]) -> dict[str, Any]:
        """Write the manifest and return it."""
        counts = sum((part.counts for part in parts), Counts())
        manifest = {
            "state": "completed",
            "config_hash": job["config_hash"],
            "input": job["input"],
            **asdict(counts),
            "num_parts": len(parts),
            "parts_repeated": self.num_repeated(),
            "finished_unix_s": round(time.time(), 3),
            "identity": job["identity"],
            "parts": [part.document() for part in parts],
        }
        self.place.write_json(MANIFEST, manifest)
        return manifest

    def manifest(self) -> dict[str, Any] | None:
        """Return the manifest; None: the batch has not ended."""
        found: dict[str, Any] | None = self.place.read_json(MANIFEST)
        return found

    def _file(self, number: int) -> str:
        return f"part-{number:08d}.{self._kind}"

    def _encode(self, outcomes: Sequence[Outcome]) -> bytes:
        if self._kind == "jsonl":
            return to_jsonl(outcomes)
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(to_columns(outcomes), schema=SCHEMA), sink)
        return bytes(sink.getvalue().to_pybytes())

    def _recount(self, file: str) -> tuple[Counts, str]:
        """Count a part that was committed and not noted: its writer died between the two."""
        content = self.place.read(file)
        assert content is not None
        if self._kind == "jsonl":
            counts = Counts.of([_outcome(json.loads(line)) for line in content.splitlines()])
        else:
            rows = pq.read_table(pa.BufferReader(content)).to_pylist()
            counts = Counts(
                rows=len(rows),
                failed=sum(row["error_code"] is not None for row in rows),
                prompt_tokens=sum(row["prompt_tokens"] for row in rows),
                completion_tokens=sum(row["completion_tokens"] for row in rows),
            )
        return counts, hashlib.sha256(content).hexdigest()

    def _note(self, number: int, counted: tuple[Counts, str]) -> DonePart:
        counts, sha256 = counted
        part = DonePart(number=number, file=self._file(number), sha256=sha256, counts=counts)
        self.place.write_json(f"{DONE}/{number:08d}.json", part.document())
        return part


def _outcome(document: Mapping[str, Any]) -> Outcome:
    usage = ((document["response"] or {}).get("body") or {}).get("usage") or {}
    return Outcome(
        number=document["row"],
        custom_id=document["custom_id"],
        response=document["response"],
        error=document["error"],
        prompt_tokens=usage.get("prompt_tokens", 0),
        completion_tokens=usage.get("completion_tokens", 0),
    )
