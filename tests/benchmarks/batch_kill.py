"""A batch whose driver and clients are killed again and again: is every row there, once, and right?

Regime: `expertmesh serve` in float32 with two routers, `--rows` rows of token ids, half of them
    sampled, 1 % of them poison (no JSON, no id, more tokens than the window). First the rows are
    answered undisturbed, without Ray; then by `expertmesh batch run`, and at random times after a
    part was committed, a SIGKILL goes to the driver (which is run again) or to a client actor.
    With `--submitted` the service runs the batch and starts its driver again by itself, and routers
    and expert groups are killed, too.

Meaning: `missing`, `duplicated` and `wrong` count rows against the undisturbed run, `repeated` the
    parts (of `--part-rows` rows) that were begun again, `repeated_per_kill` their number per kill.

Ceiling: 0, 0, 0; a kill repeats the parts in flight, two per client.

    python -m tests.benchmarks.batch_kill CHECKPOINT [--rows 2000] [--kills 8] [--submitted]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import psutil

from protos.batch_calls import ENDED
from protos.client import BatchOptions, Client, ClientConfig
from protos.v1 import batch_pb2
from tests.benchmarks.harness import ServedCluster, process_tree, report, served
from tests.integration.batches import CLIENT, BatchRun, answer_undisturbed, rows_of, write_input

BAR_PER_KILL = 2.0
VICTIMS = {
    "driver": "cluster.batch.driver",
    "client": CLIENT,
    "router": "RouterActor",
    "group": "ExpertGroupActor",
}
"""Of a submitted batch, by words in the command lines of their processes."""
PATIENT = ClientConfig(max_attempts=60)
MAX_TOKENS = 24


def kill_and_resume(
    file: Path, output: Path, address: str, flags: Sequence[str], num_kills: int, seed: int
) -> Counter[str]:
    """Run a batch to its end through so many kills; returns who was killed how often."""
    rng = random.Random(seed)
    kills: Counter[str] = Counter()
    while True:
        with BatchRun(file, output, address, *flags) as run:
            begun_with = len(list(output.glob("part-*.jsonl")))
            while not run.has_ended and len(list(output.glob("part-*.jsonl"))) <= begun_with:
                time.sleep(0.05)
            while sum(kills.values()) < num_kills:
                time.sleep(rng.uniform(0.2, 3.0))
                if run.has_ended:
                    break
                if rng.random() < 0.5 or not (clients := run.clients()):
                    run.kill()
                    kills["driver"] += 1
                    break
                rng.choice(clients).kill()
                kills["client"] += 1
            if not run.was_killed:
                code, result, err = run.wait(3600)
                if code not in (0, 5) or result.get("state") != "completed":
                    raise RuntimeError(f"the batch ended with {code}: {err[-2000:]}")
                return kills
        print(f"kills {dict(kills)}, parts {len(list(output.glob('part-*.jsonl')))}", flush=True)


def submit_and_kill(
    file: Path,
    output: Path,
    cluster: ServedCluster,
    options: BatchOptions,
    num_kills: int,
    seed: int,
) -> Counter[str]:
    """Have the service run a batch through so many kills; returns who was killed how often."""
    rng = random.Random(seed)
    kills: Counter[str] = Counter()
    seen = 0
    with Client(cluster.address, PATIENT) as client:
        name = client.create_batch(str(file), str(output), **options).name
        while (batch := client.get_batch(name)).state not in ENDED:
            if sum(kills.values()) < num_kills and batch.rows_done > seen:
                who = rng.choice(list(VICTIMS))
                alive = processes(cluster.process.pid, VICTIMS[who])
                if alive:
                    rng.choice(alive).kill()
                    kills[who] += 1
                    seen = batch.rows_done
                    print(f"kills {dict(kills)}, rows {seen}", flush=True)
            time.sleep(rng.uniform(0.1, 1.5))
    if batch.state != batch_pb2.BATCH_STATE_COMPLETED:
        raise RuntimeError(f"the batch ended as {batch}")
    return kills


def processes(pid: int, words: str) -> list[psutil.Process]:
    """Return the processes below `pid` with these words in their command line."""
    found = []
    for process in process_tree(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            if words in " ".join(process.cmdline()):
                found.append(process)
    return found


def main() -> None:
    """Serve, answer both ways, compare, print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--part-rows", type=int, default=25)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--kills", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--submitted", action="store_true")
    parser.add_argument("--serve-argument", action="append", default=[])
    arguments = parser.parse_args()
    num_rows = arguments.rows
    poison = sorted(random.Random(arguments.seed).sample(range(num_rows), max(1, num_rows // 100)))
    flags = ["--part-rows", str(arguments.part_rows), "--clients", "1"]
    flags += ["--concurrency", str(arguments.concurrency)]
    options = ("--expert-groups", "2", "--routers", "2", "--dtype", "float32")
    with (
        tempfile.TemporaryDirectory(prefix="batch-") as folder,
        served(
            *(arguments.checkpoint, *options, "--batch-root", folder), *arguments.serve_argument
        ) as cluster,
    ):
        file, output = Path(folder) / "in.jsonl", Path(folder) / "out"
        write_input(file, num_rows, poison, MAX_TOKENS)
        model = arguments.checkpoint.name
        expected = answer_undisturbed(file, Path(folder) / "alone", cluster.address, model)
        how_often = (arguments.kills, arguments.seed)
        if arguments.submitted:
            submitted: BatchOptions = {
                "part_rows": arguments.part_rows,
                "max_clients": 1,
                "concurrency": arguments.concurrency,
            }
            kills = submit_and_kill(file, output, cluster, submitted, *how_often)
        else:
            kills = kill_and_resume(file, output, cluster.address, flags, *how_often)
        found = rows_of(output)
        manifest = json.loads((output / "manifest.json").read_text())
    numbers = Counter(row["row"] for row in found)
    by_number = {row["row"]: row for row in found}
    num_kills = sum(kills.values())
    repeated_per_kill = manifest["parts_repeated"] / max(1, num_kills)
    figures = {
        "rows": num_rows,
        "poison": len(poison),
        "kills": dict(kills),
        "missing": sum(number not in numbers for number in range(num_rows)),
        "duplicated": sum(count - 1 for count in numbers.values()),
        "wrong": sum(by_number.get(row["row"]) != row for row in expected),
        "failed": sum(row["error"] is not None for row in found),
        "repeated": manifest["parts_repeated"],
        "repeated_per_kill": round(repeated_per_kill, 2),
        "bar_per_kill": BAR_PER_KILL,
    }
    is_exact = figures["missing"] == figures["duplicated"] == figures["wrong"] == 0
    figures["is_met"] = is_exact and repeated_per_kill <= BAR_PER_KILL
    config = {**vars(arguments), "checkpoint": model, "max_tokens": MAX_TOKENS}
    report("batch_kill", config, figures)


if __name__ == "__main__":
    main()
