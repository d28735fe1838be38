"""Attention over keys that arrive section by section equals attention over all of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from experts.native import build
from experts.native.kernels import cpu_flags, load_kernels
from router.engine.batch import Chunk, build_batch
from router.engine.chain import CACHE_BLOCK
from router.model.native_ops import NativeOps
from router.model.ops import AttentionParams, Ops
from router.model.streamed_attention import (
    StreamedAttention,
    attend_at_once,
    attend_in_sections,
    merge,
)
from router.model.torch_ops import TorchOps

F32, BF16 = torch.float32, torch.bfloat16
CPU = torch.device("cpu")
ISAS = [isa for isa in build.ISA_FLAGS if isa == "avx2" or "avx512_bf16" in cpu_flags()]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def cut(total: int, most: int, rng: random.Random) -> list[range]:
    """Cut `range(total)` into ranges of 1 to `most`."""
    pieces, start = [], 0
    while start < total:
        stop = min(total, start + rng.randint(1, most))
        pieces.append(range(start, stop))
        start = stop
    return pieces


# The mathematics


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("seed", range(25))
def test_any_cut_into_sections_equals_attention_at_once(dtype: torch.dtype, seed: int) -> None:
    rng = random.Random(seed)
    num_kv_heads, group, head_dim = rng.choice((1, 2, 3)), rng.choice((1, 2, 4)), 8
    num_queries, cold, warm = rng.randint(1, 40), rng.randint(0, 400), rng.randint(0, 60)
    # Scores up to about 30, where a sum without a running maximum would overflow.
    q = normal(num_queries, num_kv_heads * group, head_dim, seed=seed) * 2
    k = normal(cold + warm + num_queries, num_kv_heads, head_dim, seed=seed + 1).to(dtype) * 2
    v = normal(cold + warm + num_queries, num_kv_heads, head_dim, seed=seed + 2).to(dtype)
    pieces = [(k[p.start : p.stop], v[p.start : p.stop]) for p in cut(cold, 130, rng)]
    got = attend_in_sections(q, pieces, k[cold:], v[cold:], 0.7)
    want = attend_at_once(q, k, v, 0.7)
    assert float((got - want).abs().max()) < 1e-5


@pytest.mark.parametrize("seed", range(10))
def test_partial_results_merge_in_any_grouping(seed: int) -> None:
    rng = random.Random(seed)
    q, k, v = normal(5, 4, 8, seed=1) * 5, normal(300, 2, 8, seed=2), normal(300, 2, 8, seed=3)
    parts = []
    for piece in cut(300, 90, rng):
        running = StreamedAttention(q, 2, 0.9)
        running.add(k[piece.start : piece.stop], v[piece.start : piece.stop])
        parts.append(running.partial())
    whole = StreamedAttention(q, 2, 0.9)
    whole.add(k, v)
    rng.shuffle(parts)
    split = rng.randint(1, len(parts))
    joined = merge([merge(parts[:split]), *parts[split:]])
    for got, want in zip(joined, whole.partial(), strict=True):
        torch.testing.assert_close(got, want, atol=3e-6, rtol=1e-5)


def test_a_query_without_keys_is_zero_and_merges_as_nothing() -> None:
    q, k, v = normal(3, 2, 4, seed=1), normal(3, 1, 4, seed=2), normal(3, 1, 4, seed=3)
    nothing = StreamedAttention(q, 1, 1.0)
    nothing.add(k, v, offset=-2)  # query 0 sees keys up to -2, query 1 up to -1, query 2 key 0
    out, logsumexp = nothing.partial()
    assert torch.equal(out[:2], torch.zeros(2, 2, 4))
    assert logsumexp[:2].isinf().all()
    torch.testing.assert_close(out[2], v[0].expand(2, 4))
    rest = StreamedAttention(q, 1, 1.0)
    rest.add(k, v)
    merged = merge([(out, logsumexp), rest.partial()])[0]
    torch.testing.assert_close(merged[:2], rest.partial()[0][:2])


def test_tiles_of_keys_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = normal(7, 2, 8, seed=1), normal(99, 1, 8, seed=2), normal(99, 1, 8, seed=3)
    want = attend_in_sections(q, [], k, v, 0.5)
    for elements in (1, 14 * 3, 14 * 50):
        monkeypatch.setattr("router.model.streamed_attention.SCORE_ELEMENTS", elements)
        torch.testing.assert_close(attend_in_sections(q, [], k, v, 0.5), want)


def as_bytes(values: Tensor) -> NDArray[np.uint8]:
    return values.contiguous().view(torch.uint8).flatten().numpy()


# The kernels: a step with a cold past equals the same step with all of it in blocks.

PARAMS = AttentionParams(
    q_norm=normal(24, seed=4) * 0.1,
    k_norm=normal(24, seed=5) * 0.1,
    num_heads=6,
    num_kv_heads=2,
    head_dim=24,
    rotary_dim=8,
    scale=24**-0.5,
    eps=1e-6,
)


class GivenPast:
    """A cold past of one layer that lies in memory, handed out in the given sections."""

    def __init__(self, values: NDArray[np.uint8], cuts: list[range]) -> None:
        self.num_tokens = values.shape[0] * CACHE_BLOCK
        self._values = values
        self._cuts = cuts

    def next_layer(self) -> Iterator[NDArray[np.uint8]]:
        buffer = np.empty_like(self._values)
        for piece in self._cuts:
            part = buffer[: len(piece)]
            part[:] = self._values[piece.start : piece.stop]
            yield part
            part.fill(0xFF)  # NaN: what is over must not be read any more


def native(isa: str, dtype: torch.dtype) -> Ops:
    build.build(isa)
    kernels = load_kernels(isa)
    assert kernels is not None
    ops = NativeOps(kernels, dtype)
    kernels.set_num_threads(2)
    return ops


KINDS: dict[str, Callable[[torch.dtype], Ops]] = {
    "torch": lambda dtype: TorchOps(dtype, CPU),
    **{isa: lambda dtype, isa=isa: native(isa, dtype) for isa in ISAS},  # type: ignore[misc]
}


def step_twice(
    ops: Ops, dtype: torch.dtype, context: int, tokens: int, block_size: int, cold: int, most: int
) -> tuple[Tensor, Tensor]:
    """Run one step with all keys in blocks, and again with the first `cold` of them outside."""
    params = PARAMS
    rng = random.Random(context + tokens)
    num_blocks = -(-(context + tokens) // block_size)
    kv = ops.allocate_kv(num_blocks + 3, block_size, params.num_kv_heads, params.head_dim, dtype)
    table = list(range(1, num_blocks + 1))
    rng.shuffle(table)
    heads = params.num_kv_heads, params.head_dim
    past = normal(2, context, *heads, seed=6).to(dtype)
    ops.write_kv([kv], np.array(table, np.int32), context, as_bytes(past))
    width = 2 * (params.num_heads + params.num_kv_heads) * params.head_dim
    qkv = normal(tokens, width, seed=7).to(ops.activation_dtype)
    cos_sin = normal(tokens, params.rotary_dim, seed=8)
    chunk = Chunk(token_ids=[0] * tokens, context_len=context, block_table=table, state_slot=0)
    batch = build_batch([chunk])
    want = ops.attention(qkv, params, cos_sin, kv, ops.begin_step(batch))

    count = cold // CACHE_BLOCK
    values = past[:, :cold].reshape(2, count, CACHE_BLOCK, *heads).transpose(0, 1)
    given = GivenPast(as_bytes(values).reshape(count, -1), cut(count, most, rng))
    gone = cold // block_size
    nan = as_bytes(torch.full((2, cold, *heads), float("nan"), dtype=dtype))
    ops.write_kv([kv], np.array(table[:gone], np.int32), cold, nan)
    local = torch.tensor([table[gone:]], dtype=torch.int32)
    step = ops.begin_step(replace(batch, cold=given, block_tables=local))
    return ops.attention(qkv, params, cos_sin, kv, step), want


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("context", "tokens", "cold"),
    [(128, 1, 128), (128, 40, 128), (300, 1, 256), (700, 33, 384), (5200, 3, 5120)],
)
@pytest.mark.parametrize("block_size", [8, 32])
def test_a_step_with_a_cold_past_equals_one_without(
    kind: str, dtype: torch.dtype, context: int, tokens: int, cold: int, block_size: int
) -> None:
    got, want = step_twice(KINDS[kind](dtype), dtype, context, tokens, block_size, cold, 50)
    if kind == "torch":
        tolerance = 2e-6 if dtype == F32 else 2e-2
        assert float((got - want).abs().max()) < tolerance
    else:
        assert torch.equal(got, want)


@pytest.mark.parametrize("kind", ISAS)
def test_the_bits_do_not_depend_on_the_sections(kind: str) -> None:
    ops = KINDS[kind](F32)
    results = [step_twice(ops, F32, 1300, 70, 16, 1280, most)[0] for most in (1, 2, 10)]
    assert all(torch.equal(result, results[0]) for result in results)
