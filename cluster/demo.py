"""`make demo`: the real service on the demo checkpoint: a conversation, streams, figures, a death.

Starts `expertmesh serve` as a user would (two expert groups, two routers, an embedded Valkey),
talks to it through `protos.client`, kills a router in the middle of an answer, which the other one
finishes, and ends it. Works with and without a terminal; takes under two minutes on two cores.
`infra/demo_model` says how the checkpoint was trained, and on what.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table

from cluster.console import (
    EXIT_CONFIGURATION,
    EXIT_OK,
    err_console,
    errors_exit,
    out_console,
    table,
)
from cluster.status import ask_status, dispatch_share
from cluster.talk import Answer, stream_answer
from protos.client import Client, GenerateOptions, Prompt, build_request
from protos.errors import ExpertMeshError
from protos.events import Completion
from protos.v1 import cluster_pb2

CHECKPOINT = Path(__file__).resolve().parents[1] / "infra" / "demo_model" / "checkpoint"
SYSTEM = "You are ExpertMesh, a small demo model."
TURNS = (
    "Hello, I am Emma.",
    "Please tell me a short story about the fox and the key.",
    "Who was the friend of the fox?",
)
STREAMS = (
    "Please tell me a short story about the dog and the book.",
    "Was ist die Hauptstadt von Spanien?",
    "Combien font 9 + 6 ?",
    'How do you say "sun" in German?',
)
DEATH_QUESTION = "Please tell me a short story about the owl and the lamp."
KILL_AT_TOKEN = 4
"""Early: some tokens more are on their way to us when the router dies."""
GREEDY = GenerateOptions(temperature=0.0, max_tokens=160)
READY_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 30.0


@dataclass(slots=True)
class Stream:
    """One of the concurrent requests, while it runs and after."""

    question: str
    answer: Answer = field(default_factory=lambda: Answer(Completion()))
    text: str = ""
    error: ExpertMeshError | None = None

    def run(self, client: Client) -> None:
        """Read the answer to its end; called in a thread of its own."""
        messages = [{"role": "user", "content": self.question}]
        try:
            for part in stream_answer(client, messages, GREEDY, self.answer):
                self.text += part
        except ExpertMeshError as error:
            self.error = error


def main(
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint to serve.")] = CHECKPOINT,
    groups: Annotated[str, typer.Option("--expert-groups", help="As in `serve`.")] = "2",
) -> None:
    """Serve the demo checkpoint and show what it does."""
    console = out_console()
    begin = time.perf_counter()
    command = f"expertmesh serve {checkpoint.name} --expert-groups {groups} --routers 2"
    console.print(command, style="bold")
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "cluster.cli", "serve", str(checkpoint)),
            *("--expert-groups", groups, "--routers", "2"),
            *("--port", "0", "--max-num-seqs", "8"),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        address = wait_ready(process)
        if address is None:
            sys.exit(process.wait() or EXIT_CONFIGURATION)
        console.print(f"ready after {time.perf_counter() - begin:.1f} s at {address}\n")
        with errors_exit(), Client(address) as client:
            turns = hold_conversation(client, console)
            streams = run_streams(client, console)
            status = ask_status(address)
            print_figures(turns, streams, status, console)
            if any(stream.error for stream in streams):
                raise next(stream.error for stream in streams if stream.error)
            kill_a_router(status, console)
    finally:
        stop(process)
    console.print(f"stopped cleanly; {time.perf_counter() - begin:.1f} s in all", style="dim")
    sys.exit(EXIT_OK)


def wait_ready(process: subprocess.Popen[str]) -> str | None:
    """Return the router's address, or None when `serve` ended; its reason is on stderr."""
    assert process.stdout is not None
    watch = threading.Timer(READY_TIMEOUT_S, process.terminate)
    watch.start()
    try:
        line = process.stdout.readline()
    finally:
        watch.cancel()
    if not line.startswith("ready "):
        err_console().print("the service did not start", style="bold red")
        return None
    fields = dict(part.split("=", 1) for part in line.split()[1:])
    return fields["grpc"]


