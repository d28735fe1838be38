"""What a batch that the service runs is, as values. No Redis here.

Words: a *driver* is the process that asks a batch's rows; a *lease* is the right of one `serve` to
have one driver for a batch, and its *epoch* counts the leases that the batch has had: what an
earlier holder still writes is refused (it is *fenced*).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any

from protos.errors import InternalError

RECORD_VERSION = 1


class BatchState(StrEnum):
    """How far a batch is; the names of OpenAI's batches."""

    VALIDATING = "validating"
    """Waits for its turn, or its input is being read."""
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    """All rows are committed, the manifest is not."""
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"

    @property
    def has_ended(self) -> bool:
        """Whether it stays as it is."""
        return self in (BatchState.COMPLETED, BatchState.FAILED, BatchState.CANCELLED)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchProgress:
    """What a driver has done; all runs together, unless said otherwise."""

    rows_total: int = 0
    """0: not counted yet."""
    rows_done: int = 0
    rows_failed: int = 0
    """Of the done ones."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    tokens_per_s: float = 0.0
    """Generated ones, of the last run."""
    eta_ms: int = 0
    """Milliseconds since 1970; 0: not known."""

    @property
    def tokens_per_row(self) -> float | None:
        """Prompt and output, mean of the done rows; None: there are none."""
        if not self.rows_done:
            return None
        return (self.prompt_tokens + self.completion_tokens) / self.rows_done


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRecord:
    """A batch as a reader sees it."""

    tenant: str
    name: str
    model: str
    """That it was made for: only its services drive the batch."""
    state: BatchState
    input_uri: str
    output_uri: str
    options: bytes
    """The serialised `BatchOptions`."""
    created_ms: int
    """Server's clock, milliseconds since 1970."""
    updated_ms: int
    """Of the last write."""
    ended_ms: int
    """0: it has not ended."""
    progress: BatchProgress
    error: bytes
    """A serialised `google.rpc.Status`: why it failed, or last stumbled; empty: nothing."""
    starts: int
    """Of its driver."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLease:
    """The right to drive one batch."""

    tenant: str
    name: str
    model: str
    token: bytes
    """What the server compares."""
    epoch: int
    lease_s: float
    """Seconds that it lasts beyond each update."""


def record_of(tenant: str, name: str, found: Mapping[bytes, bytes]) -> BatchRecord | None:
    """Return the record in the fields of its hash; None when there are none.

    Raises:
        InternalError: It is of another version.
    """
    if not found:
        return None
    if int(found[b"v"]) != RECORD_VERSION:
        raise InternalError(f"batch record of version {int(found[b'v'])}, ours is {RECORD_VERSION}")
    return BatchRecord(
        tenant=tenant,
        name=name,
        model=found[b"model"].decode(),
        state=BatchState(found[b"state"].decode()),
        input_uri=found[b"input"].decode(),
        output_uri=found[b"output"].decode(),
        options=found[b"options"],
        created_ms=int(found[b"created_ms"]),
        updated_ms=int(found[b"updated_ms"]),
        ended_ms=int(found.get(b"ended_ms", 0)),
        progress=_progress_of(found),
        error=found.get(b"error", b""),
        starts=int(found.get(b"starts", 0)),
    )


def progress_fields(progress: BatchProgress) -> list[str | float]:
    """Return names and values in turn, as a script takes them."""
    pairs: list[str | float] = []
    for one in fields(BatchProgress):
        pairs += [one.name, getattr(progress, one.name)]
    return pairs


def _progress_of(found: Mapping[bytes, bytes]) -> BatchProgress:
    values: dict[str, Any] = {}
    for one in fields(BatchProgress):
        if (raw := found.get(one.name.encode())) is not None:
            values[one.name] = float(raw) if one.name == "tokens_per_s" else int(raw)
    return BatchProgress(**values)
