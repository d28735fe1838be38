"""Routers that share a session store, for tests: real gRPC, engines and Redis or Valkey."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from protos.client import build_request
from protos.v1 import generation_pb2
from router.state.sessions import SessionStore, StoreSettings
from tests.store_servers import StoreServer
from tests.unit.router.gateway_service import GatewayService, running
from tests.unit.router.hash_script import HashScript

T = TypeVar("T")
Messages = list[generation_pb2.GenerateResponse]


@contextmanager
def router(
    server: StoreServer,
    engine: str,
    model: Any = None,
    settings: StoreSettings | None = None,
    **options: Any,
) -> Iterator[GatewayService]:
    """Run a router of this name with sessions in `server`."""
    store = SessionStore.connect(server.endpoint, engine=engine, settings=settings)
    with running(model or HashScript(), store=store, **options) as service:
        yield service


def ask(server: StoreServer, call: Callable[[SessionStore], Awaitable[T]]) -> T:
    """Call the store from the test's own connection."""

    async def asked() -> T:
        store = SessionStore.connect(server.endpoint, engine="test")
        try:
            return await call(store)
        finally:
            await store.close()

    return asyncio.run(asked())


def create(server: StoreServer, session_id: str, **options: Any) -> None:
    """Make a session."""
    ask(server, lambda store: store.create("", session_id, ttl_s=600, **options))


def tokens_of(server: StoreServer, session_id: str) -> list[int]:
    """Return a session's history."""
    found: list[int] = ask(server, lambda store: store.history("", session_id)).tolist()
    return found


def turn_request(prompt: Any, session_id: str, **options: Any) -> generation_pb2.GenerateRequest:
    """Return the request of a turn; greedy unless said otherwise."""
    request, _ = build_request(prompt, {"temperature": 0, **options})  # type: ignore[typeddict-item]
    request.session_id = session_id
    return request


def run_turn(service: GatewayService, prompt: Any, session_id: str, **options: Any) -> Messages:
    """Run a turn to its end."""
    return list(service.client.messages(turn_request(prompt, session_id, **options)))


def take(stream: Iterator[generation_pb2.GenerateResponse], num_tokens: int) -> Messages:
    """Return the messages until so many tokens have come; one may have several."""
    messages: Messages = []
    while len(ids_of(messages)) < num_tokens:
        messages.append(next(stream))
    return messages


def ids_of(messages: Messages) -> list[int]:
    """Return the tokens of some messages."""
    return [token_id for message in messages for token_id in message.token_ids]


def text_of(messages: Messages) -> str:
    """Return the text of some messages."""
    return "".join(message.text_delta for message in messages)
