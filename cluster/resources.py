"""What the nodes of a Ray cluster have, and what our processes need of them. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

GROUP_RESOURCE = "expert_group"
"""Custom resource that nodes of a shared cluster advertise, 1 per group they may hold."""
MEMBER_RESOURCE = "expertmesh_member"
"""Custom resource of a private cluster: a place for one of our processes, whatever its CPUs."""


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of the Ray cluster."""

    node_id: str
    address: str
    resources: Mapping[str, float]


def lacking(bundles: Sequence[Mapping[str, float]], nodes: Sequence[Node]) -> str:
    """Return what these nodes lack for these bundles, in words; empty: nothing."""
    found = []
    for name in sorted({name for bundle in bundles for name in bundle}):
        need = sum(bundle.get(name, 0.0) for bundle in bundles)
        have = sum(node.resources.get(name, 0.0) for node in nodes)
        if need > have:
            found.append(f"{need - have:g} {name} (need {need:g}, have {have:g})")
    return ", ".join(found)


def total(
    bundles: Sequence[Mapping[str, float]], only: Sequence[Mapping[str, float]] | None = None
) -> str:
    """Return the sums by resource, in words: `2 CPU, 1 expert_group`.

    Args:
        bundles: Amounts by resource.
        only: Name the resources of these bundles alone.
    """
    names = sorted({name for bundle in (only if only is not None else bundles) for name in bundle})
    return ", ".join(f"{sum(b.get(name, 0.0) for b in bundles):g} {name}" for name in names)
