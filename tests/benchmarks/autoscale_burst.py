"""A burst of ten times the load: how soon does another group serve, and does anyone notice?

Regime: `expertmesh serve --autoscale apply` in float32 with one expert group and one router on a
    Ray cluster whose nodes are processes of one host (`tests/cluster/fake_nodes.py`); Ray's own
    autoscaler (v2) starts and stops them, one for each group. Three clients ask for greedy
    generations, each once in `--period-s` at most; then thirty do; then three; then none.

Meaning: `first_extra_group_s` is from the burst to the status in which another group has computed.
    The parts after it are: until the service decided, until Ray had started a node's process,
    until the group's process began, until it had imported torch, and until the router sent it
    rows. `failed` requests ended with an error, `unequal` ones with other tokens than undisturbed.
    `nodes_at_rest` are the nodes beside the head, `rest_s` after the end of all load.

Ceiling: what Ray takes to start a node (3-6 s) and a group to import torch and DeepSpeed (about
    5 s), beside the burst on the same cores; bar 30 s. 0 failed, 0 unequal, nodes as before.

    python -m tests.benchmarks.autoscale_burst CHECKPOINT [--groups 3] [--burst-s 60]
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

from cluster.autoscale_explain import ask_decisions
from cluster.status import ask_status
from protos.tls import Access
from protos.v1 import cluster_pb2
from tests.benchmarks.harness import report
from tests.chaos.traffic import Traffic
from tests.cluster.fake_nodes import FakeNodes
from tests.cluster.hosts import obstacle, running_hosts
from tests.eventually import eventually
from tests.integration.served import ROOT

BURST = 10
"""Times the calm load, which is three clients."""
PERIOD_S = 1.0
IDLE_TIMEOUT_S = 6.0
DOWNSCALE_S = 15.0
LONG_S = 600.0
TARGET_BUSY = 0.05
"""Of a group: between what three clients and what thirty make of it. The models are tiny, and a
group computes only while the trunk waits."""
BAR_S = 30.0


def busy_groups(status: cluster_pb2.ClusterStatus) -> int:
    """Return how many groups have computed something."""
    return sum(group.state == "READY" and group.num_pairs > 0 for group in status.groups)


def started_after(began_s: float, what: str) -> float:
    """Return when (seconds after `began_s`, Unix time) the first such process started since."""
    found = []
    for process in psutil.process_iter(["name", "create_time", "cmdline"]):
        words = process.info["cmdline"] or [""]
        if words[0].endswith(what) and process.info["create_time"] > began_s:
            found.append(process.info["create_time"] - began_s)
    return min(found, default=float("nan"))


def main() -> None:
    """Run the burst and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--groups", type=int, default=3)
    parser.add_argument("--burst-s", type=float, default=60.0)
    parser.add_argument("--target-busy", type=float, default=TARGET_BUSY)
    parser.add_argument("--period-s", type=float, default=PERIOD_S)
    arguments = parser.parse_args()
    reason = obstacle()
    if reason is not None:
        sys.exit(f"no host with fake nodes here: {reason}")
    checkpoint = arguments.checkpoint.resolve()
    flags = (
        *("--expert-groups", "1", "--dtype", "float32"),
        *("--autoscale", "apply", "--max-expert-groups", str(arguments.groups)),
        *("--upscale-delay", "3", "--downscale-delay", str(DOWNSCALE_S)),
    )
    settings = {"EXPERTMESH_AUTOSCALE__TARGET_GROUP_BUSY": str(arguments.target_busy)}
    with (
        tempfile.TemporaryDirectory(prefix="f", dir="/tmp") as name,
        running_hosts(1, seen=[Path(name), ROOT, checkpoint]) as hosts,
    ):
        nodes = FakeNodes(
            hosts.hosts["h1"], Path(name), most=arguments.groups, idle_timeout_s=IDLE_TIMEOUT_S
        )
        nodes.start()
        address = nodes.serve(checkpoint, *flags, env=settings)
        nodes_before = nodes.num_nodes()

        def decided() -> str:
            return str(ask_decisions(address, Access(), 1).decisions[-1].groups.reason)

        with Traffic([address], period_s=arguments.period_s) as calm:
            eventually(lambda: calm.num_done >= 18, LONG_S)
            print(f"calm: {decided()}", flush=True)
            assert len(ask_status(address).groups) == 1, "the calm load is too much for one group"
            bursts = [
                Traffic([address], expected=calm.expected, period_s=arguments.period_s)
                for _ in range(BURST - 1)
            ]
            began_s, began = time.time(), time.monotonic()
            for burst in bursts:
                burst.__enter__()
            eventually(lambda: busy_groups(ask_status(address)) > 1, LONG_S, 0.1)
            first_s = time.monotonic() - began
            print(f"another group serves after {first_s:.1f} s; {decided()}", flush=True)
            said = [(at - began, line) for at, line in nodes.lines if at > began]
            parts = {
                "decided_s": next(at for at, line in said if "autoscale wants" in line),
                "node_s": started_after(began_s, "raylet"),
                "process_s": started_after(began_s, "ray::ExpertGroupActor"),
                "imported_s": next(at for at, line in said if "experts move" in line),
            }
            threading.Event().wait(max(0.0, arguments.burst_s - (time.monotonic() - began)))
            most = len(ask_status(address).groups)
            for burst in bursts:
                burst.__exit__(None, None, None)
        ended = time.monotonic()
        eventually(lambda: len(ask_status(address).groups) == 1, LONG_S, 0.5)
        groups_s = time.monotonic() - ended
        eventually(lambda: nodes.num_nodes() == nodes_before, LONG_S, 0.5)
        rest_s = time.monotonic() - ended
        nodes_after = nodes.num_nodes()
        lines = [f"{at - began:6.1f} {line}" for at, line in nodes.lines]
    nodes.join()
    everyone = [calm, *bursts]
    failures = list(itertools.chain.from_iterable(one.failures for one in everyone))
    unequal = sum(one.unequal for one in everyone)
    is_met = first_s <= BAR_S and not failures and not unequal and nodes_after == nodes_before
    print("\n".join([*map(str, failures), *lines[-60:]]))
    report(
        "autoscale_burst",
        {
            "checkpoint": checkpoint.name,
            "groups": arguments.groups,
            "period_s": arguments.period_s,
            "target_busy": arguments.target_busy,
        },
        {
            "first_extra_group_s": round(first_s, 2),
            **{name: round(seconds, 2) for name, seconds in parts.items()},
            "most_groups": most,
            "requests": sum(one.num_done for one in everyone) + len(failures),
            "failed": len(failures),
            "unequal": unequal,
            "nodes_before": nodes_before,
            "nodes_at_rest": nodes_after,
            "groups_at_rest_s": round(groups_s, 1),
            "rest_s": round(rest_s, 1),
            "is_met": is_met,
        },
    )
    raise SystemExit(0 if is_met else 1)


if __name__ == "__main__":
    main()
