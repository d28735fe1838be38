"""The engine with the real trunk: greedy tokens are the oracle's, whatever the engine's sizes."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from router.engine.config import EngineConfig
from router.engine.engine import Engine
from router.engine.request import EngineRequest, SamplingParams, StepOutput, StoppingParams
from router.model.decoder import Decoder
from router.model.ops import Ops
from tests.parity.oracle import LoopExperts, Oracle, make_decoder

MakeOps = Callable[[torch.dtype], Ops]
MakeCheckpoint = Callable[..., Path]

LENGTHS = (1, 5, 17, 40, 66, 33)
NEW_TOKENS = 24
SIZES = {
    "roomy": {"max_num_seqs": 8, "max_num_batched_tokens": 512, "num_blocks": 64},
    "one_at_a_time": {"max_num_seqs": 1, "max_num_batched_tokens": 512, "num_blocks": 64},
    "small_chunks": {"max_num_seqs": 4, "max_num_batched_tokens": 7, "num_blocks": 64},
    "preempting": {"max_num_seqs": 6, "max_num_batched_tokens": 32, "num_blocks": 14},
}


def generate(
    decoder: Decoder, prompts: list[list[int]], vocab_size: int, sizes: dict[str, int]
) -> tuple[list[list[int]], list[list[float]], int]:
    """Return tokens, log-probabilities, and how often a sequence was preempted."""
    config = EngineConfig(
        vocab_size=vocab_size, max_model_len=96, block_size=8, num_state_slots=8, **sizes
    )
    engine = Engine(decoder, config)
    tokens: dict[str, list[int]] = defaultdict(list)
    logprobs: dict[str, list[float]] = defaultdict(list)

    def sink(output: StepOutput) -> None:
        assert output.error is None
        tokens[output.request_id] += output.token_ids
        if output.logprobs is not None:
            logprobs[output.request_id] += output.logprobs.logprobs

    names = [str(i) for i in range(len(prompts))]
    for name, prompt in zip(names, prompts, strict=True):
        engine.submit(
            EngineRequest(
                request_id=name,
                prompt_ids=prompt,
                sampling=SamplingParams(temperature=0.0),
                stopping=StoppingParams(max_tokens=NEW_TOKENS),
                logprobs=0,
            ),
            sink,
        )
    while engine.step():
        pass
    assert engine.stats().num_blocks_used == 0
    preemptions = engine.stats().preemptions
    return [tokens[name] for name in names], [logprobs[name] for name in names], preemptions


@pytest.mark.parametrize("name", SIZES)
def test_greedy_tokens_equal_the_oracle(
    name: str, make_ops: MakeOps, checkpoint: MakeCheckpoint
) -> None:
    path = checkpoint()
    oracle = Oracle(path)
    decoder = Decoder.from_checkpoint(
        path,
        dtype=torch.float32,
        ops=make_ops(torch.float32),
        experts=LoopExperts(path, torch.float32),
    )
    vocab_size = decoder.config.vocab_size
    rng = random.Random(20261122)
    prompts = [[rng.randrange(vocab_size) for _ in range(length)] for length in LENGTHS]
    tokens, logprobs, preemptions = generate(decoder, prompts, vocab_size, SIZES[name])
    assert (preemptions > 0) == (name == "preempting")
    for prompt, ours, values in zip(prompts, tokens, logprobs, strict=True):
        expected = oracle.logits([*prompt, *ours])[len(prompt) - 1 : -1]
        assert ours == expected.argmax(1).tolist()
        exact = expected.log_softmax(1)[torch.arange(NEW_TOKENS), torch.tensor(ours)]
        assert values == pytest.approx(exact.tolist(), abs=2e-4)


class RowExperts(LoopExperts):
    """Routed experts whose answer for a row cannot depend on the other rows: one row at a time."""

    def dispatch(
        self, layer_id: int, rows: Tensor, topk_ids: Tensor, topk_weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        slots = torch.zeros(*topk_ids.shape, rows.shape[1])
        for token, ids in enumerate(topk_ids.tolist()):
            row = rows[token : token + 1].clone()
            for slot, expert_id in enumerate(ids):
                gate_up, down = self.experts[layer_id, expert_id]
                gate, up = F.linear(row, gate_up).chunk(2, dim=-1)
                slots[token, slot] = F.linear(F.silu(gate) * up, down)[0]
        return slots, topk_weights


def test_bits_do_not_depend_on_the_engines_sizes(
    make_ops: MakeOps, checkpoint: MakeCheckpoint
) -> None:
    """Batch mix, chunking and preemption leave log-probabilities bit for bit as they are; with the
    torch twin, whose matrix products depend on the number of rows, only nearly."""
    path = checkpoint()
    ops = make_ops(torch.float32)
    experts = RowExperts(path, torch.float32)
    decoder = Decoder.from_checkpoint(path, dtype=torch.float32, ops=ops, experts=experts)
    vocab_size = decoder.config.vocab_size
    rng = random.Random(7)
    prompts = [[rng.randrange(vocab_size) for _ in range(length)] for length in LENGTHS]
    tokens, logprobs, _ = generate(decoder, prompts, vocab_size, SIZES["roomy"])
    for name in ("one_at_a_time", "small_chunks", "preempting"):
        others, other_logprobs, _ = generate(decoder, prompts, vocab_size, SIZES[name])
        assert others == tokens
        if ops.name == "native":
            assert other_logprobs == logprobs
        for ours, expected in zip(other_logprobs, logprobs, strict=True):
            assert ours == pytest.approx(expected, abs=1e-4)


def test_turns_of_a_conversation_equal_the_oracle(
    make_ops: MakeOps, checkpoint: MakeCheckpoint
) -> None:
    """Two conversations side by side, four turns each, answers included: every turn but the first
    goes on from a snapshot that stands at no round position."""
    path = checkpoint()
    oracle = Oracle(path)
    decoder = make_decoder(path, make_ops(torch.float32))
    vocab_size = decoder.config.vocab_size
    engine = Engine(
        decoder,
        EngineConfig(
            vocab_size=vocab_size,
            max_model_len=512,
            block_size=16,
            num_blocks=64,
            num_state_slots=2,
            max_num_seqs=2,
            max_num_batched_tokens=100,
        ),
    )
    rng = random.Random(5)
    histories: list[list[int]] = [[], []]
    for turn in range(4):
        outputs: dict[str, list[int]] = defaultdict(list)
        cached: dict[str, int] = {}

        def sink(
            output: StepOutput, outputs: dict[str, list[int]] = outputs, cached: Any = cached
        ) -> None:
            assert output.error is None
            outputs[output.request_id] += output.token_ids
            if output.prefill is not None:
                cached[output.request_id] = output.prefill.tokens_cached

        for name, history in enumerate(histories):
            history += [rng.randrange(vocab_size) for _ in range(rng.randrange(40, 70))]
            request = EngineRequest(
                request_id=str(name),
                prompt_ids=history,
                sampling=SamplingParams(temperature=0.0),
                stopping=StoppingParams(max_tokens=40, ignore_eos=True),
            )
            engine.submit(request, sink)
        while engine.step():
            pass
        for name, history in enumerate(histories):
            ours = outputs[str(name)]
            expected = oracle.logits([*history, *ours])[len(history) - 1 : -1]
            assert ours == expected.argmax(1).tolist(), f"turn {turn}"
            assert (cached[str(name)] > 0) == (turn > 0)
            history += ours
