"""Routers killed in the middle of turns: does every session say what it would have said?

Regime: `expertmesh serve` in float32 with `--routers` routers, an embedded Valkey, sessions of
    `--turns` turns, greedy and sampled (temperature, top-p, penalties) in turn. First every session
    is held undisturbed; then again, and in every turn the router that serves it gets a SIGKILL when
    the client has a random number of its tokens, from none (while the prompt is prefilled) to all
    but one. The client library goes on by itself; killed routers come back meanwhile.

Meaning: `equal` turns have the tokens of the undisturbed run, each once and in order; `lost` and
    `repeated` count tokens that are missing or too many. `pause_s` is the longest wait for a
    message after the kill, as the client's user sees it; `no_pause` counts turns whose messages had
    all left the router when it died.

Ceiling: 100 % equal, 0 lost, 0 repeated. The pause: noticing the death, the lease, restoring and
    replaying; not the router's restart, which takes seconds beside it.

    python -m tests.benchmarks.kill_router CHECKPOINT [--kills 50]
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

from protos.client import Client, ClientConfig
from protos.v1 import cluster_pb2, generation_pb2
from tests.benchmarks.harness import percentile, prompts, report, served, vocab_size_of

STEADY_S = 5.5
"""A router that dies earlier after its start counts as crashing (`cluster.restarts.QUICK_S`)."""
NO_PAUSE_S = 0.02
PATIENCE = ClientConfig(resume_timeout_s=60.0)


@dataclass
class Turn:
    """One turn as its client saw it."""

    tokens: list[int] = field(default_factory=list)
    sequences: list[int] = field(default_factory=list)
    pause_s: float = 0.0
    was_killed: bool = False


class Routers:
    """Who serves, since when, and in which process."""

    def __init__(self, address: str) -> None:
        with Client(address) as client:
            addresses = [router.grpc_address for router in client.status().routers]
        self._client = Client(addresses)
        self._since: dict[int, float] = {}
        self.seen: set[int] = set()
        self.look()

    def look(self) -> list[cluster_pb2.RouterStatus]:
        """Return the routers that are ready, the longest first."""
        ready = [r for r in self._client.status().routers if r.state == "READY"]
        now = time.monotonic()
        for router in ready:
            self._since.setdefault(router.pid, now)
        self.seen |= {router.pid for router in ready}
        return sorted(ready, key=lambda router: self._since[router.pid])

    def wait_steady(self, count: int) -> list[cluster_pb2.RouterStatus]:
        """Wait until `count` routers are ready, the first for `STEADY_S`."""
        while True:
            ready = self.look()
            now = time.monotonic()
            if len(ready) >= count and now - self._since[ready[0].pid] >= STEADY_S:
                return ready
            time.sleep(0.1)

    def pid_of(self, address: str) -> int:
        """Return the process behind an address."""
        return next(r.pid for r in self.look() if r.grpc_address == address)


def request_of(
    session: str, number: int, prompt: list[int], new: int
) -> generation_pb2.GenerateRequest:
    """Return a turn's request: greedy for even sessions, sampled with everything for odd ones."""
    is_sampled = int(session.rsplit("-", 1)[1]) % 2 == 1
    sampling = generation_pb2.Sampling(temperature=0.0)
    if is_sampled:
        sampling = generation_pb2.Sampling(
            temperature=1.0,
            top_p=0.95,
            presence_penalty=0.5,
            frequency_penalty=0.3,
            repetition_penalty=1.1,
            seed=1000 + number,
        )
    return generation_pb2.GenerateRequest(
        session_id=session,
        request_id=f"{session}-{number}",
        tokens=generation_pb2.TokenIds(ids=prompt),
        sampling=sampling,
        stopping=generation_pb2.Stopping(max_tokens=new, min_tokens=new, ignore_eos=True),
    )


def run_turn(
    client: Client, request: generation_pb2.GenerateRequest, routers: Routers, kill_at: int | None
) -> Turn:
    """Read a turn to its end; kill its router once `kill_at` tokens are here."""
    turn = Turn()
    pid, last = 0, time.monotonic()
    for message in client.messages(request):
        now = time.monotonic()
        if turn.was_killed:  # what was on its way comes at once; the longest wait is the pause
            turn.pause_s = max(turn.pause_s, now - last)
        turn.sequences.append(message.sequence)
        turn.tokens.extend(message.token_ids)
        if message.HasField("accepted") and kill_at is not None:
            pid = routers.pid_of(message.accepted.router_address)
        if kill_at is not None and not turn.was_killed and len(turn.tokens) >= kill_at:
            os.kill(pid, signal.SIGKILL)
            turn.was_killed = True
        last = time.monotonic()
    return turn


