"""Decode throughput while everything computed is written to Redis, against not writing.

Regime: two services on one checkpoint, alternating: `off` without servers (`--no-state`, prefix
    cache on), `on` with an embedded Valkey: each cache block of 128 tokens and each snapshot goes
    out behind the step. `--batch` requests at once, prompts never seen before, so that every block
    is written. `sessions` is `on` with the same requests as turns of sessions, which also save
    their tokens every 64 or every second, and are committed.

Meaning: tokens per second of all streams together, in the window in which all of them decode: from
    the last first token to the first last token. Ratios are of medians.

Ceiling: 1.0; a write costs one copy of the block and its way through a socket, on another thread.

    python -m tests.benchmarks.write_through CHECKPOINT [--repeats 7]
"""

from __future__ import annotations

import argparse
import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path

import grpc

from protos.v1 import generation_pb2, generation_pb2_grpc, session_pb2, session_pb2_grpc
from tests.benchmarks.harness import (
    ServedCluster,
    alternate,
    greedy_request,
    prompts,
    report,
    served,
    vocab_size_of,
)

BAR = 0.97
SETTLE_S = 30.0

_runs = itertools.count(1)


class Stream(threading.Thread):
    """One request, and when its tokens came."""

    def __init__(
        self,
        stub: generation_pb2_grpc.GenerationServiceStub,
        request: generation_pb2.GenerateRequest,
    ) -> None:
        super().__init__()
        self._stub = stub
        self._request = request
        self.times: list[float] = []
        """Of each token."""

    def run(self) -> None:
        """Read the stream to its end."""
        for message in self._stub.Generate(self._request, timeout=600):
            self.times += [time.perf_counter()] * len(message.token_ids)


def decode_rate(streams: list[Stream]) -> float:
    """Return the tokens per second of all streams while all of them decode."""
    begin = max(stream.times[0] for stream in streams)
    end = min(stream.times[-1] for stream in streams)
    count = sum(begin < at <= end for stream in streams for at in stream.times)
    return count / (end - begin)


def run_batch(
    cluster: ServedCluster, arguments: argparse.Namespace, vocab: int, *, sessions: bool
) -> float:
    """Decode a batch of new prompts and return its rate; waits until all is written."""
    number = next(_runs)
    texts = prompts(arguments.batch, arguments.prompt, vocab, seed=number)
    channel = grpc.insecure_channel(cluster.address)
    stub = generation_pb2_grpc.GenerationServiceStub(channel)
    streams = []
    for index, text in enumerate(texts):
        request = greedy_request(text, arguments.new)
        if sessions:
            request.session_id = f"run-{number}-{index}"
            calls = session_pb2_grpc.SessionServiceStub(channel)
            made = session_pb2.CreateSessionRequest(session_id=request.session_id)
            calls.CreateSession(made, timeout=30)
        streams.append(Stream(stub, request))
    for stream in streams:
        stream.start()
    for stream in streams:
        stream.join()
    deadline = time.monotonic() + SETTLE_S
    while time.monotonic() < deadline and any(
        router.cache.queued_bytes for router in cluster.status().routers
    ):
        time.sleep(0.05)
    channel.close()
    return decode_rate(streams)


def main() -> None:
    """Run the sides in turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--new", type=int, default=384)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--groups", default="1")
    arguments = parser.parse_args()
    vocab = vocab_size_of(arguments.checkpoint)
    flags = ("--expert-groups", arguments.groups, "--max-num-seqs", str(2 * arguments.batch))
    with (
        served(arguments.checkpoint, "--no-state", *flags) as off,
        served(arguments.checkpoint, *flags, "--namespace", "second") as on,
    ):
        sides: dict[str, Callable[[], float]] = {
            "off": lambda: run_batch(off, arguments, vocab, sessions=False),
            "on": lambda: run_batch(on, arguments, vocab, sessions=False),
            "sessions": lambda: run_batch(on, arguments, vocab, sessions=True),
        }
        samples = alternate(sides, arguments.repeats)
        (cache,) = (router.cache for router in on.status().routers)
    ratio = samples["on"].median / samples["off"].median
    figures = {
        **{f"{name}_tokens_per_s": side.to_json() for name, side in samples.items()},
        "on_over_off": round(ratio, 4),
        "sessions_over_off": round(samples["sessions"].median / samples["off"].median, 4),
        "stored_mib": round(cache.stored_bytes / (1 << 20), 1),
        "dropped_mib": round(cache.dropped_bytes / (1 << 20), 1),
        "is_met": ratio >= BAR,
    }
    names = ("batch", "prompt", "new", "repeats", "groups")
    config = {name: getattr(arguments, name) for name in names}
    report("write_through", {"checkpoint": arguments.checkpoint.name, **config}, figures)
    raise SystemExit(0 if ratio >= BAR else 1)


if __name__ == "__main__":
    main()
