"""From one placement to the next with as few moves as the new shares allow. Pure.

How many experts of each layer a group is to hold is the planner's sum (`planner.slots_per_layer`).
An expert stays where it is as long as its group's count has room for it; what a group has too many
of, and what no group holds, goes to the groups that have too few. So the number of moves is the
smallest that these counts allow. Which ones a group gives away, and who gets them, evens out the
load: a group gives the expert whose load comes nearest to what it has too much of, each; the
heaviest one goes first, to the group whose load per capacity is least.

With `even`, experts are then exchanged between the most and the least loaded group of a layer as
long as that lowers the higher of the two loads: more moves, for an operator who asks for them.

A worked sum: one layer, 6 experts, a holds 0 1 2, b holds 3 4 5, c is new, capacities equal. Each
is to hold 2. Without load figures a gives 2 and b gives 5, both to c: two moves.

Ties go to the higher expert id among those given away, and to the group that is named first.

Dimension letters: L layers, E logical experts, G groups.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import numpy.typing as npt

from experts.placement import NO_GROUP, Placement
from experts.planner import Load, check_load, relative_shares, slots_per_layer

LEAST_GAIN = 0.01
"""Part of the highest load of a layer that an exchange must save."""


def replan(
    before: Placement,
    capacities: Mapping[str, float],
    load: Load | None = None,
    lost: Collection[str] = (),
    *,
    even: bool = False,
) -> Placement:
    """Place one copy of every logical expert on these groups, moving as few as possible.

    Args:
        before: Where experts are now; of several copies the first counts.
        capacities: Relative share of the experts by group id; 0 keeps a group empty.
        load: `[L, E]` token-expert pairs counted so far; None weighs all experts alike.
        lost: Groups that hold nothing any more, whatever `before` says.
        even: Exchange experts, too, where that evens out the load.

    Returns:
        A placement of the next epoch, `groups` in the order of `capacities`.

    Raises:
        ConfigurationError: As `planner.plan_placement`.
    """
    shares = relative_shares(capacities)
    num_layers, num_experts = before.num_layers, before.num_experts
    if load is not None:
        check_load(load, num_layers, num_experts)
    weights_LE = np.ones((num_layers, num_experts)) if load is None else np.asarray(load, float)
    index = {group: i for i, group in enumerate(capacities)}
    new_of_old = np.array(
        [NO_GROUP if group in lost else index.get(group, NO_GROUP) for group in before.groups]
        + [NO_GROUP],
        np.int32,
    )
    counts_LG = slots_per_layer(num_layers, num_experts, shares)
    table = np.empty((num_layers, num_experts, 1), np.int32)
    for layer_id, counts_G in enumerate(counts_LG):
        holder_E = new_of_old[before.expert_to_group[layer_id, :, 0]]
        to_E = _move(holder_E, weights_LE[layer_id], counts_G, shares)
        if even:
            _exchange(to_E, weights_LE[layer_id], shares)
        table[layer_id, :, 0] = to_E
    return Placement(epoch=before.epoch + 1, groups=tuple(capacities), expert_to_group=table)


def _move(
    holder_E: npt.NDArray[np.int32],
    weight_E: npt.NDArray[np.float64],
    counts_G: npt.NDArray[np.int64],
    shares: npt.NDArray[np.float64],
) -> npt.NDArray[np.int32]:
    """Return each expert's group in one layer."""
    to_E = holder_E.copy()
    for group, count in enumerate(counts_G):
        held = np.flatnonzero(to_E == group)
        too_much = float(weight_E[held].sum()) - float(weight_E.sum()) * shares[group]
        for left in range(len(held) - int(count), 0, -1):
            distance = np.abs(weight_E[held] - too_much / left)
            given = held[len(held) - 1 - int(np.argmin(distance[::-1]))]
            to_E[given] = NO_GROUP
            too_much -= float(weight_E[given])
            held = held[held != given]
    homeless = np.flatnonzero(to_E == NO_GROUP)
    usable = np.where(shares > 0, shares, 1.0)
    room_G = counts_G - np.bincount(to_E[to_E >= 0], minlength=len(counts_G))
    load_G = np.bincount(
        to_E[to_E >= 0], weights=weight_E[to_E >= 0], minlength=len(counts_G)
    ).astype(float)
    for expert_id in homeless[np.argsort(-weight_E[homeless], kind="stable")]:
        with_it = np.where(room_G > 0, (load_G + weight_E[expert_id]) / usable, np.inf)
        group = int(np.argmin(with_it))
        to_E[expert_id] = group
        room_G[group] -= 1
        load_G[group] += weight_E[expert_id]
    return to_E


def _exchange(
    to_E: npt.NDArray[np.int32],
    weight_E: npt.NDArray[np.float64],
    shares: npt.NDArray[np.float64],
) -> None:
    """Exchange experts of one layer in place, the best pair first; at most one pair an expert."""
    used = np.flatnonzero(shares > 0)
    for _ in range(len(to_E)):
        load_G = np.bincount(to_E, weights=weight_E, minlength=len(shares))[used] / shares[used]
        high, low = used[int(np.argmax(load_G))], used[int(np.argmin(load_G))]
        ours, theirs = np.flatnonzero(to_E == high), np.flatnonzero(to_E == low)
        if high == low or not len(ours) or not len(theirs):
            return
        shift = weight_E[ours][:, None] - weight_E[theirs][None, :]
        after = np.maximum(load_G.max() - shift / shares[high], load_G.min() + shift / shares[low])
        best = np.unravel_index(int(np.argmin(after)), after.shape)
        if after[best] >= load_G.max() * (1 - LEAST_GAIN):
            return
        to_E[ours[best[0]]], to_E[theirs[best[1]]] = low, high
