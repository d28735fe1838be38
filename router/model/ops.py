"""The seam between the trunk's structure and its kernels.

`decoder.py`, `attention.py`, `gated_delta_net.py` and `moe.py` say which projection follows which
norm; an `Ops` says how one of these steps is computed. There are two: `torch_ops.TorchOps` (any
device and dtype; the slow twin) and `native_ops.NativeOps` (CPU, fused C++ kernels). Both pass the
same parity tests.

Conventions, so that a step is one call without views or casts around it:
- activations are `[T, width]`, contiguous, in `Ops.activation_dtype`, unless said otherwise;
- norm weights, the conv weight and the Gated DeltaNet vectors are float32 and contiguous, whatever
  the model's dtype;
- what belongs to one ops (`LinearWeight`, `KvLayer`, `step`) is `Any` where it comes back as
  argument;
- per-step metadata is made once, by `begin_step`, and handed to every layer as `step`;
- an op may return a buffer that it overwrites at its next call only if nothing in this file's order
  of calls can still hold the old one. When in doubt, a fresh tensor.

Legend: T tokens, S sequences, D hidden, Hq/Hkv query/KV heads, Hk/Hv key/value heads of the Gated
DeltaNet, dk/dv their sizes, C = 2*Hk*dk + Hv*dv conv channels, E experts, K top-k, F intermediate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from protos.errors import ConfigurationError
from router.engine.batch import Batch


class LinearWeight(Protocol):
    """A weight as `Ops.prepare_linear` packed it; only the ops that packed it can read it."""

    @property
    def out_features(self) -> int:
        """N, the width of the result."""
        ...


class KvLayer(Protocol):
    """The paged K and V of one full-attention layer; the layout belongs to the ops that allocated
    it."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all its blocks."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class GdnParams:
    """What a Gated DeltaNet layer needs besides its two projections. Tensors: float32,
    contiguous."""

    conv_weight: Tensor
    """`[C, conv_kernel]`: depthwise, causal, no bias; the last tap meets the newest token."""

    decay: Tensor
    """`[Hv]`: `-exp(A_log)`, made once at load; the log decay is `g = decay * softplus(a +
    dt_bias)`."""

    dt_bias: Tensor
    """`[Hv]`."""

    norm_weight: Tensor
    """`[dv]`: plain (not zero-centred) scale of the gated norm."""

    num_key_heads: int
    num_value_heads: int
    """Key head h serves the value heads `h*r .. h*r + r - 1`, r = num_value_heads /
    num_key_heads."""

    key_head_dim: int
    value_head_dim: int
    conv_kernel: int
    eps: float
    """Epsilon of the gated norm. The L2 norm of q and k uses `L2_EPS`."""


