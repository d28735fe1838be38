"""Cached values as bytes: canonical, exact, and the same for all kernels and block sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from router.engine.chain import CACHE_BLOCK
from router.model.cache_io import DecoderCacheIo
from router.model.config import ModelConfig
from router.model.ops import GdnState, KvLayer, Ops, choose_ops
from router.model.torch_ops import TorchKv
from tests.parity.checkpoints import make_checkpoint
from tests.parity.conftest import available_ops

DTYPES = [torch.float32, torch.bfloat16]
BLOCK_SIZES = [8, 16, 32, 128]
Bytes = NDArray[np.uint8]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    path = make_checkpoint(
        tmp_path_factory.mktemp("checkpoint"), text_only=True, num_layers=8, head_dim=40
    )
    return ModelConfig.from_checkpoint(path)


class Pool:
    """Caches of one kind of kernels, 400 tokens and 3 slots, and their io."""

    def __init__(self, name: str, config: ModelConfig, dtype: torch.dtype, block_size: int) -> None:
        self.ops: Ops = choose_ops(dtype, torch.device("cpu"), name)
        self.block_size = block_size
        num_blocks = 400 // block_size
        conv = (3, config.conv_dim, config.conv_kernel - 1)
        recurrent = (
            *(3, config.linear_num_value_heads),
            *(config.linear_key_head_dim, config.linear_value_head_dim),
        )
        self.layers: list[KvLayer | GdnState] = [
            self.ops.allocate_kv(
                num_blocks, block_size, config.num_kv_heads, config.head_dim, dtype
            )
            if kind == "full_attention"
            else GdnState(
                conv=torch.zeros(conv, dtype=self.ops.activation_dtype),
                recurrent=torch.zeros(recurrent),
            )
            for kind in config.layer_types
        ]
        self.io = DecoderCacheIo(config, self.ops, dtype, self.layers)
        # Not in order, and not from the first.
        self.blocks = [(7 * i + 3) % num_blocks for i in range(CACHE_BLOCK // block_size)]
        if len(set(self.blocks)) < len(self.blocks):
            self.blocks = list(range(num_blocks))[-CACHE_BLOCK // block_size :]

    def read(self, num_tokens: int = CACHE_BLOCK) -> Bytes:
        out = np.full(self.io.tail_bytes(num_tokens), 0xAA, dtype=np.uint8)
        self.io.read_tail(self.blocks, num_tokens, out)
        return out

    def read_state(self, slot: int) -> Bytes:
        out = np.full(self.io.state_bytes, 0xAA, dtype=np.uint8)
        self.io.read_state(slot, out)
        return out


def values_of(num_bytes: int, dtype: torch.dtype, seed: int = 0) -> Bytes:
    generator = torch.Generator().manual_seed(seed)
    count = num_bytes // dtype.itemsize
    numbers = torch.randn(count, generator=generator).to(dtype)
    numbers[::97] = float("nan")  # bits are moved, not numbers
    numbers[::89] = -0.0
    found: Bytes = numbers.view(torch.uint8).numpy()
    return found


@pytest.mark.parametrize("name", available_ops())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_what_is_written_is_read_at_every_length(
    name: str, dtype: torch.dtype, block_size: int, config: ModelConfig
) -> None:
    pool = Pool(name, config, dtype, block_size)
    assert pool.io.kv_block_bytes == 2 * 2 * CACHE_BLOCK * 2 * 40 * dtype.itemsize
    values = values_of(pool.io.kv_block_bytes, dtype)
    pool.io.write_blocks(pool.blocks, values.tobytes())  # from read-only memory
    assert (pool.read() == values).all()
    whole = values.reshape(2, 2, CACHE_BLOCK, -1)
    for num_tokens in [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 120, 127]:
        part = np.ascontiguousarray(whole[:, :, :num_tokens])
        assert (pool.read(num_tokens) == part.ravel()).all()
        other = Pool(name, config, dtype, block_size)
        other.io.write_tail(other.blocks, num_tokens, memoryview(part.tobytes()))
        assert (other.read(num_tokens) == part.ravel()).all()
        behind = other.read().reshape(2, 2, CACHE_BLOCK, -1)[:, :, num_tokens:]
        assert not behind.any()  # nothing is written behind the tail


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_all_kernels_read_each_others_values(
    dtype: torch.dtype, block_size: int, config: ModelConfig
) -> None:
    """Through the kernels' own layouts: what an attention layer writes, not what an io writes."""
    pools = [Pool(name, config, dtype, block_size) for name in available_ops()]
    values = values_of(pools[0].io.kv_block_bytes, dtype)
    expected = values.reshape(2, 2, CACHE_BLOCK, -1)
    for pool in pools:
        pool.io.write_blocks(pool.blocks, values)
        assert (pool.read() == values).all()
        for layer, per_layer in zip(pool.layers[3::4], expected, strict=True):
            if isinstance(layer, TorchKv):
                slots = layer.slots_of(np.array(pool.blocks, np.int32), CACHE_BLOCK)
                for tensor, rows in zip((layer.k, layer.v), per_layer, strict=True):
                    found = tensor[slots].view(torch.uint8).numpy()
                    assert (found.reshape(CACHE_BLOCK, -1) == rows).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_states_are_float32_for_all_kernels(dtype: torch.dtype, config: ModelConfig) -> None:
    values = values_of(Pool("torch", config, dtype, 16).io.state_bytes, torch.float32)
    values.view(np.float32)[:] = np.nan_to_num(values.view(np.float32))
    # As bfloat16 activations leave it: numbers that bfloat16 holds.
    rounded = torch.from_numpy(values.view(np.float32)).bfloat16().float().numpy().view(np.uint8)
    for name in available_ops():
        pool = Pool(name, config, dtype, 16)
        for slot, source in ((2, rounded), (0, rounded.tobytes())):
            pool.io.write_state(slot, source)
            assert (pool.read_state(slot) == rounded).all()
        assert not pool.read_state(1).any()
        if pool.ops.activation_dtype == torch.float32:
            pool.io.write_state(1, values)
            assert (pool.read_state(1) == values).all()


