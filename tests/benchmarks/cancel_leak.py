"""Requests cancelled at random moments: what is left behind.

Regime: `expertmesh serve` with few slots, `--concurrent` requests at once, so that some wait, some
    prefill and some decode. Each ends after a random time by one of: the client goes away,
    `CancelRequests`, its deadline. `--requests` count after a warm-up of a fifth as many.

Meaning: when the last one is gone, `ClusterService.GetStatus` must show no running or waiting
    request, no used block, no used state slot; the groups no more streams or lanes than before, and
    no forward that comes after. Growth is the routers' PSS after each wave, against the first.

    The prefix cache is off: it fills up to its budget, which is its purpose and would hide a leak.

Ceiling: 0 of everything; memory as after the warm-up.

    python -m tests.benchmarks.cancel_leak CHECKPOINT
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import random
import time
from collections.abc import Sequence
from pathlib import Path

import grpc
import psutil

from protos.v1 import experts_pb2, experts_pb2_grpc, generation_pb2, generation_pb2_grpc
from tests.benchmarks.harness import (
    ServedCluster,
    greedy_request,
    pss_bytes,
    report,
    served,
    vocab_size_of,
)

WAYS = ("client", "cancel", "deadline")
NUM_WAVES = 5
GROWTH_BAR_BYTES = 8 << 20
"""What an allocator may wander between the second wave and the last."""
SETTLE_S = 10.0


class Canceller:
    """Sends requests and ends each in its own way."""

    def __init__(self, address: str, vocab_size: int, longest_s: float, seed: int) -> None:
        self._channel = grpc.aio.insecure_channel(address)
        self._stub = generation_pb2_grpc.GenerationServiceStub(self._channel)
        self._vocab_size = vocab_size
        self._longest_s = longest_s
        self._rng = random.Random(seed)
        self._count = 0
        self.moments: collections.Counter[str] = collections.Counter()
        """How far each request was when it ended."""

    async def wave(self, num_requests: int, concurrent: int) -> None:
        """Run and cancel `num_requests` requests."""
        gate = asyncio.Semaphore(concurrent)

        async def one() -> None:
            async with gate:
                await self._one()

        await asyncio.gather(*(one() for _ in range(num_requests)))

    async def _one(self) -> None:
        rng = self._rng
        self._count += 1
        request_id = f"cancel-{self._count}"
        way = WAYS[self._count % len(WAYS)]
        length = rng.choice((1, 16, 64, 300, 1000))
        request = greedy_request(
            [rng.randrange(16, self._vocab_size) for _ in range(length)], 1000, request_id
        )
        delay_s = rng.uniform(0, self._longest_s)
        phase = ["not accepted"]
        timeout_s = delay_s if way == "deadline" else 60.0
        call = self._stub.Generate(request, timeout=timeout_s)
        reader = asyncio.create_task(self._read(call, phase))
        if way != "deadline":
            await asyncio.wait({reader}, timeout=delay_s)
            if way == "client":
                call.cancel()
            else:
                await self._cancel(request_id, reader)
        reason = await reader
        self.moments[f"{way}: {phase[0]}, {reason}"] += 1

    async def _read(
        self,
        call: grpc.aio.UnaryStreamCall[
            generation_pb2.GenerateRequest, generation_pb2.GenerateResponse
        ],
        phase: list[str],
    ) -> str:
        """Read to the end; returns how it ended."""
        reason = "ended without a reason"
        try:
            async for message in call:
                if message.token_ids:
                    phase[0] = "decode"
                elif message.HasField("prefill"):
                    phase[0] = "prefill"
                elif message.HasField("accepted"):
                    phase[0] = "accepted"
                if message.HasField("finished"):
                    reason = generation_pb2.FinishReason.Name(message.finished.reason)
        except asyncio.CancelledError:
            return "CANCELLED"
        except grpc.aio.AioRpcError as error:
            return error.code().name
        return reason

    async def _cancel(self, request_id: str, reader: asyncio.Task[str]) -> None:
        """Ask until the request is known (it may still be on its way in) or over."""
        request = generation_pb2.CancelRequestsRequest(request_ids=[request_id])
        while not reader.done():
            answer = await self._stub.CancelRequests(request, timeout=10)
            if answer.cancelled:
                return
            await asyncio.wait({reader}, timeout=0.005)

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()


def leftovers(cluster: ServedCluster) -> dict[str, int]:
    """Return what the routers hold, summed."""
    names = ("requests_running", "requests_waiting", "kv_blocks_used", "state_slots_used")
    routers = cluster.status().routers
    return {name: sum(getattr(router, name) for router in routers) for name in names}


def group_state(cluster: ServedCluster) -> dict[str, int]:
    """Return open lanes, open streams and forwards so far, over all groups."""
    totals = {"open_lanes": 0, "open_streams": 0, "num_calls": 0}
    for group in cluster.status().groups:
        with grpc.insecure_channel(group.grpc_address) as channel:
            stub = experts_pb2_grpc.ExpertServiceStub(channel)
            state = stub.GetState(experts_pb2.GetStateRequest(), timeout=10)
        for name in totals:
            totals[name] += getattr(state, name)
    return totals


def settle(cluster: ServedCluster) -> tuple[float, dict[str, int]]:
    """Wait until nothing is held; returns seconds and what is still held."""
    started = time.perf_counter()
    while True:
        held = leftovers(cluster)
        seconds = time.perf_counter() - started
        if not any(held.values()) or seconds > SETTLE_S:
            return seconds, held
        time.sleep(0.01)  # polls another process


def router_pss(cluster: ServedCluster) -> int:
    """Return the routers' PSS."""
    return pss_bytes([psutil.Process(router.pid) for router in cluster.status().routers])


