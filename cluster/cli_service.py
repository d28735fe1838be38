"""`expertmesh service`: `serve` in the background of a cluster's head."""

from __future__ import annotations

from typing import Annotated

import typer

from cluster.console import errors_exit

service_app = typer.Typer(
    help="Run `serve` in the background, for as long as Ray runs on this machine.",
    no_args_is_help=True,
)


@service_app.command("start", context_settings={"ignore_unknown_options": True})
def service_start(
    arguments: Annotated[list[str], typer.Argument(help="Those of `serve`, after --.")],
) -> None:
    """Start `serve` in the background; ends the one that runs first."""
    from cluster.supervisor import start

    with errors_exit():
        print(f"started, log: {start(arguments)}")


@service_app.command("watch")
def service_watch() -> None:
    """On a machine without `serve`: when Ray has gone, clear up what it left."""
    from cluster.supervisor import start

    with errors_exit():
        print(f"watching, log: {start([])}")


@service_app.command("stop")
def service_stop() -> None:
    """End the service in the background: running requests finish first."""
    from cluster.supervisor import stop

    with errors_exit():
        print("stopped" if stop() else "no service runs here")