def main() -> None:
    """Run the undisturbed sessions, then the disturbed ones, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--new", type=int, default=48)
    parser.add_argument("--prompt", type=int, default=200)
    parser.add_argument("--routers", type=int, default=3)
    parser.add_argument("--groups", default="2")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    generator = random.Random(arguments.seed)
    num_sessions = -(-arguments.kills // arguments.turns)
    vocab = vocab_size_of(arguments.checkpoint)
    texts = [
        prompts(arguments.turns, arguments.prompt, vocab, seed=arguments.seed * 1000 + index)
        for index in range(num_sessions)
    ]
    flags = ["--dtype", "float32", "--routers", str(arguments.routers)]
    flags += ["--expert-groups", arguments.groups, "--max-num-seqs", "4"]
    lines: list[str] = []
    with served(arguments.checkpoint, *flags, on_progress=lambda _, s: lines.append(s)) as cluster:
        routers = Routers(cluster.address)
        calm = [
            hold(cluster.address, "calm", i, texts[i], arguments, routers, None)
            for i in range(num_sessions)
        ]
        started = time.monotonic()
        shaken = [
            hold(cluster.address, "shaken", i, texts[i], arguments, routers, generator)
            for i in range(num_sessions)
        ]
        wall_s = time.monotonic() - started
    report_on(arguments, calm, shaken, wall_s, len(routers.seen), lines)


def hold(
    address: str,
    kind: str,
    index: int,
    texts: list[list[int]],
    arguments: argparse.Namespace,
    routers: Routers,
    generator: random.Random | None,
) -> list[Turn]:
    """Hold one session; with a generator, kill a router in every turn."""
    session = f"{kind}-{index}"
    turns = []
    for number, text in enumerate(texts):
        ready = routers.wait_steady(2) if generator is not None else routers.look()
        with Client([r.grpc_address for r in ready], PATIENCE) as client:
            if number == 0:
                client.create_session(session)
            kill_at = generator.randrange(arguments.new) if generator is not None else None
            request = request_of(session, number, text, arguments.new)
            turns.append(run_turn(client, request, routers, kill_at))
    if generator is not None:
        print(f"{session}: pauses {[round(turn.pause_s, 2) for turn in turns]}", flush=True)
    return turns


def report_on(
    arguments: argparse.Namespace,
    calm: list[list[Turn]],
    shaken: list[list[Turn]],
    wall_s: float,
    num_processes: int,
    lines: list[str],
) -> None:
    """Compare turn by turn, print the JSON line, and exit with 1 where the bar is missed."""
    pairs = [
        (expected, got)
        for before, after in zip(calm, shaken, strict=True)
        for expected, got in zip(before, after, strict=True)
    ]
    equal = sum(expected.tokens == got.tokens for expected, got in pairs)
    lost = sum(max(0, len(e.tokens) - len(g.tokens)) for e, g in pairs)
    repeated = sum(len(g.sequences) - len(set(g.sequences)) for _, g in pairs)
    repeated += sum(max(0, len(g.tokens) - len(e.tokens)) for e, g in pairs)
    pauses = [got.pause_s for _, got in pairs if got.pause_s]
    for index, (expected, got) in enumerate(pairs):
        if expected.tokens != got.tokens:
            print(f"turn {index} differs:\n  calm   {expected.tokens}\n  shaken {got.tokens}")
    kills = sum(got.was_killed for _, got in pairs)
    is_met = equal == len(pairs) and not lost and not repeated and kills >= arguments.kills
    if not is_met:
        print("\n".join(lines[-60:]))
    figures = {
        "turns": len(pairs),
        "kills": kills,
        "equal": equal,
        "equal_percent": round(100 * equal / len(pairs), 2),
        "lost_tokens": lost,
        "repeated_tokens": repeated,
        "pause_s": {
            "median": round(statistics.median(pauses), 3) if pauses else None,
            "p99": round(percentile(pauses, 99), 3) if pauses else None,
        },
        "no_pause": sum(pause_s < NO_PAUSE_S for pause_s in pauses),
        "router_processes": num_processes,
        "wall_s": round(wall_s, 1),
        "is_met": is_met,
    }
    names = ("kills", "turns", "new", "prompt", "routers", "groups", "seed")
    config = {name: getattr(arguments, name) for name in names}
    report("kill_router", {"checkpoint": arguments.checkpoint.name, **config}, figures)
    raise SystemExit(0 if is_met else 1)


if __name__ == "__main__":
    main()