def main() -> None:
    """Cancel wave after wave; exit code 1 when anything is left."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--concurrent", type=int, default=48)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--chunk", type=int, default=64, help="tokens a step: long prefills")
    parser.add_argument("--longest-s", type=float, default=1.5)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--serve-argument", action="append", default=[])
    arguments = parser.parse_args()
    options = [
        *("--expert-groups", str(arguments.groups), "--max-num-seqs", str(arguments.slots)),
        *("--max-num-batched-tokens", str(arguments.chunk), "--no-enable-prefix-caching"),
    ]
    per_wave = arguments.requests // NUM_WAVES
    with served(arguments.checkpoint, *options, *arguments.serve_argument) as cluster:
        pss, growth, figures = asyncio.run(_waves(cluster, arguments, per_wave))
    is_met = growth <= GROWTH_BAR_BYTES and not figures["leaks"]
    figures |= {
        "router_pss_mib": [round(value / 2**20, 1) for value in pss],
        "growth_mib": round(growth / 2**20, 2),
        "is_met": is_met,
    }
    config = {
        "checkpoint": arguments.checkpoint.name,
        "requests": per_wave * NUM_WAVES,
        "concurrent": arguments.concurrent,
        "slots": arguments.slots,
        "chunk": arguments.chunk,
        "seed": arguments.seed,
    }
    report("cancel_leak", config, figures)
    raise SystemExit(0 if is_met else 1)


async def _waves(
    cluster: ServedCluster, arguments: argparse.Namespace, per_wave: int
) -> tuple[Sequence[int], int, dict[str, object]]:
    canceller = Canceller(
        cluster.address,
        vocab_size_of(arguments.checkpoint),
        arguments.longest_s,
        arguments.seed,
    )
    await canceller.wave(per_wave, arguments.concurrent)  # warms up
    canceller.moments.clear()
    settle(cluster)
    before = group_state(cluster)
    pss, settled, leaks = [router_pss(cluster)], [], []
    for number in range(NUM_WAVES):
        await canceller.wave(per_wave, arguments.concurrent)
        seconds, held = settle(cluster)
        settled.append(round(seconds, 3))
        leaks += [f"wave {number}: {name} {count}" for name, count in held.items() if count]
        pss.append(router_pss(cluster))
        print(f"wave {number}: settled in {seconds:.2f} s, held {held}, PSS {pss[-1] >> 20} MiB")
    calls = group_state(cluster)
    await asyncio.sleep(1)  # what would come late, comes now
    after = group_state(cluster)
    if after["num_calls"] != calls["num_calls"]:
        leaks.append(f"{after['num_calls'] - calls['num_calls']} forwards after the end")
    for name in ("open_lanes", "open_streams"):
        if after[name] > before[name]:
            leaks.append(f"{name}: {before[name]} before, {after[name]} after")
    await canceller.close()
    for moment, count in sorted(canceller.moments.items()):
        print(f"  {count:5} {moment}")
    for leak in leaks:
        print(f"LEAK {leak}")
    figures: dict[str, object] = {
        "leaks": leaks,
        "left": dict(leftovers(cluster)),
        "groups_before": before,
        "groups_after": after,
        "settled_s": settled,
        "moments": dict(canceller.moments),
    }
    return pss, pss[-1] - pss[1], figures


if __name__ == "__main__":
    main()
