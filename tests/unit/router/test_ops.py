"""Every op against its definition, written out token by token in float64."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from protos.errors import ConfigurationError
from router.engine.batch import Batch, Chunk, build_batch
from router.model.attention import attend
from router.model.gated_delta_net import chunked_delta_rule, recurrent_delta_rule
from router.model.ops import AttentionParams, GdnParams, GdnState, Ops, choose_ops
from tests.parity.conftest import available_ops

CPU = torch.device("cpu")


@pytest.fixture(params=available_ops())
def ops(request: pytest.FixtureRequest) -> Ops:
    return choose_ops(torch.float32, CPU, request.param)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def close(actual: Tensor, expected: Tensor, atol: float = 2e-5) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=2e-5, atol=atol)


def ragged(lengths: Sequence[int], contexts: Sequence[int], block_size: int = 4) -> Batch:
    """Sequences of these lengths; blocks and slots in falling order."""
    needed = [
        -(-(length + context) // block_size)
        for length, context in zip(lengths, contexts, strict=True)
    ]
    free = list(range(sum(needed)))
    return build_batch(
        [
            Chunk(
                token_ids=[1] * length,
                context_len=context,
                block_table=[free.pop() for _ in range(count)],
                state_slot=len(lengths) - i,
            )
            for i, (length, context, count) in enumerate(
                zip(lengths, contexts, needed, strict=True)
            )
        ]
    )


def norm64(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def test_linear_embed_and_norms(ops: Ops) -> None:
    x, weight, table = rand(5, 48), rand(37, 48), rand(11, 48)
    packed = ops.prepare_linear(weight)
    assert packed.out_features == 37
    close(ops.linear(x, packed), x.double() @ weight.double().t())
    ids = torch.tensor([3, 0, 10, 3])
    assert torch.equal(ops.embed(ids, table).float(), table[ids])
    scale = rand(48, seed=3) * 0.1
    close(ops.rms_norm(x, scale, 1e-6), norm64(x, 1 + scale, 1e-6))
    residual, delta = rand(5, 48, seed=1), rand(5, 48, seed=2)
    total = residual + delta
    close(ops.add_rms_norm(residual, delta, scale, 1e-6), norm64(total, 1 + scale, 1e-6))
    assert torch.equal(residual, total)  # in place


def test_swiglu_ignores_what_stands_behind_it(ops: Ops) -> None:
    x = rand(3, 33)
    gate, up = x[:, :16].double(), x[:, 16:32].double()
    close(ops.swiglu(x, 16), gate * torch.sigmoid(gate) * up)


def test_the_gate_renormalises_and_breaks_ties_by_id(ops: Ops) -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0, 2.0, -1.0, 0.5], [1.0] * 7])
    ids, weights = ops.gate_topk(logits, 3)
    assert ids.dtype == torch.int32
    assert ids.tolist() == [[1, 3, 4], [0, 1, 2]]
    close(weights, torch.full((2, 3), 1 / 3))
    ids, weights = ops.gate_topk(torch.tensor([[0.0, math.log(3.0), -5.0]]), 2)
    assert ids.tolist() == [[1, 0]]
    close(weights, torch.tensor([[0.75, 0.25]]))


def test_the_shared_expert_is_added_by_the_last_column(ops: Ops) -> None:
    routed, shared, gate = rand(4, 24), rand(4, 24, seed=1), rand(4, 9, seed=2)
    expected = routed.double() + torch.sigmoid(gate[:, -1:].double()) * shared.double()
    close(ops.add_shared(routed.clone(), shared, gate), expected)


def gdn_params(num_key_heads: int, num_value_heads: int, dk: int, dv: int, k: int) -> GdnParams:
    channels = 2 * num_key_heads * dk + num_value_heads * dv
    return GdnParams(
        conv_weight=rand(channels, k),
        decay=-rand(num_value_heads).exp(),
        dt_bias=rand(num_value_heads, seed=1),
        norm_weight=1 + 0.1 * rand(dv),
        num_key_heads=num_key_heads,
        num_value_heads=num_value_heads,
        key_head_dim=dk,
        value_head_dim=dv,
        conv_kernel=k,
        eps=1e-6,
    )


def gdn_by_definition(
    mixed: Tensor, p: GdnParams, conv: Tensor, memory: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One sequence, token by token, float64. `conv [C, k-1]`, `memory [Hv, dk, dv]`."""
    key_dim, value_dim = p.num_key_heads * p.key_head_dim, p.num_value_heads * p.value_head_dim
    repeat = p.num_value_heads // p.num_key_heads
    conv, memory, outputs = conv.double(), memory.double(), []
    for row in mixed.double():
        x, z, b, a = row.split(
            (2 * key_dim + value_dim, value_dim, p.num_value_heads, p.num_value_heads)
        )
        window = torch.cat((conv, x[:, None]), dim=1)
        conv = window[:, 1:]
        x = torch.nn.functional.silu((window * p.conv_weight.double()).sum(1))
        q, k, v = x.split((key_dim, key_dim, value_dim))
        q, k = (part.view(p.num_key_heads, -1).repeat_interleave(repeat, dim=0) for part in (q, k))
        q, k = (part / (part.square().sum(-1, keepdim=True) + 1e-6).sqrt() for part in (q, k))
        q = q * p.key_head_dim**-0.5
        v = v.view(p.num_value_heads, -1)
        decay = (p.decay.double() * torch.nn.functional.softplus(a + p.dt_bias.double())).exp()
        memory = memory * decay[:, None, None]
        error = v - torch.einsum("hkv,hk->hv", memory, k)
        memory = memory + torch.einsum("hk,hv->hkv", k, error * torch.sigmoid(b)[:, None])
        out = norm64(torch.einsum("hkv,hk->hv", memory, q), p.norm_weight, p.eps)
        outputs.append((out * torch.nn.functional.silu(z.view_as(out))).flatten())
    return torch.stack(outputs), conv, memory


