"""Batches that the service runs, as the command line asks for, watches and shows them."""

from __future__ import annotations

import time
from collections.abc import Iterable
from datetime import UTC
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from cluster.batch.console import print_pairs
from cluster.batch.progress import ProgressReport
from cluster.batch.storage import absolute_uri
from cluster.console import EXIT_OK, EXIT_PARTIAL, err_console, exit_code, out_console, print_json
from cluster.console import table as new_table
from protos.batch_calls import BatchOptions
from protos.client import Client
from protos.errors import from_status
from protos.tls import Access
from protos.v1 import batch_pb2


def connect(url: str, access: Access) -> Client:
    """Return a client; use it as a context."""
    return Client(url, tls=access.tls, api_key=access.api_key)


def submit(client: Client, input_uri: str, output_uri: str, options: BatchOptions) -> str:
    """Submit a batch and return its name; a relative path is taken from here."""
    return client.create_batch(absolute_uri(input_uri), absolute_uri(output_uri), **options).name


def watch(client: Client, name: str) -> batch_pb2.Batch:
    """Show how far a batch is until it has ended; return it."""
    seen = _Seen(client.get_batch(name))
    with ProgressReport(seen, err_console(), client):
        for batch in client.watch_batch(name):
            seen.batch = batch
    return seen.batch


def end_code(batch: batch_pb2.Batch) -> int:
    """Return the exit code for a batch that has ended."""
    if batch.state == batch_pb2.BATCH_STATE_FAILED:
        return exit_code(from_status(batch.error))
    is_whole = batch.state == batch_pb2.BATCH_STATE_COMPLETED and not batch.rows_failed
    return EXIT_OK if is_whole else EXIT_PARTIAL


def print_batch(batch: batch_pb2.Batch, *, as_json: bool) -> None:
    """Print a batch."""
    shown = document(batch)
    if as_json:
        print_json(shown)
    else:
        print_pairs({name: value for name, value in shown.items() if value is not None})


def print_batches(batches: Iterable[batch_pb2.Batch], *, as_json: bool) -> None:
    """Print a line for each batch."""
    found = [document(batch) for batch in batches]
    if as_json:
        print_json(found)
        return
    rows = new_table("", "name", "state", ">rows", ">total", ">failed", "created", "output")
    for one in found:
        numbers = (str(one[name]) for name in ("rows", "total", "failed"))
        rows.add_row(one["name"], one["state"], *numbers, one["created"], one["output"])
    out_console().print(rows)


def document(batch: batch_pb2.Batch) -> dict[str, Any]:
    """Return a batch as JSON, under the names of `batch status FOLDER`."""
    return {
        "name": batch.name,
        "state": _state(batch),
        "model": batch.model,
        "input": batch.input_uri,
        "output": batch.output_uri,
        "total": batch.rows_total,
        "rows": batch.rows_done,
        "failed": batch.rows_failed,
        "prompt_tokens": batch.prompt_tokens,
        "completion_tokens": batch.completion_tokens,
        "tokens_per_s": round(batch.output_tokens_per_second, 1),
        "starts": batch.starts,
        "created": _time(batch.create_time),
        "updated": _time(batch.update_time),
        "ended": _time(batch.end_time),
        "eta": _time(batch.eta),
        "error": batch.error.message or None,
    }


class _Seen:
    """A batch as it was last seen, as a `ProgressReport` shows it."""

    def __init__(self, batch: batch_pb2.Batch) -> None:
        self.batch = batch

    def document(self) -> dict[str, Any]:
        """Return the numbers; see `Meter.document`."""
        batch, eta_s = self.batch, None
        now_s = time.time()
        if batch.HasField("eta"):
            eta_s = max(0, round(batch.eta.ToMilliseconds() / 1000 - now_s))
        return {
            "state": _state(batch),
            "rows": batch.rows_done,
            "total": batch.rows_total,
            "failed": batch.rows_failed,
            "prompt_tokens": batch.prompt_tokens,
            "completion_tokens": batch.completion_tokens,
            "tokens_per_s": round(batch.output_tokens_per_second, 1) or None,
            "eta_s": eta_s,
            "elapsed_s": round(now_s - batch.create_time.ToMilliseconds() / 1000, 1),
        }


def _state(batch: batch_pb2.Batch) -> str:
    return batch_pb2.BatchState.Name(batch.state).removeprefix("BATCH_STATE_").lower()


def _time(at: Timestamp) -> str | None:
    if not at.seconds:
        return None
    return at.ToDatetime(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
