"""Batches for tests and benchmarks: their input, a run that may be killed, what came out."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from cluster.batch.asker import AskerSettings
from cluster.batch.rows import RowDefaults
from cluster.batch.source import scan
from cluster.batch.storage import Place
from cluster.batch.worker import PartWorker, WorkerSettings
from protos.tls import Access
from tests.benchmarks.harness import process_tree
from tests.integration.served import ROOT, clean_environment, running_after

CLIENT = "PartClient"
"""Part of the title of a client actor's process."""


def write_input(file: Path, num_rows: int, poison: Sequence[int], max_tokens: int) -> None:
    """Write rows of token ids, half of them sampled; the `poison` ones cannot be answered."""
    rng = random.Random(17)
    lines = []
    for number in range(num_rows):
        prompt = [rng.randrange(1, 90) for _ in range(rng.randrange(4, 24))]
        body: dict[str, Any] = {
            "prompt": prompt,
            "max_tokens": rng.randrange(max_tokens // 2, max_tokens + 1),
            "temperature": 0.8 if number % 2 else 0.0,
            "ignore_eos": True,
        }
        line = json.dumps({"custom_id": f"row-{number}", "body": body})
        if number in poison:
            body["max_tokens"] = 10**6
            bad = json.dumps({"custom_id": f"row-{number}", "body": body})
            line = [bad, "{", '{"body": {}}'][poison.index(number) % 3]
        lines.append(line)
    file.write_text("\n".join(lines) + "\n")


def rows_of(output: Path) -> list[dict[str, Any]]:
    """Return all rows of an output folder, by number, without what differs between runs."""
    rows = []
    for file in sorted(output.glob("part-*.jsonl")):
        for text in file.read_text(encoding="utf-8").split("\n"):
            if text:
                row = json.loads(text)
                if row["response"]:
                    del row["response"]["request_id"]
                rows.append(row)
    return sorted(rows, key=lambda row: int(row["row"]))


def answer_undisturbed(
    file: Path,
    output: Path,
    address: str,
    model: str,
    concurrency: int = 16,
    access: Access | None = None,
) -> list[dict[str, Any]]:
    """Return the rows that a batch without Ray and without accidents gives."""
    worker = PartWorker(
        WorkerSettings(
            input_uri=str(file),
            input_format="jsonl",
            output_uri=str(output),
            output_format="jsonl",
            id_field="custom_id",
            defaults=RowDefaults(),
            asker=AskerSettings(
                addresses=(address,),
                access=access or Access(),
                model=model,
                concurrency=concurrency,
            ),
        )
    )
    place = Place.of(str(file), "input")
    for part in scan(place, id_field="custom_id", part_rows=256, limit=None)[1].parts:
        worker.run(part)
    worker.close()
    return rows_of(output)


class BatchRun:
    """`expertmesh batch run` in a process that may be killed."""

    def __init__(self, file: Path, output: Path, address: str, *flags: str) -> None:
        self.output = output
        self.was_killed = False
        words = ("batch", "run", "-i", str(file), "-o", str(output), "--url", address, *flags)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "cluster.cli", *words, "--json"],
            cwd=ROOT,
            env=clean_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> BatchRun:
        return self

    def __exit__(self, *ended: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()

    @property
    def has_ended(self) -> bool:
        """Whether the driver is gone, well or not."""
        return self._process.poll() is not None

    @property
    def num_parts(self) -> int:
        """Parts that are committed; fails where the run has ended."""
        assert self._process.poll() is None, self._process.communicate()
        return len(list(self.output.glob("part-*.jsonl")))

    def clients(self) -> list[psutil.Process]:
        """Return the processes of the client actors."""
        found = []
        for process in process_tree(self._process.pid):
            try:
                if CLIENT in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    def kill(self) -> None:
        """SIGKILL the driver, and wait until nothing is left of it."""
        self.was_killed = True
        family = psutil.Process(self._process.pid).children(recursive=True)
        self._process.kill()
        self._process.communicate()
        assert running_after(family, timeout_s=30) == []

    def wait(self, timeout_s: float) -> tuple[int, dict[str, Any], str]:
        """Return exit code, result and stderr."""
        try:
            out, err = self._process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise
        return self._process.returncode, json.loads(out) if out else {}, err
