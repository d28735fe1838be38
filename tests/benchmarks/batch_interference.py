"""What a batch job does to people: time to the first interactive token, with and without it.

Regime: `expertmesh serve`, interactive greedy requests of `--prompt` random token ids and `--new`
    tokens, one after the other with a pause of random length (mean `--pause` seconds) between them,
    so that they meet the batch's steps anywhere. Batch rows of the same prompts' length and
    `--batch-new` tokens, `--concurrency` at a time, at batch priority, fed by a client in a process
    of its own (`cluster.batch.asker`, without Ray). Rounds with and without it in turn.

Meaning: `ttft_ms` is from the call to the first token's message, as the client sees it. `ratio` is
    p99 with the batch / p99 without, over all rounds.

Ceiling: 1, and the rest of the step that runs when a request comes.

    python -m tests.benchmarks.batch_interference CHECKPOINT
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc

from cluster.batch.asker import Asker, AskerSettings
from cluster.batch.rows import RowDefaults, row_of
from protos.tls import Access
from protos.v1 import generation_pb2_grpc
from tests.benchmarks.harness import (
    ROOT,
    ServedCluster,
    greedy_request,
    percentile,
    prompts,
    report,
    served,
    vocab_size_of,
)

BAR = 1.5


async def feed(address: str, length: int, vocab_size: int, num_new: int, concurrency: int) -> None:
    """Ask batch rows, so many at a time, until the process is ended."""
    settings = AskerSettings(
        addresses=(address,), access=Access(), model="", concurrency=concurrency
    )
    asker = Asker(settings)
    body = {"max_tokens": num_new, "ignore_eos": True}
    rows = [
        row_of(
            number,
            {"custom_id": f"row-{number}", "prompt": prompt, **body},
            id_field="custom_id",
            defaults=RowDefaults(temperature=0.0),
        )
        for number, prompt in enumerate(prompts(512, length, vocab_size, seed=99))
    ]
    waiting = itertools.cycle(rows)

    async def seat() -> None:
        while True:
            outcome = await asker.ask(next(waiting))
            assert outcome.error is None, outcome.error

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(seat())


@contextlib.contextmanager
def feeding(address: str, vocab_size: int, arguments: argparse.Namespace) -> Iterator[None]:
    """Run `feed` in a process of its own, as a client of a batch is one."""
    values = (arguments.prompt, vocab_size, arguments.batch_new, arguments.concurrency)
    words = ("--feed", address, *map(str, values))
    process = subprocess.Popen([sys.executable, "-m", __spec__.name, *words], cwd=ROOT)
    try:
        time.sleep(arguments.settle)
        assert process.poll() is None, "the batch ended"
        yield
    finally:
        process.kill()
        process.wait()


async def first_tokens_s(
    address: str, batch: list[list[int]], num_new: int, pause_s: float, rng: random.Random
) -> list[float]:
    """Ask one request after the other; returns the seconds to each one's first token."""
    found = []
    async with grpc.aio.insecure_channel(address) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        for prompt in batch:
            await asyncio.sleep(rng.uniform(0, 2 * pause_s))
            started, first = time.perf_counter(), None
            async for message in stub.Generate(greedy_request(prompt, num_new), timeout=600):
                if message.token_ids and first is None:
                    first = time.perf_counter() - started
            assert first is not None
            found.append(first)
    return found


def measure(
    cluster: ServedCluster, vocab_size: int, arguments: argparse.Namespace
) -> tuple[dict[str, list[float]], float]:
    """Run the rounds; returns the times by side, and the batch's tokens a second."""
    rng = random.Random(arguments.seed)
    times: dict[str, list[float]] = {"without": [], "with": []}
    num_tokens, seconds = 0, 0.0
    for repeat in range(arguments.repeats + 1):
        for side in times:
            seed = 1000 + 2 * repeat + (side == "with")
            asked = prompts(arguments.requests, arguments.prompt, vocab_size, seed=seed)
            background = (
                feeding(cluster.address, vocab_size, arguments)
                if side == "with"
                else contextlib.nullcontext()
            )
            with background:
                started, before = time.perf_counter(), generated(cluster)
                found = asyncio.run(
                    first_tokens_s(cluster.address, asked, arguments.new, arguments.pause, rng)
                )
                if side == "with":
                    seconds += time.perf_counter() - started
                    num_tokens += generated(cluster) - before - len(asked) * arguments.new
            p50 = statistics.median(found) * 1e3
            print(f"{side}: p50 {p50:.1f} ms, max {max(found) * 1e3:.1f} ms", flush=True)
            if repeat:  # the first round warms up
                times[side] += found
    return times, num_tokens / seconds


def generated(cluster: ServedCluster) -> int:
    """Return the tokens that the routers have drawn."""
    return sum(router.generation_tokens for router in cluster.status().routers)


def main() -> None:
    """Serve, measure, print the JSON line."""
    if sys.argv[1:2] == ["--feed"]:
        address, *values = sys.argv[2:]
        asyncio.run(feed(address, *map(int, values)))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=8)
    parser.add_argument("--batch-new", type=int, default=128)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--requests", type=int, default=60, help="per round and side")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--pause", type=float, default=0.2)
    parser.add_argument("--settle", type=float, default=5.0, help="of the batch, seconds")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--serve-argument", action="append", default=[])
    arguments = parser.parse_args()
    options = ("--expert-groups", "2", *arguments.serve_argument)
    with served(arguments.checkpoint, *options) as cluster:
        vocab_size = vocab_size_of(arguments.checkpoint)
        times, batch_tok_s = measure(cluster, vocab_size, arguments)
    shown = {
        side: {
            name: round(percentile(found, percent) * 1e3, 2)
            for name, percent in (("p50", 50), ("p90", 90), ("p99", 99), ("max", 100))
        }
        for side, found in times.items()
    }
    ratio = shown["with"]["p99"] / shown["without"]["p99"]
    figures = {
        "ttft_ms": shown,
        "batch_tok_s": round(batch_tok_s, 1),
        "ratio_p99": round(ratio, 3),
        "bar": BAR,
        "is_met": ratio <= BAR,
    }
    config = {**vars(arguments), "checkpoint": arguments.checkpoint.name}
    report("batch_interference", config, figures)


if __name__ == "__main__":
    main()
