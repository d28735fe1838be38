#!/usr/bin/env python3
"""Make the demo model: tokenizer, training, evaluation, checkpoint, in one command.

    .venv/bin/python infra/demo_model/train.py

Everything follows from `--seed` and `--steps`; no text comes from outside this folder. Training
runs on the CPU, in `--workers` single-threaded processes that average their gradients. It ends by
scoring the saved bfloat16 checkpoint with transformers (`evaluate.py`) and prints one JSON with the
time it took and the held-out figures.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from checkpoint import load_model, save_checkpoint
from evaluate import evaluate
from model import DemoConfig
from moe import DemoModel
from optimizer import make_optimizers
from safetensors.torch import load_file, save_file
from text import rows, train_tokenizer
from tokenizers import Tokenizer
from torch import Tensor
from torch.multiprocessing.spawn import spawn

HERE = Path(__file__).parent
MTP_WEIGHT, BALANCE_WEIGHT = 0.3, 0.002
WEIGHTS_FILE = "weights.safetensors"
"""Between the workers and the process that saves the checkpoint; lives for one run."""
STAGES = ((0.0, 128, 2), (0.12, 256, 4), (0.87, 1536, 20))
"""From which progress on rows have how many tokens, and conversations at most how many exchanges.

Short rows first: copying from the context, which everything else rests on, is found soonest there.
"""
WARMUP, DECAY_FROM = 0.02, 0.45
"""Fractions of training: linear warm-up until the first, linear decay from the second on."""


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=HERE / "checkpoint", help="folder of the checkpoint"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3000, help="optimizer steps")
    parser.add_argument(
        "--step-tokens", type=int, default=3072, help="tokens per step, over all workers"
    )
    parser.add_argument(
        "--micro-tokens", type=int, default=1536, help="tokens per forward in one worker"
    )
    parser.add_argument(
        "--workers", type=int, default=2, help="training processes, one thread each"
    )
    parser.add_argument("--muon-lr", type=float, default=0.01)
    parser.add_argument("--adam-lr", type=float, default=3e-3)
    parser.add_argument("--start-from", type=Path, help="checkpoint to train further")
    parser.add_argument("--mtp-from", type=float, default=0.4, help="progress at which MTP joins")
    parser.add_argument(
        "--minutes", type=float, help="stop early: the schedule ends when this time is over"
    )
    return parser.parse_args()


def learning_rate(progress: float) -> float:
    """Return the factor on the peak learning rates at `progress` in 0..1."""
    return min(1.0, progress / WARMUP + 0.01, max(0.0, (1 - progress) / (1 - DECAY_FROM)))


def losses(
    model: DemoModel, ids: Tensor, weights: Tensor, *, with_mtp: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return next-token, MTP (the token after the next) and balance loss of rows `[B, T]`."""

    def mean(hidden: Tensor, skip: int) -> Tensor:
        each = F.cross_entropy(
            model.lm_head(hidden).flatten(0, 1).float(), ids[:, skip:].flatten(), reduction="none"
        )
        weight = weights[:, skip:].flatten()
        return (each * weight).sum() / weight.sum()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(ids, with_mtp=with_mtp)
        mtp = torch.zeros(()) if out.mtp_hidden is None else mean(out.mtp_hidden[:, :-1], 2)
        return mean(out.hidden[:, :-1], 1), mtp, out.balance


def average_gradients(model: DemoModel, num_parts: int) -> None:
    """Average gradients over workers and micro-batches, and clip them to norm 1."""
    grads = [weight.grad for weight in model.parameters() if weight.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    flat /= num_parts
    flat *= min(1.0, 1.0 / (float(flat.norm()) + 1e-6))
    for grad, part in zip(grads, torch.split(flat, [grad.numel() for grad in grads]), strict=True):
        grad.copy_(part.view_as(grad))


def shared_progress(step: int, started_s: float, args: argparse.Namespace) -> float:
    """Return progress in 0..1, equal in all workers: by steps, or by time if that is ahead."""
    elapsed = (time.monotonic() - started_s) / 60
    progress = torch.tensor(max(step / args.steps, elapsed / args.minutes if args.minutes else 0.0))
    dist.broadcast(progress, 0)
    return float(progress)


def work(rank: int, rendezvous: str, args: argparse.Namespace) -> None:
    """Train in one process; rank 0 reports and leaves weights beside the rendezvous file."""
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=args.workers
    )
    folder = Path(rendezvous).parent
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    config = DemoConfig()
    model = load_model(args.start_from, config) if args.start_from else DemoModel(config)
    optimizers = make_optimizers(model, muon_lr=args.muon_lr, adam_lr=args.adam_lr)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    num_micro = max(1, args.step_tokens // (args.micro_tokens * args.workers))
    started_s, step, tokens = time.monotonic(), 0, 0
    stage = -1
    while (progress := shared_progress(step, started_s, args)) < 1:
        now = max(i for i, (start, *_) in enumerate(STAGES) if progress >= start)
        if now != stage:
            stage, (_, length, max_turns) = now, STAGES[now]
            seed = (args.seed * 100 + stage) * 100 + rank
            source = rows(tokenizer, seed, length, max_turns=max_turns)
        num_rows = args.micro_tokens // length
        for _ in range(num_micro):
            ids, weights = (
                torch.stack(part)
                for part in zip(*(next(source) for _ in range(num_rows)), strict=True)
            )
            lm, mtp, balance = losses(model, ids, weights, with_mtp=progress >= args.mtp_from)
            torch.autograd.backward(lm + MTP_WEIGHT * mtp + BALANCE_WEIGHT * balance)
            tokens += ids.numel() * args.workers
        average_gradients(model, num_micro * args.workers)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * learning_rate(progress)
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        if rank == 0 and (step % 25 == 0 or step < 4):
            minutes = (time.monotonic() - started_s) / 60
            figures = [round(float(part.detach()), 4) for part in (lm, mtp, balance)]
            print(f"{step=} {progress=:.3f} {minutes=:.1f} {tokens=} {figures=}", flush=True)
        if rank == 0 and step % 100 == 0:
            save_file(model.state_dict(), folder / WEIGHTS_FILE)
    if rank == 0:
        save_file(model.state_dict(), folder / WEIGHTS_FILE)
        minutes = round((time.monotonic() - started_s) / 60, 1)
        (folder / "run.json").write_text(
            json.dumps({"steps": step, "tokens": tokens, "training_minutes": minutes})
        )
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Run all stages."""
    args = parse_args()
    # Freed blocks stay in the process: page faults cost more than a small model's arithmetic.
    os.environ.update(
        {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 33)}
    )
    with tempfile.TemporaryDirectory(prefix="demo_model_") as name:
        folder = Path(name)
        if args.start_from:
            tokenizer = Tokenizer.from_file(str(args.start_from / "tokenizer.json"))
        else:
            tokenizer = train_tokenizer(DemoConfig().vocab_size, args.seed)
        tokenizer.save(str(folder / "tokenizer.json"))
        print(f"tokenizer vocab={tokenizer.get_vocab_size()} folder={folder}", flush=True)
        of_work = (str(folder / "rendezvous"), args)
        spawn(work, of_work, nprocs=args.workers)  # type: ignore[no-untyped-call]
        model = DemoModel(DemoConfig())
        model.load_state_dict(load_file(folder / WEIGHTS_FILE))
        save_checkpoint(model, tokenizer, args.out, seed=args.seed)
        run = json.loads((folder / "run.json").read_text())
    print(json.dumps(run | {"seed": args.seed} | evaluate(args.out)))


if __name__ == "__main__":
    main()
