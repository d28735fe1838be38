"""What every benchmark shares: a served cluster, alternating repetitions, the closing JSON line.

Regime: one machine, other work on the same cores. So both sides of a comparison run in turn, in one
command; medians and ratios are quoted; every repetition notes how many cores others used meanwhile
(`others`), because one busy neighbour can cost a spinning thread pool a factor of ten.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import psutil

from protos.v1 import cluster_pb2, cluster_pb2_grpc, generation_pb2, generation_pb2_grpc

ROOT = Path(__file__).resolve().parents[2]
QUIET_CORES = 0.25


def prompts(num: int, length: int, vocab_size: int, seed: int = 1) -> list[list[int]]:
    """Return `num` prompts of `length` random token ids; the first 16 ids stay with specials."""
    generator = random.Random(seed)
    return [[generator.randrange(16, vocab_size) for _ in range(length)] for _ in range(num)]


def vocab_size_of(checkpoint: Path) -> int:
    """Read the vocabulary size from a checkpoint's config.json."""
    config = json.loads((checkpoint / "config.json").read_text())
    return int(config.get("text_config", config)["vocab_size"])


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the smallest value that at least `percent` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def process_tree(pid: int) -> list[psutil.Process]:
    """Return a process and all its descendants that still live."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def pss_bytes(processes: Sequence[psutil.Process]) -> int:
    """Sum the proportional set sizes: shared pages count once over all processes that map them."""
    total = 0
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            total += process.memory_full_info().pss
    return total


class OtherCores:
    """How many cores processes outside `pids` used since construction."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids = pids
        self._start = (time.perf_counter(), *self._seconds())

    def _seconds(self) -> tuple[float, float]:
        times = psutil.cpu_times()
        busy = sum(times) - times.idle - times.iowait - times.guest - times.guest_nice
        own = 0.0
        for pid in self._pids:
            for process in process_tree(pid):
                with contextlib.suppress(psutil.NoSuchProcess):
                    used = process.cpu_times()
                    own += used.user + used.system
        return busy, own

    def cores(self) -> float:
        """Cores used by others, averaged since construction."""
        wall = max(time.perf_counter() - self._start[0], 1e-3)
        busy, own = self._seconds()
        return max(0.0, ((busy - self._start[1]) - (own - self._start[2])) / wall)


@dataclass
class Samples:
    """Repetitions of one figure, each with the cores that others used meanwhile."""

    values: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)

    def add(self, value: float, others: float) -> None:
        """Append one repetition."""
        self.values.append(value)
        self.others.append(round(others, 2))

    @property
    def median(self) -> float:
        """Median over the quiet repetitions, or over all when none was quiet."""
        quiet = [v for v, o in zip(self.values, self.others, strict=True) if o <= QUIET_CORES]
        return statistics.median(quiet or self.values)

    def to_json(self) -> dict[str, object]:
        """Median, extremes and every repetition."""
        return {
            "median": round(self.median, 4),
            "min": round(min(self.values), 4),
            "max": round(max(self.values), 4),
            "values": [round(v, 4) for v in self.values],
            "others": self.others,
        }


def alternate(
    sides: Mapping[str, Callable[[], float]], repeats: int, warmup: int = 1
) -> dict[str, Samples]:
    """Run the sides in turn, `repeats` times, after `warmup` rounds that do not count."""
    samples = {name: Samples() for name in sides}
    for round_idx in range(warmup + repeats):
        for name, run in sides.items():
            others = OtherCores([os.getpid()])
            value = run()
            if round_idx >= warmup:
                samples[name].add(value, others.cores())
    return samples


