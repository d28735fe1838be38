"""`expertmesh top`: asks again and again, and draws.

Any router answers for all, so the screen outlives the one that it asked first.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping

from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from cluster.console import out_console, table
from cluster.kv_budget import format_bytes
from cluster.status import StatusAsker
from cluster.top import View, view_of
from protos.errors import DeadlineExceededError, ServiceUnavailableError
from protos.tls import Access
from protos.v1 import cluster_pb2

SHADES = " ░▒▓█"
"""A cell's part of the load in its layer: none, .. , twice an even part and more."""
COLOURS = ("default", "blue", "green", "yellow", "red")


def run_top(url: str, access: Access, *, interval_s: float, once: bool, as_json: bool) -> None:
    """Show the service until Ctrl-C, or once.

    Raises:
        ExpertMeshError: No router answers at the start.
    """
    views = _views(StatusAsker(url, access), interval_s)
    if once or as_json:
        for view in views:
            if once and not view.seconds:
                continue  # rates take two statuses
            if as_json:
                print(json.dumps(view.document()), flush=True)
            else:
                out_console().print(screen(view))
            if once:
                return
        return
    try:
        with Live(console=out_console(), screen=sys.stdout.isatty(), auto_refresh=False) as live:
            for view in views:
                live.update(screen(view), refresh=True)
    except KeyboardInterrupt:
        return


def screen(view: View) -> RenderableType:
    """Return what a person sees."""
    tokens = [r.generation_tokens_per_s for r in view.routers if r.generation_tokens_per_s]
    prompts = [r.prompt_tokens_per_s for r in view.routers if r.prompt_tokens_per_s]
    head = Text(
        f"{view.model}  epoch {view.placement_epoch}  tokens/s out {sum(tokens):,.1f}"
        f"  prompt {sum(prompts):,.1f}  TTFT {_percentiles(view.ttft_ms)}"
        f"  between tokens {_percentiles(view.itl_ms)}"
    )
    routers = table(
        "routers", "id", "state", ">run", ">wait", ">wait tokens", ">kv", ">slots", ">prompt/s",
        ">tokens/s", ">in steps", ">dispatch", "address",
    )  # fmt: skip
    for router in view.routers:
        routers.add_row(
            router.router_id,
            router.state,
            str(router.requests_running),
            str(router.requests_waiting),
            str(router.waiting_tokens),
            f"{router.kv_usage:.0%}",
            f"{router.state_slot_usage:.0%}",
            _number(router.prompt_tokens_per_s),
            _number(router.generation_tokens_per_s),
            _share(router.step_share),
            _share(router.dispatch_share),
            router.grpc_address,
        )
    if view.is_asleep:
        return Group(head, routers, Text("asleep: no expert groups until the first request"))
    if not view.groups:
        return Group(head, routers)
    balance = "" if view.balancedness is None else f", worst layer balanced {view.balancedness:.2f}"
    groups = table(
        f"expert groups (a cell a layer{balance})", "id", "state", ">busy", ">pairs/s",
        ">experts", ">memory", "way", "compute", "load by layer",
    )  # fmt: skip
    for group in view.groups:
        groups.add_row(
            group.group_id,
            group.state,
            _share(group.busy),
            _number(group.pairs_per_s),
            str(group.num_experts),
            format_bytes(group.resident_bytes),
            group.transport,
            group.compute,
            heat(group.layer_shares, len(view.groups)),
        )
    return Group(head, routers, groups)


def heat(shares: tuple[float, ...], num_groups: int) -> Text:
    """Return a cell for each layer: the darker, the larger a group's part of it."""
    text = Text()
    for share in shares:
        level = min(len(SHADES) - 1, round(share * num_groups * (len(SHADES) - 1) / 2))
        level = max(level, 1) if share else 0
        text.append(SHADES[level], COLOURS[level])
    return text


def _views(asker: StatusAsker, interval_s: float) -> Iterator[View]:
    """Yield a view now and every interval; a service that is gone for a while is waited for."""
    before: cluster_pb2.ClusterStatus | None = None
    asked_s = 0.0
    while True:
        try:
            now_s, status = time.monotonic(), asker.status()
        except (ServiceUnavailableError, DeadlineExceededError):
            if before is None:
                raise
        else:
            yield view_of(before, status, now_s - asked_s if before is not None else 0.0)
            before, asked_s = status, now_s
        time.sleep(interval_s)


def _percentiles(values: Mapping[str, float | None]) -> str:
    return (
        " / ".join("-" if value is None else f"{value:,.0f}" for value in values.values()) + " ms"
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.1f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"
