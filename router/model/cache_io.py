"""Cached values as bytes: KV blocks and state slots in and out of a decoder's caches.

Decides the canonical layout, which no kernel and no block size shows through:

    cache block, tail   per full-attention layer: K [tokens, kv_heads, head_dim], then V alike,
                        in the KV dtype
    state               per Gated DeltaNet layer: conv [channels, kernel - 1], then recurrent
                        [value_heads, key_dim, value_dim], float32 both

Layers in the model's order. The conv state is float32 even where a model keeps it in bfloat16:
kernels that keep it in float32 lose nothing by it, and it is a hundredth of the recurrent state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from router.engine.chain import CACHE_BLOCK
from router.model.config import ModelConfig
from router.model.ops import GdnState, KvLayer, Ops

Bytes = NDArray[np.uint8]


class DecoderCacheIo:
    """`router.engine.model.CacheIo` of one decoder's caches.

    Args:
        config: The model's sizes.
        ops: The kernels whose packing the caches have.
        kv_dtype: Of K and V.
        layers: The caches, layer by layer.
    """

    def __init__(
        self,
        config: ModelConfig,
        ops: Ops,
        kv_dtype: torch.dtype,
        layers: Sequence[KvLayer | GdnState],
    ) -> None:
        self._ops = ops
        self._kv = [layer for layer in layers if not isinstance(layer, GdnState)]
        self._states = [layer for layer in layers if isinstance(layer, GdnState)]
        self._token_bytes = 2 * config.num_kv_heads * config.head_dim * kv_dtype.itemsize
        """Of one layer."""
        self.state_bytes = sum(
            4 * (state.conv[0].numel() + state.recurrent[0].numel()) for state in self._states
        )
        self.layout: Mapping[str, Any] = {
            "layout": "layer,K|V,token,head,dim",
            "cache_block": CACHE_BLOCK,
            "kernels": ops.name,  # other kernels, other bits
            "kv_dtype": str(kv_dtype).removeprefix("torch."),
            "state_dtype": "float32",
            "layer_types": list(config.layer_types),
            "kv_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "conv_channels": config.conv_dim,
            "conv_kernel": config.conv_kernel,
            "linear_value_heads": config.linear_num_value_heads,
            "linear_key_dim": config.linear_key_head_dim,
            "linear_value_dim": config.linear_value_head_dim,
        }

    @property
    def num_kv_layers(self) -> int:
        """See `CacheIo.num_kv_layers`."""
        return len(self._kv)

    @property
    def kv_block_bytes(self) -> int:
        """See `CacheIo.kv_block_bytes`."""
        return self.tail_bytes(CACHE_BLOCK)

    def tail_bytes(self, num_tokens: int) -> int:
        """See `CacheIo.tail_bytes`."""
        return len(self._kv) * num_tokens * self._token_bytes

    def read_blocks(self, blocks: Sequence[int], out: Any) -> None:
        """See `CacheIo.read_blocks`."""
        self.read_tail(blocks, CACHE_BLOCK, out)

    def write_blocks(self, blocks: Sequence[int], values: Any) -> None:
        """See `CacheIo.write_blocks`."""
        self.write_tail(blocks, CACHE_BLOCK, values)

    def read_tail(self, blocks: Sequence[int], num_tokens: int, out: Any) -> None:
        """See `CacheIo.read_tail`."""
        whole = _bytes_of(out, self.tail_bytes(num_tokens))
        self._ops.read_kv(self._kv, np.array(blocks, dtype=np.int32), num_tokens, whole)

    def write_tail(self, blocks: Sequence[int], num_tokens: int, values: Any) -> None:
        """See `CacheIo.write_tail`."""
        whole = _bytes_of(values, self.tail_bytes(num_tokens))
        self._ops.write_kv(self._kv, np.array(blocks, dtype=np.int32), num_tokens, whole)

    def read_state(self, slot: int, out: Any) -> None:
        """See `CacheIo.read_state`."""
        for tensor, part in self._state_parts(slot, out):
            np.copyto(part, tensor.float().cpu().numpy())

    def write_state(self, slot: int, values: Any) -> None:
        """See `CacheIo.write_state`."""
        for tensor, part in self._state_parts(slot, values):
            if tensor.device.type == "cpu" and tensor.dtype == torch.float32:
                np.copyto(tensor.numpy(), part)
            else:
                tensor.copy_(torch.from_numpy(part.copy()))

    def _state_parts(self, slot: int, buffer: Any) -> list[tuple[Tensor, NDArray[np.float32]]]:
        """Pair a slot's tensors with their part of a buffer."""
        floats = _bytes_of(buffer, self.state_bytes).view(np.float32)
        pairs, start = [], 0
        for state in self._states:
            for tensor in (state.conv[slot], state.recurrent[slot]):
                stop = start + tensor.numel()
                pairs.append((tensor, floats[start:stop].reshape(tensor.shape)))
                start = stop
        return pairs


def _bytes_of(buffer: Any, num_bytes: int) -> Bytes:
    array = np.frombuffer(buffer, dtype=np.uint8)
    if array.nbytes != num_bytes:
        raise ValueError(f"the buffer must have {num_bytes} bytes, got {array.nbytes}")
    return array
