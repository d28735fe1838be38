"""Greedy float32 tokens of the whole engine against transformers, over many shapes of checkpoint.

Regime: random checkpoints (tests/parity/checkpoints.py), float32; the real scheduler, engine,
    decoder and dispatcher here, expert groups in 1, 2 or 3 other processes over lanes or gRPC; 16
    requests at once with prompts of 1 to 600 tokens; prefill in chunks of many sizes.

Meaning: `mismatches` counts generated tokens that are not transformers' float32 argmax after the
    same tokens. `max_logit_difference` is over every sampled position, to transformers
    in float64: random models have ill-conditioned positions at which transformers' own float32 is
    farther than 1e-4 from its float64, and that distance is printed beside it.

Ceiling: 0 mismatches; about 1e-5, a float32 sum in another order.

    python -m tests.benchmarks.parity_matrix [--quick] [--shape NAME] [--ops auto|native|torch]
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experts.native.kernels import load_kernels
from protos.errors import ExpertMeshError
from router.gating.dispatch import ExpertDispatcher
from router.model.config import ModelConfig
from tests.benchmarks.engines import RecordedLogits, greedy, load_decoder, start_engine
from tests.benchmarks.group_processes import GroupPool
from tests.benchmarks.harness import report
from tests.parity.checkpoints import make_checkpoint
from tests.parity.oracle import Oracle

TOLERANCE = 1e-4
LENGTHS = (1, 2, 3, 4, 5, 17, 31, 63, 64, 65, 66, 100, 128, 129, 257, 600)
CHUNKS = (16, 17, 31, 64, 100, 257, 1024)
"""`max_num_batched_tokens`; 16 leaves a prefill what 15 decoding sequences do not take, down to one
token."""
CAPACITIES = ({"a": 1.0}, {"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 2.0, "c": 1.0})
SHAPES: dict[str, dict[str, Any]] = {
    "default": {},
    "top1_of_5": {"num_experts": 5, "top_k": 1, "moe_intermediate_size": 24},
    "top3_of_7_split": {"num_experts": 7, "top_k": 3, "layout": "split"},
    "top8_of_33": {"num_experts": 33, "top_k": 8, "moe_intermediate_size": 16},
    "top10_of_16": {"num_experts": 16, "top_k": 10, "moe_intermediate_size": 16},
    "top10_of_129": {"num_experts": 129, "top_k": 10, "moe_intermediate_size": 16, "num_layers": 3},
    "one_key_head": {"linear_num_key_heads": 1, "linear_num_value_heads": 3},
    "three_key_heads": {"linear_num_key_heads": 3, "linear_num_value_heads": 6, "conv_kernel": 6},
    "four_key_heads": {"linear_num_key_heads": 4, "linear_key_head_dim": 8}
    | {"linear_value_head_dim": 24},
    "multi_query": {"num_heads": 6, "num_kv_heads": 1, "head_dim": 16},
    "wide": {"hidden_size": 128, "head_dim": 128, "num_layers": 2, "full_attention_interval": 2},
    "tied": {"tied": True, "vocab_size": 300},
    "text_only_fully_rotary": {"text_only": True, "rope": {"partial_rotary_factor": 1.0}},
    "only_attention": {"full_attention_interval": 1, "num_layers": 3},
    "dense": {"dense": True},
    "dense_tied": {"dense": True, "tied": True, "num_layers": 5},
}
QUICK = ("default", "top1_of_5", "one_key_head", "dense")


@dataclass
class Tally:
    """What was compared."""

    tokens: int = 0
    mismatches: int = 0
    runs: int = 0
    errors: int = 0
    """Runs that ended with an error."""
    max_difference: float = 0.0
    oracle_difference: float = 0.0
    """transformers float32 to transformers float64 at the same positions."""
    failures: list[str] = field(default_factory=list)


class Judge:
    """transformers on one checkpoint; asks each sequence once."""

    def __init__(self, path: Path) -> None:
        self._models = (Oracle(path, torch.float32), Oracle(path))
        self._answers: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def logits(self, token_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Logits `[len(token_ids), vocab]` of the float32 and of the float64 model."""
        key = tuple(token_ids)
        if key not in self._answers:
            single, double = (model.logits(key) for model in self._models)
            self._answers[key] = single, double
        return self._answers[key]


