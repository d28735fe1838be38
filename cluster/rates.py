"""What happened between two statuses of a service: rates, shares, percentiles. Pure.

Members count since their start. A difference is only taken between two messages of one process: of
a member that started again in between, or did not answer, there is none.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from protos.v1 import cluster_pb2

LOST = "LOST"
"""State of a member that did not answer."""

Status = TypeVar("Status", cluster_pb2.RouterStatus, cluster_pb2.GroupStatus)


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterRates:
    """What a router did."""

    prompt_tokens_per_s: float
    """Computed."""
    arriving_tokens_per_s: float
    """Uncached prompt tokens that came: computed, or waiting now and not before."""
    generation_tokens_per_s: float
    step_share: float
    """Part of the time that it was in steps."""
    dispatch_share: float
    """Part of its steps' time that it waited for expert groups."""
    requests_per_s: float
    """That got their first token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRates:
    """What an expert group did."""

    busy: float
    """Part of the time that it computed."""
    pairs_per_s: float
    layer_pairs: tuple[int, ...]
    """Token-expert pairs by layer."""


def router_rates(
    before: cluster_pb2.RouterStatus, after: cluster_pb2.RouterStatus, seconds: float
) -> RouterRates | None:
    """Return what a router did in these seconds; None: not one process."""
    if not _is_one_process(before, after) or seconds <= 0:
        return None
    prompt = after.prompt_tokens - before.prompt_tokens
    waiting = after.waiting_tokens - before.waiting_tokens
    step_s = after.step_s - before.step_s
    begun = sum(after.latency.first_token) - sum(before.latency.first_token)
    return RouterRates(
        prompt_tokens_per_s=prompt / seconds,
        arriving_tokens_per_s=max(0.0, (prompt + waiting) / seconds),
        generation_tokens_per_s=(after.generation_tokens - before.generation_tokens) / seconds,
        step_share=min(1.0, step_s / seconds),
        dispatch_share=min(1.0, (after.dispatch_s - before.dispatch_s) / step_s) if step_s else 0.0,
        requests_per_s=begun / seconds,
    )


def group_rates(
    before: cluster_pb2.GroupStatus, after: cluster_pb2.GroupStatus, seconds: float
) -> GroupRates | None:
    """Return what a group did in these seconds; None: not one process."""
    if not _is_one_process(before, after) or seconds <= 0:
        return None
    earlier = list(before.layer_pairs) or [0] * len(after.layer_pairs)
    return GroupRates(
        busy=min(1.0, max(0.0, after.busy_s - before.busy_s) / seconds),
        pairs_per_s=max(0, after.num_pairs - before.num_pairs) / seconds,
        layer_pairs=tuple(max(0, b - a) for a, b in zip(earlier, after.layer_pairs, strict=True)),
    )


def first_token_percentile(
    pairs: Iterable[tuple[cluster_pb2.RouterStatus | None, cluster_pb2.RouterStatus]],
    percent: float,
) -> float | None:
    """Return the time to first token, in seconds, that so many percent of the requests had at most.

    Args:
        pairs: Each router before and after; before is None: since its start.
        percent: 0 to 100.

    Returns:
        None where no request got its first token.
    """
    return _percentile([_counts(pair, "first_token") for pair in pairs], percent)


def token_percentile(
    pairs: Iterable[tuple[cluster_pb2.RouterStatus | None, cluster_pb2.RouterStatus]],
    percent: float,
) -> float | None:
    """Return the time between two tokens alike."""
    return _percentile([_counts(pair, "between_tokens") for pair in pairs], percent)


def by_id(members: Iterable[Status]) -> dict[str, Status]:
    """Return id -> status."""
    return {member_id(member): member for member in members}


def member_id(member: cluster_pb2.RouterStatus | cluster_pb2.GroupStatus) -> str:
    """Return a router's or a group's id."""
    return member.router_id if isinstance(member, cluster_pb2.RouterStatus) else member.group_id


def _is_one_process(before: Status, after: Status) -> bool:
    return LOST not in (before.state, after.state) and before.pid == after.pid


_Counts = tuple[Sequence[float], list[int]]


def _counts(
    pair: tuple[cluster_pb2.RouterStatus | None, cluster_pb2.RouterStatus], name: str
) -> _Counts:
    before, after = pair
    counts = list(getattr(after.latency, name))
    earlier = list(getattr(before.latency, name)) if before is not None else []
    if before is not None and _is_one_process(before, after) and len(earlier) == len(counts):
        counts = [new - old for new, old in zip(counts, earlier, strict=True)]
    return after.latency.bounds_s, counts


def _percentile(found: Sequence[_Counts], percent: float) -> float | None:
    """Straight lines between the bounds; what is above the last bound counts as that bound."""
    found = [(bounds, counts) for bounds, counts in found if counts]
    if not found:
        return None
    bounds = found[0][0]
    counts = [sum(column) for column in zip(*(counts for _, counts in found), strict=True)]
    rank = sum(counts) * percent / 100
    if not rank:
        return None
    below = 0
    for index, count in enumerate(counts[:-1]):
        if count and below + count >= rank:
            low = bounds[index - 1] if index else 0.0
            return float(low + (bounds[index] - low) * (rank - below) / count)
        below += count
    return float(bounds[-1])
