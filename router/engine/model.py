"""What the engine needs of a model: steps, and access to what steps leave in the caches.

Knows neither layers nor kernels; `router.model` implements both protocols.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from router.engine.batch import Batch


class CacheIo(Protocol):
    """Reads and writes the pool's memory, all layers at once, as bytes in a canonical layout.

    The layout depends neither on the kernels nor on the block size, so a router reads what another
    one of the same model and dtype has written. Safe in any thread for blocks and slots that the
    caller owns; copies give up the interpreter lock.

    Buffers are contiguous bytes, such as a memoryview or a uint8 array, of exactly the stated size.
    """

    @property
    def kv_block_bytes(self) -> int:
        """Bytes of one cache block: 128 tokens of K and V of all full-attention layers."""
        ...

    @property
    def num_kv_layers(self) -> int:
        """Full-attention layers; a cache block is so many parts of equal size, in their order."""
        ...

    @property
    def state_bytes(self) -> int:
        """Bytes of one state slot: conv and recurrent state of all Gated DeltaNet layers."""
        ...

    @property
    def layout(self) -> Mapping[str, Any]:
        """What these bytes mean, as JSON values; part of a cached value's namespace."""
        ...

    def tail_bytes(self, num_tokens: int) -> int:
        """Return the bytes of K and V of `num_tokens` tokens."""
        ...

    def read_blocks(self, blocks: Sequence[int], out: Any) -> None:
        """Copy one cache block out of the engine's blocks that hold it, in order."""
        ...

    def write_blocks(self, blocks: Sequence[int], values: Any) -> None:
        """Copy one cache block into the engine's blocks."""
        ...

    def read_tail(self, blocks: Sequence[int], num_tokens: int, out: Any) -> None:
        """Copy the first `num_tokens` tokens, fewer than 128, out of a cache block's blocks."""
        ...

    def write_tail(self, blocks: Sequence[int], num_tokens: int, values: Any) -> None:
        """Copy the first `num_tokens` tokens into a cache block's blocks."""
        ...

    def read_state(self, slot: int, out: Any) -> None:
        """Copy a state slot out."""
        ...

    def write_state(self, slot: int, values: Any) -> None:
        """Copy into a state slot."""
        ...


class Model(Protocol):
    """What the engine needs of a model.

    Two more are used where there are any: a float attribute `dispatch_s`, the time it has spent
    waiting for experts; and `cache_io(caches) -> CacheIo`, without which no prefix is reused.
    """

    def allocate_caches(self, num_blocks: int, block_size: int, num_state_slots: int) -> Any:
        """Return the KV blocks and state slots of all layers."""
        ...

    def forward(self, batch: Batch, caches: Any) -> Tensor:
        """Compute a batch, update the caches, return the wanted logits, float32 `[L, vocab]`.

        The engine may change the logits in place. The batch's tensors are on the CPU and valid
        during the call.
        """
        ...
