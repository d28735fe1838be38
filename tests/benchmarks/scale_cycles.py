"""Scale-ups and scale-downs in a row under traffic: does any request notice?

Regime: `expertmesh serve` in float32 with one expert group and one router on this machine. Three
    clients ask for greedy generations all the time. `--changes` changes follow each other, each
    when the one before is done: expert groups between 1 and `--groups` (drawn), and every fifth
    time the routers between 1 and 2. With `--kills`, so many of the changes are followed by a
    SIGKILL of a drawn expert group instead of the next change.

Meaning: `failed` requests ended with an error, `unequal` ones with other tokens than undisturbed.
    `change_s` is from the request to the service being as wanted: old copies dropped, processes
    gone. `pause_s` is the longest wait for a token of each generation, as its client sees it;
    `calm_pause_s` the same before the first change.

Ceiling: 0 failed, 0 unequal. A scale-up takes what a process takes to import torch and DeepSpeed.
    A planned change pauses nobody; what is seen is the work of loading and starting on the same
    cores. A kill pauses until the others have loaded what was lost.

    python -m tests.benchmarks.scale_cycles CHECKPOINT [--changes 20] [--kills 0]
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import time
from pathlib import Path

from protos.client import Client
from protos.v1 import cluster_pb2
from tests.benchmarks.harness import percentile, report, served
from tests.chaos.traffic import CONFIG, Traffic
from tests.eventually import eventually

CHANGE_S = 300.0
CALM_GENERATIONS = 12
LOOK_S = 0.1


def status_of(addresses: list[str]) -> cluster_pb2.ClusterStatus:
    """Return what a router of the service says of it."""
    with Client(addresses, CONFIG) as client:
        return client.status()


def change(addresses: list[str], groups: int, routers: int) -> float:
    """Want these numbers; return the seconds until it is so."""
    with Client(addresses, CONFIG) as client:
        stub = client._routers.current().cluster
        started = time.monotonic()
        stub.Scale(cluster_pb2.ScaleRequest(expert_groups=groups, routers=routers), timeout=10)

        def is_so() -> bool:
            scaling = client.status().scaling
            wanted = (scaling.target_groups, scaling.target_routers) == (groups, routers)
            return wanted and scaling.is_settled

        eventually(is_so, CHANGE_S, LOOK_S)
        return time.monotonic() - started


def kill(addresses: list[str], generator: random.Random) -> float:
    """Kill a group; return the seconds until the service is whole again."""
    before = status_of(addresses)
    doomed = generator.choice(list(before.groups))
    os.kill(doomed.pid, signal.SIGKILL)
    started = time.monotonic()

    def is_whole() -> bool:
        now = status_of(addresses)
        is_new = doomed.pid not in {group.pid for group in now.groups}
        return is_new and now.scaling.is_settled and now.placement_epoch > before.placement_epoch

    eventually(is_whole, CHANGE_S, LOOK_S)
    return time.monotonic() - started


def main() -> None:
    """Run the changes under traffic, and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--changes", type=int, default=20)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--groups", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    generator = random.Random(arguments.seed)
    groups, routers = 1, 1
    up: list[float] = []
    down: list[float] = []
    killed: list[float] = []
    lines: list[str] = []
    flags = ("--dtype", "float32", "--expert-groups", "1", "--max-num-seqs", "8")
    with served(arguments.checkpoint, *flags, on_progress=lambda _, s: lines.append(s)) as cluster:
        addresses = [cluster.address]
        with Traffic(addresses) as traffic:
            eventually(lambda: traffic.num_done >= CALM_GENERATIONS, CHANGE_S)
            num_calm = len(traffic.pauses)
            for number in range(arguments.changes):
                if number % 5 == 4:
                    routers, is_up = 3 - routers, routers == 1
                else:
                    others = [n for n in range(1, arguments.groups + 1) if n != groups]
                    wanted = generator.choice(others)
                    groups, is_up = wanted, wanted > groups
                seconds = change(addresses, groups, routers)
                (up if is_up else down).append(seconds)
                print(f"{groups} groups, {routers} routers: {seconds:.1f} s", flush=True)
                if number < arguments.kills:
                    killed.append(kill(addresses, generator))
                    print(f"a group killed: whole after {killed[-1]:.1f} s", flush=True)
        epoch = status_of(addresses).placement_epoch
    calm, shaken = traffic.pauses[:num_calm], traffic.pauses[num_calm:]
    is_met = traffic.is_whole() and len(up) + len(down) == arguments.changes
    if not is_met:
        print("\n".join([*map(str, traffic.failures), *lines[-60:]]))
    figures = {
        "changes": len(up) + len(down),
        "kills": len(killed),
        "requests": traffic.num_done + len(traffic.failures),
        "failed": len(traffic.failures),
        "unequal": traffic.unequal,
        "epochs": epoch,
        "change_s": {"up": spread(up), "down": spread(down), "after_kill": spread(killed)},
        "calm_pause_s": spread(calm),
        "pause_s": spread(shaken),
        "is_met": is_met,
    }
    names = ("changes", "kills", "groups", "seed")
    config = {name: getattr(arguments, name) for name in names}
    report("scale_cycles", {"checkpoint": arguments.checkpoint.name, **config}, figures)
    raise SystemExit(0 if is_met else 1)


def spread(values: list[float]) -> dict[str, float] | None:
    """Return median, p99 and maximum; None of nothing."""
    if not values:
        return None
    return {
        "median": round(statistics.median(values), 3),
        "p99": round(percentile(values, 99), 3),
        "max": round(max(values), 3),
    }


if __name__ == "__main__":
    main()
