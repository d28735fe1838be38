"""Which expert groups hold which logical experts: an immutable map with a monotone version, the
epoch.

Decides how a placement is represented and when it is well formed. It does not decide where an
expert should live (that is `planner.py`), nor which of several copies to ask (that is the
router's).

Dimension letters: L layers, E logical experts, C copies of an expert at most.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from protos.errors import ConfigurationError

NO_GROUP = -1
"""Fills the copies that an expert does not have."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Placement:
    """Every logical expert is resident in at least one group.

    Two placements are equal when all fields are. Experts sit on the groups by index into `groups`.
    """

    epoch: int
    """1 or more; a later placement of the same cluster has a larger one."""
    groups: tuple[str, ...]
    """Group ids."""
    expert_to_group: npt.NDArray[np.int32]
    """`[L, E, C]` index into `groups`; `NO_GROUP` behind an expert's last copy. Read-only."""

    def __post_init__(self) -> None:
        """Check the map and freeze it.

        Raises:
            ConfigurationError: An expert without a group, an unknown group, a group twice for one
                expert.
        """
        table = np.ascontiguousarray(self.expert_to_group, dtype=np.int32).copy()
        table.flags.writeable = False
        object.__setattr__(self, "expert_to_group", table)
        _require(self.epoch >= 1, "epoch", "must be 1 or more", self.epoch)
        _require(
            bool(self.groups) and len(set(self.groups)) == len(self.groups),
            "groups",
            "must be one or more distinct ids",
            ",".join(self.groups),
        )
        _require(
            table.ndim == 3 and min(table.shape) > 0,
            "expert_to_group",
            "must be [num_layers, num_experts, copies], none of them 0",
            str(list(table.shape)),
        )
        _require(
            bool((table >= NO_GROUP).all() and (table < len(self.groups)).all()),
            "expert_to_group",
            f"must index {len(self.groups)} groups",
            str([int(table.min()), int(table.max())]),
        )
        lonely = np.argwhere(table[:, :, 0] == NO_GROUP)
        if len(lonely):
            where = f"placement.expert_to_group[{lonely[0][0]}][{lonely[0][1]}]"
            raise ConfigurationError(where, "must have at least one group", NO_GROUP)
        ordered = np.sort(table, axis=2)
        twice = np.argwhere((ordered[:, :, 1:] == ordered[:, :, :-1]) & (ordered[:, :, 1:] >= 0))
        if len(twice):
            where = f"placement.expert_to_group[{twice[0][0]}][{twice[0][1]}]"
            raise ConfigurationError(where, "must not name a group twice", None)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Placement):
            return NotImplemented
        return (
            self.epoch == other.epoch
            and self.groups == other.groups
            and np.array_equal(self.expert_to_group, other.expert_to_group)
        )

    def __hash__(self) -> int:
        return hash((self.epoch, self.groups, self.expert_to_group.tobytes()))

    @property
    def num_layers(self) -> int:
        """Number of layers, L."""
        return int(self.expert_to_group.shape[0])

    @property
    def num_experts(self) -> int:
        """Number of logical experts of each layer, E."""
        return int(self.expert_to_group.shape[1])

    def experts_of(self, group_id: str) -> dict[int, list[int]]:
        """Return the group's experts, ascending, by layer; layers without one are left out.

        Raises:
            ConfigurationError: The placement does not know the group.
        """
        if group_id not in self.groups:
            raise ConfigurationError(
                "placement.groups", f"must contain {group_id!r}", ",".join(self.groups)
            )
        held = (self.expert_to_group == self.groups.index(group_id)).any(axis=2)
        return {
            layer_id: np.flatnonzero(held[layer_id]).tolist()
            for layer_id in range(self.num_layers)
            if held[layer_id].any()
        }

    def to_json(self) -> str:
        """Return the placement as JSON text."""
        return json.dumps(
            {
                "epoch": self.epoch,
                "groups": list(self.groups),
                "expert_to_group": self.expert_to_group.tolist(),
            },
            separators=(",", ":"),
        )

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read what `to_json` wrote.

        Raises:
            ConfigurationError: Not JSON, a missing or unknown field, or not a valid placement.
        """
        try:
            fields: Any = json.loads(text)
        except ValueError as error:
            raise ConfigurationError("placement", "must be JSON", str(error)) from None
        names = {"epoch", "groups", "expert_to_group"}
        if not isinstance(fields, dict) or fields.keys() != names:
            got = sorted(fields) if isinstance(fields, dict) else type(fields).__name__
            raise ConfigurationError("placement", f"must have the fields {sorted(names)}", str(got))
        try:
            table = np.array(fields["expert_to_group"], dtype=np.int32)
            return cls(
                epoch=int(fields["epoch"]), groups=tuple(fields["groups"]), expert_to_group=table
            )
        except (TypeError, ValueError, OverflowError) as error:
            raise ConfigurationError("placement", "must hold integers", str(error)) from None


def _require(holds: bool, field: str, rule: str, value: str | int) -> None:
    if not holds:
        raise ConfigurationError(f"placement.{field}", rule, value)