@pytest.mark.parametrize("sizes", [(1, 2, 16, 16, 4), (2, 2, 8, 40, 3), (3, 6, 24, 9, 2)])
@pytest.mark.parametrize(
    ("lengths", "contexts"),
    [
        ((1,), (0,)),
        ((1, 1, 1), (4, 0, 9)),
        ((70,), (0,)),
        ((130, 1, 64, 2, 1), (0, 3, 5, 0, 0)),
    ],
)
def test_gated_delta_net_equals_its_definition(
    sizes: tuple[int, int, int, int, int],
    lengths: tuple[int, ...],
    contexts: tuple[int, ...],
    ops: Ops,
) -> None:
    p = gdn_params(*sizes)
    batch = ragged(lengths, contexts)
    channels = p.conv_weight.shape[0]
    heads, dv = p.num_value_heads, p.value_head_dim
    mixed = rand(sum(lengths), channels + heads * dv + 2 * heads)
    num_slots = len(lengths) + 2
    conv = rand(num_slots, channels, p.conv_kernel - 1)
    memory = rand(num_slots, heads, p.key_head_dim, dv)
    for slot, context in zip(batch.state_slots.tolist(), contexts, strict=True):
        if context == 0:  # garbage that must not be read
            conv[slot], memory[slot] = math.nan, math.nan
    state = GdnState(conv=conv.clone(), recurrent=memory.clone())
    out = ops.gated_delta_net(mixed, p, state, ops.begin_step(batch))
    parts = mixed.split(lengths)
    found = out.split(lengths)
    untouched = set(range(num_slots)) - set(batch.state_slots.tolist())
    for i, slot in enumerate(batch.state_slots.tolist()):
        start = (conv[slot], memory[slot])
        if contexts[i] == 0:
            start = (torch.zeros_like(conv[slot]), torch.zeros_like(memory[slot]))
        expected, conv_after, memory_after = gdn_by_definition(parts[i], p, *start)
        close(found[i], expected, atol=2e-4)
        close(state.conv[slot], conv_after)
        close(state.recurrent[slot], memory_after)
    for slot in untouched:
        assert torch.equal(state.recurrent[slot], memory[slot])


