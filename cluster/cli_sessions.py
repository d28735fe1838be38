"""`expertmesh sessions ...`: parses, calls `cluster.sessions`, and no more."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from cluster.cli_options import DEFAULT_URL, ApiKey, AsJson, TlsCa, TlsCert, TlsKey, Url, access_of
from cluster.console import EXIT_PARTIAL, errors_exit

sessions_app = typer.Typer(
    help="List, show, fork and delete the conversations that a service keeps.",
    no_args_is_help=True,
)
SessionId = Annotated[str, typer.Argument(help="Id of a session.")]


@sessions_app.command("list")
def sessions_list(
    url: Url = DEFAULT_URL,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """List sessions by id."""
    from cluster.sessions import list_sessions

    with errors_exit():
        list_sessions(url, access_of(tls_ca, tls_cert, tls_key, api_key), as_json=as_json)


@sessions_app.command("show")
def sessions_show(
    session_id: SessionId,
    url: Url = DEFAULT_URL,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Show a session and its turns."""
    from cluster.sessions import show_session

    with errors_exit():
        access = access_of(tls_ca, tls_cert, tls_key, api_key)
        show_session(url, access, session_id, as_json=as_json)


@sessions_app.command("fork")
def sessions_fork(
    session_id: SessionId,
    new_id: Annotated[str | None, typer.Option(help="Id of the new one; unset: drawn.")] = None,
    at_tokens: Annotated[
        int | None, typer.Option(help="Tokens to take; unset: all of finished turns.")
    ] = None,
    url: Url = DEFAULT_URL,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Make a session that begins as another one."""
    from cluster.sessions import fork_session

    with errors_exit():
        access = access_of(tls_ca, tls_cert, tls_key, api_key)
        fork_session(url, access, session_id, new_id, at_tokens, as_json=as_json)


@sessions_app.command("delete")
def sessions_delete(
    session_ids: Annotated[list[str], typer.Argument(help="Ids of sessions.")],
    url: Url = DEFAULT_URL,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Delete sessions; exit code 5 if one of them was not there."""
    from cluster.sessions import delete_sessions

    with errors_exit():
        access = access_of(tls_ca, tls_cert, tls_key, api_key)
        is_whole = delete_sessions(url, access, session_ids, as_json=as_json)
    if not is_whole:
        sys.exit(EXIT_PARTIAL)
