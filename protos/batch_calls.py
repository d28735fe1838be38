"""What both clients can do with batches that the service runs."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from typing import Any, Literal, TypedDict, Unpack

from protos.calls import Ask, Pages, Stream, asks, lists, streams
from protos.requests import PAGE_SIZE
from protos.routers import RouterConnection
from protos.v1 import batch_pb2

ENDED = frozenset(
    (
        batch_pb2.BATCH_STATE_COMPLETED,
        batch_pb2.BATCH_STATE_FAILED,
        batch_pb2.BATCH_STATE_CANCELLED,
    )
)
"""States in which a batch stays."""
WATCH_TIMEOUT_S = 1800.0
"""Of one stream; a batch that lasts longer is watched by another."""


class BatchOptions(TypedDict, total=False):
    """Fields of `batch_pb2.BatchOptions`; `batch.proto` says what each means."""

    id_column: str
    format: Literal["jsonl", "parquet"]
    limit: int
    max_tokens: int
    temperature: float
    seed: int
    min_clients: int
    max_clients: int
    concurrency: int
    part_rows: int
    parts_in_flight: int
    max_retries: int
    max_failure_rate: float


class BatchCalls:
    """The part of `Client` and `AsyncClient` for batches."""

    @asks
    def create_batch(
        self,
        input_uri: str,
        output_uri: str,
        *,
        idempotency_key: str = "",
        **options: Unpack[BatchOptions],
    ) -> Ask[batch_pb2.Batch]:
        """Have the service run a batch; returns at once.

        Without an idempotency key this call draws one, so that sending it again makes no second
        batch.
        """
        values: dict[str, Any] = dict(options)
        request = batch_pb2.CreateBatchRequest(
            input_uri=input_uri,
            output_uri=output_uri,
            options=batch_pb2.BatchOptions(**values),
            idempotency_key=idempotency_key or uuid.uuid4().hex,
        )
        return Ask(lambda router: router.batches.CreateBatch, request)

    @asks
    def get_batch(self, name: str) -> Ask[batch_pb2.Batch]:
        """Return a batch as it is now."""
        request = batch_pb2.GetBatchRequest(name=name)
        return Ask(lambda router: router.batches.GetBatch, request)

    @lists
    def list_batches(self, page_size: int = PAGE_SIZE) -> Pages[batch_pb2.Batch]:
        """Yield all batches, the newest first, asking page by page."""
        request = batch_pb2.ListBatchesRequest(page_size=page_size)
        return Pages(lambda router: router.batches.ListBatches, request, lambda page: page.batches)

    @asks
    def cancel_batch(self, name: str) -> Ask[batch_pb2.Batch]:
        """Stop a batch; return it as it is then, which may be on its way to an end."""
        request = batch_pb2.CancelBatchRequest(name=name)
        return Ask(lambda router: router.batches.CancelBatch, request)

    @streams
    def watch_batch(self, name: str, interval_s: float = 1.0) -> Stream[batch_pb2.Batch]:
        """Yield a batch now and whenever it has changed, until it has ended.

        Goes on at another router where one dies.
        """
        return BatchWatch(batch_pb2.WatchBatchRequest(name=name, interval_s=interval_s))


class BatchWatch(Stream[batch_pb2.Batch]):
    """A batch's changes. Every stream of them begins with the batch as it is."""

    timeout_s = WATCH_TIMEOUT_S
    is_endless = True

    def __init__(self, request: batch_pb2.WatchBatchRequest) -> None:
        self._request = request

    def method(self, router: RouterConnection) -> Any:
        """Return what takes the request."""
        return router.batches.WatchBatch

    def next_request(self) -> batch_pb2.WatchBatchRequest:
        """Return the request, which is always the same."""
        return self._request

    def take(self, message: batch_pb2.Batch) -> Iterable[batch_pb2.Batch]:
        """Return the message."""
        return (message,)
