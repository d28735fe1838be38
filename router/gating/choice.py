"""Which copy of an expert serves a router's rows.

Pure: placement in, table out. Today the first copy serves; the table is made once per placement, so
    a smarter choice costs the step nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from experts.placement import Placement


def first_copies(placement: Placement) -> Tensor:
    """Return the group index that serves each expert, int32 `[num_layers, num_experts]`; -1 where
    no group holds it.

    The index counts in `placement.groups`; of several copies the one listed first is taken.
    """
    table = torch.full((placement.num_layers, placement.num_experts), -1, dtype=torch.int32)
    for index in reversed(range(len(placement.groups))):
        for layer_id, expert_ids in placement.experts_of(placement.groups[index]).items():
            table[layer_id, list(expert_ids)] = index
    return table
