"""How the command line talks: exit codes, errors, tables; no ANSI unless a person watches."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from rich.console import Console
from rich.table import Table

from protos.errors import (
    DeadlineExceededError,
    ExpertMeshError,
    FieldError,
    RequestError,
    ServiceUnavailableError,
    SetupError,
    UnauthenticatedError,
)

EXIT_OK = 0
EXIT_USAGE = 2
EXIT_CONFIGURATION = 3
EXIT_UNREACHABLE = 4
EXIT_PARTIAL = 5
PIPE_WIDTH = 240
"""Columns of a table that no person watches: nothing is cut."""


def exit_code(error: ExpertMeshError) -> int:
    """Return the exit code for an error that ends a command."""
    if isinstance(error, SetupError):
        return EXIT_CONFIGURATION
    if isinstance(error, ServiceUnavailableError | DeadlineExceededError):
        return EXIT_UNREACHABLE
    if isinstance(error, RequestError):
        return EXIT_USAGE
    return EXIT_PARTIAL


def out_console() -> Console:
    """Return the console of results: stdout; plain and wide where stdout is no terminal."""
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    return Console(highlight=False, width=width)


def err_console() -> Console:
    """Return the console of progress and errors: stderr."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def fail(error: ExpertMeshError) -> NoReturn:
    """Print an error the way a person can act on it, and exit with its code."""
    console = err_console()
    console.print("error:", style="bold red", end=" ")
    console.print(error.message, markup=False)
    if isinstance(error, UnauthenticatedError):
        console.print("       --api-key KEY, or EXPERTMESH_API_KEY, sends one", markup=False)
    if isinstance(error, FieldError) and len(error.violations) > 3:
        for violation in error.violations[3:]:
            console.print(f"       {violation}", markup=False)
    sys.exit(exit_code(error))


@contextmanager
def errors_exit() -> Iterator[None]:
    """End the process with the right code when a command's body raises one of our errors."""
    try:
        yield
    except ExpertMeshError as error:
        fail(error)
    except BrokenPipeError:  # `expertmesh ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_OK)


def print_json(document: Any) -> None:
    """Print one JSON document on stdout."""
    print(json.dumps(document, indent=2, ensure_ascii=False))


def table(title: str, *columns: str) -> Table:
    """Return an empty table; columns that start with `>` hold numbers."""
    made = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column in columns:
        is_number = column.startswith(">")
        made.add_column(column.lstrip(">"), justify="right" if is_number else "left", no_wrap=True)
    return made
