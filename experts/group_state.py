"""What an expert group is doing and what it says of itself.

STARTING -> LOADING -> READY -> DRAINING; FAILED from any of them, for good.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class GroupState(StrEnum):
    """What a group is doing."""

    STARTING = "STARTING"
    LOADING = "LOADING"
    READY = "READY"
    DRAINING = "DRAINING"
    FAILED = "FAILED"


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupStatus:
    """What a group says of itself; the fields of `GetStateResponse` that are not the server's."""

    group_id: str
    state: GroupState
    failure: str
    placement_epoch: int
    layers: dict[int, list[int]]
    compute: str
    num_threads: int
    resident_bytes: int
    capacity_bytes: int
    num_calls: int
    num_rows: int
    num_pairs: int
    busy_s: float
    dtype: str
