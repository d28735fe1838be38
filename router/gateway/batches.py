"""`BatchService`: create, read, list, cancel and watch batches.

Checks what clients send and says what the store answers; who runs the batches is in
`cluster.batch.supervisor`. Whose batches a call means is said by its API key, as for sessions.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.timestamp_pb2 import Timestamp

from protos.errors import BatchesOffError, InvalidFieldError, Violation
from protos.ids import is_valid_session_id, new_batch_name, session_id_rule
from protos.v1 import batch_pb2, batch_pb2_grpc
from protos.validate import raise_violations
from router.gateway.authentication import Callers
from router.gateway.batch_roots import BatchRoots
from router.state.batch_records import BatchRecord
from router.state.batches import BatchStore
from router.state.paging import MAX_PAGE_SIZE

DEFAULT_PAGE_SIZE = 100
DEFAULT_INTERVAL_S = 1.0
MIN_INTERVAL_S = 0.1
ROOT_OPTION = "--batch-root URI"
"""Of `serve`."""
MAX_ID_COLUMN_CHARS = 128
FORMATS = ("jsonl", "parquet")

Context = grpc.aio.ServicerContext[Any, Any]
_Rule = tuple[str, Callable[[float], bool]]


def _in(least: int, most: int) -> _Rule:
    return f"must be in [{least}, {most}]", lambda value: least <= value <= most


_OPTION_RULES: dict[str, _Rule] = {
    "limit": ("must be 1 or more", lambda value: value >= 1),
    "max_tokens": ("must be 1 or more", lambda value: value >= 1),
    "temperature": ("must be 0 or more", lambda value: math.isfinite(value) and value >= 0),
    "min_clients": _in(1, 64),
    "max_clients": _in(1, 64),
    "concurrency": _in(1, 1024),
    "part_rows": _in(1, 65536),
    "parts_in_flight": _in(1, 16),
    "max_retries": _in(0, 100),
    "max_failure_rate": _in(0, 1),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchTerms:
    """What batches a service takes."""

    model: str
    """That rows are asked of."""
    roots: BatchRoots
    """Empty: none are taken."""
    ttl_s: float
    """Seconds that a batch is kept after its last change."""


class BatchServicer(batch_pb2_grpc.BatchServiceServicer):
    """Serves the batches of the calls' tenants.

    Args:
        store: Where they are.
        terms: Which ones are taken.
        callers: Says whose they are; None: the unnamed tenant's.
    """

    def __init__(
        self, store: BatchStore, terms: BatchTerms, callers: Callers | None = None
    ) -> None:
        self._store = store
        self._terms = terms
        self._callers = callers or Callers()

    async def CreateBatch(
        self, request: batch_pb2.CreateBatchRequest, context: Context
    ) -> batch_pb2.Batch:
        """Make a batch that runs behind this call; see `batch.proto`."""
        terms, tenant = self._terms, self._tenant_of(context)
        if not terms.roots:
            raise BatchesOffError(ROOT_OPTION)
        found = _option_violations(request.options)
        for field in ("input_uri", "output_uri"):
            wrong = terms.roots.violation(field, getattr(request, field), tenant)
            found += [wrong] if wrong else []
        key = request.idempotency_key
        if key and not is_valid_session_id(key):
            found.append(Violation("idempotency_key", session_id_rule(), key))
        raise_violations(found)
        record = await self._store.create(
            tenant,
            new_batch_name(),
            model=terms.model,
            input_uri=request.input_uri,
            output_uri=request.output_uri,
            options=request.options.SerializeToString(deterministic=True),
            ttl_s=terms.ttl_s,
            idempotency_key=key,
        )
        return batch_message(record)

    async def GetBatch(
        self, request: batch_pb2.GetBatchRequest, context: Context
    ) -> batch_pb2.Batch:
        """Return a batch; see `batch.proto`."""
        record = await self._store.get(self._tenant_of(context), _checked(request.name))
        return batch_message(record)

    async def ListBatches(
        self, request: batch_pb2.ListBatchesRequest, context: Context
    ) -> batch_pb2.ListBatchesResponse:
        """Return one page of batches; see `batch.proto`."""
        if request.page_size > MAX_PAGE_SIZE:
            raise InvalidFieldError(
                "page_size", f"must be at most {MAX_PAGE_SIZE}", request.page_size
            )
        size = request.page_size or DEFAULT_PAGE_SIZE
        tenant = self._tenant_of(context)
        records, next_token = await self._store.list(tenant, size, request.page_token)
        return batch_pb2.ListBatchesResponse(
            batches=[batch_message(record) for record in records], next_page_token=next_token
        )

    async def CancelBatch(
        self, request: batch_pb2.CancelBatchRequest, context: Context
    ) -> batch_pb2.Batch:
        """Stop a batch; see `batch.proto`."""
        record = await self._store.cancel(self._tenant_of(context), _checked(request.name))
        return batch_message(record)

    async def WatchBatch(
        self, request: batch_pb2.WatchBatchRequest, context: Context
    ) -> AsyncIterator[batch_pb2.Batch]:
        """Answer with a batch now and whenever it has changed, until it has ended."""
        interval_s = request.interval_s or DEFAULT_INTERVAL_S
        if not interval_s >= MIN_INTERVAL_S:
            raise InvalidFieldError("interval_s", f"must be {MIN_INTERVAL_S} or more", interval_s)
        tenant, name = self._tenant_of(context), _checked(request.name)
        seen: BatchRecord | None = None
        while True:
            record = await self._store.get(tenant, name)
            if record != seen:
                yield batch_message(record)
            if record.state.has_ended:
                return
            seen = record
            await asyncio.sleep(interval_s)

    def _tenant_of(self, context: Context) -> str:
        return self._callers.tenant_of(context.invocation_metadata())


def batch_message(record: BatchRecord) -> batch_pb2.Batch:
    """Return a batch as its clients see it."""
    progress = record.progress
    message = batch_pb2.Batch(
        name=record.name,
        state=f"BATCH_STATE_{record.state.upper()}",
        model=record.model,
        input_uri=record.input_uri,
        output_uri=record.output_uri,
        rows_total=progress.rows_total,
        rows_done=progress.rows_done,
        rows_failed=progress.rows_failed,
        prompt_tokens=progress.prompt_tokens,
        completion_tokens=progress.completion_tokens,
        output_tokens_per_second=progress.tokens_per_s,
        starts=record.starts,
    )
    message.options.ParseFromString(record.options)
    times: tuple[tuple[Timestamp, int], ...] = (
        (message.create_time, record.created_ms),
        (message.update_time, record.updated_ms),
        (message.end_time, record.ended_ms),
        (message.eta, 0 if record.state.has_ended else progress.eta_ms),
    )
    for field, at_ms in times:
        if at_ms:
            field.FromMilliseconds(at_ms)
    if record.error:
        message.error.ParseFromString(record.error)
    return message


def _checked(name: str) -> str:
    if not is_valid_session_id(name):
        raise InvalidFieldError("name", session_id_rule(), name)
    return name


def _option_violations(options: batch_pb2.BatchOptions) -> list[Violation]:
    """Return the options that are out of range."""
    found = []
    for descriptor, value in options.ListFields():
        rule = _OPTION_RULES.get(descriptor.name)
        if rule is not None and not rule[1](value):
            found.append(Violation(f"options.{descriptor.name}", rule[0], value))
    fewest, most = options.min_clients, options.max_clients
    if options.HasField("max_clients") and fewest > most:
        rule_text = f"must be at most options.max_clients ({most})"
        found.append(Violation("options.min_clients", rule_text, fewest))
    if options.HasField("format") and options.format not in FORMATS:
        rule_text = f"must be one of {', '.join(FORMATS)}"
        found.append(Violation("options.format", rule_text, options.format))
    if options.HasField("id_column") and not 1 <= len(options.id_column) <= MAX_ID_COLUMN_CHARS:
        rule_text = f"must have 1 to {MAX_ID_COLUMN_CHARS} characters"
        found.append(Violation("options.id_column", rule_text, options.id_column))
    return found
