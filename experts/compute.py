"""How a group computes its resident experts: one protocol, two fast implementations.

`NativeCompute` runs our C++ kernels (CPU), `DeepSpeedCompute` runs
`deepspeed.moe.ep_experts.GroupedExperts` on whatever device `deepspeed.accelerator` found;
`reference.ReferenceCompute` is their slow twin. `compute_choice.py` picks one by measurement. All
of them keep experts in *slots* of one array per layer, so residency is bookkeeping (`SlotMap`) and
true counts go to the kernels, never padded ones.

Combine modes. SLOTS answers each pair's unweighted output in the rows' dtype; the router weighs and
sums in top-k order, so bits do not depend on the placement. PARTIAL answers a float32 weighted sum
per row: its bits depend on which experts share a group. Measured on bench-large's shape (H 1024,
top-8, bfloat16; `tests/benchmarks/combine_modes.py`): with 2 groups PARTIAL halves the answers (512
rows: 8.0 -> 4.0 MiB), with 4 it saves a tenth (7.2 MiB); the groups' own time is the same within
noise; the router's merge in torch is 0.01 ms slower with SLOTS at 1 row, 0.3 ms at 64, 3.4 ms of 32
at 512 (best of 15, 2 groups). Decode does not notice; so SLOTS, the exact one, is the default.

Dimension letters: R rows, P pairs, H hidden, I intermediate, S slots.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from experts import device
from experts.native.kernels import ExpertBank, Kernels
from protos.codec import Combine
from protos.errors import ResourceError

NOT_RESIDENT = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertShape:
    """What all experts of a model have in common."""

    num_layers: int
    num_experts: int
    hidden_size: int
    intermediate_size: int
    dtype: torch.dtype

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert."""
        return 3 * self.hidden_size * self.intermediate_size * self.dtype.itemsize


class NotResidentError(LookupError):
    """A pair names an expert that has no slot in this layer."""

    def __init__(self, layer_id: int, expert_id: int) -> None:
        super().__init__(f"layer {layer_id} expert {expert_id} is not resident")
        self.layer_id = layer_id
        self.expert_id = expert_id


class ExpertCompute(Protocol):
    """Resident experts and a pure function over them.

    `reserve`, `load` and `drop` may run beside `forward` of other layers, and of the same layer as
    long as the caller keeps `drop` and `forward` apart: an expert is visible only once its slot is
    full.
    """

    name: str
    """native-avx512bf16, native-avx2, deepspeed or torch."""

    def reserve(self, layer_id: int, num_slots: int) -> None:
        """Make room for `num_slots` experts of a layer in all; never less than before."""

    def load(
        self, layer_id: int, expert_id: int, gate_up: torch.Tensor, down: torch.Tensor
    ) -> None:
        """Copy one expert, `gate_up [2I, H]` and `down [H, I]`, into a free slot."""

    def drop(self, layer_id: int, expert_id: int) -> None:
        """Forget an expert; its slot is free for another."""

    def forward(
        self,
        layer_id: int,
        rows: torch.Tensor,
        pair_row: torch.Tensor,
        pair_expert: torch.Tensor,
        pair_weight: torch.Tensor | None,
        combine: Combine,
    ) -> torch.Tensor:
        """Compute the pairs of one layer on CPU tensors.

        Args:
            layer_id: Transformer layer.
            rows: `[R, H]` in the compute's dtype.
            pair_row: `[P]` int32 in `[0, R)`.
            pair_expert: `[P]` int32 in `[0, num_experts)`.
            pair_weight: `[P]` float32, for PARTIAL.
            combine: SLOTS or PARTIAL.

        Returns:
            SLOTS: `[P, H]` in the rows' dtype, pair p's unweighted output. PARTIAL: `[R, H]`
            float32, each row's weighted sum in pair order.

        Raises:
            NotResidentError: An expert has no slot.
        """

    def residents(self, layer_id: int) -> list[int]:
        """Return the layer's resident experts, ascending."""

    @property
    def resident_bytes(self) -> int:
        """Bytes of all resident experts."""


