"""A batch over a real service, cut off by SIGKILL and run again: every row exactly once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.eventually import eventually
from tests.integration.batches import BatchRun, answer_undisturbed, rows_of, write_input
from tests.integration.served import Served, run_cli

pytestmark = pytest.mark.timeout(400)

NUM_ROWS = 60
PART_ROWS = 5
POISON = (7, 31, 44)
FLAGS = ("--part-rows", str(PART_ROWS), "--clients", "1", "--concurrency", "2")
IN_FLIGHT = 2
"""Parts of one client."""


def test_a_batch_survives_its_driver_and_its_client(served: Served, tmp_path: Path) -> None:
    file, out = tmp_path / "in.jsonl", tmp_path / "out"
    write_input(file, NUM_ROWS, POISON, max_tokens=60)

    with BatchRun(file, out, served.address, *FLAGS) as killed:
        eventually(lambda: killed.num_parts >= 2, timeout_s=150)
        killed.kill()
    num_committed = len(list(out.glob("part-*.jsonl")))
    assert 2 <= num_committed < NUM_ROWS // PART_ROWS
    assert not (out / "manifest.json").exists()
    status = run_cli("batch", "status", str(out), "--json")
    shown = json.loads(status.stdout)
    assert (shown["state"], shown["total"], shown["parts"]) == ("in_progress", NUM_ROWS, 12)

    changed = run_cli(
        *("batch", "run", "-i", str(file), "-o", str(out), "--url", served.address, *FLAGS),
        *("--temperature", "0.1"),
    )
    assert changed.returncode == 3
    assert "sampling.defaults: begun with" in changed.stderr

    with BatchRun(file, out, served.address, *FLAGS) as resumed:
        eventually(lambda: resumed.num_parts > num_committed, timeout_s=150)
        [client] = resumed.clients()
        client.kill()
        code, result, err = resumed.wait(200)
    assert code == 5, err  # the poison rows
    assert (result["state"], result["rows"], result["failed"]) == ("completed", NUM_ROWS, 3)
    assert result["parts_repeated"] <= 2 * IN_FLIGHT
    assert [json.loads(line)["total"] for line in err.splitlines() if line[:1] == "{"]

    expected = answer_undisturbed(file, tmp_path / "undisturbed", served.address, "tiny")
    assert [row["row"] for row in rows_of(out)] == list(range(NUM_ROWS))
    assert rows_of(out) == expected
    assert [row["row"] for row in expected if row["error"]] == list(POISON)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["completion_tokens"] == sum(
        row["response"]["body"]["usage"]["completion_tokens"] for row in expected if row["response"]
    )

    again = run_cli(
        "batch", "run", "-i", str(file), "-o", str(out), "--url", served.address, *FLAGS
    )
    assert again.returncode == 5
    assert rows_of(out) == expected


def test_a_dry_run_counts_and_writes_nothing(served: Served, tmp_path: Path) -> None:
    file, out = tmp_path / "in.jsonl", tmp_path / "out"
    write_input(file, 20, (3,), max_tokens=8)
    answer = run_cli(
        *("batch", "run", "-i", str(file), "-o", str(out), "--url", served.address),
        *("--dry-run", "--price-per-million", "2", "--json"),
    )
    assert answer.returncode == 0, answer.stderr
    shown = json.loads(answer.stdout)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    prompts = sum(len(row["body"]["prompt"]) for row in rows)
    outputs = sum(row["body"]["max_tokens"] for row in rows)
    assert (shown["rows"], shown["sampled_rows"], shown["prompt_tokens"]) == (20, 20, prompts)
    assert shown["max_completion_tokens"] == outputs
    assert shown["max_price"] == pytest.approx((prompts + outputs) * 2e-6, abs=1e-4)
    assert shown["measured_tokens_per_s"] > 0
    assert not out.exists()


def test_status_needs_a_batch(tmp_path: Path) -> None:
    answer = run_cli("batch", "status", str(tmp_path), "--json")
    assert answer.returncode == 3
    assert "must be the output folder of a batch" in answer.stderr
