"""One dispatch and combine with no expert work, against bare echoes of the same bytes and hivemind.

Regime: one MoE layer, hidden 4,096, bfloat16, top-8 of 64 experts, 1 to 512 rows; two and four
    groups in other processes, whose kernel hands out a result that is ready. Our sides measure
    `dispatch` + `combine` whole: packing, sending, the group's checks, receiving, the weighted sum.
    The echoes (`echo.py`) move the same bytes to the same number of processes and back. Sides take
    turns in blocks of `--calls`. hivemind's RemoteMixtureOfExperts (two servers, float32, experts
    of width 8, its own gate) runs as a process of its own before and after ours.

Meaning: what our framing, checks and sums add to the transport.

Ceiling: ratio 1. A Unix-socket round trip is 0.05 to 0.1 ms, a Python gRPC one 0.3 to 0.45 ms;
    beyond that memory copies at a few GB/s.

    python -m tests.benchmarks.dispatch [--hivemind-python P --runners DIR --scratch DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from experts.planner import plan_placement
from router.gating.dispatch import DispatchHandle, ExpertDispatcher
from router.gating.route import SentCall
from tests.benchmarks.echo import EchoServers, message
from tests.benchmarks.group_processes import GroupPool, ServedGroups
from tests.benchmarks.harness import OtherCores, Samples, percentile, report
from tests.benchmarks.prepared_runtime import make_prepared_runtime

NUM_EXPERTS, TOP_K = 64, 8
BARS = {"grpc": 1.5, "lane": 2.0}
HIVEMIND_BAR = 5.0


def one_call(dispatcher: ExpertDispatcher, num_rows: int, hidden: int) -> Callable[[], None]:
    """Return a function that dispatches and combines the same random rows."""
    generator = torch.Generator().manual_seed(num_rows)
    rows = torch.randn(num_rows, hidden, generator=generator).bfloat16()
    scores = torch.rand(num_rows, NUM_EXPERTS, generator=generator)
    weights, ids = scores.softmax(-1).topk(TOP_K)
    ids = ids.to(torch.int32)

    def call() -> None:
        dispatcher.combine(dispatcher.dispatch(0, rows, ids, weights))

    call()
    return call


def echo_messages(dispatcher: ExpertDispatcher, num_rows: int, hidden: int) -> list[bytes]:
    """Return messages with the bytes of this dispatch, one a group."""
    sizes: list[tuple[int, int]] = []
    original = dispatcher.combine

    def observe(handle: DispatchHandle) -> torch.Tensor:
        options, sent = dispatcher.options, handle.sent
        assert isinstance(sent, SentCall)
        for group in sent.called:
            rows, pairs = sent.packed.num_rows[group], sent.packed.num_pairs[group]
            forward = 64 + pairs * 12 + rows * hidden * options.item_bytes
            sizes.append((forward, 64 + options.result_bytes(rows, pairs)))
        return original(handle)

    dispatcher.combine = observe  # type: ignore[method-assign]
    try:
        one_call(dispatcher, num_rows, hidden)
    finally:
        del dispatcher.combine
    return [message(*size) for size in sizes]


def measure(
    sides: dict[str, Callable[[], None]], repeats: int, calls: int
) -> dict[str, dict[str, Any]]:
    """Time blocks of calls in turn; returns microseconds per call of each side."""
    samples = {name: Samples() for name in sides}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, call in sides.items():
            others = OtherCores([os.getpid()])
            block = []
            for _ in range(calls):
                started = time.perf_counter()
                call()
                block.append((time.perf_counter() - started) * 1e6)
            if repeat:  # the first round warms up
                samples[name].add(statistics.median(block), others.cores())
                times[name] += block
    return {
        name: {**samples[name].to_json(), "p99": round(percentile(times[name], 99), 1)}
        for name in sides
    }


def measure_groups(
    num_groups: int, pool: GroupPool, echoes: EchoServers, arguments: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Measure every number of rows with `num_groups` groups."""
    placement = plan_placement(1, NUM_EXPERTS, {f"group-{i}": 1.0 for i in range(num_groups)})
    addresses = pool.serve_runtimes(placement, make_prepared_runtime, arguments.hidden)
    groups = ServedGroups(
        placement=placement, addresses=addresses, hidden=arguments.hidden, top_k=TOP_K
    )
    dispatchers = {
        name: groups.connect(dtype=torch.bfloat16, transport=name) for name in ("grpc", "lane")
    }
    found: dict[str, dict[str, Any]] = {}
    for num_rows in arguments.rows:
        messages = echo_messages(dispatchers["lane"], num_rows, arguments.hidden)
        sides = {
            name: one_call(dispatcher, num_rows, arguments.hidden)
            for name, dispatcher in dispatchers.items()
        }
        sides["grpc echo"] = lambda messages=messages: echoes.grpc_call(messages)
        sides["lane echo"] = lambda messages=messages: echoes.socket_call(messages)
        calls = max(5, arguments.calls * 8 // max(8, num_rows))
        result = found[f"{num_groups} groups, {num_rows} rows"] = dict(
            measure(sides, arguments.repeats, calls)
        )
        for name in dispatchers:
            ours, bare = (result[side]["median"] for side in (name, f"{name} echo"))
            result[f"{name} / echo"] = round(ours / bare, 3)
            print(
                f"{num_groups} groups {num_rows:4} rows {name}: {ours:9.0f} us, "
                f"echo {bare:9.0f} us, ratio {ours / bare:.2f} (bar {BARS[name]})",
                flush=True,
            )
    for dispatcher in dispatchers.values():
        dispatcher.close()
    return found


def measure_hivemind(arguments: argparse.Namespace, times: dict[int, list[float]]) -> None:
    """Run hivemind once; adds the median microseconds per call by number of rows."""
    command = [
        *(arguments.hivemind_python, str(arguments.runners / "run_hivemind.py")),
        *("--experts", str(arguments.hivemind_experts), "--k", str(TOP_K)),
        *("--hidden", str(arguments.hidden), "--inter", "8", "--calls", "40"),
        *("--tokens", ",".join(map(str, arguments.rows)), "--scratch", str(arguments.scratch)),
    ]
    run = subprocess.run(command, capture_output=True, text=True, timeout=900)
    for line in run.stdout.splitlines():
        row = json.loads(line) if line.startswith("{") else {}
        if str(row.get("what", "")).startswith("RemoteMixtureOfExperts"):
            times.setdefault(row["tokens"], []).append(row["median_us"])
    if run.returncode != 0 or not times:
        print(run.stderr[-3000:], file=sys.stderr)
        raise RuntimeError(f"hivemind's runner failed with exit code {run.returncode}")


def main() -> None:
    """Measure, compare, print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--rows", type=_numbers, default=[1, 8, 64, 512])
    parser.add_argument("--groups", type=_numbers, default=[2, 4])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--calls", type=int, default=200, help="in a block, at up to 8 rows")
    parser.add_argument("--hivemind-python")
    parser.add_argument("--hivemind-experts", type=int, default=32)
    parser.add_argument("--runners", type=Path, help="folder with run_hivemind.py")
    parser.add_argument("--scratch", type=Path, help="folder for hivemind's generated module")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    hivemind: dict[int, list[float]] = {}
    if arguments.hivemind_python:
        measure_hivemind(arguments, hivemind)
    figures: dict[str, dict[str, Any]] = {}
    is_met = True
    most = max(arguments.groups)
    with GroupPool(most) as pool, EchoServers(most) as echoes:
        for num_groups in arguments.groups:
            found = measure_groups(num_groups, pool, echoes, arguments)
            figures |= found
            is_met &= all(row[f"{n} / echo"] <= BARS[n] for row in found.values() for n in BARS)
    if arguments.hivemind_python:
        measure_hivemind(arguments, hivemind)
        for num_rows, times in hivemind.items():
            row = figures[f"{arguments.groups[0]} groups, {num_rows} rows"]
            theirs = statistics.median(times)
            ratios = {n: round(theirs / row[n]["median"], 1) for n in BARS}
            figures[f"hivemind, {num_rows} rows"] = {"median_us": times, "theirs / ours": ratios}
            print(f"hivemind {num_rows:4} rows: {theirs:9.0f} us, {ratios} (bar {HIVEMIND_BAR})")
            is_met &= min(ratios.values()) >= HIVEMIND_BAR
    config = {"hidden": arguments.hidden, "experts": NUM_EXPERTS, "top_k": TOP_K, "unit": "us"}
    report("dispatch", config, {**figures, "bars": BARS, "is_met": is_met})


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


if __name__ == "__main__":
    main()
