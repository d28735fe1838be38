"""What of a service is under way, in words for people."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from cluster.controller import GroupPhase, Target
from cluster.groups import Group
from cluster.routers import Router, RouterPhase
from experts.placement import Placement

RESTING = (RouterPhase.UP, RouterPhase.LEFT, RouterPhase.GIVEN_UP)


def under_way(
    target: Target,
    groups: Mapping[str, Group],
    routers: Collection[Router],
    plan: Placement | None,
    missing_nodes: Callable[[], str],
) -> str:
    """Return what is under way; empty when nothing is.

    Args:
        target: What is wanted.
        groups: By id.
        routers: All of them.
        plan: The placement that is being brought about.
        missing_nodes: Returns what the cluster lacks for another group, in words.
    """
    words = []
    if starting := [name for name, g in groups.items() if g.view().phase is GroupPhase.STARTING]:
        lacking = missing_nodes()
        waits = f" (the Ray cluster lacks {lacking})" if lacking else ""
        words.append(f"starting {', '.join(starting)}{waits}")
    if target.groups == 0 and groups:
        words.append(f"nobody asks for anything: {', '.join(groups)} leave")
    if plan is not None:
        words.append(f"placement epoch {plan.epoch}: {_step(plan, groups, routers)}")
    for router in routers:
        if router.phase is RouterPhase.DRAIN:
            words.append(f"draining {router.router_id}")
        elif router.phase not in RESTING:
            words.append(f"{router.router_id} starts or stops")
    return "; ".join(words)


def _step(plan: Placement, groups: Mapping[str, Group], routers: Collection[Router]) -> str:
    """Return how far a plan is."""
    if behind := [name for name in plan.groups if groups[name].holds < plan.epoch]:
        return f"{', '.join(behind)} load experts"
    serving = [r for r in routers if r.phase in (RouterPhase.UP, RouterPhase.DRAIN)]
    if any(router.connected < plan.epoch for router in serving):
        return "routers connect"
    return "routers switch"
