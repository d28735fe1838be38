"""`expertmesh status` and `top`: one look at a running service, or one after another."""

from __future__ import annotations

from typing import Annotated

import typer

from cluster.cli_options import DEFAULT_URL, ApiKey, AsJson, TlsCa, TlsCert, TlsKey, Url, access_of
from cluster.console import errors_exit, print_json


def status(
    url: Url = DEFAULT_URL,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Show routers and expert groups of a running service."""
    from cluster.status import ask_status, message_document, print_status

    with errors_exit():
        answer = ask_status(url, access_of(tls_ca, tls_cert, tls_key, api_key))
        if as_json:
            print_json(message_document(answer))
        else:
            print_status(answer)


def top(
    url: Url = DEFAULT_URL,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    api_key: ApiKey = None,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Look twice, print once, and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, a look a line.")] = False,
) -> None:
    """Watch routers and expert groups: queues, KV, tokens/s, latencies, load by layer."""
    from cluster.top_screen import run_top

    with errors_exit():
        access = access_of(tls_ca, tls_cert, tls_key, api_key)
        run_top(url, access, interval_s=interval, once=once, as_json=as_json)
