"""The demo checkpoint against transformers: float32 tokens, bfloat16 distance.

Regime: `--prompts` held-out chats of the demo model's corpus, rendered with the checkpoint's own
    template; the real engine with two expert groups in other processes, 16 requests at once.

Meaning: float32: every generated token is transformers' float32 argmax after the same tokens.
    bfloat16: the float32 tokens are forced on both; mean |logit difference| to transformers in
    float32, over all generated positions and the whole vocabulary, for us (prompt in chunks, then
    token by token) and for transformers' own bfloat16. Texts are no test in bfloat16: near-ties of
    the gate flip in every engine.

Ceiling: 0 mismatches; transformers' own bfloat16 distance.

    python -m tests.benchmarks.demo_parity [--checkpoint DIR]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infra.demo_model.corpus import held_out_prompts
from router.engine.batch import Chunk, build_batch
from router.model.config import ModelConfig
from router.model.decoder import Decoder
from tests.benchmarks.engines import greedy, load_decoder, start_engine
from tests.benchmarks.group_processes import GroupPool
from tests.benchmarks.harness import ROOT, report
from tests.parity.oracle import Oracle

CONCURRENT = 16
CHUNK = 48
BLOCK_SIZE = 16
CAPACITIES = {"group-0": 1.0, "group-1": 1.0}


def encode(checkpoint: Path, num_prompts: int, seed: int) -> list[list[int]]:
    """Return the token ids of the chats, as transformers' tokenizer renders them."""
    import transformers

    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(checkpoint)
    return [
        tokenizer.apply_chat_template(
            [{"role": m["role"], "content": m["content"]} for m in map(dict, messages)],
            add_generation_prompt=True,
            return_dict=True,
        )["input_ids"]
        for messages in held_out_prompts(num_prompts, seed)
    ]


def forced_logits(
    decoder: Decoder, sequences: Sequence[tuple[list[int], list[int]]]
) -> list[Tensor]:
    """Feed prompts in chunks, then the given new tokens one by one, all sequences together.

    Returns:
        For each sequence float32 `[len(new), vocab]`: the logits for each new token.
    """
    blocks = [-(-(len(prompt) + len(new)) // BLOCK_SIZE) for prompt, new in sequences]
    caches = decoder.allocate_caches(sum(blocks), BLOCK_SIZE, len(sequences))
    tables = [list(range(sum(blocks[:i]), sum(blocks[: i + 1]))) for i in range(len(blocks))]
    done = [0] * len(sequences)
    rows: list[list[Tensor]] = [[] for _ in sequences]
    while True:
        chunks, owners = [], []
        for i, (prompt, new) in enumerate(sequences):
            length = min(CHUNK, len(prompt) - done[i]) if done[i] < len(prompt) else 1
            end = done[i] + length
            if end >= len(prompt) + len(new):
                continue  # the last token is not fed back
            chunks.append(
                Chunk(
                    token_ids=[*prompt, *new][done[i] : end],
                    context_len=done[i],
                    block_table=tables[i],
                    state_slot=i,
                    num_logits=int(end >= len(prompt)),
                )
            )
            if end >= len(prompt):
                owners.append(i)
            done[i] = end
        if not chunks:
            return [torch.stack(row) for row in rows]
        for i, logits in zip(owners, decoder.forward(build_batch(chunks), caches), strict=True):
            rows[i].append(logits)


def main() -> None:
    """Compare tokens in float32, then distances in bfloat16; exit code 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    default = ROOT / "infra" / "demo_model" / "checkpoint"
    parser.add_argument("--checkpoint", type=Path, default=default)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--ops", choices=["auto", "native", "torch"], default="auto")
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint: Path = arguments.checkpoint
    config = ModelConfig.from_checkpoint(checkpoint)
    prompts = encode(checkpoint, arguments.prompts, arguments.seed)
    longest = max(map(len, prompts)) + arguments.new
    exact = Oracle(checkpoint, torch.float32)
    rounded = Oracle(checkpoint, torch.bfloat16)
    mismatches, tokens = 0, 0
    ours, theirs = 0.0, 0.0
    with GroupPool(2) as pool:
        groups = pool.serve(checkpoint, dtype="float32", capacities=CAPACITIES)
        experts = groups.connect(dtype=torch.float32)
        decoder = load_decoder(checkpoint, torch.float32, experts, ops=arguments.ops)
        engine = start_engine(
            decoder, config, max_num_seqs=CONCURRENT, max_tokens_per_seq=longest + 1
        )
        generated: list[list[int]] = []
        for start in range(0, len(prompts), CONCURRENT):
            generated += greedy(engine, prompts[start : start + CONCURRENT], arguments.new)
        engine.stop()
        experts.close()

        groups = pool.serve(checkpoint, dtype="bfloat16", capacities=CAPACITIES)
        experts = groups.connect(dtype=torch.bfloat16)
        decoder = load_decoder(checkpoint, torch.bfloat16, experts, ops=arguments.ops)
        for start in range(0, len(prompts), CONCURRENT):
            part = slice(start, start + CONCURRENT)
            sequences = list(zip(prompts[part], generated[part], strict=True))
            for (prompt, new), logits in zip(
                sequences, forced_logits(decoder, sequences), strict=True
            ):
                forced, first = [*prompt, *new][:-1], len(prompt) - 1
                reference = exact.logits(forced)[first:]
                tokens += len(new)
                for step, expected in enumerate(reference.argmax(dim=-1).tolist()):
                    if new[step] != expected:
                        mismatches += 1
                        top = reference[step].topk(2).values
                        print(
                            f"MISMATCH prompt of {len(prompt)}, token {step}: {new[step]}, "
                            f"expected {expected}; transformers' two best are "
                            f"{top[0] - top[1]:.2g} apart"
                        )
                ours += float((logits - reference).abs().mean(dim=-1).sum())
                theirs += float((rounded.logits(forced)[first:] - reference).abs().mean(-1).sum())
            print(f"{min(start + CONCURRENT, len(prompts))} prompts", flush=True)
        experts.close()
    is_met = mismatches == 0 and ours <= theirs
    figures = {
        "prompts": len(prompts),
        "tokens": tokens,
        "mismatches": mismatches,
        "bfloat16_distance": ours / tokens,
        "transformers_bfloat16_distance": theirs / tokens,
        "is_met": is_met,
    }
    print(f"distance to float32: ours {ours / tokens:.5f}, transformers {theirs / tokens:.5f}")
    report("demo_parity", {"checkpoint": checkpoint.name, "new": arguments.new}, figures)
    raise SystemExit(0 if is_met else 1)


if __name__ == "__main__":
    main()
