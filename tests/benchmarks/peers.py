"""Decode and prefill against the engines users would pick instead: transformers, vLLM, llama.cpp.

Regime: one checkpoint, greedy, token-id prompts, two threads in total for each side. Our side is
    the whole product: `expertmesh serve` with expert groups in their own processes, asked over
    gRPC. A peer
is its own runner (one process, no network). The sides run one after the other, `--rounds` times, so
that a slow hour meets both.

Meaning: decode = tokens/s after the first token, all sequences together, from the difference
    between a long and a one-token generation; prefill = prompt tokens/s of one prompt with one new
    token.

Ceiling: memory bandwidth over active bytes a step for decode, GEMM rate for prefill
(`peers.md`, section 4 of the reference).

    python -m tests.benchmarks.peers CHECKPOINT --runners DIR --transformers-python P \
        --vllm-python P --llamacpp-bin DIR --gguf FILE
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from pathlib import Path

from tests.benchmarks.harness import (
    OtherCores,
    Samples,
    generate_batch,
    prompts,
    report,
    served,
)


def measure_ours(arguments: argparse.Namespace, figures: dict[str, Samples]) -> None:
    """One round of `expertmesh serve`: every figure once per repetition."""
    # The same prompts again and again: what is measured is computing them.
    extra = ["--no-enable-prefix-caching", *arguments.serve_argument]
    vocab_size = json.loads((arguments.checkpoint / "config.json").read_text())
    vocab_size = vocab_size.get("text_config", vocab_size)["vocab_size"]
    with served(arguments.checkpoint, "--expert-groups", str(arguments.groups), *extra) as cluster:
        stub = cluster.stub()
        generate_batch(stub, prompts(1, 16, vocab_size), 4)
        for length in arguments.prefill:
            ids = prompts(1, length, vocab_size)
            generate_batch(stub, ids, 1)
            for _ in range(arguments.repeats):
                others = OtherCores([cluster.process.pid, os.getpid()])
                seconds, _ = generate_batch(stub, ids, 1)
                _add(figures, f"prefill {length}", length / seconds, others.cores())
        for batch in arguments.batches:
            ids = prompts(batch, arguments.prompt, vocab_size)
            generate_batch(stub, ids, 1)
            for _ in range(arguments.repeats):
                others = OtherCores([cluster.process.pid, os.getpid()])
                first, _ = generate_batch(stub, ids, 1)
                whole, outputs = generate_batch(stub, ids, arguments.new)
                tokens = sum(len(output) for output in outputs) - batch
                _add(figures, f"decode {batch}", tokens / (whole - first), others.cores())


def _add(figures: dict[str, Samples], name: str, value: float, others: float) -> None:
    figures.setdefault(name, Samples()).add(value, others)
    print(f"  {name}: {value:.1f} tok/s (others {others:.2f})", flush=True)


def measure_peer(command: list[str], env: dict[str, str], figures: dict[str, Samples]) -> None:
    """One round of a peer's runner, which prints one JSON object per figure."""
    run = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True)
    for line in run.stdout.splitlines():
        row = json.loads(line) if line.startswith("{") else {}
        if row.get("what") == "decode":
            _add(figures, f"decode {row['batch']}", row["tok_s"], min(row["others"]))
        elif row.get("what") == "prefill":
            _add(figures, f"prefill {row['tokens']}", row["tok_s"], min(row["others"]))
    if run.returncode != 0:
        raise RuntimeError(f"{command[0]} failed: {run.stderr[-2000:]}")


def main() -> None:
    """Parse arguments, alternate the sides, print medians, ratios and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--runners", type=Path, help="folder with run_transformers.py, ...")
    parser.add_argument("--transformers-python")
    parser.add_argument("--vllm-python")
    parser.add_argument("--vllm-preload", default="")
    parser.add_argument("--vllm-mode", choices=["eager", "compiled"], default="compiled")
    parser.add_argument("--llamacpp-bin")
    parser.add_argument("--gguf")
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--serve-argument", action="append", default=[])
    parser.add_argument("--batches", type=_numbers, default=[1, 8, 32])
    parser.add_argument("--prefill", type=_numbers, default=[512, 4096])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3, help="per round and figure")
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()

    shape = [
        *("--batches", ",".join(map(str, arguments.batches))),
        *("--prefill", ",".join(map(str, arguments.prefill))),
        *("--prompt", str(arguments.prompt), "--new", str(arguments.new)),
        *("--reps", str(arguments.repeats), "--threads", "2"),
    ]
    peers: dict[str, tuple[list[str], dict[str, str]]] = {}
    runners, checkpoint = arguments.runners, str(arguments.checkpoint)
    if arguments.transformers_python:
        script = str(runners / "run_transformers.py")
        peers["transformers"] = ([arguments.transformers_python, script, checkpoint, *shape], {})
    if arguments.vllm_python:
        script = str(runners / "run_vllm.py")
        eager = ["--eager"] if arguments.vllm_mode == "eager" else []
        path = f"{Path(arguments.vllm_python).parent}:{os.environ['PATH']}"
        peers[f"vllm {arguments.vllm_mode}"] = (
            [arguments.vllm_python, script, checkpoint, *eager, *shape],
            {"LD_PRELOAD": arguments.vllm_preload, "PATH": path},
        )
    if arguments.llamacpp_bin:
        script = str(runners / "run_llamacpp.py")
        command = ["python3", script, arguments.gguf, "--bin", arguments.llamacpp_bin]
        peers["llama.cpp"] = ([*command, "--skip-server", *shape], {})

    ours: dict[str, Samples] = {}
    theirs: dict[str, dict[str, Samples]] = {name: {} for name in peers}
    for round_idx in range(arguments.rounds):
        print(f"round {round_idx + 1}: expertmesh", flush=True)
        measure_ours(arguments, ours)
        for name, (command, env) in peers.items():
            print(f"round {round_idx + 1}: {name}", flush=True)
            measure_peer(command, env, theirs[name])
    figures: dict[str, object] = {"expertmesh": {k: v.to_json() for k, v in ours.items()}}
    for name, samples in theirs.items():
        figures[name] = {k: v.to_json() for k, v in samples.items()}
        for figure, sample in samples.items():
            ratio = ours[figure].median / sample.median
            print(
                f"{figure:>14}: ours {ours[figure].median:8.1f}  {name} {sample.median:8.1f}  "
                f"ratio {ratio:.2f}"
            )
            figures[f"{figure} / {name}"] = round(ratio, 3)
    report(
        "peers",
        {
            "checkpoint": arguments.checkpoint.name,
            "groups": arguments.groups,
            "prompt": arguments.prompt,
            "new": arguments.new,
            "serve": arguments.serve_argument,
        },
        figures,
    )


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


if __name__ == "__main__":
    main()
