"""The Python client: text in, typed events out, errors as the classes of `protos.errors`.

    with Client("127.0.0.1:50051") as client:
        for event in client.generate("Once upon a time", max_tokens=64):
            if isinstance(event, Delta):
                print(event.text, end="", flush=True)

`AsyncClient` has the same methods as coroutines; `protos.generation_calls`, `protos.session_calls`
and `protos.batch_calls` say what they are. Every call has a deadline. A client may be given
several routers (`"a:50051,b:50051"`, or a list) and learns the others from the cluster. A call that
failed with UNAVAILABLE is sent again, to the next router, and when all were asked after the delay
that the server wants or a growing one. A stream that breaks goes on where it broke, on any router,
under the same deadline: every token comes once. Several sequences (`n`) cannot do that; they fail
once a message has arrived.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Unpack

import grpc

from protos.async_client import AsyncClient
from protos.batch_calls import BatchCalls, BatchOptions
from protos.calls import Ask, Blocking, Pages, Stream, T
from protos.events import Completion
from protos.generation_calls import GenerationCalls
from protos.requests import ChatMessages, GenerateOptions, Prompt, build_request, build_tokenize
from protos.retry import Attempts, ClientConfig
from protos.routers import (
    DEFAULT_ADDRESS,
    LEARN_TIMEOUT_S,
    KnownRouters,
    RouterConnection,
    channels,
)
from protos.session_calls import SessionCalls
from protos.tls import Access, ClientTls
from protos.v1 import cluster_pb2

__all__ = [
    "DEFAULT_ADDRESS",
    "AsyncClient",
    "BatchOptions",
    "ChatMessages",
    "Client",
    "ClientConfig",
    "GenerateOptions",
    "Prompt",
    "build_request",
    "build_tokenize",
]


class Client(GenerationCalls, SessionCalls, BatchCalls, Blocking):
    """A connection to the routers, for threads. Methods may be called from several at once.

    Args:
        address: `host:port`, or `grpcs://host:port` for TLS with a public CA; several with commas
            between them, or a list.
        config: Deadlines and retries.
        tls: Connect with TLS: which CA to trust, which certificate to show.
        api_key: Sent with every call.
    """

    def __init__(
        self,
        address: str | Sequence[str] = DEFAULT_ADDRESS,
        config: ClientConfig | None = None,
        *,
        tls: ClientTls | None = None,
        api_key: str | None = None,
    ) -> None:
        self._config = config or ClientConfig()
        self._routers = KnownRouters(address, channels(Access(tls=tls, api_key=api_key)))

    @property
    def addresses(self) -> list[str]:
        """The routers that are known."""
        return self._routers.addresses

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; running calls end with `RequestCancelledError`."""
        for channel in self._routers.close():
            channel.close()

    def complete(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Completion:
        """Return a whole generation; see `generate`."""
        completion = Completion()
        for event in self.generate(prompt, **options):
            completion.add(event)
        return completion

    def chat(self, messages: ChatMessages, **options: Unpack[GenerateOptions]) -> Completion:
        """Return the answer to a chat; see `generate`."""
        return self.complete(messages, **options)

    def _ask(self, ask: Ask[T]) -> T:
        attempts = Attempts(self._config, self._routers)
        while True:
            method = ask.method(attempts.next_router())
            try:
                return ask.read(method(ask.request, timeout=attempts.left_s()))
            except grpc.RpcError as error:
                time.sleep(attempts.failed(error))

    def _stream(self, stream: Stream[T]) -> Iterator[T]:
        attempts = Attempts(self._config, self._routers, stream)
        while True:
            router = attempts.next_router()
            call = stream.method(router)(stream.next_request(), timeout=attempts.left_s())
            try:
                for message in call:
                    attempts.arrived()
                    if attempts.should_learn():  # beside the stream
                        threading.Thread(target=self._learn, args=(router,), daemon=True).start()
                    yield from stream.take(message)
                return
            except grpc.RpcError as error:
                time.sleep(attempts.failed(error))
            finally:
                call.cancel()

    def _pages(self, pages: Pages[T]) -> Iterator[T]:
        has_more = True
        while has_more:
            page = self._ask(pages.page())
            yield from pages.read(page)
            has_more = pages.turn(page)

    def _learn(self, router: RouterConnection) -> None:
        request = cluster_pb2.GetStatusRequest()
        with suppress(grpc.RpcError, ValueError):  # ValueError: the client was closed
            status = router.cluster.GetStatus(request, timeout=LEARN_TIMEOUT_S)
            self._routers.learn(status, router)
