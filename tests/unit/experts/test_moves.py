"""Placements that follow one another: few moves, even counts, even load."""

from __future__ import annotations

import numpy as np
import pytest

from experts.moves import replan
from experts.placement import Placement
from experts.planner import balancedness, num_moves, plan_placement
from protos.errors import ConfigurationError


def held(placement: Placement, group: str) -> list[list[int]]:
    experts = placement.experts_of(group)
    return [experts.get(layer_id, []) for layer_id in range(placement.num_layers)]


def test_the_worked_sum() -> None:
    """a holds 0 1 2, b holds 3 4 5; each of three is to hold 2: 2 and 5 move."""
    before = plan_placement(1, 6, {"a": 1, "b": 1})
    after = replan(before, {"a": 1, "b": 1, "c": 1})
    assert [held(after, g) for g in "abc"] == [[[0, 1]], [[3, 4]], [[2, 5]]]
    assert after.epoch == 2
    assert num_moves(before, after) == 2


def test_the_same_groups_move_nothing() -> None:
    before = plan_placement(5, 7, {"a": 1, "b": 2, "c": 1})
    after = replan(before, {"a": 1, "b": 2, "c": 1})
    assert num_moves(before, after) == 0


def test_a_group_that_leaves_gives_its_own_and_no_more() -> None:
    before = plan_placement(4, 8, {"a": 1, "b": 1, "c": 1})
    after = replan(before, {"a": 1, "b": 1})
    assert after.groups == ("a", "b")
    assert num_moves(before, after) == sum(map(len, held(before, "c")))


def test_what_a_lost_group_held_is_placed_anew() -> None:
    before = plan_placement(2, 6, {"a": 1, "b": 1})
    back = replan(before, {"a": 1, "b": 1}, lost={"b"})
    assert [held(back, g) for g in "ab"] == [held(before, g) for g in "ab"]
    alone = replan(before, {"a": 1}, lost={"b"})
    assert held(alone, "a") == [list(range(6))] * 2


def test_random_changes_keep_their_promises() -> None:
    """Every expert is placed, counts are the planner's, and moves are the fewest for them."""
    seed = 20240611
    generator = np.random.default_rng(seed)
    for trial in range(200):
        layers, experts = int(generator.integers(1, 5)), int(generator.integers(4, 40))
        names = [f"g{i}" for i in range(int(generator.integers(1, 6)))]
        placement = plan_placement(layers, experts, dict.fromkeys(names, 1.0))
        for _ in range(4):
            count = int(generator.integers(1, 7))
            pool = [f"g{i}" for i in range(8)]
            chosen = generator.choice(pool, count, replace=False).tolist()
            capacities = {g: float(generator.integers(1, 5)) for g in chosen}
            load = generator.integers(0, 1000, (layers, experts)) if trial % 2 else None
            after = replan(placement, capacities, load)
            fresh = plan_placement(layers, experts, capacities)
            fewest = 0
            for group in capacities:
                counts = [len(ids) for ids in held(after, group)]
                assert counts == [len(ids) for ids in held(fresh, group)], f"seed {seed}"
                had = held(placement, group) if group in placement.groups else [[]] * layers
                fewest += sum(max(0, n - len(h)) for n, h in zip(counts, had, strict=True))
            assert num_moves(placement, after) == fewest, f"seed {seed} trial {trial}"
            assert after.epoch == placement.epoch + 1
            placement = after


def test_load_decides_which_ones_move() -> None:
    """a is hot: of four experts it gives the two that even things out, not the last two."""
    before = plan_placement(1, 4, {"a": 1.0})
    load = np.array([[70, 10, 10, 10]])
    after = replan(before, {"a": 1, "b": 1}, load)
    assert balancedness(after, load, {"a": 1, "b": 1}) == pytest.approx(50 / 80)
    even = np.array([[40, 10, 40, 10]])
    after = replan(before, {"a": 1, "b": 1}, even)
    assert balancedness(after, even, {"a": 1, "b": 1}) == 1.0


def test_exchanges_even_out_the_load_of_groups_that_stay() -> None:
    """One holds all the hot experts: an exchange of three pairs is even; without it none moves."""
    before = plan_placement(1, 12, {"a": 1, "b": 1})
    load = np.array([[10] * 6 + [0] * 6])
    shares = {"a": 1.0, "b": 1.0}
    assert num_moves(before, replan(before, shares, load)) == 0
    after = replan(before, shares, load, even=True)
    assert balancedness(after, load, shares) == 1.0
    assert num_moves(before, after) == 6
    assert num_moves(after, replan(after, shares, load, even=True)) == 0


def test_figures_that_make_no_sense_are_refused() -> None:
    before = plan_placement(1, 4, {"a": 1.0})
    with pytest.raises(ConfigurationError, match="above 0"):
        replan(before, {"a": 0.0})
    with pytest.raises(ConfigurationError, match=r"\[1, 4\]"):
        replan(before, {"a": 1.0}, np.zeros((2, 4)))