@dataclass
class ServedCluster:
    """A running `expertmesh serve`."""

    process: subprocess.Popen[str]
    address: str
    ready_s: float
    """Seconds from the start of the process to its `ready` line."""

    def stub(self) -> generation_pb2_grpc.GenerationServiceStub:
        """Return a stub of the generation service."""
        channel = grpc.insecure_channel(
            self.address, options=[("grpc.max_receive_message_length", 64 << 20)]
        )
        return generation_pb2_grpc.GenerationServiceStub(channel)

    def status(self) -> cluster_pb2.ClusterStatus:
        """Ask what runs where."""
        with grpc.insecure_channel(self.address) as channel:
            stub = cluster_pb2_grpc.ClusterServiceStub(channel)
            return stub.GetStatus(cluster_pb2.GetStatusRequest(), timeout=10)


@contextlib.contextmanager
def served(
    checkpoint: Path | str,
    *arguments: str,
    timeout_s: float = 300,
    on_progress: Callable[[float, str], None] | None = None,
) -> Iterator[ServedCluster]:
    """Run `expertmesh serve CHECKPOINT --port 0 ...` until the block ends.

    Args:
        checkpoint: What to serve.
        arguments: Further ones of `serve`.
        timeout_s: How long the start may take.
        on_progress: Gets each line of stderr with the seconds since the start; else it is ours.

    Raises:
        RuntimeError: It ended, or printed no `ready` line within `timeout_s`.
    """
    command = [sys.executable, "-m", "cluster.cli", "serve", str(checkpoint), "--port", "0"]
    started = time.perf_counter()
    stderr = None if on_progress is None else subprocess.PIPE
    process = subprocess.Popen(
        [*command, *arguments], stdout=subprocess.PIPE, stderr=stderr, text=True, cwd=ROOT
    )
    if on_progress is not None:
        reader = threading.Thread(
            target=_read_progress, args=(process, started, on_progress), daemon=True
        )
        reader.start()
    try:
        assert process.stdout is not None
        address = ""
        while not address:
            line = process.stdout.readline()
            if not line or time.perf_counter() - started > timeout_s:
                raise RuntimeError(f"serve gave no ready line (exit code {process.poll()})")
            if line.startswith("ready "):
                fields = dict(part.split("=", 1) for part in line.split()[1:] if "=" in part)
                address = fields["grpc"]
        yield ServedCluster(process, address, time.perf_counter() - started)
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _read_progress(
    process: subprocess.Popen[str], started: float, on_progress: Callable[[float, str], None]
) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        on_progress(time.perf_counter() - started, line.rstrip())


def greedy_request(
    prompt: Sequence[int], new_tokens: int, request_id: str = ""
) -> generation_pb2.GenerateRequest:
    """Return a greedy request of exactly `new_tokens` tokens."""
    return generation_pb2.GenerateRequest(
        request_id=request_id,
        tokens=generation_pb2.TokenIds(ids=prompt),
        sampling=generation_pb2.Sampling(temperature=0.0, repetition_penalty=1.0, seed=0),
        stopping=generation_pb2.Stopping(
            max_tokens=new_tokens, min_tokens=new_tokens, ignore_eos=True
        ),
    )


def generate_batch(
    stub: generation_pb2_grpc.GenerationServiceStub, batch: Sequence[Sequence[int]], new_tokens: int
) -> tuple[float, list[list[int]]]:
    """Generate greedily for all prompts at once; returns seconds and each prompt's tokens."""
    requests = [greedy_request(ids, new_tokens) for ids in batch]
    started = time.perf_counter()
    streams = [stub.Generate(request, timeout=600) for request in requests]
    outputs = [[i for message in stream for i in message.token_ids] for stream in streams]
    return time.perf_counter() - started, outputs


def report(name: str, config: Mapping[str, object], figures: Mapping[str, object]) -> None:
    """Print the closing JSON line: what ran, where, and the figures."""
    import torch

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    model = [
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    print(
        json.dumps(
            {
                "benchmark": name,
                "commit": commit,
                "device": f"{os.cpu_count()} x {model[0].split(':')[1].strip() if model else '?'}",
                "versions": {"python": platform.python_version(), "torch": torch.__version__},
                "config": dict(config),
                "figures": dict(figures),
            }
        ),
        flush=True,
    )
