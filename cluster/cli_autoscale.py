"""`expertmesh autoscale ...`: parses, calls `cluster.autoscale_*`, and no more."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from cluster.cli_options import DEFAULT_URL, ApiKey, AsJson, TlsCa, TlsCert, TlsKey, Url, access_of
from cluster.console import errors_exit

autoscale_app = typer.Typer(
    help="How many routers and expert groups there should be, and why.", no_args_is_help=True
)


@autoscale_app.command()
def explain(
    url: Url = DEFAULT_URL,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    api_key: ApiKey = None,
    last: Annotated[int, typer.Option(min=1, max=64, help="Decisions to show.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, a decision a line.")] = False,
) -> None:
    """Show the last decisions, the changes before them, and the numbers they rest on."""
    from cluster.autoscale_explain import ask_decisions, decision_line, print_decisions

    with errors_exit():
        answer = ask_decisions(url, access_of(tls_ca, tls_cert, tls_key, api_key), last)
        if as_json:
            for decision in answer.decisions:
                print(decision_line(decision))
            return
        print_decisions(f"autoscale {answer.mode}", answer.decisions, is_clock=True)


@autoscale_app.command()
def simulate(
    trace: Annotated[Path, typer.Option(help="CSV with a header, or JSON lines: t_s and figures.")],
    routers: Annotated[int, typer.Option(min=1, help="Routers at the start.")] = 1,
    groups: Annotated[int, typer.Option(min=0, help="Expert groups at the start.")] = 1,
    start: Annotated[float, typer.Option(min=0, help="Seconds a member takes to start.")] = 30.0,
    config: Annotated[
        Path | None, typer.Option(help="TOML or JSON file; its section autoscale is the policy.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Replay a load and show what would have been decided, and when."""
    from cluster.autoscale_explain import decision_line, print_decisions
    from cluster.autoscale_log import changes_something, decision_message
    from cluster.autoscale_loop import policy_of
    from cluster.autoscale_replay import read_trace, replay
    from cluster.config_loading import load_config

    with errors_exit():
        settings = load_config(env=os.environ, file=config).config
        policy = policy_of(
            settings.autoscale,
            routers=routers,
            groups=groups,
            max_num_seqs=settings.engine.max_num_seqs,
        )
        decisions = replay(read_trace(trace), policy, routers=routers, groups=groups, start_s=start)
        messages = [decision_message(decision, decision.at_s) for decision in decisions]
        if as_json:
            for message in messages:
                print(decision_line(message))
            return
        changes = [message for message in messages if changes_something(message)]
        title = f"{len(changes)} changes in {len(messages)} decisions"
        print_decisions(title, [*changes, messages[-1]], is_clock=False)