def stop(process: subprocess.Popen[str]) -> None:
    """End `serve` the way an operator does."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def hold_conversation(client: Client, console: Console) -> list[Answer]:
    """Ask one question after the other in one chat; print the answers as they come."""
    messages = [{"role": "system", "content": SYSTEM}]
    answers = []
    for question in TURNS:
        messages.append({"role": "user", "content": question})
        console.print(f"you   {question}", style="cyan", markup=False)
        console.print("model ", style="green", end="")
        answer = Answer(Completion())
        for part in stream_answer(client, messages, GREEDY, answer):
            console.out(part, end="", highlight=False)
            console.file.flush()
        console.print()
        messages.append({"role": "assistant", "content": answer.completion.text})
        answers.append(answer)
    console.print()
    return answers


def run_streams(client: Client, console: Console) -> list[Stream]:
    """Send all questions at once; show the answers grow where a terminal can."""
    console.print(f"{len(STREAMS)} streams at once", style="bold")
    streams = [Stream(question) for question in STREAMS]
    threads = [threading.Thread(target=stream.run, args=(client,)) for stream in streams]
    for thread in threads:
        thread.start()
    if console.is_terminal:
        with Live(_stream_table(streams), console=console, refresh_per_second=20) as live:
            while any(thread.is_alive() for thread in threads):
                live.update(_stream_table(streams))
                threads[0].join(0.05)
            live.update(_stream_table(streams))
    for thread in threads:
        thread.join()
    if not console.is_terminal:
        for stream in streams:
            console.print(f"you   {stream.question}\nmodel {stream.text}", markup=False)
    console.print()
    return streams


def kill_a_router(status: cluster_pb2.ClusterStatus, console: Console) -> None:
    """Ask in a session, kill the router that answers, and let the other one finish."""
    console.print("a router dies in the middle of an answer", style="bold")
    routers = {router.grpc_address: router for router in status.routers}
    prompt: Prompt = [{"role": "user", "content": DEATH_QUESTION}]
    with Client(list(routers)) as client:
        for session in ("calm", "shaken"):
            client.create_session(session)
        calm: GenerateOptions = {**GREEDY, "session": "calm"}
        expected = client.complete(prompt, **calm)
        console.print(f"you   {DEATH_QUESTION}", style="cyan", markup=False)
        console.print("model ", style="green", end="")
        tokens: list[int] = []
        killed: cluster_pb2.RouterStatus | None = None
        killed_at = pause_s = 0.0
        for message in client.messages(*build_request(prompt, {**GREEDY, "session": "shaken"})):
            if killed is not None:
                pause_s = max(pause_s, time.perf_counter() - killed_at)
                killed_at = time.perf_counter()
            if message.HasField("accepted"):
                serving = routers[message.accepted.router_address]
            console.out(message.text_delta, end="", highlight=False)
            console.file.flush()
            tokens += message.token_ids
            if killed is None and len(tokens) == KILL_AT_TOKEN:
                killed, killed_at = serving, time.perf_counter()
                os.kill(killed.pid, signal.SIGKILL)
                mark = f" (kill -9 {killed.pid}: {killed.router_id}) "
                console.print(mark, style="red", end="", markup=False)
        console.print()
    is_same = tokens == expected.token_ids
    console.print(
        f"the other router went on after {pause_s:.2f} s;"
        f" {len(tokens)} tokens, {'the same as' if is_same else 'NOT those'} without the kill\n",
        style="" if is_same else "bold red",
    )


def print_figures(
    turns: list[Answer],
    streams: list[Stream],
    status: cluster_pb2.ClusterStatus,
    console: Console,
) -> None:
    """Print pace, work per expert group, and the share of time spent waiting for experts."""
    pace = table("pace", "request", ">tokens", ">first token ms", ">tok/s")
    rows = [(f"turn {i + 1}", answer) for i, answer in enumerate(turns)]
    rows += [(f"stream {i + 1}", stream.answer) for i, stream in enumerate(streams)]
    for name, answer in rows:
        pace.add_row(
            name,
            str(len(answer.completion.token_ids)),
            f"{answer.first_token_s * 1e3:.0f}",
            f"{answer.tokens_per_s:.0f}",
        )
    console.print(pace)
    total = sum(len(stream.answer.completion.token_ids) for stream in streams)
    wall_s = max(stream.answer.total_s for stream in streams)
    if wall_s:
        console.print(f"all streams together: {total / wall_s:.0f} tok/s\n")
    work = table(
        "expert groups", "group", ">experts", ">token-expert pairs", ">share", "compute", "way"
    )
    pairs = sum(group.num_pairs for group in status.groups) or 1
    for group in status.groups:
        work.add_row(
            group.group_id,
            str(group.num_experts),
            str(group.num_pairs),
            f"{group.num_pairs / pairs:.0%}",
            group.compute,
            group.transport,
        )
    console.print(work)
    for router in status.routers:
        share = dispatch_share(router)
        console.print(
            f"{router.router_id}: {router.steps} steps, {share:.0%} of their time waiting for"
            f" expert groups, trunk {router.trunk_ops}\n"
        )


def _stream_table(streams: list[Stream]) -> Table:
    grid = Table(box=None, show_header=False, pad_edge=False)
    grid.add_column(style="cyan", ratio=2)
    grid.add_column(ratio=3)
    for stream in streams:
        grid.add_row(stream.question, stream.text)
    return grid


if __name__ == "__main__":
    typer.run(main)
