"""Every benchmark that needs no other engine, one after the other, and a table at the end.

Runs each as a process of its own with the checkpoints given, keeps its output in a folder, and
reads the JSON line that it ends with. The others need peers that are installed apart: `peers.py`,
and the hivemind side of `dispatch.py`.

    python -m tests.benchmarks.run_all [--checkpoint DIR] [--quick] [--only NAME ...]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.harness import ROOT

DEMO = ROOT / "infra" / "demo_model" / "checkpoint"
TIMEOUT_S = 3600.0


@dataclass(frozen=True, kw_only=True)
class Command:
    """One benchmark."""

    arguments: tuple[str, ...] = ()
    quick: tuple[str, ...] = ()
    """Added by `--quick`: a run that proves the command and is no measurement."""
    takes_checkpoint: bool = True


COMMANDS = {
    "parity_matrix": Command(quick=("--quick",), takes_checkpoint=False),
    "demo_parity": Command(quick=("--prompts", "16"), takes_checkpoint=False),
    "route_generate": Command(quick=("--prompts", "4")),
    "autoscale_simulation": Command(quick=("--traces", "200"), takes_checkpoint=False),
    "kernels": Command(takes_checkpoint=False),
    "engine_overhead": Command(takes_checkpoint=False),
    "combine_modes": Command(takes_checkpoint=False),
    "dispatch": Command(quick=("--repeats", "2", "--calls", "20"), takes_checkpoint=False),
    "remote_vs_local": Command(quick=("--repeats", "2", "--new", "16")),
    "memory": Command(),
    "start": Command(quick=("--repeats", "1")),
    "gateway": Command(quick=("--repeats", "2", "--requests", "10", "--new", "16")),
    "shared_prefix": Command(quick=("--sessions", "4")),
    "state_commit": Command(quick=("--repeats", "1", "--turns", "40"), takes_checkpoint=False),
    "long_context": Command(quick=("--tokens", "8192", "--repeats", "1"), takes_checkpoint=False),
    "million_tokens": Command(quick=("--tokens", "65536"), takes_checkpoint=False),
    "cancel_leak": Command(quick=("--requests", "100")),
    "batch_kill": Command(quick=("--rows", "200", "--part-rows", "10", "--kills", "2")),
    "batch_throughput": Command(quick=("--rows", "64", "--repeats", "1")),
    "batch_interference": Command(quick=("--requests", "10", "--repeats", "1")),
    "kill_router": Command(quick=("--kills", "4", "--turns", "2")),
    "scale_cycles": Command(quick=("--changes", "4", "--kills", "1")),
    "write_through": Command(quick=("--repeats", "2", "--new", "160")),
    "resume_ttft": Command(quick=("--repeats", "1", "--lengths", "256", "2048")),
    "restore_frac": Command(
        quick=("--tokens", "2048", "--cycles", "2"),
        takes_checkpoint=False,
    ),
}


@dataclass(frozen=True)
class Outcome:
    """How one benchmark ended."""

    exit_code: int
    seconds: float
    last: dict[str, Any]
    """The JSON line; empty where there was none."""

    @property
    def verdict(self) -> str:
        """`met`, `missed`, `ran` (no bar) or `FAILED`."""
        figures = self.last.get("figures")
        is_met = figures.get("is_met") if isinstance(figures, dict) else None
        if not self.last or (self.exit_code != 0 and is_met is not False):
            return "FAILED"
        return {True: "met", False: "missed", None: "ran"}[is_met]


def run(name: str, arguments: list[str], log: Path) -> Outcome:
    """Run one benchmark, its output to `log`."""
    command = [sys.executable, "-m", f"tests.benchmarks.{name}", *arguments]
    started = time.perf_counter()
    with log.open("w") as file:
        try:
            code = subprocess.run(
                command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=TIMEOUT_S
            ).returncode
        except subprocess.TimeoutExpired:
            code = -1
    last: dict[str, Any] = {}
    for line in log.read_text(errors="replace").splitlines():
        if line.startswith('{"benchmark"'):
            last = json.loads(line)
    return Outcome(code, time.perf_counter() - started, last)


def main() -> None:
    """Run them, print the table; exit code 1 when one failed to run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=DEMO)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", action="append", choices=COMMANDS)
    parser.add_argument("--logs", type=Path, help="folder for the outputs")
    arguments = parser.parse_args()
    logs = arguments.logs or Path(tempfile.mkdtemp(prefix="bench-"))
    logs.mkdir(parents=True, exist_ok=True)
    outcomes: dict[str, Outcome] = {}
    for name in arguments.only or COMMANDS:
        command = COMMANDS[name]
        extra = [str(arguments.checkpoint)] if command.takes_checkpoint else []
        extra += [*command.arguments, *(command.quick if arguments.quick else ())]
        print(f"{name} {' '.join(extra)}", flush=True)
        outcome = outcomes[name] = run(name, extra, logs / f"{name}.log")
        print(f"  {outcome.verdict} in {outcome.seconds:.0f} s", flush=True)
    print(f"\n{'benchmark':<18} {'verdict':<8} {'seconds':>8}  log")
    for name, outcome in outcomes.items():
        print(f"{name:<18} {outcome.verdict:<8} {outcome.seconds:>8.0f}  {logs / name}.log")
    for outcome in outcomes.values():
        if outcome.last:
            print(json.dumps(outcome.last))
    failed = [name for name, outcome in outcomes.items() if outcome.verdict == "FAILED"]
    raise SystemExit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
