"""Batches that the service runs itself: every row once, whatever dies meanwhile."""

from __future__ import annotations

import json
import re
import signal
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from protos.client import Client
from protos.tls import Access
from protos.v1 import batch_pb2
from tests.benchmarks.harness import process_tree
from tests.eventually import eventually
from tests.integration.batches import answer_undisturbed, rows_of, write_input
from tests.integration.served import Served, is_running, run_cli
from tests.store_servers import StoreServer, running_store

pytestmark = pytest.mark.timeout(500)

NUM_ROWS = 40
PART_ROWS = 2
POISON = (7, 19, 31)
TEAM_KEY = "key-of-the-tenant"
DRIVER = "cluster.batch.driver"
COMPLETED = batch_pb2.BATCH_STATE_COMPLETED


@pytest.fixture
def store() -> Iterator[StoreServer]:
    with running_store() as server:
        yield server


def serve(checkpoint: Path, store: StoreServer, root: Path) -> Served:
    flags = ("--routers", "2", "--served-model-name", "dense", "--batch-root", str(root))
    environment = {"EXPERTMESH_ROUTER__API_KEYS": f"operators-key,team {TEAM_KEY}"}
    return Served(checkpoint, *flags, "--redis-url", f"unix://{store.path}", env=environment)


def process(service: Served, words: str, but_not: int = 0) -> psutil.Process:
    """Return a process of a service, once there is one."""

    def found() -> psutil.Process | None:
        for one in process_tree(service.pid):
            try:
                if words in " ".join(one.cmdline()) and one.pid != but_not and is_running(one):
                    return one
            except psutil.NoSuchProcess:
                continue
        return None

    return eventually(found, timeout_s=60)


def test_a_submitted_batch_survives_its_driver_a_router_and_serve(
    dense_checkpoint: Path, store: StoreServer, tmp_path: Path
) -> None:
    """The batch is a named tenant's: its files lie below its folder, its key asks the rows."""
    team = tmp_path / "team"
    team.mkdir()
    file, out = team / "in.jsonl", team / "out"
    write_input(file, NUM_ROWS, POISON, max_tokens=300)

    def num_parts() -> int:
        return len(list(out.glob("part-*.jsonl")))

    with serve(dense_checkpoint, store, tmp_path) as service:
        with Client(service.address, api_key=TEAM_KEY) as client:
            name = client.create_batch(
                *(str(file), str(out)), part_rows=PART_ROWS, max_clients=1, concurrency=1
            ).name
            driver, router = process(service, DRIVER), process(service, "RouterActor")
            eventually(lambda: num_parts() >= 2, timeout_s=120)
            driver.kill()
            committed = num_parts()
            process(service, DRIVER, but_not=driver.pid)
            eventually(lambda: num_parts() > committed, timeout_s=120)
            router.kill()
            committed = num_parts()
            eventually(lambda: num_parts() > committed + 1, timeout_s=120)
        service.note_processes()
        service.signal(signal.SIGKILL)
        service.wait()
        assert service.survivors(30) == []
    assert 0 < num_parts() < NUM_ROWS // PART_ROWS

    with serve(dense_checkpoint, store, tmp_path) as service:
        with Client(service.address, api_key=TEAM_KEY) as client:
            last = list(client.watch_batch(name, 0.2))[-1]
        assert (last.state, last.error.message) == (COMPLETED, "")
        assert (last.rows_total, last.rows_done, last.rows_failed) == (NUM_ROWS, NUM_ROWS, 3)
        assert last.starts >= 3
        expected = answer_undisturbed(
            file,
            tmp_path / "undisturbed",
            service.address,
            "dense",
            access=Access(api_key=TEAM_KEY),
        )
    assert rows_of(out) == expected
    assert [row["row"] for row in expected if row["error"]] == list(POISON)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["completion_tokens"] == last.completion_tokens


def test_the_command_line_submits_shows_and_cancels(served: Served, batch_root: Path) -> None:
    write_input(batch_root / "in.jsonl", 12, (3,), max_tokens=8)
    url = ("--url", served.address)
    files = ("-i", str(batch_root / "in.jsonl"), "-o")
    submit = ("batch", "submit", *files, str(batch_root / "done"), *url, "--wait", "--json")
    done = run_cli(*submit, timeout_s=200)
    assert done.returncode == 5, done.stderr  # the poison row
    shown = json.loads(done.stdout)
    assert (shown["state"], shown["rows"], shown["failed"]) == ("completed", 12, 1)
    lines = [json.loads(line) for line in done.stderr.splitlines() if line[:1] == "{"]
    assert (lines[-1]["state"], lines[-1]["rows"]) == ("completed", 12)
    folder = run_cli("batch", "status", str(batch_root / "done"), "--json")
    status = run_cli("batch", "status", shown["name"], *url, "--json")
    same = ("state", "input", "output", "total", "rows", "failed", "completion_tokens")
    for answer in (folder, status):
        document = json.loads(answer.stdout)
        assert {name: document[name] for name in same} == {name: shown[name] for name in same}

    write_input(batch_root / "long.jsonl", 200, (), max_tokens=400)
    with Client(served.address) as client:
        name = client.create_batch(
            str(batch_root / "long.jsonl"), str(batch_root / "cut"), part_rows=1, concurrency=1
        ).name
        eventually(lambda: client.get_batch(name).rows_done > 0, timeout_s=100)
        cancelled = run_cli("batch", "cancel", name, *url, "--json")
        assert json.loads(cancelled.stdout)["state"] in ("cancelling", "cancelled")
        last = list(client.watch_batch(name, 0.2))[-1]
    assert last.state == batch_pb2.BATCH_STATE_CANCELLED
    assert 0 < last.rows_done < last.rows_total
    cut = json.loads(run_cli("batch", "status", str(batch_root / "cut"), "--json").stdout)
    assert (cut["state"], cut["total"]) == ("cancelled", 200)
    listed = json.loads(run_cli("batch", "list", *url, "--json").stdout)
    assert [batch["name"] for batch in listed[:2]] == [name, shown["name"]]

    # Both batches, as Prometheus sees them.
    sums = eventually(lambda: ended_sums(served), timeout_s=60)
    assert sums["batch_rows_total", "completed"] == 11 + last.rows_done
    assert sums["batch_rows_total", "failed"] == 1
    assert sums["batches_ended_total", "completed"] == 1
    assert sums["batches_ended_total", "cancelled"] == 1


def ended_sums(service: Served) -> dict[tuple[str, str], float] | None:
    """Return the metrics of batches by name and state; None: one still runs."""
    said = "".join(service.errors)
    [port] = re.findall(r"metrics of batches are on port (\d+)", said)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    pattern = r'^expertmesh_(batch\w+){model_name="tiny",state="(\w+)"} (\S+)$'
    found = {(m[1], m[2]): float(m[3]) for m in re.finditer(pattern, text, re.MULTILINE)}
    return None if found["batches", "running"] else found


def test_files_elsewhere_are_refused_by_name(served: Served, batch_root: Path) -> None:
    outside = str(batch_root.parent / "out")
    answer = run_cli(
        *("batch", "submit", "-i", str(batch_root / "in"), "-o", outside, "--url", served.address)
    )
    assert answer.returncode == 2
    assert f'output_uri must lie under {batch_root}, got "{outside}"' in answer.stderr
