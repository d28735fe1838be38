"""The planner: every expert has a home, shares follow capacities, plans are repeatable."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experts.planner import balancedness, group_load, num_moves, plan_placement
from protos.errors import ConfigurationError

capacities = st.lists(st.one_of(st.floats(0.01, 100), st.just(0.0)), min_size=1, max_size=5).filter(
    lambda values: sum(values) > 0
)


def named(values: list[float]) -> dict[str, float]:
    return {f"g{index}": value for index, value in enumerate(values)}


def held(placement: object, num_groups: int) -> np.ndarray:
    """`[L, G]` experts of each group."""
    table = placement.expert_to_group[:, :, 0]  # type: ignore[attr-defined]
    return np.stack([(table == group).sum(axis=1) for group in range(num_groups)], axis=1)


@given(st.integers(1, 6), st.integers(1, 40), capacities, st.booleans(), st.integers(0, 1000))
def test_shares_follow_capacities_in_each_layer_and_over_all(
    num_layers: int, num_experts: int, values: list[float], with_load: bool, seed: int
) -> None:
    load = (
        np.random.default_rng(seed).integers(0, 100, (num_layers, num_experts))
        if with_load
        else None
    )
    plan = plan_placement(num_layers, num_experts, named(values), load, epoch=4)
    assert plan.epoch == 4
    assert plan.expert_to_group.shape == (num_layers, num_experts, 1)
    assert (plan.expert_to_group >= 0).all()  # every logical expert is resident
    counts = held(plan, len(values))
    exact = np.array(values) / sum(values) * num_experts
    assert (counts.sum(axis=1) == num_experts).all()
    assert (np.abs(counts - exact) < 2).all()
    # Rounding is given back in later layers: nobody is more than an expert off in total.
    assert (np.abs(counts.sum(axis=0) - exact * num_layers) < 1 + 1e-6).all()
    assert (counts[:, np.array(values) == 0] == 0).all()
    assert plan == plan_placement(num_layers, num_experts, named(values), load, epoch=4)


def test_worked_sum_of_the_module() -> None:
    plan = plan_placement(2, 3, {"a": 1, "b": 1})
    assert plan.expert_to_group[:, :, 0].tolist() == [[0, 0, 1], [0, 1, 1]]


def test_unequal_groups_and_odd_counts() -> None:
    # Shares of 7 experts: 4.67 and 2.33; layer 0 rounds to 5 and 2, then a owes a third.
    plan = plan_placement(3, 7, {"big": 2, "small": 1})
    assert held(plan, 2).tolist() == [[5, 2], [4, 3], [5, 2]]
    assert held(plan, 2).sum(axis=0).tolist() == [14, 7]


def test_heavy_experts_are_spread() -> None:
    # Heaviest first: 9 -> a, 8 -> b, 7 -> b would be 15, so b (8 < 9); 1 -> a. Loads 10 and 15;
    # two slots each, so 7 goes to the lighter group b and 1 to a.
    load = np.array([[9, 8, 7, 1]])
    plan = plan_placement(1, 4, {"a": 1, "b": 1}, load)
    assert plan.expert_to_group[0, :, 0].tolist() == [0, 1, 1, 0]
    assert group_load(plan, load).tolist() == [[10, 15]]
    assert balancedness(plan, load, {"a": 1, "b": 1}) == pytest.approx(12.5 / 15)


def test_ties_go_to_lower_ids() -> None:
    plan = plan_placement(1, 4, {"a": 1, "b": 1}, np.full((1, 4), 5))
    assert plan.expert_to_group[0, :, 0].tolist() == [0, 1, 0, 1]


@given(st.integers(0, 10_000), st.integers(2, 4))
def test_planning_by_load_is_never_far_from_even(seed: int, num_groups: int) -> None:
    load = np.random.default_rng(seed).integers(1, 50, (2, 32))
    groups = named([1.0] * num_groups)
    plan = plan_placement(2, 32, groups, load)
    loads = group_load(plan, load)
    assert loads.sum(axis=1).tolist() == load.sum(axis=1).tolist()
    assert (loads.max(axis=1) - loads.min(axis=1) <= 2 * load.max(axis=1)).all()


def test_capacity_counts_in_balancedness() -> None:
    plan = plan_placement(1, 3, {"a": 2, "b": 1})
    even = np.array([[10, 10, 10]])
    assert balancedness(plan, even, {"a": 2, "b": 1}) == 1.0
    assert balancedness(plan, even, {"a": 1, "b": 1}) == pytest.approx(15 / 20)
    assert balancedness(plan, np.zeros((1, 3)), {"a": 2, "b": 1}) == 1.0


def test_moves_are_new_residencies() -> None:
    before = plan_placement(2, 4, {"a": 1, "b": 1})
    after = plan_placement(2, 4, {"a": 1, "b": 1, "c": 2}, epoch=2)
    # before: a a b b; after: a b c c. Expert 1 moves to b, 2 and 3 to c, in both layers.
    assert num_moves(before, before) == 0
    assert num_moves(before, after) == 6


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({}, "capacities must have a group above 0"),
        ({"a": 0.0}, "capacities must have a group above 0"),
        ({"a": 1.0, "b": -1.0}, r"capacities\.b must be a finite number, 0 or more, got -1\.0"),
        ({"a": float("nan")}, r"capacities\.a must be a finite number"),
    ],
)
def test_unusable_capacities_are_named(groups: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        plan_placement(1, 2, groups)


@pytest.mark.parametrize(
    "load", [np.ones((2, 2)), np.array([[1.0, -1.0]]), np.array([[np.nan, 1]])]
)
def test_unusable_load_is_refused(load: np.ndarray) -> None:
    with pytest.raises(ConfigurationError, match="load must"):
        plan_placement(1, 2, {"a": 1}, load)
