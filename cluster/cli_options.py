"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from protos.tls import Access

ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="TOML or JSON file with these settings.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Url = Annotated[
    str,
    typer.Option(
        "--url", "--address", help="host:port of a router; grpcs://host:port for a public CA."
    ),
]
DEFAULT_URL = "127.0.0.1:50051"
TlsCa = Annotated[
    str | None,
    typer.Option(
        envvar="EXPERTMESH_TLS_CA", help="CA of the router's certificate (PEM); set: use TLS."
    ),
]
TlsCert = Annotated[
    str | None, typer.Option(envvar="EXPERTMESH_TLS_CERT", help="Own certificate (PEM).")
]
TlsKey = Annotated[str | None, typer.Option(envvar="EXPERTMESH_TLS_KEY", help="Its key (PEM).")]
ApiKey = Annotated[
    str | None,
    typer.Option(
        envvar="EXPERTMESH_API_KEY",
        help="Sent with every call; the environment hides it from other users' process lists.",
    ),
]


def access_of(
    tls_ca: str | None, tls_cert: str | None, tls_key: str | None, api_key: str | None
) -> Access:
    """Return how a command calls a router; TLS where a CA or a certificate is given.

    Raises:
        ConfigurationError: A file that cannot be read.
    """
    from protos.tls import Access, ClientTls

    is_tls = tls_ca is not None or tls_cert is not None or tls_key is not None
    tls = ClientTls.from_files(tls_ca, tls_cert, tls_key) if is_tls else None
    return Access(tls=tls, api_key=api_key or None)


def clients_of(text: str) -> tuple[int, int]:
    """Return the fewest and the most clients of `MIN:MAX`, or of one number for both."""
    from protos.errors import ConfigurationError

    fewest, _, most = text.partition(":")
    try:
        return int(fewest), int(most or fewest)
    except ValueError:
        raise ConfigurationError("batch.clients", "must be MIN:MAX", text) from None