class SlotMap:
    """Which slot of one layer holds which expert."""

    def __init__(self, layer_id: int, num_experts: int) -> None:
        self._layer_id = layer_id
        self._slot_of = np.full(num_experts, NOT_RESIDENT, np.int32)
        self._free: list[int] = []
        self.num_slots = 0

    def grow(self, num_slots: int) -> None:
        """Add free slots up to `num_slots`."""
        self._free = [*range(num_slots - 1, self.num_slots - 1, -1), *self._free]
        self.num_slots = max(self.num_slots, num_slots)

    def take(self, expert_id: int) -> int:
        """Return the slot to fill for an expert: its own, or the lowest free one."""
        if self._slot_of[expert_id] != NOT_RESIDENT:
            return int(self._slot_of[expert_id])
        if not self._free:
            raise ResourceError(
                f"slots in layer {self._layer_id}",
                need=str(self.num_slots + 1),
                have=str(self.num_slots),
                hint="reserve() before load()",
            )
        return self._free.pop()

    def publish(self, expert_id: int, slot: int) -> None:
        """Let lookups see the expert in the slot that now holds it."""
        self._slot_of[expert_id] = slot

    def release(self, expert_id: int) -> int:
        """Free the expert's slot and return it."""
        slot = int(self._slot_of[expert_id])
        if slot == NOT_RESIDENT:
            raise NotResidentError(self._layer_id, expert_id)
        self._slot_of[expert_id] = NOT_RESIDENT
        self._free.append(slot)
        return slot

    def slots_of(self, expert_ids: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """Return each pair's slot.

        Raises:
            NotResidentError: Names the first expert without one.
        """
        slots = self._slot_of[expert_ids]
        if slots.size and slots.min() < 0:
            raise NotResidentError(self._layer_id, int(expert_ids[int(np.argmax(slots < 0))]))
        return slots

    @property
    def table(self) -> npt.NDArray[np.int32]:
        """The live table expert -> slot, `NOT_RESIDENT` where there is none; never reallocated."""
        return self._slot_of

    def residents(self) -> list[int]:
        """Return the resident experts, ascending."""
        return np.flatnonzero(self._slot_of != NOT_RESIDENT).tolist()


class NativeCompute:
    """Our C++ kernels. A row's bits never depend on other rows, thread count or residency."""

    def __init__(self, shape: ExpertShape, kernels: Kernels) -> None:
        self.name = f"native-{kernels.isa}"
        self.kernels = kernels
        self._shape = shape
        self._banks: dict[int, ExpertBank] = {}
        self._slots: dict[int, SlotMap] = {}

    def reserve(self, layer_id: int, num_slots: int) -> None:
        """Reserve address space for every logical expert; pages of empty slots stay unused."""
        if layer_id in self._banks or num_slots == 0:
            return
        shape = self._shape
        self._banks[layer_id] = self.kernels.new_expert_bank(
            shape.num_experts, shape.hidden_size, shape.intermediate_size, shape.dtype
        )
        slots = SlotMap(layer_id, shape.num_experts)
        slots.grow(shape.num_experts)
        self._slots[layer_id] = slots

    def load(
        self, layer_id: int, expert_id: int, gate_up: torch.Tensor, down: torch.Tensor
    ) -> None:
        """Pack one expert into a free slot."""
        slot = self._slots[layer_id].take(expert_id)
        self.kernels.fill_slot(self._banks[layer_id], slot, gate_up, down)
        self._slots[layer_id].publish(expert_id, slot)

    def drop(self, layer_id: int, expert_id: int) -> None:
        """Free an expert's slot, and its memory."""
        slot = _slots_of_layer(self._slots, layer_id, expert_id).release(expert_id)
        self.kernels.empty_slot(self._banks[layer_id], slot)

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
        if not len(pair_row):
            return _no_pairs(rows, combine)
        experts = pair_expert.numpy()
        slots = _slots_of_layer(self._slots, layer_id, int(experts[0])).slots_of(experts)
        if combine == Combine.SLOTS:
            out = torch.empty((len(slots), rows.shape[1]), dtype=rows.dtype)
        else:
            out = torch.empty(rows.shape, dtype=torch.float32)
        self.kernels.experts_forward(
            self._banks[layer_id],
            rows,
            pair_row,
            torch.from_numpy(slots),
            pair_weight,
            combine,
            out,
        )
        self.kernels.park()  # the next call is a round trip away: leave the cores to the router
        return out

    def layers(self) -> Iterator[tuple[int, ExpertBank, npt.NDArray[np.int32]]]:
        """Yield `(layer_id, bank, table expert -> slot)` of every reserved layer."""
        for layer_id, bank in self._banks.items():
            yield layer_id, bank, self._slots[layer_id].table

    def residents(self, layer_id: int) -> list[int]:
        """Return the layer's resident experts, ascending."""
        return self._slots[layer_id].residents() if layer_id in self._slots else []

    @property
    def resident_bytes(self) -> int:
        """Bytes of the filled slots."""
        return sum(
            len(slots.residents()) * self._banks[layer_id].slot_bytes
            for layer_id, slots in self._slots.items()
        )


class DeepSpeedCompute:
    """`GroupedExperts` as one slot array per layer, on the accelerator's device.

    `use_grouped_mm` is decided by measurement (`compute_choice.py`): the loop touches hit experts
    only but pays for each slot in Python, grouped_mm pays once. Both give the same bits on
    a CPU at the shapes of real models; at 48x40 in float32 their last bits differ.
    """

    def __init__(self, shape: ExpertShape, *, use_grouped_mm: bool) -> None:
        device.require_deepspeed()
        self.name = "deepspeed"
        self.use_grouped_mm = use_grouped_mm
        self._shape = shape
        self._device = device.current_device()
        self._layers: dict[int, Any] = {}
        self._slots: dict[int, SlotMap] = {}

    def reserve(self, layer_id: int, num_slots: int) -> None:
        """Allocate the slot array, or a larger one with the same experts in the same slots."""
        old = self._layers.get(layer_id)
        if num_slots <= (old.num_experts if old is not None else 0):
            return
        new = self._new_layer(num_slots)
        if old is not None:
            for name, weight in old.named_parameters():
                getattr(new, name).data[: old.num_experts].copy_(weight.data)
        self._layers[layer_id] = new
        slots = self._slots.setdefault(layer_id, SlotMap(layer_id, self._shape.num_experts))
        slots.grow(num_slots)

    def load(
        self, layer_id: int, expert_id: int, gate_up: torch.Tensor, down: torch.Tensor
    ) -> None:
        """Copy one expert into a free slot."""
        inter = self._shape.intermediate_size
        layer = self._layers[layer_id]
        slot = self._slots[layer_id].take(expert_id)
        layer.w1.data[slot].copy_(gate_up[:inter])
        layer.w3.data[slot].copy_(gate_up[inter:])
        layer.w2.data[slot].copy_(down)
        device.synchronize()
        self._slots[layer_id].publish(expert_id, slot)

    def drop(self, layer_id: int, expert_id: int) -> None:
        """Free an expert's slot."""
        _slots_of_layer(self._slots, layer_id, expert_id).release(expert_id)

    def forward(
        self,
        layer_id: int,
        rows: torch.Tensor,
        pair_row: torch.Tensor,
        pair_expert: torch.Tensor,
        pair_weight: torch.Tensor | None,
        combine: Combine,
    ) -> torch.Tensor:
        """Sort the pairs by slot, run the grouped GEMMs, and put the outputs back in pair order."""
        if not len(pair_row):
            return _no_pairs(rows, combine)
        experts = pair_expert.numpy()
        slot_map = _slots_of_layer(self._slots, layer_id, int(experts[0]))
        slots = slot_map.slots_of(experts)
        order = torch.from_numpy(np.argsort(slots, kind="stable"))
        counts = torch.from_numpy(np.bincount(slots, minlength=slot_map.num_slots).astype(np.int32))
        sorted_rows = rows.index_select(0, pair_row[order]).to(self._device)
        layer = self._layers[layer_id]
        sorted_out = layer(sorted_rows, counts.to(self._device)).cpu()
        out = torch.empty_like(sorted_out)
        out[order] = sorted_out
        if combine == Combine.SLOTS:
            return out
        return weighted_sum(out, pair_row, pair_weight, rows.shape[0])

    def residents(self, layer_id: int) -> list[int]:
        """Return the layer's resident experts, ascending."""
        return self._slots[layer_id].residents() if layer_id in self._slots else []

    @property
    def resident_bytes(self) -> int:
        """Bytes of the resident experts."""
        count = sum(len(slots.residents()) for slots in self._slots.values())
        return count * self._shape.expert_bytes

    def _new_layer(self, num_slots: int) -> Any:
        from deepspeed.moe.ep_experts import GroupedExperts

        shape = self._shape
        with torch.device("meta"):
            layer = GroupedExperts(
                shape.hidden_size,
                shape.intermediate_size,
                num_slots,
                use_grouped_mm=self.use_grouped_mm,
            )
        # Not `to_empty`: `empty_like` of a meta tensor imports sympy, 0.4 s and 40 MB.
        for name, empty in list(layer.named_parameters()):
            weight = torch.empty(empty.shape, dtype=shape.dtype, device=self._device)
            layer.register_parameter(name, torch.nn.Parameter(weight, requires_grad=False))
        return layer


def weighted_sum(
    slots: torch.Tensor,
    pair_row: torch.Tensor,
    pair_weight: torch.Tensor | None,
    num_rows: int,
) -> torch.Tensor:
    """Sum each row's pairs in float32 and in pair order.

    Args:
        slots: `[P, H]` pair outputs.
        pair_row: `[P]` int32.
        pair_weight: `[P]` float32; None counts as 1.
        num_rows: R.

    Returns:
        `[R, H]` float32.
    """
    weighted = slots.float()
    if pair_weight is not None:
        weighted = weighted * pair_weight[:, None]
    row_of = pair_row.numpy()
    order = np.argsort(row_of, kind="stable")
    sorted_rows = row_of[order]
    rank = np.empty(len(order), np.int64)  # how many pairs of the same row come before
    rank[order] = np.arange(len(order)) - np.searchsorted(sorted_rows, sorted_rows)
    out = torch.zeros((num_rows, slots.shape[1]), dtype=torch.float32)
    for turn in range(int(rank.max(initial=-1)) + 1):
        pairs = torch.from_numpy(np.flatnonzero(rank == turn))
        out[pair_row[pairs]] += weighted[pairs]
    return out


def _no_pairs(rows: torch.Tensor, combine: Combine) -> torch.Tensor:
    if combine == Combine.SLOTS:
        return rows.new_empty(0, rows.shape[1])
    return torch.zeros(rows.shape, dtype=torch.float32)


def _slots_of_layer(slots: dict[int, SlotMap], layer_id: int, expert_id: int) -> SlotMap:
    found = slots.get(layer_id)
    if found is None:
        raise NotResidentError(layer_id, expert_id)
    return found