L2_EPS = 1e-6
"""`x * rsqrt(sum(x*x) + L2_EPS)`, as flash-linear-attention and transformers have it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GdnState:
    """Conv and recurrent state of one Gated DeltaNet layer, all state slots."""

    conv: Tensor
    """`[slots, C, conv_kernel - 1]` in `Ops.activation_dtype`: the inputs (before the conv) of the
    last tokens, oldest first."""

    recurrent: Tensor
    """`[slots, Hv, dk, dv]` float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionParams:
    """What a full-attention layer needs besides its two projections. Tensors: float32,
    contiguous."""

    q_norm: Tensor
    """`[head_dim]`: zero-centred per-head RMS norm of the queries."""

    k_norm: Tensor
    """`[head_dim]`: zero-centred per-head RMS norm of the keys."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    """The first `rotary_dim` components of a head are rotated: pair i is (i, i + rotary_dim/2)."""

    scale: float
    """`head_dim ** -0.5`."""

    eps: float


class Ops(Protocol):
    """The trunk's kernels."""

    name: str
    """"torch", "native"."""

    activation_dtype: torch.dtype
    """float32 for NativeOps (rounded to bfloat16 only as input of a matrix product), the model's
    dtype for TorchOps."""

    device: torch.device

    def prepare_linear(self, weight: Tensor) -> LinearWeight:
        """Pack a weight `[N, K]`. The ops keeps what it needs; the caller drops `weight`.

        Args:
            weight: Model dtype; float32 for the gate, whose logits must not be rounded to bfloat16
                (the weight itself may be).
        """
        ...

    def begin_step(self, batch: Batch) -> Any:
        """Make what all layers of this step share, once. The result is passed as `step`; it may be
        the batch itself."""
        ...

    def linear(self, x: Tensor, weight: Any) -> Tensor:
        """`x [T, K] @ weight.T` -> `[T, N]`, activation dtype."""
        ...

    def embed(self, token_ids: Tensor, weight: Tensor) -> Tensor:
        """Rows of `weight [vocab, D]` (model dtype) -> a fresh `[T, D]`, activation dtype. Ids were
        validated."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Zero-centred: `x / rms(x) * (1 + weight)`, computed in float32."""
        ...

    def add_rms_norm(self, residual: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
        """`residual += delta` in place, then `rms_norm(residual, weight, eps)`."""
        ...

    def gated_delta_net(
        self, mixed: Tensor, params: GdnParams, state: GdnState, step: Any
    ) -> Tensor:
        """Mix tokens through the recurrent state, from the fused input projection to the gated
        norm.

        Per sequence: causal depthwise conv over (conv state, qkv), SiLU; L2 norm of q and k, q
        scaled by dk**-0.5; `beta = sigmoid(b)`, `g = decay * softplus(a + dt_bias)` in float32; per
        token and value head `S = exp(g) S; S += k (beta (v - S^T k))^T; o = S^T q`; `o / rms(o) *
        norm_weight * silu(z)`. State slots of the batch are updated; a sequence with `context_len`
        0 starts from zero.

        Args:
            mixed: `[T, C + Hv*dv + 2*Hv]` = concat(q, k, v, z, b, a).

        Returns:
            `[T, Hv*dv]`.
        """
        ...

    def attention(
        self, qkv: Tensor, params: AttentionParams, cos_sin: Tensor, kv: Any, step: Any
    ) -> Tensor:
        """Attend causally over the paged past, from the fused projection to the output gate.

        Per-head RMS norm of q and k, rotary, write of k and v into the blocks, softmax(q k^T *
        scale) v with float32 scores, `* sigmoid(gate)`. A batch with a cold past attends to that
        first, section by section.

        Args:
            qkv: `[T, 2*Hq*hd + 2*Hkv*hd]`: per query head (q, gate), then k, then v.
            cos_sin: float32 `[T, rotary_dim]`, row t for token t (not a table to index by
            position): cos of the
                rotary_dim/2 angles, then sin.

        Returns:
            `[T, Hq*hd]`.
        """
        ...

    def allocate_kv(
        self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> KvLayer:
        """Allocate the blocks of one layer; `dtype` is what K and V are rounded to."""
        ...

    def read_kv(
        self,
        layers: Sequence[Any],
        blocks: NDArray[np.int32],
        num_tokens: int,
        out: NDArray[np.uint8],
    ) -> None:
        """Copy K `[num_tokens, Hkv, hd]`, then V alike, out of the blocks of one sequence, layer by
        layer.

        Args:
            layers: At least one, allocated alike.
            blocks: The blocks of the `num_tokens` tokens, in order; the first token is at the begin
                of the first block.
            num_tokens: At least one.
            out: The bytes of all, in the KV dtype.
        """
        ...

    def write_kv(
        self,
        layers: Sequence[Any],
        blocks: NDArray[np.int32],
        num_tokens: int,
        values: NDArray[np.uint8],
    ) -> None:
        """Copy what `read_kv` gave, bit for bit, into blocks. `values` may be read-only."""
        ...

    def swiglu(self, gate_up: Tensor, intermediate_size: int) -> Tensor:
        """`silu(gate_up[:, :F]) * gate_up[:, F:2F]` -> `[T, F]`; columns behind 2F are ignored."""
        ...

    def gate_topk(self, logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """Choose experts: softmax in float32 over all E, top-k (ties to the lower id), renormalise.

        Args:
            logits: `[T, E]`.
            top_k: K.

        Returns:
            `topk_ids` int32 `[T, K]` by falling probability, `topk_weights` float32 `[T, K]`, rows
            sum to 1.
        """
        ...

    def add_shared(self, routed: Tensor, shared: Tensor, gate: Tensor) -> Tensor:
        """`routed + sigmoid(gate) * shared` -> `[T, D]`, activation dtype. May overwrite `routed`.

        Args:
            routed: float32 `[T, D]`.
            shared: `[T, D]`.
            gate: `[T, G]`; only its last column is read (so the fused gate-up projection can be
            handed over whole).
        """
        ...


def choose_ops(dtype: torch.dtype, device: torch.device, name: str = "auto") -> Ops:
    """Choose the kernels for a device; they log what they are.

    Args:
        dtype: Of the model's matrices.
        device: Where the trunk runs.
        name: `torch`, `native`, or `auto`: native on a CPU for which kernels were built.

    Raises:
        ConfigurationError: An unknown name, or `native` where it cannot be.
    """
    if name not in ("auto", "torch", "native"):
        raise ConfigurationError("ops", "must be auto, torch or native", name)
    # The two are imported here: both import this file, and nobody loads the one not chosen.
    if name != "torch" and device.type == "cpu":
        from experts.native.kernels import load_kernels

        kernels = load_kernels()
        if kernels is not None:
            from router.model.native_ops import NativeOps

            return NativeOps(kernels, dtype)
    if name == "native":
        rule = f"cannot be native on {device.type}: no kernels, see python -m experts.native.build"
        raise ConfigurationError("ops", rule, name)
    from router.model.torch_ops import TorchOps

    return TorchOps(dtype, device)
