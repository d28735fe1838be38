"""transformers with its experts replaced by `GatingService.Route`: the same tokens as locally.

Regime: transformers' own Qwen3.5-MoE in float32 here, trunk and gate included; `expertmesh serve`
    of the same checkpoint with `--groups` groups computes its routed experts, layer by layer over
    one gRPC stream (`route_experts.py`). `--prompts` prompts of 1 to 300 tokens, greedy
    `generate()`; each with the model's own choice of experts sent along and with the router's gate.

Meaning: tokens that differ from the local model's. `choices_differ` counts rows for which the
    router's gate, given the same hidden state, took other experts.

Ceiling: 0 differences. One Route call a layer and token costs a Python gRPC round trip.

    python -m tests.benchmarks.route_generate CHECKPOINT
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import torch

from tests.benchmarks.harness import report, served, vocab_size_of
from tests.benchmarks.route_experts import RouteExperts, generate
from tests.parity.oracle import Oracle


def main() -> None:
    """Generate locally, then through the cluster; exit code 1 on any difference."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--serve-argument", action="append", default=[])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(arguments.seed)
    vocab_size = vocab_size_of(arguments.checkpoint)
    prompts = [
        [rng.randrange(16, vocab_size) for _ in range(rng.choice((1, 2, 7, 40, 64, 65, 300)))]
        for _ in range(arguments.prompts)
    ]
    model = Oracle(arguments.checkpoint, torch.float32).model
    started = time.perf_counter()
    expected = [generate(model, prompt, arguments.new) for prompt in prompts]
    local_s = time.perf_counter() - started
    figures: dict[str, object] = {"tokens": len(prompts) * arguments.new}
    is_met = True
    options = ("--dtype", "float32", "--expert-groups", str(arguments.groups))
    with (
        served(arguments.checkpoint, *options, *arguments.serve_argument) as cluster,
        RouteExperts(model, cluster.address) as experts,
    ):
        for use_gate in (False, True):
            experts.use_gate = use_gate
            before = (experts.num_calls, experts.choices_differ)
            started = time.perf_counter()
            tokens = [generate(model, prompt, arguments.new) for prompt in prompts]
            seconds = time.perf_counter() - started
            differences = sum(
                ours != theirs
                for new, reference in zip(tokens, expected, strict=True)
                for ours, theirs in zip(new, reference, strict=True)
            )
            is_met &= differences == 0
            name = "router's gate" if use_gate else "model's choice"
            figures[name] = {
                "differences": differences,
                "route_calls": experts.num_calls - before[0],
                "choices_differ": experts.choices_differ - before[1],
                "seconds": round(seconds, 2),
                "local_seconds": round(local_s, 2),
            }
            print(f"{name}: {figures[name]}", flush=True)
    config = {"checkpoint": arguments.checkpoint.name, "groups": arguments.groups}
    report("route_generate", config, {**figures, "is_met": is_met})
    raise SystemExit(0 if is_met else 1)


if __name__ == "__main__":
    main()
