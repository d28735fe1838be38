"""`expertmesh config`: what is set, whether it is right, and what may be set."""

from __future__ import annotations

import os

import typer

from cluster.cli_options import AsJson, ConfigFile
from cluster.config import shown, to_json_schema
from cluster.config_loading import load_config
from cluster.console import errors_exit, out_console, print_json, table

config_app = typer.Typer(help="Show, check and describe the configuration.", no_args_is_help=True)


@config_app.command("show")
def config_show(config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Show every setting, its value, and where it comes from."""
    with errors_exit():
        loaded = load_config(env=os.environ, file=config)
        values = shown(loaded.config)
        if as_json:
            print_json({k: {"value": v, "origin": loaded.origins[k]} for k, v in values.items()})
            return
        rows = table("", "setting", "value", "origin")
        for path, value in values.items():
            text = "unset" if value in (None, []) else str(value)
            rows.add_row(path, text, loaded.origins[path])
        out_console().print(rows)


@config_app.command("check")
def config_check(config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Check a file and the environment; exit code 3 and a list of mistakes if they are wrong."""
    with errors_exit():
        load_config(env=os.environ, file=config)
        if as_json:
            print_json({"ok": True})
        else:
            print("ok")


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON Schema of a configuration file."""
    print_json(to_json_schema())
