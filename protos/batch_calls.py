"""What `Client` and `AsyncClient` can do with batches that the service runs."""

from __future__ import annotations

import asyncio
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Literal, TypedDict, Unpack

import grpc

from protos.requests import PAGE_SIZE
from protos.retry import Attempts
from protos.routers import Router, Routers
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


class BatchCalls(ABC):
    """The part of `Client` for batches."""

    _routers: Routers

    def create_batch(
        self,
        input_uri: str,
        output_uri: str,
        *,
        idempotency_key: str = "",
        **options: Unpack[BatchOptions],
    ) -> batch_pb2.Batch:
        """Have the service run a batch; returns at once.

        Without an idempotency key this call draws one, so that sending it again makes no second
        batch.
        """
        request = _create_request(input_uri, output_uri, idempotency_key, options)
        return self._batch(lambda router: router.batches.CreateBatch, request)

    def get_batch(self, name: str) -> batch_pb2.Batch:
        """Return a batch as it is now."""
        request = batch_pb2.GetBatchRequest(name=name)
        return self._batch(lambda router: router.batches.GetBatch, request)

    def list_batches(self, page_size: int = PAGE_SIZE) -> Iterator[batch_pb2.Batch]:
        """Yield all batches, the newest first, asking page by page."""
        request = batch_pb2.ListBatchesRequest(page_size=page_size)
        while True:
            page = self._unary(lambda router: router.batches.ListBatches, request)
            yield from page.batches
            request.page_token = page.next_page_token
            if not request.page_token:
                return

    def cancel_batch(self, name: str) -> batch_pb2.Batch:
        """Stop a batch; return it as it is then, which may be on its way to an end."""
        request = batch_pb2.CancelBatchRequest(name=name)
        return self._batch(lambda router: router.batches.CancelBatch, request)

    def watch_batch(self, name: str, interval_s: float = 1.0) -> Iterator[batch_pb2.Batch]:
        """Yield a batch now and whenever it has changed, until it has ended.

        Goes on at another router where one dies.
        """
        request = batch_pb2.WatchBatchRequest(name=name, interval_s=interval_s)
        attempts, is_open = self._attempts(WATCH_TIMEOUT_S), False
        while True:
            router = self._routers.current()
            call = router.batches.WatchBatch(request, timeout=WATCH_TIMEOUT_S)
            try:
                for batch in call:
                    is_open = True
                    attempts = self._attempts(WATCH_TIMEOUT_S)
                    yield batch
                return
            except grpc.RpcError as error:
                if _is_only_long(error, is_open=is_open):
                    continue
                wait_s = attempts.wait_before_next(error, is_open=is_open, can_resume=True)
                self._routers.failed(router)
                time.sleep(wait_s)
            finally:
                call.cancel()

    def _batch(self, method: Callable[[Router], Any], request: Any) -> batch_pb2.Batch:
        answer: batch_pb2.Batch = self._unary(method, request)
        return answer

    @abstractmethod
    def _unary(self, method: Callable[[Router], Any], request: Any) -> Any:
        """Call a router, and another where one dies."""

    @abstractmethod
    def _attempts(self, timeout_s: float) -> Attempts:
        """Return the tries of one call."""


class AsyncBatchCalls(ABC):
    """The part of `AsyncClient` for batches; see `BatchCalls`."""

    _routers: Routers

    async def create_batch(
        self,
        input_uri: str,
        output_uri: str,
        *,
        idempotency_key: str = "",
        **options: Unpack[BatchOptions],
    ) -> batch_pb2.Batch:
        """Have the service run a batch; see `Client.create_batch`."""
        request = _create_request(input_uri, output_uri, idempotency_key, options)
        return await self._batch(lambda router: router.batches.CreateBatch, request)

    async def get_batch(self, name: str) -> batch_pb2.Batch:
        """Return a batch as it is now."""
        request = batch_pb2.GetBatchRequest(name=name)
        return await self._batch(lambda router: router.batches.GetBatch, request)

    async def list_batches(self, page_size: int = PAGE_SIZE) -> AsyncIterator[batch_pb2.Batch]:
        """Yield all batches, the newest first, asking page by page."""
        request = batch_pb2.ListBatchesRequest(page_size=page_size)
        while True:
            page = await self._unary(lambda router: router.batches.ListBatches, request)
            for batch in page.batches:
                yield batch
            request.page_token = page.next_page_token
            if not request.page_token:
                return

    async def cancel_batch(self, name: str) -> batch_pb2.Batch:
        """Stop a batch; see `Client.cancel_batch`."""
        request = batch_pb2.CancelBatchRequest(name=name)
        return await self._batch(lambda router: router.batches.CancelBatch, request)

    async def watch_batch(
        self, name: str, interval_s: float = 1.0
    ) -> AsyncIterator[batch_pb2.Batch]:
        """Yield a batch now and whenever it has changed; see `Client.watch_batch`."""
        request = batch_pb2.WatchBatchRequest(name=name, interval_s=interval_s)
        attempts, is_open = self._attempts(WATCH_TIMEOUT_S), False
        while True:
            router = self._routers.current()
            call = router.batches.WatchBatch(request, timeout=WATCH_TIMEOUT_S)
            try:
                async for batch in call:
                    is_open = True
                    attempts = self._attempts(WATCH_TIMEOUT_S)
                    yield batch
                return
            except grpc.RpcError as error:
                if _is_only_long(error, is_open=is_open):
                    continue
                wait_s = attempts.wait_before_next(error, is_open=is_open, can_resume=True)
                self._routers.failed(router)
                await asyncio.sleep(wait_s)
            finally:
                call.cancel()

    async def _batch(self, method: Callable[[Router], Any], request: Any) -> batch_pb2.Batch:
        answer: batch_pb2.Batch = await self._unary(method, request)
        return answer

    @abstractmethod
    async def _unary(self, method: Callable[[Router], Any], request: Any) -> Any:
        """Call a router, and another where one dies."""

    @abstractmethod
    def _attempts(self, timeout_s: float) -> Attempts:
        """Return the tries of one call."""


def _create_request(
    input_uri: str, output_uri: str, idempotency_key: str, options: BatchOptions
) -> batch_pb2.CreateBatchRequest:
    values: dict[str, Any] = dict(options)
    return batch_pb2.CreateBatchRequest(
        input_uri=input_uri,
        output_uri=output_uri,
        options=batch_pb2.BatchOptions(**values),
        idempotency_key=idempotency_key or uuid.uuid4().hex,
    )


def _is_only_long(error: grpc.RpcError, *, is_open: bool) -> bool:
    """Whether a stream ended because it had lasted `WATCH_TIMEOUT_S`."""
    return is_open and error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
