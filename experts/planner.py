"""Chooses where experts live. Pure: figures in, a `Placement` out, the same for the same figures.

Two steps. (1) How many experts of each layer a group holds follows from its capacity alone; what
rounding takes from a group in one layer it gets back in a later one, so the counts are exact to one
expert in every layer *and* over all layers. (2) Which ones: without load figures contiguous ids;
with them, the heaviest expert first, to the group whose load per capacity is least and that has
room (longest processing time first). Every layer is planned for itself, because a step waits for
the slowest group in every layer.

A worked sum: 2 layers, 3 experts, capacities {a: 1, b: 1}. Layer 0 targets 1.5 and 1.5: a takes 2,
b takes 1. Carried over: a owes half an expert. Layer 1 targets 1.0 and 2.0: a takes 1, b takes 2.
Both hold 3 of 6.

Ties go to the lower expert id and to the group that is named first.

Dimension letters: L layers, E logical experts, G groups.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from experts.placement import NO_GROUP, Placement
from protos.errors import ConfigurationError

Load = npt.NDArray[np.int64] | npt.NDArray[np.float64]


def plan_placement(
    num_layers: int,
    num_experts: int,
    capacities: Mapping[str, float],
    load: Load | None = None,
    epoch: int = 1,
) -> Placement:
    """Place one copy of every logical expert.

    Args:
        num_layers: L.
        num_experts: E of each layer.
        capacities: Relative share of the experts by group id; 0 keeps a group empty.
        load: `[L, E]` token-expert pairs counted so far; None places contiguous ids.
        epoch: Epoch of the new placement.

    Returns:
        The placement, `groups` in the order of `capacities`.

    Raises:
        ConfigurationError: No group with capacity, a capacity that is not a finite number of 0 or
            more, or a load of another shape, negative or not finite.
    """
    shares = relative_shares(capacities)
    if load is not None:
        check_load(load, num_layers, num_experts)
    counts_LG = slots_per_layer(num_layers, num_experts, shares)
    table = np.empty((num_layers, num_experts, 1), np.int32)
    for layer_id, counts_G in enumerate(counts_LG):
        if load is None:
            table[layer_id, :, 0] = np.repeat(np.arange(len(shares)), counts_G)
        else:
            table[layer_id, :, 0] = _heaviest_first(load[layer_id], counts_G, shares)
    return Placement(epoch=epoch, groups=tuple(capacities), expert_to_group=table)


def slots_per_layer(
    num_layers: int, num_experts: int, shares: npt.NDArray[np.float64]
) -> npt.NDArray[np.int64]:
    """Return `[L, G]` how many experts of each layer each group holds; every row sums to E."""
    counts_LG = np.zeros((num_layers, len(shares)), np.int64)
    owed_G = np.zeros(len(shares))
    for counts_G in counts_LG:
        owed_G += shares * num_experts
        for _ in range(num_experts):
            # Rounding noise must not decide a tie: 1/3 + 1/3 + 1/3 is not always 1.
            group = int(np.argmax(np.round(np.where(shares > 0, owed_G, -np.inf), 9)))
            counts_G[group] += 1
            owed_G[group] -= 1
    return counts_LG


def group_load(placement: Placement, load: Load) -> npt.NDArray[np.float64]:
    """Return `[L, G]` pairs that each group would compute; copies share an expert's evenly."""
    table = placement.expert_to_group
    is_copy = table != NO_GROUP
    per_copy = np.asarray(load, np.float64)[:, :, None] / is_copy.sum(axis=2, keepdims=True)
    result = np.zeros((placement.num_layers, len(placement.groups)))
    layer_id, _, _ = np.nonzero(is_copy)
    np.add.at(result, (layer_id, table[is_copy]), np.broadcast_to(per_copy, table.shape)[is_copy])
    return result


def balancedness(placement: Placement, load: Load, capacities: Mapping[str, float]) -> float:
    """Return mean / max over groups of load per capacity, averaged over layers; 1 is even."""
    shares = np.array([capacities[group] for group in placement.groups], np.float64)
    if not (shares > 0).any():
        return 1.0
    used = shares > 0
    per_capacity = group_load(placement, load)[:, used] / shares[used]
    busy = per_capacity.max(axis=1) > 0
    if not busy.any():
        return 1.0
    # Capacities differ: the even load per capacity is sum(load) / sum(capacity).
    even = (per_capacity * shares[used]).sum(axis=1) / shares[used].sum()
    return float((even[busy] / per_capacity[busy].max(axis=1)).mean())


def num_moves(before: Placement, after: Placement) -> int:
    """Return how many (expert, group) residencies `after` has that `before` has not."""

    def residencies(placement: Placement) -> set[tuple[int, int, str]]:
        table = placement.expert_to_group
        return {
            (int(layer_id), int(expert_id), placement.groups[table[layer_id, expert_id, copy]])
            for layer_id, expert_id, copy in np.argwhere(table != NO_GROUP)
        }

    return len(residencies(after) - residencies(before))


def _heaviest_first(
    load_E: npt.NDArray[np.generic],
    counts_G: npt.NDArray[np.int64],
    shares: npt.NDArray[np.float64],
) -> npt.NDArray[np.int32]:
    """Return each expert's group: heaviest expert first, to the least loaded group with room."""
    room_G = counts_G.copy()
    load_G = np.zeros(len(shares))
    weight_E = np.asarray(load_E, np.float64)
    groups_E = np.empty(len(weight_E), np.int32)
    usable = np.where(shares > 0, shares, 1.0)
    for expert_id in np.argsort(-weight_E, kind="stable"):
        with_it = (load_G + weight_E[expert_id]) / usable
        # With nothing left to weigh, more room per capacity wins, so that idle experts spread too.
        choice = np.lexsort((np.arange(len(shares)), -room_G / usable, with_it, room_G == 0))[0]
        groups_E[expert_id] = choice
        room_G[choice] -= 1
        load_G[choice] += weight_E[expert_id]
    return groups_E


def relative_shares(capacities: Mapping[str, float]) -> npt.NDArray[np.float64]:
    """Return `[G]` shares that sum to 1.

    Raises:
        ConfigurationError: No group with capacity, or one that is not a finite number, 0 or more.
    """
    for group, capacity in capacities.items():
        if not (math.isfinite(capacity) and capacity >= 0):
            field = f"capacities.{group}"
            raise ConfigurationError(field, "must be a finite number, 0 or more", capacity)
    total = math.fsum(capacities.values())
    if not (math.isfinite(total) and total > 0):
        raise ConfigurationError("capacities", "must have a group above 0", total)
    return np.array([capacity / total for capacity in capacities.values()], np.float64)


def check_load(load: Load, num_layers: int, num_experts: int) -> None:
    """Check load figures `[L, E]`.

    Raises:
        ConfigurationError: Another shape, negative, or not finite.
    """
    if load.shape != (num_layers, num_experts):
        rule = f"must have shape [{num_layers}, {num_experts}]"
        raise ConfigurationError("load", rule, str(list(load.shape)))
    if not (np.isfinite(load).all() and (load >= 0).all()):
        raise ConfigurationError("load", "must be finite and 0 or more", float(np.min(load)))
