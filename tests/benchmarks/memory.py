"""Memory of a served checkpoint: PSS of every process, before and after it has worked.

Regime: `expertmesh serve` with `--groups` expert groups; then 8 prompts of 512 tokens, 32 new.

Meaning: PSS counts a page that n processes map as 1/n in each, so sums are real memory. `routers`
    and `groups` are what serves the model; Ray's own processes are listed beside them.

Ceiling: the checkpoint's bytes once, plus an interpreter with torch for each process (about 0.25
    GiB, most of it shared) and the KV cache that is in use.

    python -m tests.benchmarks.memory CHECKPOINT [--groups 2]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import psutil

from tests.benchmarks.harness import (
    ServedCluster,
    generate_batch,
    process_tree,
    prompts,
    pss_bytes,
    report,
    served,
    vocab_size_of,
)

GIB = 1 << 30
BAR_FACTOR, BAR_BYTES = 1.2, 1.5 * GIB


def measure(cluster: ServedCluster) -> dict[str, dict[str, int]]:
    """Return PSS bytes of every process by role, as `role -> name -> bytes`."""
    status = cluster.status()
    found: dict[str, dict[str, int]] = {"routers": {}, "groups": {}, "other": {}}
    names = {member.pid: ("routers", member.router_id) for member in status.routers}
    names |= {member.pid: ("groups", member.group_id) for member in status.groups}
    for process in process_tree(cluster.process.pid):
        try:
            role, name = names.get(process.pid) or ("other", f"{process.name()} {process.pid}")
        except psutil.NoSuchProcess:
            continue
        found[role][name] = pss_bytes([process])
    missing = names.keys() - {p.pid for p in process_tree(cluster.process.pid)}
    if missing:
        raise RuntimeError(f"processes {sorted(missing)} are not descendants of serve")
    return found


def main() -> None:
    """Serve, measure, work, measure again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--serve-argument", action="append", default=[])
    arguments = parser.parse_args()
    checkpoint: Path = arguments.checkpoint
    checkpoint_bytes = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    groups = ("--expert-groups", str(arguments.groups))
    with served(checkpoint, *groups, *arguments.serve_argument) as cluster:
        phases = {"ready": measure(cluster)}
        generate_batch(cluster.stub(), prompts(8, 512, vocab_size_of(checkpoint)), 32)
        phases["after 8 x (512 + 32)"] = measure(cluster)
    bar = BAR_FACTOR * checkpoint_bytes + BAR_BYTES
    figures: dict[str, object] = {
        "checkpoint_gib": round(checkpoint_bytes / GIB, 3),
        "bar_gib": round(bar / GIB, 3),
    }
    worst = 0
    for phase, found in phases.items():
        print(f"{phase}:")
        for role, processes in found.items():
            for name, num_bytes in sorted(processes.items()):
                print(f"  {role:>8} {name:<28} {num_bytes / GIB:7.3f} GiB")
        sums = {role: sum(processes.values()) for role, processes in found.items()}
        ours = sums["routers"] + sums["groups"]
        worst = max(worst, ours)
        figures[phase] = {role: round(total / GIB, 3) for role, total in sums.items()}
        print(f"  routers and groups: {ours / GIB:.3f} GiB, bar {bar / GIB:.3f} GiB")
    figures["is_met"] = worst <= bar
    config = {"checkpoint": checkpoint.name, "groups": arguments.groups}
    report("memory", {**config, "serve": arguments.serve_argument}, figures)


if __name__ == "__main__":
    main()