@pytest.mark.parametrize("name", available_ops())
def test_a_buffer_of_another_size_is_refused(name: str, config: ModelConfig) -> None:
    pool = Pool(name, config, torch.float32, 16)
    with pytest.raises(ValueError, match="must have"):
        pool.io.read_blocks(pool.blocks, bytearray(pool.io.kv_block_bytes - 4))
    with pytest.raises(ValueError, match="must have"):
        pool.io.write_state(0, bytes(pool.io.state_bytes + 4))


@pytest.mark.parametrize("name", available_ops())
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_decoder_goes_on_from_copied_values(
    name: str, dtype: torch.dtype, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Prefill 200 tokens, copy block, tail and state elsewhere, and decode there: same logits."""
    from router.engine.batch import Chunk, build_batch
    from tests.parity.oracle import make_decoder

    path = make_checkpoint(tmp_path_factory.mktemp("checkpoint"), text_only=True)
    decoder = make_decoder(path, choose_ops(dtype, torch.device("cpu"), name), dtype)
    ids = np.random.default_rng(5).integers(0, 512, 203).tolist()

    def step(caches: Any, table: list[int], slot: int, start: int, stop: int) -> Tensor:
        chunk = Chunk(
            token_ids=ids[start:stop], context_len=start, block_table=table, state_slot=slot
        )
        return decoder.forward(build_batch([chunk]), caches)

    source, target = decoder.allocate_caches(16, 16, 2), decoder.allocate_caches(8, 32, 4)
    from_io, to_io = decoder.cache_io(source), decoder.cache_io(target)
    here, there = list(range(13)), [6, 0, 5, 1, 4, 2, 3]
    step(source, here, 1, 0, 200)
    block, tail = bytearray(from_io.kv_block_bytes), bytearray(from_io.tail_bytes(72))
    state = bytearray(from_io.state_bytes)
    from_io.read_blocks(here[:8], block)
    from_io.read_tail(here[8:], 72, tail)
    from_io.read_state(1, state)
    to_io.write_blocks(there[:4], block)
    to_io.write_tail(there[4:], 72, tail)
    to_io.write_state(3, state)
    for position in range(200, 203):
        expected = step(source, here, 1, position, position + 1)
        assert step(target, there, 3, position, position + 1).equal(expected)
