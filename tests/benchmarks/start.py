"""Seconds from `expertmesh serve` to its `ready` line.

Regime: `--repeats` starts one after the other; the checkpoint is read once before, so that the page
    cache is warm. `ready` means that every router has answered a request.

Meaning: where the time goes is told by the progress lines of `serve`, each with its moment.

Ceiling: interpreter, torch and Ray about 5 s of CPU; then the weights at the speed of one copy out
    of the page cache per core.

    python -m tests.benchmarks.start CHECKPOINT [--repeats 5]
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from tests.benchmarks.harness import OtherCores, Samples, report, served

BAR_S = 45.0


def warm(checkpoint: Path) -> int:
    """Read the weights once; returns their bytes."""
    total = 0
    for path in sorted(checkpoint.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while block := file.read(16 << 20):
                total += len(block)
    return total


def main() -> None:
    """Start and stop `--repeats` times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--serve-argument", action="append", default=[])
    arguments = parser.parse_args()
    num_bytes = warm(arguments.checkpoint)
    samples = Samples()
    last: list[tuple[float, str]] = []
    for _ in range(arguments.repeats):
        lines: list[tuple[float, str]] = []
        groups = ("--expert-groups", str(arguments.groups))
        others = OtherCores([os.getpid()])
        with served(
            arguments.checkpoint,
            *groups,
            *arguments.serve_argument,
            on_progress=lambda moment, line, lines=lines: lines.append((moment, line)),
        ) as cluster:
            samples.add(cluster.ready_s, others.cores())
            ready_s = cluster.ready_s
            last = [(moment, line) for moment, line in lines if moment <= ready_s and line]
        print(f"ready after {ready_s:.1f} s (others {samples.others[-1]:.2f} cores)", flush=True)
    for moment, line in last:
        print(f"  {moment:6.2f} s  {line[:90]}")
    print(f"median {samples.median:.1f} s, worst {max(samples.values):.1f} s")
    report(
        "start",
        {
            "checkpoint": arguments.checkpoint.name,
            "bytes": num_bytes,
            "groups": arguments.groups,
            "serve": arguments.serve_argument,
        },
        {
            "ready_s": samples.to_json(),
            "stages": [[round(moment, 2), line[:120]] for moment, line in last],
            "bar_s": BAR_S,
            "is_met": samples.median <= BAR_S,
        },
    )


if __name__ == "__main__":
    main()
