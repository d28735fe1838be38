"""`expertmesh scale` and `expertmesh drain`: parse, call `cluster.scale_commands`, and no more."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from cluster.cli_options import DEFAULT_URL, ApiKey, AsJson, TlsCa, TlsCert, TlsKey, Url, access_of
from cluster.console import EXIT_PARTIAL, errors_exit

scale_app = typer.Typer()


@scale_app.command()
def scale(
    expert_groups: Annotated[
        int | None, typer.Option(help="Expert groups that there are to be.", min=1)
    ] = None,
    routers: Annotated[int | None, typer.Option(help="Routers likewise.", min=1)] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Return when it is so.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds to wait at most.", min=0)] = 600.0,
    url: Url = DEFAULT_URL,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Change the number of expert groups and routers of a running service, under traffic.

    Without a number it shows what is wanted and how far it is. Exit code 5 if the service was not
    as wanted when `--wait` ended.
    """
    from cluster.scale_commands import Wanted, scale_service

    with errors_exit():
        access = access_of(tls_ca, tls_cert, tls_key, api_key)
        wanted = Wanted(expert_groups=expert_groups, routers=routers)
        is_done = scale_service(url, access, wanted, timeout if wait else None, as_json=as_json)
    if not is_done:
        sys.exit(EXIT_PARTIAL)


@scale_app.command()
def drain(
    target: Annotated[str, typer.Argument(help="A router or an expert group.")],
    timeout: Annotated[
        float, typer.Option(help="Seconds that it gets; 0: as the service is configured.", min=0)
    ] = 0.0,
    url: Url = DEFAULT_URL,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Let a router finish its requests, or an expert group hand over its experts, and leave.

    The service goes on with one router or group less. Exit code 5 if requests were left; their
    clients go on with another router.
    """
    from cluster.scale_commands import drain_member

    with errors_exit():
        access = access_of(tls_ca, tls_cert, tls_key, api_key)
        left = drain_member(url, access, target, timeout, as_json=as_json)
    if left:
        sys.exit(EXIT_PARTIAL)
