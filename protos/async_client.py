"""`protos.client.Client` for an event loop; import it from there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Unpack

import grpc

from protos.batch_calls import BatchCalls
from protos.calls import Ask, Awaiting, Pages, Stream, T
from protos.events import Completion
from protos.generation_calls import GenerationCalls
from protos.requests import ChatMessages, GenerateOptions, Prompt
from protos.retry import Attempts, ClientConfig
from protos.routers import (
    DEFAULT_ADDRESS,
    LEARN_TIMEOUT_S,
    KnownRouters,
    RouterConnection,
    aio_channels,
)
from protos.session_calls import SessionCalls
from protos.tls import Access, ClientTls
from protos.v1 import cluster_pb2


class AsyncClient(GenerationCalls, SessionCalls, BatchCalls, Awaiting):
    """`Client` for an event loop; make and use it inside the loop."""

    def __init__(
        self,
        address: str | Sequence[str] = DEFAULT_ADDRESS,
        config: ClientConfig | None = None,
        *,
        tls: ClientTls | None = None,
        api_key: str | None = None,
    ) -> None:
        self._config = config or ClientConfig()
        self._routers = KnownRouters(address, aio_channels(Access(tls=tls, api_key=api_key)))
        self._learning: asyncio.Task[None] | None = None

    @property
    def addresses(self) -> list[str]:
        """The routers that are known."""
        return self._routers.addresses

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections; running calls are cancelled."""
        if self._learning is not None:
            self._learning.cancel()
        for channel in self._routers.close():
            await channel.close()

    async def complete(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Completion:
        """Return a whole generation; see `generate`."""
        completion = Completion()
        async for event in self.generate(prompt, **options):
            completion.add(event)
        return completion

    async def chat(self, messages: ChatMessages, **options: Unpack[GenerateOptions]) -> Completion:
        """Return the answer to a chat; see `generate`."""
        return await self.complete(messages, **options)

    async def _ask(self, ask: Ask[T]) -> T:
        attempts = Attempts(self._config, self._routers)
        while True:
            method = ask.method(attempts.next_router())
            try:
                return ask.read(await method(ask.request, timeout=attempts.left_s()))
            except grpc.RpcError as error:
                await asyncio.sleep(attempts.failed(error))

    async def _stream(self, stream: Stream[T]) -> AsyncIterator[T]:
        attempts = Attempts(self._config, self._routers, stream)
        while True:
            router = attempts.next_router()
            call = stream.method(router)(stream.next_request(), timeout=attempts.left_s())
            try:
                async for message in call:
                    attempts.arrived()
                    if attempts.should_learn():  # beside the stream
                        self._learning = asyncio.create_task(self._learn(router))
                    for news in stream.take(message):
                        yield news
                return
            except grpc.RpcError as error:
                await asyncio.sleep(attempts.failed(error))
            finally:
                call.cancel()

    async def _pages(self, pages: Pages[T]) -> AsyncIterator[T]:
        has_more = True
        while has_more:
            page = await self._ask(pages.page())
            for news in pages.read(page):
                yield news
            has_more = pages.turn(page)

    async def _learn(self, router: RouterConnection) -> None:
        request = cluster_pb2.GetStatusRequest()
        with suppress(grpc.RpcError):
            status = await router.cluster.GetStatus(request, timeout=LEARN_TIMEOUT_S)
            self._routers.learn(status, router)
