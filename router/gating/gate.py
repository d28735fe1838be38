"""The gate of a MoE layer as plain mathematics, for callers outside the trunk
(`GatingService.Route`).

The trunk computes the same through `router.model.ops.Ops`; this is its slow twin and what a model
that runs elsewhere uses when it lets the router choose. Legend: T tokens, D hidden, E experts, K
top-k.
"""

from __future__ import annotations

import torch
from torch import Tensor


def choose_topk(logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Choose each token's experts as the model defines it.

    Softmax in float32 over all experts, the `top_k` largest (ties to the lower id), renormalised to
    sum 1.

    Args:
        logits_TE: Gate logits `[num_tokens, num_experts]`.
        top_k: Experts a token visits.

    Returns:
        `topk_ids` int32 `[num_tokens, top_k]` by falling probability and `topk_weights` float32 of
        the same shape.

    Source: Qwen3.5-MoE's top-k gate in transformers (softmax, top-k, renormalise).
    """
    probabilities = torch.softmax(logits_TE.float(), dim=-1)
    order = torch.sort(probabilities, dim=-1, descending=True, stable=True)
    weights, ids = order.values[:, :top_k], order.indices[:, :top_k]
    weights = weights / weights.sum(dim=-1, keepdim=True)
    return ids.to(torch.int32).contiguous(), weights.contiguous()


class Gate:
    """The gate weights of every MoE layer.

    Args:
        weights: layer_id -> `[num_experts, hidden]`, the checkpoint's dtype.
        top_k: Experts a token visits.
    """

    def __init__(self, weights: dict[int, Tensor], top_k: int) -> None:
        self.weights = weights
        self.top_k = top_k

    def __call__(self, layer_id: int, hidden_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Return `topk_ids` and `topk_weights` of the rows `hidden_TD [num_tokens, hidden]`.

        Raises:
            KeyError: `layer_id` has no gate.
        """
        weight = self.weights[layer_id]
        return choose_topk(
            torch.nn.functional.linear(hidden_TD.to(weight.dtype), weight), self.top_k
        )
