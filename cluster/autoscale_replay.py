"""`expertmesh autoscale simulate`: a recorded load, and what would have been decided. Pure but for
reading the file.

A trace is CSV with a header, or JSON lines; `t_s` and the figures of `Load`, each of which may be
missing. What `expertmesh autoscale explain --json` prints works, line by line, too. Figures that
are means over members (`group_busy`, `kv_usage`, `state_slot_usage`) were measured with so many
`routers` and `groups`, where the trace says so, else with those of the start; with another number
they would have been smaller or larger in proportion.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.autoscale import Decision, Memory, Policy, State, decide
from cluster.autoscale_signals import Load, Pool
from protos.errors import ConfigurationError

_FIGURES = tuple(item.name for item in dataclasses.fields(Load))
_COUNTS = ("routers", "groups")
_MEANS = {"group_busy": "groups", "kv_usage": "routers", "state_slot_usage": "routers"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """One line of a trace."""

    t_s: float
    load: Load
    counts: Mapping[str, int]
    """`routers` and `groups` that it was measured with, where it says so."""


def read_trace(path: Path) -> list[Moment]:
    """Read a trace.

    Raises:
        ConfigurationError: A file that cannot be read, an unknown column, a value that is no number
            of 0 or more, or a time that runs backwards; names the line.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            "--trace", f"must be a readable file ({error})", str(path)
        ) from None
    lines = text.splitlines()
    is_json = bool(lines) and lines[0].lstrip().startswith("{")
    rows = _json_rows(lines) if is_json else _csv_rows(lines)
    moments: list[Moment] = []
    for number, row in rows:
        where = f"{path.name}:{number}"
        moment = _moment(where, row)
        if moments and moment.t_s <= moments[-1].t_s:
            raise ConfigurationError(
                f"{where} t_s", f"must be above {moments[-1].t_s:g}", moment.t_s
            )
        moments.append(moment)
    if not moments:
        raise ConfigurationError("--trace", "must hold a line of load", str(path))
    return moments


def replay(
    trace: Iterable[Moment], policy: Policy, *, routers: int, groups: int, start_s: float
) -> Iterator[Decision]:
    """Decide at every moment of a trace, and let members come and go accordingly.

    Args:
        trace: Times rise.
        policy: What is wanted.
        routers: At the start.
        groups: At the start.
        start_s: How long a member takes to start.
    """
    begun = counts = {"routers": routers, "groups": groups}
    starting: dict[str, list[float]] = {"routers": [], "groups": []}
    memory = Memory()
    for moment in trace:
        starting = {kind: [at for at in ats if at > moment.t_s] for kind, ats in starting.items()}
        pools = {
            kind: Pool(count=count, ready=max(0, count - len(starting[kind])))
            for kind, count in counts.items()
        }
        decision = decide(
            State(
                now_s=moment.t_s,
                policy=policy,
                routers=pools["routers"],
                groups=pools["groups"],
                load=_scaled(moment, begun, counts),
                memory=memory,
            )
        )
        yield decision
        memory = decision.memory
        wanted = {"routers": decision.routers.wanted, "groups": decision.groups.wanted}
        for kind, count in wanted.items():
            more = count - counts[kind]
            kept = starting[kind][: max(0, len(starting[kind]) + min(more, 0))]
            starting[kind] = kept + [moment.t_s + start_s] * more
        counts = wanted


def _scaled(moment: Moment, begun: Mapping[str, int], counts: Mapping[str, int]) -> Load:
    changed: dict[str, float | None] = {}
    for name, kind in _MEANS.items():
        value: float | None = getattr(moment.load, name)
        if value is not None:
            there = counts[kind]
            measured = moment.counts.get(kind, begun[kind])
            changed[name] = min(1.0, value * measured / there) if there else None
    return replace(moment.load, **changed)


def _json_rows(lines: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigurationError(
                f"line {number}", f"must be JSON ({error})", line[:80]
            ) from None
        if not isinstance(row, dict):
            raise ConfigurationError(f"line {number}", "must be a JSON object", line[:80])
        if isinstance(row.get("load"), dict):  # a decision, as `explain --json` prints it
            pools = {kind: row[kind] for kind in _COUNTS if kind in row}
            counts = {k: p.get("count") if isinstance(p, dict) else p for k, p in pools.items()}
            row = {"t_s": row.get("unix_s"), **row["load"], **counts}
        yield number, row


def _csv_rows(lines: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, row in enumerate(csv.DictReader(lines, restkey="more columns than names"), 2):
        yield number, {name: value for name, value in row.items() if value not in (None, "")}


def _moment(where: str, row: Mapping[str, Any]) -> Moment:
    known = ("t_s", *_COUNTS, *_FIGURES)
    for name in row:
        if name not in known:
            raise ConfigurationError(where, f"must hold only {', '.join(known)}", name)
    values = {name: _number(f"{where} {name}", value) for name, value in row.items()}
    if values.get("t_s") is None:
        raise ConfigurationError(f"{where} t_s", "must be set", None)
    return Moment(
        t_s=values["t_s"],
        load=Load(**{name: values[name] for name in _FIGURES if name in values}),
        counts={kind: int(values[kind]) for kind in _COUNTS if kind in values},
    )


def _number(where: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise ConfigurationError(where, "must be a number of 0 or more", str(value))
    return number
