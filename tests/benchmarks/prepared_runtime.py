"""An expert group without experts: the real runtime around a kernel whose result is ready."""

from __future__ import annotations

from typing import Any

import torch

from experts.compute import ExpertShape
from experts.group_state import GroupState
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
        compute: Any = PreparedCompute(hidden)
        shape = ExpertShape(
            num_layers=placement.num_layers,
            num_experts=placement.num_experts,
            hidden_size=hidden,
            intermediate_size=1,
            dtype=torch.bfloat16,
        )
        self.adopt(shape, compute, placement.epoch)
        self._enter(GroupState.READY)


def make_prepared_runtime(group_id: str, placement_json: str, hidden: int) -> ExpertRuntime:
    """Return a runtime for `GroupPool.serve_runtimes`."""
    torch.set_num_threads(1)
    return PreparedRuntime(group_id, Placement.from_json(placement_json), hidden)
