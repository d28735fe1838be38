"""A batch run in the foreground, and what it prints."""

from __future__ import annotations

import sys
from typing import Any

from cluster.batch.drive import Result, run_batch
from cluster.batch.dry_run import Estimate
from cluster.batch.options import BatchOptions
from cluster.console import err_console, out_console, print_json, table
from cluster.logs import configure_logging
from cluster.stopping import StopRequested, StopSignals
from protos.errors import InternalError


def run_in_foreground(options: BatchOptions) -> Result | None:
    """Run a batch until it ends; None: a signal ended it, and it can be resumed.

    Raises:
        ExpertMeshError: From `run_batch`.
    """
    configure_logging("batch", verbose=False)
    signals = StopSignals()
    signals.catch()
    stdout, sys.stdout = sys.stdout, sys.stderr  # Ray prints what its processes print
    try:
        return run_batch(options, signals.catch)
    except StopRequested:
        signals.ignore()
        return None
    except OSError as error:  # a full disk, an object store that is away
        raise InternalError(f"a file of the batch: {error}") from error
    finally:
        sys.stdout = stdout


def print_result(result: Result, options: BatchOptions, *, as_json: bool) -> None:
    """Print how a run ended."""
    shown = {k: v for k, v in result.manifest.items() if k not in ("parts", "identity")}
    shown = {**shown, "state": result.state, "output": options.output_uri}
    if as_json:
        print_json(shown)
    else:
        print_pairs(shown)
    if result.state == "stopped":
        text = f"stopped: more than {options.max_failure_rate:.2%} of all rows failed"
        err_console().print(text, style="bold red", markup=False)


def print_folder(status: dict[str, Any], *, as_json: bool) -> None:
    """Print what an output folder says."""
    if as_json:
        print_json(status)
    else:
        print_pairs(status)


def print_folders(found: list[dict[str, Any]], *, as_json: bool) -> None:
    """Print a line for each batch."""
    if as_json:
        print_json(found)
        return
    rows = table("", "output", "state", ">rows", ">total", ">failed")
    for one in found:
        numbers = (str(one[name]) for name in ("rows", "total", "failed"))
        rows.add_row(one["output"], one["state"], *numbers)
    out_console().print(rows)


def print_estimate(estimate: Estimate, price_per_million: float | None, *, as_json: bool) -> None:
    """Print what a batch would cost."""
    shown = estimate.document(price_per_million)
    if as_json:
        print_json(shown)
    else:
        print_pairs(shown)


def print_pairs(shown: dict[str, Any]) -> None:
    """Print names and values."""
    rows = table("", "", "")
    for name, value in shown.items():
        rows.add_row(name, "-" if value is None else str(value))
    out_console().print(rows)
