"""The feed-forward half of a layer: a mixture of experts, or a dense MLP.

The order inside a MoE layer hides the shared expert behind the wire: gate, top-k, send; compute the
shared expert; wait for the routed ones; merge.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from router.model.ops import Ops
from router.model.weights import DenseWeights, MoeWeights


class Experts(Protocol):
    """The routed experts, wherever they are (`router.gating.dispatch.ExpertDispatcher`)."""

    def dispatch(self, layer_id: int, rows: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Any:
        """Send the rows `[T, D]` to the experts in `topk_ids` int32 `[T, K]`; do not wait."""
        ...

    def combine(self, handle: Any) -> Tensor:
        """Wait; return the weighted sums, float32 `[T, D]`."""
        ...


class HostExperts:
    """Experts for a trunk on an accelerator: rows go through host memory."""

    def __init__(self, experts: Experts, device: torch.device) -> None:
        self._experts = experts
        self._device = device

    def dispatch(self, layer_id: int, rows: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Any:
        """See `Experts.dispatch`."""
        return self._experts.dispatch(layer_id, rows.cpu(), topk_ids.cpu(), topk_weights.cpu())

    def combine(self, handle: Any) -> Tensor:
        """See `Experts.combine`."""
        return self._experts.combine(handle).to(self._device)


class MoeLayer:
    """Routed experts and the shared one."""

    __slots__ = ("_experts", "_layer_id", "_ops", "_shared_size", "_top_k", "_weights")

    def __init__(
        self,
        layer_id: int,
        weights: MoeWeights,
        ops: Ops,
        experts: Experts,
        top_k: int,
    ) -> None:
        self._layer_id = layer_id
        self._weights = weights
        self._ops = ops
        self._experts = experts
        self._top_k = top_k
        self._shared_size = (weights.shared_in.out_features - 1) // 2

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return `[T, D]`, to be added to the residual."""
        ops, weights, experts = self._ops, self._weights, self._experts
        topk_ids_TK, topk_weights_TK = ops.gate_topk(ops.linear(x_TD, weights.gate), self._top_k)
        handle = experts.dispatch(self._layer_id, x_TD, topk_ids_TK, topk_weights_TK)
        shared_in = ops.linear(x_TD, weights.shared_in)  # gate, up, and the scalar gate behind them
        shared_TD = ops.linear(ops.swiglu(shared_in, self._shared_size), weights.shared_out)
        return ops.add_shared(experts.combine(handle), shared_TD, shared_in)


class DenseLayer:
    """A SwiGLU MLP."""

    __slots__ = ("_ops", "_size", "_weights")

    def __init__(self, weights: DenseWeights, ops: Ops) -> None:
        self._weights = weights
        self._ops = ops
        self._size = weights.gate_up.out_features // 2

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return `[T, D]`, to be added to the residual."""
        ops, weights = self._ops, self._weights
        return ops.linear(ops.swiglu(ops.linear(x_TD, weights.gate_up), self._size), weights.down)
