"""The slow, obvious twin of every expert kernel: a loop over token-expert pairs, one row at a time.

Decides what the right answer is. Rounds to the rows' dtype where transformers does: after each
projection and after the activation. Fast paths keep more in float32 and agree to rounding; among
themselves they are compared bit for bit.

Source: `Qwen3_5MoeExperts.forward` of transformers 5.23.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from experts.compute import NotResidentError
from protos.codec import Combine


def expert_forward(row: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """Apply one expert to one row: `down @ (silu(gate @ x) * (up @ x))`.

    Args:
        row: `[hidden]`.
        gate_up: `[2 * intermediate, hidden]`, gate above up.
        down: `[hidden, intermediate]`.

    Returns:
        `[hidden]` in the row's dtype.
    """
    gate, up = F.linear(row, gate_up).chunk(2)
    return F.linear(F.silu(gate) * up, down)


def experts_forward(
    rows: torch.Tensor,
    pair_row: torch.Tensor,
    pair_expert: torch.Tensor,
    pair_weight: torch.Tensor | None,
    weights: dict[int, tuple[torch.Tensor, torch.Tensor]],
    combine: Combine,
) -> torch.Tensor:
    """Compute all pairs of one layer, in pair order.

    Args:
        rows: `[R, hidden]`.
        pair_row: `[P]` int32, the row of each pair.
        pair_expert: `[P]` int32, its expert.
        pair_weight: `[P]` float32; used by PARTIAL only.
        weights: `(gate_up, down)` of each expert.
        combine: What to return.

    Returns:
        SLOTS: `[P, hidden]` in the rows' dtype, unweighted. PARTIAL: `[R, hidden]` float32.
    """
    slots = rows.new_empty(len(pair_row), rows.shape[1])
    for pair, (row_idx, expert_id) in enumerate(
        zip(pair_row.tolist(), pair_expert.tolist(), strict=True)
    ):
        slots[pair] = expert_forward(rows[row_idx], *weights[expert_id])
    if combine == Combine.SLOTS:
        return slots
    assert pair_weight is not None
    partial = torch.zeros(rows.shape, dtype=torch.float32, device=rows.device)
    for pair, row_idx in enumerate(pair_row.tolist()):
        partial[row_idx] += pair_weight[pair] * slots[pair].float()
    return partial


class ReferenceCompute:
    """The reference behind the `ExpertCompute` protocol; weights stay as they were given."""

    name = "torch"

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._weights: dict[int, dict[int, tuple[torch.Tensor, torch.Tensor]]] = {}

    def reserve(self, layer_id: int, num_slots: int) -> None:
        """Do nothing: a dictionary has room."""

    def load(
        self, layer_id: int, expert_id: int, gate_up: torch.Tensor, down: torch.Tensor
    ) -> None:
        """Keep a copy of one expert."""
        weights = (gate_up.to(self._dtype, copy=True), down.to(self._dtype, copy=True))
        self._weights.setdefault(layer_id, {})[expert_id] = weights

    def drop(self, layer_id: int, expert_id: int) -> None:
        """Forget one expert."""
        if self._weights.get(layer_id, {}).pop(expert_id, None) is None:
            raise NotResidentError(layer_id, expert_id)

    def forward(
        self,
        layer_id: int,
        rows: torch.Tensor,
        pair_row: torch.Tensor,
        pair_expert: torch.Tensor,
        pair_weight: torch.Tensor | None,
        combine: Combine,
    ) -> torch.Tensor:
        """Compute the pairs; see `ExpertCompute.forward`."""
        weights = self._weights.get(layer_id, {})
        for expert_id in pair_expert.tolist():
            if expert_id not in weights:
                raise NotResidentError(layer_id, expert_id)
        return experts_forward(rows, pair_row, pair_expert, pair_weight, weights, combine)

    def residents(self, layer_id: int) -> list[int]:
        """Return the layer's resident experts, ascending."""
        return sorted(self._weights.get(layer_id, {}))

    @property
    def resident_bytes(self) -> int:
        """Bytes of all resident experts."""
        return sum(
            gate_up.nbytes + down.nbytes
            for layer in self._weights.values()
            for gate_up, down in layer.values()
        )
