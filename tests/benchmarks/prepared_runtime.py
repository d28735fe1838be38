"""An expert group without expert work: the real runtime around experts of intermediate width 0.

They multiply nothing and their outputs are zeros, so the native kernels, where there are some, sort
the pairs and write the result: all that a group does beside its products. Without native kernels a
compute whose result is ready takes their place.
"""

from __future__ import annotations

from typing import Any

import torch

from experts.compute import ExpertCompute, ExpertShape, NativeCompute
from experts.group_state import GroupState
from experts.native.kernels import load_kernels
from experts.placement import Placement
from experts.runtime import ExpertRuntime
from protos.codec import Combine

MAX_PAIRS = 4096


class PreparedCompute:
    """Answers every forward with the same numbers, of the right shape."""

    name = "prepared"
    resident_bytes = 0

    def __init__(self, hidden: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self._slots = torch.randn(MAX_PAIRS, hidden, generator=generator).bfloat16()
        self._partial = self._slots.float()

    def forward(
        self,
        layer_id: int,
        rows: torch.Tensor,
        pair_row: torch.Tensor,
        pair_expert: torch.Tensor,
        pair_weight: torch.Tensor | None,
        combine: Combine,
    ) -> torch.Tensor:
        """See `ExpertCompute.forward`; computes nothing."""
        if combine is Combine.SLOTS:
            return self._slots[: pair_row.shape[0]]
        return self._partial[: rows.shape[0]]

    def residents(self, layer_id: int) -> list[int]:
        """See `ExpertCompute.residents`."""
        return []


class PreparedRuntime(ExpertRuntime):
    """A runtime that is READY without a checkpoint."""

    def __init__(self, group_id: str, placement: Placement, hidden: int) -> None:
        super().__init__(group_id=group_id, checkpoint="", dtype="bfloat16")
        shape = ExpertShape(
            num_layers=placement.num_layers,
            num_experts=placement.num_experts,
            hidden_size=hidden,
            intermediate_size=0,
            dtype=torch.bfloat16,
        )
        self.adopt(shape, _compute(shape, placement, group_id), placement.epoch)
        self._enter(GroupState.READY)


def _compute(shape: ExpertShape, placement: Placement, group_id: str) -> ExpertCompute:
    kernels = load_kernels()
    if kernels is None:
        prepared: Any = PreparedCompute(shape.hidden_size)
        return prepared
    compute = NativeCompute(shape, kernels)
    gate_up = torch.empty(0, shape.hidden_size, dtype=shape.dtype)
    down = torch.empty(shape.hidden_size, 0, dtype=shape.dtype)
    for layer_id, expert_ids in placement.experts_of(group_id).items():
        compute.reserve(layer_id, len(expert_ids))
        for expert_id in expert_ids:
            compute.load(layer_id, expert_id, gate_up, down)
    return compute


def make_prepared_runtime(group_id: str, placement_json: str, hidden: int) -> ExpertRuntime:
    """Return a runtime for `GroupPool.serve_runtimes`."""
    torch.set_num_threads(1)
    return PreparedRuntime(group_id, Placement.from_json(placement_json), hidden)
