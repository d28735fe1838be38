"""What an output folder says of its batch, without the service and without the input."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from cluster.batch.ledger import Ledger
from cluster.batch.outcomes import Counts
from cluster.batch.storage import Place
from protos.errors import ConfigurationError


def open_folder(output_uri: str) -> tuple[Ledger, dict[str, Any]]:
    """Return the ledger of a batch that was begun, and what it was begun with.

    Raises:
        ConfigurationError: No batch was begun there.
    """
    ledger = Ledger(Place.of(output_uri, "output"), "jsonl")
    job = ledger.begun_with() if ledger.is_begun else None
    if job is None:
        raise ConfigurationError("output", "must be the output folder of a batch", output_uri)
    return ledger, job


def mark_cancelled(output_uri: str) -> None:
    """Let an output folder say that its batch was cancelled; of one without a batch nothing."""
    ledger = Ledger(Place.of(output_uri, "output"), "jsonl")
    if ledger.is_begun and ledger.manifest() is None:
        ledger.cancel()


def list_folders(uri: str) -> list[dict[str, Any]]:
    """Return the status of every batch whose output is a folder of this one, by name."""
    place = Place.of(uri, "folder")
    scheme = uri.rstrip("/")
    found = [f"{scheme}/{name}" for name in place.folders()]
    return [
        folder_status(one) for one in found if Ledger(Place.of(one, "folder"), "jsonl").is_begun
    ]


def folder_status(output_uri: str) -> dict[str, Any]:
    """Return state, counts and configuration of a batch.

    Raises:
        ConfigurationError: No batch was begun there.
    """
    ledger, job = open_folder(output_uri)
    parts = ledger.noted_parts()
    state = "cancelled" if ledger.is_cancelled else "in_progress"
    return {
        "state": "completed" if ledger.manifest() is not None else state,
        "input": job["input"],
        "output": output_uri,
        "config_hash": job["config_hash"],
        "total": job["identity"]["input.rows"],
        **asdict(sum((part.counts for part in parts), Counts())),
        "parts_done": len(parts),
        "parts": job["num_parts"],
        "parts_repeated": ledger.num_repeated(),
    }
