"""What it costs to have the experts in other processes: the same engine, local and remote.

Regime: one engine and trunk in this process, bfloat16, greedy decode; experts (a) here, called as a
    function, (b) in `--groups` other processes over lanes, (c) the same over gRPC. Two threads in
    total for each side: trunk and local experts share a pool of `--threads`; a remote group has
    `--group-threads`, and works while the trunk waits. Sides take turns.

Meaning: decode tokens/s after the first token, all sequences together, from the difference between
    a long and a one-token generation.

Ceiling: ratio 1, or above where shared expert and groups overlap; below it by one round trip a
    layer (lane 0.1 to 0.2 ms, gRPC 1 ms) over the layer's own time.

    python -m tests.benchmarks.remote_vs_local CHECKPOINT
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from experts.native.kernels import Kernels, load_kernels
from router.engine.engine import Engine
from router.gating.dispatch import ExpertDispatcher
from router.model.config import ModelConfig
from tests.benchmarks.engines import greedy, load_decoder, local_dispatcher, start_engine
from tests.benchmarks.group_processes import GroupPool
from tests.benchmarks.harness import OtherCores, Samples, percentile, prompts, report

BARS = {1: 0.7, 8: 0.8}


@dataclass
class Side:
    """One engine and its experts."""

    engine: Engine
    dispatcher: ExpertDispatcher
    samples: dict[int, Samples]

    def decode_rate(self, batch: list[list[int]], num_new: int) -> float:
        """Return decode tokens/s."""
        started = time.perf_counter()
        greedy(self.engine, batch, 1)
        first_s = time.perf_counter() - started
        started = time.perf_counter()
        greedy(self.engine, batch, num_new)
        return len(batch) * (num_new - 1) / (time.perf_counter() - started - first_s)


def make_side(dispatcher: ExpertDispatcher, arguments: argparse.Namespace) -> Side:
    """Start an engine on these experts."""
    config = ModelConfig.from_checkpoint(arguments.checkpoint)
    decoder = load_decoder(
        arguments.checkpoint, torch.bfloat16, dispatcher, num_threads=arguments.threads
    )
    engine = start_engine(
        decoder,
        config,
        max_num_seqs=max(arguments.batches),
        max_tokens_per_seq=arguments.prompt + arguments.new + 1,
    )
    return Side(engine, dispatcher, {batch: Samples() for batch in arguments.batches})


def measure(sides: dict[str, Side], kernels: Kernels | None, arguments: argparse.Namespace) -> None:
    """Run the sides in turn."""
    vocab_size = ModelConfig.from_checkpoint(arguments.checkpoint).vocab_size
    for batch_size in arguments.batches:
        batch = prompts(batch_size, arguments.prompt, vocab_size)
        for repeat in range(arguments.repeats + 1):
            for name, side in sides.items():
                if kernels is not None:
                    kernels.set_num_threads(arguments.threads)
                others = OtherCores([os.getpid()])
                rate = side.decode_rate(batch, arguments.new)
                if repeat:  # the first round warms up
                    side.samples[batch_size].add(rate, others.cores())
                    print(f"  batch {batch_size} {name}: {rate:.1f} tok/s", flush=True)


def main() -> None:
    """Build the three sides, measure, print ratios and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2, help="of trunk and local experts")
    parser.add_argument("--group-threads", type=int, default=1)
    parser.add_argument("--batches", type=_numbers, default=[1, 8])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    checkpoint, dtype = arguments.checkpoint, torch.bfloat16
    with GroupPool(arguments.groups) as pool:
        groups = pool.serve(checkpoint, num_threads=arguments.group_threads)
        make: dict[str, Callable[[], ExpertDispatcher]] = {
            "local": lambda: local_dispatcher(checkpoint, dtype, num_threads=arguments.threads),
            "lane": lambda: groups.connect(dtype=dtype, transport="lane"),
            "grpc": lambda: groups.connect(dtype=dtype, transport="grpc"),
        }
        sides = {name: make_side(factory(), arguments) for name, factory in make.items()}
        try:
            measure(sides, load_kernels(), arguments)
        finally:
            for side in sides.values():
                side.engine.stop(drain=False)
                side.dispatcher.close()
    figures: dict[str, object] = {}
    is_met = True
    for batch_size in arguments.batches:
        local = sides["local"].samples[batch_size].median
        for name, side in sides.items():
            samples = side.samples[batch_size]
            slow = percentile([-value for value in samples.values], 99)
            row = {**samples.to_json(), "p99_slowest": round(-slow, 2)}
            row["ratio_to_local"] = round(samples.median / local, 3)
            figures[f"batch {batch_size} {name}"] = row
            print(f"batch {batch_size} {name}: {samples.median:.1f}, {row['ratio_to_local']}")
        if batch_size in BARS:
            best = sides["lane"].samples[batch_size].median / local
            is_met &= best >= BARS[batch_size]
    config = {
        "checkpoint": checkpoint.name,
        "groups": arguments.groups,
        "threads": arguments.threads,
        "group_threads": arguments.group_threads,
        "prompt": arguments.prompt,
        "new": arguments.new,
    }
    report("remote_vs_local", config, {**figures, "bars": BARS, "is_met": is_met})


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


if __name__ == "__main__":
    main()
