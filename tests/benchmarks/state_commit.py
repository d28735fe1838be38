"""Time to make a turn durable, and to begin one, on a meta server of each make and fsync policy.

Regime: one router, one session at a time (serial) and eight at once, over a Unix socket on this
machine; a turn of 400 prompt tokens and 8 checkpoints of 64, as the gateway makes it. `commit` is
what the end of a stream waits for: one script, one round trip. Ceiling: the round trip itself,
measured as PING in the same run; with `always` one fsync of the disk under the server's folder.
The client is `SessionStore` as routers use it (`redis.asyncio`), whose own cost is in the figures.

    python -m tests.benchmarks.state_commit [--turns 300] [--repeats 5]
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np

from router.state.embedded import EmbeddedServer, Role, find_binary
from router.state.session_records import OpenTurn, TurnRecord
from router.state.sessions import SessionStore
from tests.benchmarks.harness import OtherCores, percentile, report

PROMPT_TOKENS = 400
CHECKPOINTS = 8
CHECKPOINT_TOKENS = 64
SESSIONS = 8


class Timer:
    """Durations of calls by name, in milliseconds."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}

    async def __call__(self, name: str, call: Awaitable[object]) -> None:
        """Await a call and note how long it took."""
        started = time.perf_counter()
        await call
        self.values.setdefault(name, []).append(1000 * (time.perf_counter() - started))

    def figures(self) -> dict[str, dict[str, float]]:
        """p50 and p99 of each call, in milliseconds."""
        return {
            name: {"p50_ms": round(percentile(v, 50), 3), "p99_ms": round(percentile(v, 99), 3)}
            for name, v in self.values.items()
        }


async def run_turn(store: SessionStore, session_id: str, number: int, timer: Timer) -> None:
    """Run one turn, from the lease to its release."""
    prompt = np.arange(PROMPT_TOKENS, dtype=np.uint32)
    new = np.arange(CHECKPOINT_TOKENS, dtype=np.uint32)
    request_id = f"q{number}"
    started = time.perf_counter()
    lease = await store.acquire("bench", session_id)
    timer.values.setdefault("acquire", []).append(1000 * (time.perf_counter() - started))
    turn = OpenTurn(request_id=request_id, prompt_ids=prompt, seed=1, request=bytes(500))
    await timer("open", store.open_turn(lease, turn))
    for _ in range(CHECKPOINTS):
        await timer("checkpoint", store.checkpoint(lease, new))
    record = TurnRecord(
        request_id=request_id,
        first_token=lease.num_tokens,
        prompt_tokens=PROMPT_TOKENS,
        completion_tokens=(CHECKPOINTS + 1) * CHECKPOINT_TOKENS,
        finish_reason="stop",
    )
    await timer("commit", store.commit_turn(lease, request_id, record, new))
    await timer("release", store.release(lease))


async def measure(server: EmbeddedServer, turns: int) -> dict[str, object]:
    """Run `turns` turns serially, and as many by eight sessions at once."""
    store = SessionStore.connect(server.endpoint, engine="bench")
    ids = [(await store.create("bench", ttl_s=600)).session_id for _ in range(SESSIONS)]
    for number in range(20):  # warm-up
        await run_turn(store, ids[0], number, Timer())
    serial, together = Timer(), Timer()
    for _ in range(turns):
        await serial("ping", store.ping())
    for number in range(turns):
        await run_turn(store, ids[1], number, serial)
    started = time.perf_counter()

    async def one(session_id: str) -> None:
        for number in range(turns // SESSIONS):
            await run_turn(store, session_id, 1000 + number, together)

    await asyncio.gather(*(one(session_id) for session_id in ids))
    wall = time.perf_counter() - started
    for session_id in ids:
        await store.delete("bench", session_id)
    await store.close()
    return {
        "serial": serial.figures(),
        "eight_at_once": together.figures(),
        "eight_at_once_turns_per_s": round(turns // SESSIONS * SESSIONS / wall, 1),
    }


def programs() -> dict[str, Path]:
    """Return the servers that this machine has."""
    found = {"valkey": find_binary()}
    if redis := shutil.which("redis-server"):
        found["redis"] = Path(redis)
    return found


def main() -> None:
    """Measure every make and policy in turn; the median repetition by commit's p50 is reported."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    found: dict[str, list[dict[str, object]]] = {}
    commit_p50: Callable[[dict[str, object]], float] = lambda f: f["serial"]["commit"]["p50_ms"]  # type: ignore[index]  # noqa: E731
    for _ in range(arguments.repeats):
        for make, program in programs().items():
            for policy in ("everysec", "always"):
                others = OtherCores([])
                extra = f"appendfsync {policy}"
                with EmbeddedServer.start(Role.META, binary=program, extra=extra) as server:
                    figures = asyncio.run(measure(server, arguments.turns))
                figures["busy_cores"] = round(others.cores(), 2)
                found.setdefault(f"{make}_{policy}", []).append(figures)
                print(f"{make} {policy}: commit p50 {commit_p50(figures)} ms", flush=True)
    median = {
        name: sorted(runs, key=commit_p50)[len(runs) // 2]
        | {"all_p50_ms": [*map(commit_p50, runs)]}
        for name, runs in found.items()
    }
    report("state_commit", vars(arguments), median)


if __name__ == "__main__":
    main()
