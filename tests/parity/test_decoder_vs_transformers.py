"""Our trunk against transformers on the same checkpoint: same logits, same greedy tokens.

The oracle sees each finished sequence once, as a whole, without a cache. Ours saw it in chunks,
next to fifteen others, then token by token. Our float32 logits of every position agree with the
oracle's within 1e-4, and each generated token is the oracle's most likely one.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from router.model.ops import Ops
from tests.parity.oracle import Oracle, Run, generate, make_decoder

MakeOps = Callable[[torch.dtype], Ops]
MakeCheckpoint = Callable[..., Path]

LOGIT_TOLERANCE = 1e-4

YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "rope_theta": 10000.0,
}
SHAPES: dict[str, dict[str, Any]] = {
    "default": {},
    "text_only_split": {"text_only": True, "layout": "split"},
    "odd_experts_top1": {"num_experts": 5, "top_k": 1, "moe_intermediate_size": 24},
    "top3_of_7": {"num_experts": 7, "top_k": 3, "shared_intermediate_size": 48},
    "top8_of_33": {"num_experts": 33, "top_k": 8, "moe_intermediate_size": 16},
    "top10_of_16": {"num_experts": 16, "top_k": 10, "moe_intermediate_size": 16, "layout": "split"},
    "one_key_head": {"linear_num_key_heads": 1, "linear_num_value_heads": 3},
    "four_key_heads": {
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 24,
    },
    "three_key_heads_long_conv": {
        "linear_num_key_heads": 3,
        "linear_num_value_heads": 6,
        "conv_kernel": 6,
    },
    "multi_query": {"num_heads": 6, "num_kv_heads": 1, "head_dim": 16},
    "no_grouping": {"num_heads": 3, "num_kv_heads": 3, "head_dim": 64, "hidden_size": 96},
    "wide_heads": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 128, "num_layers": 2}
    | {"full_attention_interval": 2},
    "fully_rotary": {"rope": {"partial_rotary_factor": 1.0}, "full_attention_interval": 2},
    "tied": {"tied": True, "vocab_size": 300},
    "only_attention": {"full_attention_interval": 1, "num_layers": 3},
    "only_linear": {"full_attention_interval": 9, "num_layers": 3},
    "yarn": {"rope": YARN, "full_attention_interval": 2},
    "yarn_mscale": {
        "rope": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False, "beta_fast": 16},
        "full_attention_interval": 2,
    },
    "dense": {"dense": True},
    "dense_tied_text_only": {"dense": True, "tied": True, "text_only": True, "num_layers": 5},
}
SIXTEEN_LENGTHS = (1, 2, 3, 4, 5, 17, 31, 63, 64, 65, 66, 100, 128, 129, 257, 600)


def random_prompts(lengths: tuple[int, ...], vocab_size: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(vocab_size) for _ in range(length)] for length in lengths]


def assert_equals_oracle(runs: list[Run], oracle: Oracle) -> None:
    for run in runs:
        ours, expected = torch.cat(run.logits), oracle.logits(run.token_ids[: run.num_tokens])
        difference = (ours - expected).abs().amax(dim=1)
        worst = int(difference.argmax())
        assert difference[worst] <= LOGIT_TOLERANCE, (
            f"prompt of {run.num_prompt}: logits differ by {difference[worst]:.2g} at {worst}"
        )
        generated = run.token_ids[run.num_prompt :]
        assert generated == expected[run.num_prompt - 1 :].argmax(dim=1)[: len(generated)].tolist()


@pytest.mark.parametrize("shape", SHAPES)
def test_sixteen_mixed_sequences_equal_the_oracle(
    shape: str, make_ops: MakeOps, checkpoint: MakeCheckpoint
) -> None:
    path = checkpoint(**SHAPES[shape])
    rng = random.Random(shape)
    decoder = make_decoder(path, make_ops(torch.float32))
    lengths = SIXTEEN_LENGTHS
    runs = generate(
        decoder,
        random_prompts(lengths, decoder.config.vocab_size, seed=1),
        num_new=12,
        chunk_len=lambda left: rng.choice((1, 5, 33, 64, 100, 256)),
        arrivals=[rng.randrange(6) for _ in lengths],
    )
    assert_equals_oracle(runs, Oracle(path))


@pytest.mark.parametrize("chunk", [1, 7, 63, 64, 65, 300, 600])
def test_any_chunking_of_the_prefill_equals_the_oracle(
    chunk: int, make_ops: MakeOps, checkpoint: MakeCheckpoint
) -> None:
    path = checkpoint()
    decoder = make_decoder(path, make_ops(torch.float32))
    prompts = random_prompts((600,), decoder.config.vocab_size, seed=2)
    runs = generate(decoder, prompts, 4, lambda left: chunk, block_size=chunk % 13 + 4)
    assert_equals_oracle(runs, Oracle(path))


def test_only_wanted_rows_have_logits_and_they_are_the_same(
    make_ops: MakeOps, checkpoint: MakeCheckpoint
) -> None:
    """The shortcut in the last layer changes nothing but the number of rows."""
    from router.engine.batch import Chunk, build_batch

    decoder = make_decoder(checkpoint(), make_ops(torch.float32))
    first, second = random_prompts((40, 9), decoder.config.vocab_size, seed=3)

    def logits(wanted: tuple[int, int]) -> torch.Tensor:
        caches = decoder.allocate_caches(8, 16, 2)
        chunks = [
            Chunk(token_ids=tokens, context_len=0, block_table=table, state_slot=slot, num_logits=n)
            for tokens, table, slot, n in (
                (first, [2, 0, 5], 1, wanted[0]),
                (second, [7], 0, wanted[1]),
            )
        ]
        return decoder.forward(build_batch(chunks), caches)

    everything = logits((40, 9))
    assert everything.shape == (49, decoder.config.vocab_size)
    torch.testing.assert_close(logits((1, 2)), everything[[39, 47, 48]], rtol=0, atol=1e-5)
    assert logits((0, 0)).shape == (0, decoder.config.vocab_size)


def test_bfloat16_is_no_farther_from_float32_than_the_oracle(
    make_ops: MakeOps, checkpoint: MakeCheckpoint
) -> None:
    path = checkpoint(dtype="bfloat16", num_layers=8)
    decoder = make_decoder(path, make_ops(torch.bfloat16), torch.bfloat16)
    exact, rounded = Oracle(path), Oracle(path, torch.bfloat16)
    prompts = random_prompts((200, 150, 64, 33), decoder.config.vocab_size, seed=4)
    runs = generate(decoder, prompts, 8, lambda left: 48)
    ours, theirs = [], []
    for run in runs:
        token_ids = run.token_ids[: run.num_tokens]
        reference = exact.logits(token_ids)
        ours.append((torch.cat(run.logits) - reference).abs())
        theirs.append((rounded.logits(token_ids) - reference).abs())
    our_mean, their_mean = torch.cat(ours).mean(), torch.cat(theirs).mean()
    assert our_mean <= their_mean, f"ours {our_mean:.4f}, transformers {their_mean:.4f}"


def test_state_and_blocks_of_other_sequences_are_left_alone(
    make_ops: MakeOps, checkpoint: MakeCheckpoint
) -> None:
    """A step writes only the state slots and the blocks of its own sequences."""
    from router.engine.batch import Chunk, build_batch
    from router.model.ops import GdnState

    decoder = make_decoder(checkpoint(), make_ops(torch.float32))
    caches = decoder.allocate_caches(4, 16, 3)
    states = [layer for layer in caches.layers if isinstance(layer, GdnState)]
    for state in states:
        state.recurrent.fill_(7.0)
        state.conv.fill_(7.0)
    chunk = Chunk(token_ids=[5, 6, 7], context_len=0, block_table=[2], state_slot=1)
    decoder.forward(build_batch([chunk]), caches)
    for state in states:
        assert (state.recurrent[[0, 2]] == 7.0).all()
        assert (state.conv[[0, 2]] == 7.0).all()
        assert not (state.recurrent[1] == 7.0).any()
