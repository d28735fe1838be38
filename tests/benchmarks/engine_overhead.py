"""What the engine adds to every step: schedule, batch building, sampling, output.

Regime: one process, one thread, a null model that returns the same logits at once, all sequences
decoding; prompts of 4 tokens, batches of 1, 8, 32 and 256. Greedy (one argmax for all) and sampled
(temperature 0.7, top-k 20, top-p 0.95), with prefixes reused and not, in turn: 300 steps fill two
cache blocks a sequence. Meaning: median and p99 of the microseconds of `Engine.step`, sinks
included; the steps of several rounds after a warm-up round. Ceiling: an argmax has to read batch x
vocab x 4 bytes (32 x 32768: 4 MB, about 0.1 ms at 40 GB/s), which is why the vocabulary is given
with each figure; the rest is Python.

Usage: python -m tests.benchmarks.engine_overhead [--vocab 1024 32768] [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from router.engine.batch import Batch
from router.engine.config import EngineConfig
from router.engine.engine import Engine
from router.engine.request import EngineRequest, SamplingParams, StoppingParams

BATCHES = (1, 8, 32, 256)
STEPS = 300
SEED = 20261122
MODES = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.7, "top_k": 20, "top_p": 0.95},
}


class NullCacheIo:
    """Values of 1 MiB a state and 128 KiB a cache block, copied from nowhere to nowhere."""

    state_bytes = 1 << 20
    kv_block_bytes = 1 << 17
    layout: Mapping[str, Any] = {}

    def tail_bytes(self, num_tokens: int) -> int:
        return num_tokens << 10

    def read_tail(self, blocks: Sequence[int], num_tokens: int, out: Any) -> None:
        out[:] = 0

    def read_state(self, slot: int, out: Any) -> None:
        out[:] = 0


class NullModel:
    """Returns the same logits for every batch."""

    def __init__(self, vocab: int) -> None:
        generator = torch.Generator().manual_seed(SEED)
        self.logits = torch.randn(256, vocab, generator=generator) * 3

    def allocate_caches(self, num_blocks: int, block_size: int, num_state_slots: int) -> None:
        return None

    def cache_io(self, caches: Any) -> NullCacheIo:
        return NullCacheIo()

    def forward(self, batch: Batch, caches: Any) -> torch.Tensor:
        return self.logits[: len(batch.logit_rows)]


def measure(
    model: NullModel, vocab: int, batch: int, mode: dict[str, Any], is_reusing: bool
) -> list[float]:
    """Return the seconds of each decode step of one round."""
    config = EngineConfig(
        vocab_size=vocab,
        max_model_len=4096,
        num_blocks=256 * 20,
        num_state_slots=256,
        max_num_seqs=256,
        prefix_caching=is_reusing,
    )
    engine = Engine(model, config)
    received = 0

    def sink(output: Any) -> None:
        nonlocal received
        received += len(output.token_ids)

    for i in range(batch):
        engine.submit(
            EngineRequest(
                request_id=f"r{i}",
                prompt_ids=[1, 2, 3, 4],
                sampling=SamplingParams(seed=i, **mode),
                stopping=StoppingParams(max_tokens=STEPS + 2),
            ),
            sink,
        )
    engine.step()
    seconds = []
    for _ in range(STEPS):
        begin = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - begin)
    engine.step()
    assert received == batch * (STEPS + 2), received
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, nargs="+", default=[1024, 32768])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    figures = []
    for vocab in arguments.vocab:
        model = NullModel(vocab)
        for mode, sampling in MODES.items():
            for batch in BATCHES:
                rounds: dict[bool, list[list[float]]] = {False: [], True: []}
                for _ in range(arguments.rounds + 1):
                    for is_reusing, found in rounds.items():
                        found.append(measure(model, vocab, batch, sampling, is_reusing))
                for is_reusing, found in rounds.items():
                    step_us = np.array(found[1:]).ravel() * 1e6
                    figure = {
                        "vocab": vocab,
                        "mode": mode,
                        "batch": batch,
                        "reuse": is_reusing,
                        "median_us": round(float(np.median(step_us)), 1),
                        "mean_us": round(float(step_us.mean()), 1),
                        "p99_us": round(float(np.quantile(step_us, 0.99)), 1),
                        "min_us": round(float(step_us.min()), 1),
                    }
                    figures.append(figure)
                    print(
                        f"vocab {vocab:6d} {mode:8s} batch {batch:3d} reuse {is_reusing:d}: "
                        f"median {figure['median_us']:8.1f} us  mean {figure['mean_us']:8.1f} us  "
                        f"p99 {figure['p99_us']:8.1f} us  min {figure['min_us']:8.1f} us",
                        flush=True,
                    )
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    document = {
        "benchmark": "engine_overhead",
        "commit": commit,
        "device": platform.processor() or platform.machine(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "config": {"steps": STEPS, "rounds": arguments.rounds, "seed": SEED},
        "figures": figures,
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
