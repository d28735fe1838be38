"""The command line `expertmesh`: its commands, each in a file of its area.

Those files parse, call and print; they decide nothing else, and import what is slow when called.
"""

from __future__ import annotations

import typer

from cluster.cli_autoscale import autoscale_app
from cluster.cli_batch import batch_app
from cluster.cli_cluster import doctor, down, up
from cluster.cli_config import config_app
from cluster.cli_scale import scale_app
from cluster.cli_serve import serve
from cluster.cli_service import service_app
from cluster.cli_sessions import sessions_app
from cluster.cli_status import status, top
from cluster.cli_talk import chat, complete

app = typer.Typer(
    name="expertmesh",
    help="Serve Qwen3.5 mixture-of-experts models from a Ray cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(config_app, name="config")
app.add_typer(batch_app, name="batch")
app.add_typer(sessions_app, name="sessions")
app.add_typer(autoscale_app, name="autoscale")
app.add_typer(service_app, name="service")
app.add_typer(scale_app)
for command in (up, down, serve, chat, complete, status, top, doctor):
    app.command()(command)


@app.command()
def version() -> None:
    """Print the version."""
    from importlib.metadata import version as installed

    print(f"expertmesh {installed('expertmesh')}")


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
