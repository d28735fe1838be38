"""NativeOps equals TorchOps, and a token's bits depend on its own sequence alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from experts.native import build
from experts.native.kernels import cpu_flags, load_kernels
from router.engine.batch import Batch, Chunk, build_batch
from router.model.native_ops import NativeOps
from router.model.ops import AttentionParams, GdnParams, GdnState
from router.model.torch_ops import TorchOps

F32, BF16 = torch.float32, torch.bfloat16
ISAS = [isa for isa in build.ISA_FLAGS if isa == "avx2" or "avx512_bf16" in cpu_flags()]
CPU = torch.device("cpu")
TWIN = TorchOps(F32, CPU)


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    build.build(request.param)
    return str(request.param)


def native(isa: str, dtype: torch.dtype = F32, threads: int = 1) -> NativeOps:
    kernels = load_kernels(isa)
    assert kernels is not None
    ops = NativeOps(kernels, dtype)
    kernels.set_num_threads(threads)
    return ops


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_close(got: Tensor, want: Tensor, tolerance: float) -> None:
    assert got.shape == want.shape
    assert got.dtype == F32
    error = float((got.double() - want.double()).abs().max()) if want.numel() else 0.0
    assert error <= tolerance * (1 + float(want.abs().max())), error


# Row operations


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 33), (5, 64), (2000, 100)])
def test_row_operations_equal_torch(isa: str, rows: int, width: int) -> None:
    ops = native(isa, threads=2)
    x, delta, weight = normal(rows, width), normal(rows, width, seed=1), normal(width, seed=2)
    assert_close(ops.rms_norm(x, weight, 1e-6), TWIN.rms_norm(x, weight, 1e-6), 1e-6)
    got_residual, want_residual = x.clone(), x.clone()
    got = ops.add_rms_norm(got_residual, delta, weight, 1e-6)
    assert_close(got, TWIN.add_rms_norm(want_residual, delta, weight, 1e-6), 1e-6)
    assert torch.equal(got_residual, want_residual)
    gate_up = normal(rows, 2 * width + 1, seed=3) * 4
    assert_close(ops.swiglu(gate_up, width), TWIN.swiglu(gate_up, width), 1e-6)
    routed = normal(rows, width, seed=4)
    want = TWIN.add_shared(routed.clone(), x, gate_up)
    assert_close(ops.add_shared(routed, x, gate_up), want, 1e-6)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_embed_equals_torch(isa: str, dtype: torch.dtype) -> None:
    table = normal(50, 37).to(dtype)
    ids = torch.tensor([0, 49, 3, 3])
    assert torch.equal(native(isa, dtype).embed(ids, table), table[ids].float())


def test_swiglu_at_the_ends_of_the_range(isa: str) -> None:
    gate = torch.tensor([[-200.0, -104.0, -88.0, 0.0, 88.0, 200.0, float("nan")]])
    got = native(isa).swiglu(torch.cat((gate, torch.ones_like(gate)), dim=1), 7)
    want = torch.nn.functional.silu(gate.double()).float()
    assert torch.allclose(got[:, :-1], want[:, :-1], rtol=1e-6, atol=1e-35)
    assert bool(got[0, -1].isnan())


@pytest.mark.parametrize(("rows", "experts", "top_k"), [(1, 1, 1), (7, 9, 3), (600, 128, 8)])
def test_gate_topk_equals_torch(isa: str, rows: int, experts: int, top_k: int) -> None:
    logits = normal(rows, experts) * 3
    ids, weights = native(isa, threads=2).gate_topk(logits, top_k)
    want_ids, want_weights = TWIN.gate_topk(logits, top_k)
    assert torch.equal(ids, want_ids)
    assert_close(weights, want_weights, 1e-6)


def test_gate_ties_go_to_the_lower_id_and_nan_shows(isa: str) -> None:
    ids, weights = native(isa).gate_topk(torch.tensor([[1.0, 5.0, 5.0, 1.0, 1.0]]), 4)
    assert ids.tolist() == [[1, 2, 0, 3]]
    assert bool((weights[0, 0] == weights[0, 1]).all())
    ids, weights = native(isa).gate_topk(torch.full((1, 5), float("nan")), 2)
    assert ids.tolist() == [[0, 1]]
    assert bool(weights.isnan().all())


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_linear_equals_torch(isa: str, dtype: torch.dtype) -> None:
    weight, x = normal(70, 96, seed=1).to(dtype), normal(11, 96)
    ops = native(isa, dtype)
    packed = ops.prepare_linear(weight)
    assert packed.out_features == 70
    want = x.to(dtype).float() @ weight.float().t()
    assert_close(ops.linear(x, packed), want, 1e-5)


# Sequences


@dataclass
class Gdn:
    """A Gated DeltaNet layer and its inputs: `lengths` tokens of some sequences."""

    params: GdnParams
    inputs: list[Tensor]

    def state(self, slots: int) -> GdnState:
        p = self.params
        channels = p.conv_weight.shape[0]
        return GdnState(  # garbage: sequences that start must not see it
            conv=torch.full((slots, channels, p.conv_kernel - 1), 7.0),
            recurrent=torch.full(
                (slots, p.num_value_heads, p.key_head_dim, p.value_head_dim), float("nan")
            ),
        )


def make_gdn(lengths: list[int], key_heads: int, value_heads: int, dk: int, dv: int) -> Gdn:
    channels = 2 * key_heads * dk + value_heads * dv
    params = GdnParams(
        conv_weight=normal(channels, 4, seed=1) / 2,
        decay=-normal(value_heads, seed=2).exp(),
        dt_bias=normal(value_heads, seed=3) - 2,
        norm_weight=normal(dv, seed=4) + 1,
        num_key_heads=key_heads,
        num_value_heads=value_heads,
        key_head_dim=dk,
        value_head_dim=dv,
        conv_kernel=4,
        eps=1e-6,
    )
    width = channels + value_heads * (dv + 2)
    return Gdn(params, [normal(n, width, seed=10 + i) for i, n in enumerate(lengths)])


def batch_of(pieces: list[tuple[int, int, int]], blocks: int = 0, size: int = 1) -> Batch:
    """A batch of (sequence, first, last) token ranges; sequence s owns the blocks
    `s, s + 8, s + 16, ...` and state slot s."""
    return build_batch(
        [
            Chunk(
                token_ids=[0] * (last - first),
                context_len=first,
                block_table=[s + 8 * i for i in range(-(-last // size))][: blocks or None],
                state_slot=s,
            )
            for s, first, last in pieces
        ]
    )


GDN_SHAPES = [
    (1, 1, 16, 16),
    (2, 4, 16, 16),
    (2, 6, 24, 48),
    (1, 2, 128, 128),
    (2, 2, 33, 80),
    (4, 4, 8, 21),
]


@pytest.mark.parametrize(("key_heads", "value_heads", "dk", "dv"), GDN_SHAPES)
def test_gated_delta_net_equals_torch(
    isa: str, key_heads: int, value_heads: int, dk: int, dv: int
) -> None:
    gdn = make_gdn([70, 1, 33, 5], key_heads, value_heads, dk, dv)
    ops, got_state, want_state = native(isa, threads=2), gdn.state(4), gdn.state(4)
    for pieces in (
        [(0, 0, 40), (2, 0, 2), (3, 0, 4)],
        [(2, 2, 32), (0, 40, 41), (1, 0, 1)],
        [(0, 41, 70), (2, 32, 33), (3, 4, 5)],
    ):
        batch = batch_of(pieces)
        mixed = torch.cat([gdn.inputs[s][a:b] for s, a, b in pieces])
        got = ops.gated_delta_net(mixed, gdn.params, got_state, ops.begin_step(batch))
        want = TWIN.gated_delta_net(mixed, gdn.params, want_state, TWIN.begin_step(batch))
        assert_close(got, want, 2e-5)
        used = [s for s, _, _ in pieces]
        assert torch.equal(got_state.conv[used], want_state.conv[used])
        assert_close(got_state.recurrent[used], want_state.recurrent[used], 1e-5)


def test_gated_delta_net_bits_do_not_depend_on_chunks_batch_or_threads(isa: str) -> None:
    gdn = make_gdn([90, 40], 2, 4, 16, 53)

    def run(steps: list[list[tuple[int, int, int]]], threads: int) -> tuple[Tensor, Tensor]:
        ops, state = native(isa, threads=threads), gdn.state(2)
        out = [torch.empty(len(x), 4 * 53) for x in gdn.inputs]
        for pieces in steps:
            mixed = torch.cat([gdn.inputs[s][a:b] for s, a, b in pieces])
            got = ops.gated_delta_net(mixed, gdn.params, state, ops.begin_step(batch_of(pieces)))
            for (s, a, b), rows in zip(
                pieces, got.split([b - a for _, a, b in pieces]), strict=True
            ):
                out[s][a:b] = rows
        return torch.cat(out), state.recurrent

    whole = run([[(0, 0, 90), (1, 0, 40)]], 1)
    one_by_one = [[(0, i, i + 1)] for i in range(90)] + [[(1, i, i + 1)] for i in range(40)]
    mixed_steps = [[(1, 0, 7)], [(0, 0, 33), (1, 7, 8)], [(1, 8, 40), (0, 33, 90)]]
    for steps, threads in ((one_by_one, 1), (mixed_steps, 3), ([[(1, 0, 40), (0, 0, 90)]], 2)):
        got = run(steps, threads)
        assert torch.equal(got[0], whole[0])
        assert torch.equal(got[1], whole[1])


@dataclass
class Attn:
    """A full-attention layer and its inputs."""

    params: AttentionParams
    inputs: list[Tensor]
    angles: Tensor

    def rotary(self, pieces: list[tuple[int, int, int]]) -> Tensor:
        return torch.cat([self.angles[a:b] for _, a, b in pieces])


def make_attention(lengths: list[int], heads: int, kv_heads: int, hd: int, rotary: int) -> Attn:
    params = AttentionParams(
        q_norm=normal(hd, seed=1),
        k_norm=normal(hd, seed=2),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hd,
        rotary_dim=rotary,
        scale=hd**-0.5,
        eps=1e-6,
    )
    width = 2 * (heads + kv_heads) * hd
    angles = torch.arange(max(lengths))[:, None] * torch.logspace(0, -3, rotary // 2)
    return Attn(
        params,
        [normal(n, width, seed=10 + i) for i, n in enumerate(lengths)],
        torch.cat((angles.cos(), angles.sin()), dim=1),
    )


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("block_size", [1, 5, 16, 20, 64])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "hd", "rotary"),
    [(1, 1, 16, 4), (4, 2, 32, 8), (8, 2, 64, 16), (6, 1, 20, 20), (2, 2, 256, 64)],
)
def test_attention_equals_torch(
    isa: str, dtype: torch.dtype, block_size: int, heads: int, kv_heads: int, hd: int, rotary: int
) -> None:
    layer = make_attention([100, 1, 17, 40], heads, kv_heads, hd, rotary)
    ops, twin = native(isa, dtype, threads=2), TorchOps(F32, CPU)
    num_blocks = 8 * (-(-100 // block_size) + 1)
    got_kv = ops.allocate_kv(num_blocks, block_size, kv_heads, hd, dtype)
    want_kv = twin.allocate_kv(num_blocks, block_size, kv_heads, hd, F32)
    # What earlier owners left in the blocks must not be seen, not even as 0 * NaN.
    got_kv.blocks.fill_(0x7FC07FC0)
    for pieces in (
        [(0, 0, 50), (2, 0, 3), (3, 0, 39)],
        [(2, 3, 16), (0, 50, 51), (1, 0, 1)],
        [(0, 51, 100), (3, 39, 40), (2, 16, 17)],
    ):
        batch = batch_of(pieces, size=block_size)
        qkv = torch.cat([layer.inputs[s][a:b] for s, a, b in pieces])
        cos_sin = layer.rotary(pieces)
        got = ops.attention(qkv, layer.params, cos_sin, got_kv, ops.begin_step(batch))
        want = twin.attention(qkv, layer.params, cos_sin, want_kv, twin.begin_step(batch))
        assert_close(got, want, 1e-5 if dtype == F32 else 1.5e-2)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_attention_bits_do_not_depend_on_chunks_batch_or_threads(
    isa: str, dtype: torch.dtype
) -> None:
    layer = make_attention([150, 70], 6, 2, 48, 16)

    def run(steps: list[list[tuple[int, int, int]]], threads: int, size: int = 16) -> Tensor:
        ops = native(isa, dtype, threads=threads)
        kv = ops.allocate_kv(8 * (150 // size + 1), size, 2, 48, dtype)
        out = [torch.empty(len(x), 6 * 48) for x in layer.inputs]
        for pieces in steps:
            qkv = torch.cat([layer.inputs[s][a:b] for s, a, b in pieces])
            step = ops.begin_step(batch_of(pieces, size=size))
            got = ops.attention(qkv, layer.params, layer.rotary(pieces), kv, step)
            for (s, a, b), rows in zip(
                pieces, got.split([b - a for _, a, b in pieces]), strict=True
            ):
                out[s][a:b] = rows
        return torch.cat(out)

    whole = run([[(0, 0, 150), (1, 0, 70)]], 1)
    one_by_one = [[(0, i, i + 1)] for i in range(150)] + [[(1, i, i + 1)] for i in range(70)]
    mixed_steps = [[(1, 0, 7)], [(0, 0, 33), (1, 7, 8)], [(1, 8, 70), (0, 33, 150)]]
    for steps, threads in ((one_by_one, 1), (mixed_steps, 3), ([[(1, 0, 70), (0, 0, 150)]], 2)):
        assert torch.equal(run(steps, threads), whole)
    assert torch.equal(run(mixed_steps, 2, size=32), whole)  # nor on the size of blocks


def test_kv_blocks_waste_nothing_at_sixteen_tokens(isa: str) -> None:
    ops = native(isa, BF16)
    assert ops.allocate_kv(3, 16, 2, 64, BF16).num_bytes == 3 * 16 * 2 * 64 * 2 * 2
    assert ops.allocate_kv(3, 16, 2, 64, F32).num_bytes == 3 * 16 * 2 * 64 * 2 * 4
