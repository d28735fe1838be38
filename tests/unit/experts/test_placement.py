"""A placement is well formed, survives JSON, and says who holds what."""

from __future__ import annotations

import json

import numpy as np
import pytest

from experts.placement import Placement
from protos.errors import ConfigurationError

# Layer 0: expert 0 in a and b, expert 1 in b. Layer 1: both in b.
TABLE = [[[0, 1], [1, -1]], [[1, -1], [1, -1]]]


def placement(table: object = TABLE, epoch: int = 3) -> Placement:
    return Placement(epoch=epoch, groups=("a", "b"), expert_to_group=np.array(table))


def test_groups_and_experts_mirror_each_other() -> None:
    p = placement()
    assert (p.num_layers, p.num_experts) == (2, 2)
    assert p.experts_of("a") == {0: [0]}
    assert p.experts_of("b") == {0: [0, 1], 1: [0, 1]}


def test_json_round_trip() -> None:
    p = placement()
    again = Placement.from_json(p.to_json())
    assert again == p
    assert hash(again) == hash(p)
    assert again != placement(epoch=4)
    assert again.expert_to_group.dtype == np.int32


def test_a_placement_cannot_be_changed() -> None:
    source = np.array(TABLE, np.int32)
    p = Placement(epoch=1, groups=("a", "b"), expert_to_group=source)
    source[0, 0, 0] = 1
    assert p.expert_to_group[0, 0, 0] == 0
    with pytest.raises(ValueError, match="read-only"):
        p.expert_to_group[0, 0, 0] = 1


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([[[0]], [[-1]]], r"expert_to_group\[1\]\[0\] must have at least one group"),
        ([[[0, 0]]], r"expert_to_group\[0\]\[0\] must not name a group twice"),
        ([[[2]]], "must index 2 groups"),
        ([[[-2]]], "must index 2 groups"),
        ([[0]], "must be .num_layers, num_experts, copies."),
    ],
)
def test_a_malformed_table_is_refused(table: object, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        placement(table)


def test_epochs_start_at_one_and_groups_are_distinct() -> None:
    with pytest.raises(ConfigurationError, match=r"placement\.epoch must be 1 or more, got 0"):
        placement(epoch=0)
    for groups in ((), ("a", "a")):
        with pytest.raises(ConfigurationError, match="one or more distinct ids"):
            Placement(epoch=1, groups=groups, expert_to_group=np.zeros((1, 1, 1)))


def test_an_unknown_group_is_named() -> None:
    with pytest.raises(ConfigurationError, match="must contain 'c'"):
        placement().experts_of("c")


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        json.dumps({"epoch": 1, "groups": ["a"], "expert_to_group": [[["x"]]]}),
        json.dumps({"epoch": 1, "groups": ["a"], "expert_to_group": [[[0]], [[0, 0]]]}),
        json.dumps({"epoch": 1, "groups": ["a"], "expert_to_group": [[[0]]], "more": 1}),
    ],
)
def test_what_is_not_a_placement_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="placement"):
        Placement.from_json(text)