def compare(
    judge: Judge, prompt: list[int], new: list[int], model: RecordedLogits, tally: Tally
) -> None:
    """Compare one request's tokens and logits."""
    sequence = [*prompt, *new]
    single, double = judge.logits(sequence[:-1])
    for step, token_id in enumerate(new):
        position = len(prompt) + step - 1
        tally.tokens += 1
        expected = int(single[position].argmax())
        if token_id != expected:
            top = single[position].topk(2).values
            tally.mismatches += 1
            tally.failures.append(
                f"prompt of {len(prompt)}, token {step}: {token_id}, expected {expected}; "
                f"transformers' two best are {float(top[0] - top[1]):.2g} apart"
            )
        ours = model.logits[tuple(sequence[: position + 1])]
        difference = float((ours - double[position]).abs().max())
        tally.max_difference = max(tally.max_difference, difference)
        own = float((single[position] - double[position]).abs().max())
        tally.oracle_difference = max(tally.oracle_difference, own)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way to run a checkpoint."""

    capacities: dict[str, float]
    """Empty: a dense model."""
    chunk: int
    transport: str


def cases_of(index: int, is_moe: bool, every_chunk: bool) -> list[Case]:
    """Every number of groups, each with two chunk sizes and both transports; chunks take turns over
    the shapes, `every_chunk` has them all."""
    groups = CAPACITIES if is_moe else ({},)
    cases = []
    for i, capacities in enumerate(groups):
        first = 2 * (index * len(groups) + i)
        chunks = CHUNKS if every_chunk else [CHUNKS[(first + j) % len(CHUNKS)] for j in range(2)]
        for j, chunk in enumerate(chunks):
            transport = ("lane", "grpc")[j % 2]
            cases.append(Case(capacities=capacities, chunk=chunk, transport=transport))
    return cases


def run_case(
    path: Path, case: Case, experts: ExpertDispatcher | None, arguments: argparse.Namespace
) -> tuple[list[list[int]], list[list[int]], RecordedLogits]:
    """Generate for 16 prompts at once through a fresh engine; returns prompts, tokens, logits."""
    config = ModelConfig.from_checkpoint(path)
    rng = random.Random(arguments.seed)
    prompts = [[rng.randrange(config.vocab_size) for _ in range(length)] for length in LENGTHS]
    model = RecordedLogits(load_decoder(path, torch.float32, experts, ops=arguments.ops))
    engine = start_engine(model, config, max_num_seqs=16, max_num_batched_tokens=case.chunk)
    try:
        return prompts, greedy(engine, prompts, arguments.new), model
    finally:
        engine.stop(drain=False)


def run_shape(
    name: str, index: int, pool: GroupPool, folder: Path, arguments: argparse.Namespace
) -> Tally:
    """Run every case of one shape."""
    tally = Tally()
    path = make_checkpoint(folder / name, **SHAPES[name])
    judge = Judge(path)
    is_moe = not SHAPES[name].get("dense", False)
    for case in cases_of(index, is_moe, name == "default"):
        experts = None
        if is_moe:
            groups = pool.serve(
                path, dtype="float32", capacities=case.capacities, compute=arguments.compute
            )
            experts = groups.connect(dtype=torch.float32, transport=case.transport)
        tally.runs += 1
        try:
            prompts, tokens, model = run_case(path, case, experts, arguments)
        except ExpertMeshError as error:  # one shape's failure must not hide the others'
            tally.errors += 1
            print(f"  ERROR {name} {case}: {error}", flush=True)
            continue
        before = len(tally.failures)
        for prompt, new in zip(prompts, tokens, strict=True):
            compare(judge, prompt, new, model, tally)
        for failure in tally.failures[before:]:
            print(f"  MISMATCH {name} {case}: {failure}", flush=True)
        if experts is not None:
            experts.close()
    return tally


def main() -> None:
    """Run the shapes, print a line each and the JSON line; exit code 1 on any miss."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help=", ".join(QUICK))
    parser.add_argument("--shape", action="append", choices=SHAPES)
    parser.add_argument("--ops", choices=["auto", "native", "torch"], default="auto")
    parser.add_argument("--compute", choices=["auto", "native", "deepspeed", "torch"])
    parser.add_argument("--new", type=int, default=16, help="tokens a request")
    parser.add_argument("--seed", type=int, default=1)
    parser.set_defaults(compute="native" if load_kernels() else "torch")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names = arguments.shape or (QUICK if arguments.quick else tuple(SHAPES))
    tallies: dict[str, Tally] = {}
    with tempfile.TemporaryDirectory() as folder, GroupPool(3) as pool:
        for index, name in enumerate(names):
            started = time.perf_counter()
            tally = tallies[name] = run_shape(name, index, pool, Path(folder), arguments)
            print(
                f"{name:>24}: {tally.runs:2} runs {tally.tokens:6} tokens "
                f"{tally.mismatches} mismatches, {tally.errors} errors, "
                f"max logit difference {tally.max_difference:.1e} (transformers' own "
                f"{tally.oracle_difference:.1e}), {time.perf_counter() - started:.0f} s",
                flush=True,
            )
    mismatches = sum(tally.mismatches for tally in tallies.values())
    difference = max(tally.max_difference for tally in tallies.values())
    errors = sum(tally.errors for tally in tallies.values())
    is_met = mismatches + errors == 0 and difference <= TOLERANCE
    report(
        "parity_matrix",
        vars(arguments),
        {
            "shapes": len(tallies),
            "runs": sum(tally.runs for tally in tallies.values()),
            "tokens": sum(tally.tokens for tally in tallies.values()),
            "mismatches": mismatches,
            "errors": errors,
            "max_logit_difference": difference,
            "oracle_float32_difference": max(t.oracle_difference for t in tallies.values()),
            "bar": f"0 mismatches, <= {TOLERANCE}",
            "is_met": is_met,
        },
    )
    raise SystemExit(0 if is_met else 1)


if __name__ == "__main__":
    main()
