"""What the batch engine costs: tokens a second of a batch against bare streams.

Regime: `expertmesh serve`, `--rows` greedy rows of `--prompt` token ids and `--new` tokens,
    `--concurrency` at a time, at batch priority. `bare`: this process asks over one channel with
    plain gRPC stubs, a new stream as soon as one ends. `batch`: `expertmesh batch run` with one
    client. Both in turn.

Meaning: generated tokens a second from the first row asked to the last one committed; of the batch
    without the start of its Ray and its client, which `start_s` tells. `ratio` is batch / bare.

Ceiling: 1. The batch's client parses and writes rows and has Ray beside it, on the same cores.

    python -m tests.benchmarks.batch_throughput CHECKPOINT [--rows 512]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import grpc

from protos.v1 import generation_pb2, generation_pb2_grpc
from tests.benchmarks.harness import (
    OtherCores,
    Samples,
    greedy_request,
    prompts,
    report,
    served,
    vocab_size_of,
)
from tests.integration.batches import BatchRun

BAR = 0.9


async def bare_rate(address: str, rows: list[list[int]], num_new: int, concurrency: int) -> float:
    """Ask all rows, so many at a time; returns generated tokens a second."""
    seats = asyncio.Semaphore(concurrency)

    async def one(stub: generation_pb2_grpc.GenerationServiceStub, prompt: list[int]) -> int:
        async with seats:
            request = greedy_request(prompt, num_new)
            request.priority = generation_pb2.PRIORITY_BATCH  # its messages are as large
            stream = stub.Generate(request, timeout=3600)
            return sum([len(message.token_ids) async for message in stream])

    async with grpc.aio.insecure_channel(address) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        started = time.perf_counter()
        counts = await asyncio.gather(*(one(stub, prompt) for prompt in rows))
        return sum(counts) / (time.perf_counter() - started)


def write_rows(file: Path, rows: list[list[int]], num_new: int) -> None:
    """Write the same rows as an input of `batch run`."""
    body = {"max_tokens": num_new, "min_tokens": num_new, "ignore_eos": True, "temperature": 0}
    lines = [
        json.dumps({"custom_id": f"row-{number}", "body": {**body, "prompt": prompt}})
        for number, prompt in enumerate(rows)
    ]
    file.write_text("\n".join(lines) + "\n")


def batch_rate(file: Path, output: Path, address: str, flags: Sequence[str]) -> tuple[float, float]:
    """Run the batch; returns generated tokens a second, and the seconds before its first row."""
    started = time.time()
    with BatchRun(file, output, address, *flags) as run:
        code, result, err = run.wait(3600)
    if code:
        raise RuntimeError(f"the batch ended with {code}: {err[-2000:]}")
    first = min(path.stat().st_mtime for path in (output / "_batch" / "tries").iterdir())
    last = max(path.stat().st_mtime for path in output.glob("part-*.jsonl"))
    return result["completion_tokens"] / (last - first), first - started


def main() -> None:
    """Serve, measure both in turn, print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--part-rows", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--serve-argument", action="append", default=[])
    arguments = parser.parse_args()
    num_new, concurrency = arguments.new, arguments.concurrency
    flags = ["--clients", "1", "--concurrency", str(concurrency)]
    flags += ["--part-rows", str(arguments.part_rows)]
    bare, batch, starts = Samples(), Samples(), []
    with (
        tempfile.TemporaryDirectory(prefix="batch-") as folder,
        served(arguments.checkpoint, "--expert-groups", "2", *arguments.serve_argument) as cluster,
    ):
        vocab_size = vocab_size_of(arguments.checkpoint)
        for repeat in range(arguments.repeats + 1):
            # New prompts each time: nothing of them is in a cache.
            rows = prompts(2 * arguments.rows, arguments.prompt, vocab_size, seed=repeat)
            theirs, ours = rows[: arguments.rows], rows[arguments.rows :]
            others = OtherCores([os.getpid()])
            rate = asyncio.run(bare_rate(cluster.address, theirs, num_new, concurrency))
            bare_others = others.cores()
            file, output = Path(folder) / f"in{repeat}.jsonl", Path(folder) / f"out{repeat}"
            write_rows(file, ours, num_new)
            others = OtherCores([os.getpid()])
            batch_tok_s, start_s = batch_rate(file, output, cluster.address, flags)
            print(f"bare {rate:.0f} tok/s, batch {batch_tok_s:.0f} tok/s", flush=True)
            if repeat:  # the first round warms up
                bare.add(rate, bare_others)
                batch.add(batch_tok_s, others.cores())
                starts.append(start_s)
    ratio = batch.median / bare.median
    figures = {
        "bare_tok_s": bare.to_json(),
        "batch_tok_s": batch.to_json(),
        "start_s": round(statistics.median(starts), 2),
        "ratio": round(ratio, 3),
        "bar": BAR,
        "is_met": ratio >= BAR,
    }
    report(
        "batch_throughput", {**vars(arguments), "checkpoint": arguments.checkpoint.name}, figures
    )


if __name__ == "__main__":
    main()