@pytest.mark.parametrize("num_tokens", [1, 2, 63, 64, 65, 200])
def test_the_chunked_delta_rule_equals_the_recurrent_one(num_tokens: int) -> None:
    shape = (2, 3, num_tokens)
    q, k = (torch.nn.functional.normalize(rand(*shape, 16, seed=s), dim=-1) for s in (0, 1))
    v, g, beta = rand(*shape, 8), -rand(*shape).exp(), torch.sigmoid(rand(*shape, seed=1))
    memory = rand(2, 3, 16, 8)
    out, after = chunked_delta_rule(q, k, v, g, beta, memory)
    expected = []
    for t in range(num_tokens):
        row, memory = recurrent_delta_rule(*(x[:, :, t] for x in (q, k, v, g, beta)), memory)
        expected.append(row)
    close(out, torch.stack(expected, dim=2))
    close(after, memory)


def attention_by_definition(qkv: Tensor, p: AttentionParams, cos_sin: Tensor) -> Tensor:
    """One whole sequence, float64."""
    heads, kv_heads, size = p.num_heads, p.num_kv_heads, p.head_dim
    count = qkv.shape[0]
    q_gate, k, v = qkv.double().split((2 * heads * size, kv_heads * size, kv_heads * size), dim=1)
    q, gate = q_gate.view(count, heads, 2, size).unbind(2)
    half = p.rotary_dim // 2
    cos, sin = cos_sin.double()[:, None].split(half, dim=-1)

    def rotate(x: Tensor) -> Tensor:
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)

    q = rotate(norm64(q, 1 + p.q_norm, p.eps))
    k = rotate(norm64(k.view(count, kv_heads, size), 1 + p.k_norm, p.eps))
    k, v = (
        x.view(count, kv_heads, size).repeat_interleave(heads // kv_heads, dim=1) for x in (k, v)
    )
    scores = torch.einsum("qhd,khd->hqk", q, k) * p.scale
    scores = scores.masked_fill(torch.ones(count, count).triu(1).bool(), -math.inf)
    out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
    return (out * torch.sigmoid(gate)).flatten(1)


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 16), (3, 3, 24), (6, 1, 32)])
@pytest.mark.parametrize("block_size", [4, 16])
def test_attention_equals_its_definition_over_steps(
    heads: int, kv_heads: int, size: int, block_size: int, ops: Ops
) -> None:
    p = AttentionParams(
        q_norm=0.1 * rand(size),
        k_norm=0.1 * rand(size, seed=1),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=size,
        rotary_dim=8,
        scale=size**-0.5,
        eps=1e-6,
    )
    totals = (41, 7, 20)
    full = [rand(n, (2 * heads + 2 * kv_heads) * size, seed=n) for n in totals]
    angles = [rand(n, 4, seed=n) for n in totals]
    cos_sin = [torch.cat((a.cos(), a.sin()), dim=1) for a in angles]
    steps = [(30, 1, 19), (1, 5, 1), (10, 1, 0)]  # tokens of each sequence in each step
    count = -(-max(totals) // block_size)
    kv = ops.allocate_kv(3 * count, block_size, kv_heads, size, torch.float32)
    tables = [list(range(i, 3 * count, 3)) for i in range(3)]
    done = [0, 0, 0]
    found: list[list[Tensor]] = [[], [], []]
    for step in steps:
        members = [i for i in range(3) if step[i]]
        batch = build_batch(
            [
                Chunk(
                    token_ids=[1] * step[i],
                    context_len=done[i],
                    block_table=tables[i],
                    state_slot=i,
                )
                for i in members
            ]
        )
        rows = [slice(done[i], done[i] + step[i]) for i in members]
        out = ops.attention(
            torch.cat([full[i][r] for i, r in zip(members, rows, strict=True)]),
            p,
            torch.cat([cos_sin[i][r] for i, r in zip(members, rows, strict=True)]),
            kv,
            ops.begin_step(batch),
        )
        for i, part in zip(members, out.split([step[i] for i in members]), strict=True):
            found[i].append(part)
            done[i] += step[i]
    for i in range(3):
        close(torch.cat(found[i]), attention_by_definition(full[i], p, cos_sin[i]))


def test_many_queries_over_a_long_past_are_tiled(monkeypatch: pytest.MonkeyPatch) -> None:
    from router.model import attention

    q, k, v = rand(2, 9, 4, 8), rand(2, 30, 2, 8), rand(2, 30, 2, 8, seed=1)
    positions = torch.stack((torch.arange(9) + 21, torch.arange(9)))
    whole = attention.attend(q, k, v, positions, 0.3)
    monkeypatch.setattr(attention, "MASK_ELEMENTS", 300)
    close(attention.attend(q, k, v, positions, 0.3), whole)


def test_ops_that_cannot_be_are_refused() -> None:
    assert choose_ops(torch.float32, CPU, "torch").name == "torch"
    with pytest.raises(ConfigurationError, match="must be auto, torch or native"):
        choose_ops(torch.float32, CPU, "cuda")
    with pytest.raises(ConfigurationError, match="cannot be native on meta"):
        choose_ops(torch.float32, torch.device("meta"), "native")


class _FakeFla:
    """Stands in for flash-linear-attention: same call, our mathematics."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def chunk_gated_delta_rule(self, *args: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.calls.append("chunk")
        return self._rule(*args, **kwargs)

    def fused_recurrent_gated_delta_rule(
        self, *args: Tensor, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.calls.append("recurrent")
        return self._rule(*args, **kwargs)

    @staticmethod
    def _rule(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        g: Tensor,
        beta: Tensor,
        scale: float,
        initial_state: Tensor,
        output_final_state: bool,
    ) -> tuple[Tensor, Tensor]:
        assert scale == 1.0
        assert output_final_state
        heads = (x.float().transpose(1, 2) for x in (q, k, v, g, beta))
        out, state = chunked_delta_rule(*heads, initial_state)
        return out.transpose(1, 2), state


def test_flash_linear_attention_stands_behind_the_same_function() -> None:
    from router.model.torch_ops import TorchOps

    p = gdn_params(2, 2, 8, 16, 3)
    batch = ragged((9, 1), (0, 3))
    mixed = rand(10, p.conv_weight.shape[0] + 2 * 16 + 4)
    results = []
    for fla in (None, _FakeFla()):
        ops = TorchOps(torch.float32, CPU)
        ops._fla = fla
        state = GdnState(conv=rand(3, p.conv_weight.shape[0], 2), recurrent=rand(3, 2, 8, 16))
        results.append(ops.gated_delta_net(mixed, p, state, ops.begin_step(batch)))
    assert fla.calls == ["recurrent", "chunk"]
    torch.testing.assert_close(results[1], results[0], rtol=0.05, atol=0.05)  # bf16 chunks


class _FakeFlashAttention:
    """Stands in for flash-attn: same call, one sequence after the other."""

    def flash_attn_varlen_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        softmax_scale: float,
        causal: bool,
    ) -> Tensor:
        assert causal
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        q_lengths, k_lengths = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
        assert max(q_lengths) == max_seqlen_q
        assert max(k_lengths) == max_seqlen_k
        outputs = []
        for q_part, k_part, v_part in zip(
            q.split(q_lengths), k.split(k_lengths), v.split(k_lengths), strict=True
        ):
            last = k_part.shape[0]
            positions = torch.arange(last - q_part.shape[0], last)[None]
            parts = (x.unsqueeze(0) for x in (q_part, k_part, v_part))
            outputs.append(attend(*parts, positions, softmax_scale)[0])
        return torch.cat(outputs)


def test_flash_attention_stands_behind_the_same_function() -> None:
    from router.model.torch_ops import TorchOps

    p = AttentionParams(
        q_norm=rand(16),
        k_norm=rand(16),
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        rotary_dim=4,
        scale=0.25,
        eps=1e-6,
    )
    first, second = ragged((3, 9, 4), (0, 0, 0)), ragged((1, 6, 2), (3, 9, 4))
    tables = second.block_tables
    first = dataclasses.replace(first, block_tables=tables)
    results = []
    for flash in (None, _FakeFlashAttention()):
        ops = TorchOps(torch.float32, CPU)
        ops._flash = flash
        kv = ops.allocate_kv(int(tables.max()) + 1, 4, 2, 16, torch.float32)
        for batch in (first, second):
            count = batch.num_tokens
            qkv, cos_sin = rand(count, (8 + 4) * 16), rand(count, 4)
            results.append(ops.attention(qkv, p, cos_sin, kv, ops.begin_step(batch)))
    close(results[2], results[0])
    close(results[3], results[1])
