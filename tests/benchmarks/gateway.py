"""What the gateway adds: time to first token as the client sees it, and 256 streams at once.

Regime: `expertmesh serve`, greedy token-id requests over loopback. Concurrency 1 with the
    synchronous client; then `--streams` streams at once with the asynchronous one, in this process,
    which shares the cores with the service.

Meaning: `overhead_ms` = the client's time to the first token minus the engine's own
    (`Timing.time_to_first_token`): gRPC there and back, checks, the hop to the engine thread and
    back. Gaps are between messages of one stream as they arrive.

Ceiling: a Python gRPC stream's round trip, 0.3 to 0.5 ms on this machine.

    python -m tests.benchmarks.gateway CHECKPOINT
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import time
from pathlib import Path

import grpc

from protos.v1 import generation_pb2_grpc
from tests.benchmarks.harness import (
    OtherCores,
    Samples,
    greedy_request,
    percentile,
    prompts,
    report,
    served,
    vocab_size_of,
)

BAR_MS = 2.0
Stub = generation_pb2_grpc.GenerationServiceStub


def first_token_overhead_s(stub: Stub, prompt: list[int]) -> float:
    """Run one short request; returns the client's time to first token minus the engine's."""
    request = greedy_request(prompt, 2)
    started = time.perf_counter()
    seen_s = engine_s = None
    for message in stub.Generate(request, timeout=60):
        if message.token_ids and seen_s is None:
            seen_s = time.perf_counter() - started
        if message.HasField("timing"):
            engine_s = message.timing.time_to_first_token.ToNanoseconds() * 1e-9
    assert seen_s is not None
    assert engine_s is not None
    return seen_s - engine_s


async def many_streams(
    address: str, batch: list[list[int]], num_new: int
) -> tuple[float, list[float]]:
    """Run all requests at once; returns tokens/s and all gaps between messages."""
    gaps: list[float] = []

    async def one(stub: Stub, prompt: list[int]) -> int:
        count, last = 0, None
        async for message in stub.Generate(greedy_request(prompt, num_new), timeout=600):
            if message.token_ids:
                now = time.perf_counter()
                if last is not None:
                    gaps.append(now - last)
                last = now
                count += len(message.token_ids)
        return count

    async with grpc.aio.insecure_channel(address) as channel:
        stub = Stub(channel)
        started = time.perf_counter()
        counts = await asyncio.gather(*(one(stub, prompt) for prompt in batch))
        seconds = time.perf_counter() - started
    if set(counts) != {num_new}:
        raise RuntimeError(f"streams gave {sorted(set(counts))} tokens instead of {num_new}")
    return sum(counts) / seconds, gaps


def main() -> None:
    """Serve, measure both, print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--requests", type=int, default=40, help="per repeat, one after the other")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--serve-argument", action="append", default=[])
    arguments = parser.parse_args()
    batch = prompts(arguments.streams, arguments.prompt, vocab_size_of(arguments.checkpoint))
    options = ("--expert-groups", str(arguments.groups), "--max-num-seqs", str(arguments.streams))
    overhead, rates = Samples(), Samples()
    overheads: list[float] = []
    gaps: list[float] = []
    with served(arguments.checkpoint, *options, *arguments.serve_argument) as cluster:
        stub = cluster.stub()
        for prompt in batch[:10]:
            first_token_overhead_s(stub, prompt)
        for _ in range(arguments.repeats):
            others = OtherCores([os.getpid()])
            times = [
                first_token_overhead_s(stub, batch[i % len(batch)]) * 1e3
                for i in range(arguments.requests)
            ]
            overheads += times
            overhead.add(statistics.median(times), others.cores())
            others = OtherCores([os.getpid()])
            rate, new_gaps = asyncio.run(many_streams(cluster.address, batch, arguments.new))
            rates.add(rate, others.cores())
            gaps += new_gaps
            print(
                f"overhead p50 {overhead.values[-1]:.2f} ms; "
                f"{arguments.streams} streams {rate:.0f} tok/s",
                flush=True,
            )
    figures = {
        "overhead_ms": {
            **overhead.to_json(),
            "p50": round(statistics.median(overheads), 3),
            "p99": round(percentile(overheads, 99), 3),
        },
        "streams_tok_s": rates.to_json(),
        "gap_ms": {
            "p50": round(statistics.median(gaps) * 1e3, 2),
            "p99": round(percentile(gaps, 99) * 1e3, 2),
        },
        "bar_ms": BAR_MS,
        "is_met": overhead.median <= BAR_MS,
    }
    print(f"overhead {figures['overhead_ms']}\ngap {figures['gap_ms']}")
    config = {
        "checkpoint": arguments.checkpoint.name,
        "groups": arguments.groups,
        "streams": arguments.streams,
        "prompt": arguments.prompt,
        "new": arguments.new,
        "serve": arguments.serve_argument,
    }
    report("gateway", config, figures)


if __name__ == "__main__":
    main()
