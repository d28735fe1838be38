"""The oracle and the harness of the parity tests: transformers' answer, and ours step by step."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from experts.weights import SafetensorsCheckpoint
from router.engine.batch import Chunk, build_batch
from router.model.decoder import Decoder
from router.model.ops import GdnState


class Oracle:
    """transformers on the same checkpoint.

    In float64 unless said otherwise. Random models have ill-conditioned tokens (a query nearly
    orthogonal to all keys, then a norm): on some the float32 oracle is itself 1.6e-4 away from its
    float64 self, ours 0.1e-4. So float64 decides whose logits are right.
    """

    def __init__(self, path: Path, dtype: torch.dtype = torch.float64) -> None:
        import transformers

        config = transformers.AutoConfig.from_pretrained(path)
        model_class = getattr(transformers, config.architectures[0])
        self.model = model_class.from_pretrained(path, dtype=dtype).eval()
        if dtype == torch.float64 and "moe" in config.model_type:
            self.model.set_experts_implementation("eager")  # the grouped one has no float64

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """Logits of every position, float32 `[len(token_ids), vocab]`."""
        out = self.model(input_ids=torch.tensor([token_ids]), use_cache=False)
        return out.logits[0].float()


class LoopExperts:
    """The routed experts in this process, one after the other: the obvious implementation."""

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        with SafetensorsCheckpoint(path) as checkpoint:
            self.experts = {
                (layer_id, expert_id): (gate_up.clone(), down.clone())
                for layer_id in range(checkpoint.num_layers)
                for expert_id, gate_up, down in checkpoint.expert_slices(
                    layer_id, range(checkpoint.num_experts), dtype
                )
            }
        self.dtype = dtype
        self.calls = 0

    def dispatch(
        self, layer_id: int, rows: Tensor, topk_ids: Tensor, topk_weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        assert topk_ids.dtype == torch.int32
        assert topk_weights.dtype == torch.float32
        self.calls += 1
        rows = rows.to(self.dtype)
        slots = torch.zeros(*topk_ids.shape, rows.shape[1])
        for expert_id in topk_ids.unique().tolist():
            gate_up, down = self.experts[layer_id, expert_id]
            token, slot = (topk_ids == expert_id).nonzero(as_tuple=True)
            gate, up = F.linear(rows[token], gate_up).chunk(2, dim=-1)
            slots[token, slot] = F.linear(F.silu(gate) * up, down).float()
        return slots, topk_weights

    def combine(self, handle: tuple[Tensor, Tensor]) -> Tensor:
        slots, weights = handle
        total = torch.zeros(slots.shape[0], slots.shape[2])
        for slot in range(slots.shape[1]):
            total += slots[:, slot] * weights[:, slot, None]
        return total


def make_decoder(
    path: Path, ops: Any, dtype: torch.dtype = torch.float32, **kwargs: Any
) -> Decoder:
    """Load our decoder with experts in this process."""
    with SafetensorsCheckpoint(path) as checkpoint:
        is_moe = checkpoint.num_experts > 0
    experts = LoopExperts(path, dtype) if is_moe else None
    return Decoder.from_checkpoint(path, dtype=dtype, experts=experts, ops=ops, **kwargs)


@dataclass
class Run:
    """One sequence on its way through the decoder."""

    token_ids: list[int]
    """The prompt, then what was generated."""

    num_prompt: int
    num_tokens: int
    """When to stop."""

    slot: int
    blocks: list[int]
    computed: int = 0
    logits: list[Tensor] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        return self.computed == self.num_tokens


def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    num_new: int,
    chunk_len: Callable[[int], int],
    *,
    block_size: int = 16,
    seed: int = 0,
    arrivals: Sequence[int] | None = None,
) -> list[Run]:
    """Generate greedily for all prompts at once, collecting the logits of every position.

    Every step holds all sequences that have arrived: those in prefill with a chunk, the others with
    one token, in an order that changes. Blocks and state slots are handed out at random and start
    as garbage.

    Args:
        decoder: Ours.
        prompts: Token ids, each at least one.
        num_new: Tokens to generate; the last is not fed back.
        chunk_len: Tokens left of a prompt -> tokens of the next chunk.
        block_size: Tokens per KV block.
        seed: Of the order of things.
        arrivals: Step at which each prompt arrives.
    """
    rng = random.Random(seed)
    totals = [len(prompt) + num_new - 1 for prompt in prompts]
    num_blocks = sum(-(-total // block_size) for total in totals) + 3
    caches = decoder.allocate_caches(num_blocks, block_size, len(prompts) + 2)
    for layer in caches.layers:
        if isinstance(layer, GdnState):
            layer.recurrent.fill_(float("nan"))
            layer.conv.fill_(float("nan"))
    free = rng.sample(range(num_blocks), num_blocks)
    slots = rng.sample(range(len(prompts) + 2), len(prompts))
    runs = [
        Run(
            token_ids=list(prompt),
            num_prompt=len(prompt),
            num_tokens=total,
            slot=slot,
            blocks=[free.pop() for _ in range(-(-total // block_size))],
        )
        for prompt, total, slot in zip(prompts, totals, slots, strict=True)
    ]
    step = 0
    while not all(run.is_done for run in runs):
        active = [
            run
            for run, arrival in zip(runs, arrivals or [0] * len(runs), strict=True)
            if not run.is_done and arrival <= step
        ]
        rng.shuffle(active)
        if active:
            _step(decoder, caches, active, chunk_len)
        step += 1
    return runs


def _step(
    decoder: Decoder, caches: Any, active: list[Run], chunk_len: Callable[[int], int]
) -> None:
    lengths = [
        max(1, min(left, chunk_len(left)))
        for left in (len(run.token_ids) - run.computed for run in active)
    ]
    batch = build_batch(
        [
            Chunk(
                token_ids=run.token_ids[run.computed : run.computed + length],
                context_len=run.computed,
                block_table=run.blocks,
                state_slot=run.slot,
                num_logits=length,
            )
            for run, length in zip(active, lengths, strict=True)
        ]
    )
    logits = decoder.forward(batch, caches)
    for run, rows in zip(active, logits.split(lengths), strict=True):
        run.logits.append(rows)
        run.computed += rows.shape[0]
        if run.computed == len(run.token_ids) and not run.is_done:
            run.token_ids.append(int(rows[-1].argmax()))
