"""What a cluster's nodes lack, in the words that `serve` and `status` show."""

from __future__ import annotations

from cluster.resources import Node, lacking, total

NODES = [
    Node(f"n{index}", f"10.0.0.{index}", {"CPU": 4.0, "expert_group": 1.0}) for index in range(2)
]


def test_what_fits_all_nodes_together_is_not_lacking() -> None:
    assert lacking([{"expert_group": 1.0}, {"expert_group": 1.0, "CPU": 8.0}], NODES) == ""


def test_what_is_lacking_is_named_with_its_sums() -> None:
    bundles = [{"expert_group": 1.0, "GPU": 0.5}] * 3
    assert lacking(bundles, NODES) == (
        "1.5 GPU (need 1.5, have 0), 1 expert_group (need 3, have 2)"
    )


def test_a_total_may_leave_out_what_nobody_asks_for() -> None:
    resources = [node.resources for node in NODES]
    assert total(resources) == "8 CPU, 2 expert_group"
    assert total(resources, only=[{"expert_group": 1.0}]) == "2 expert_group"
