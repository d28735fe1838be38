"""`protos.client.Client` for an event loop; import it from there."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Unpack

import grpc

from protos.batch_calls import AsyncBatchCalls
from protos.events import Completion, Event, events_of
from protos.requests import (
    PAGE_SIZE,
    ChatMessages,
    GenerateOptions,
    Prompt,
    build_create,
    build_fork,
    build_request,
    build_tokenize,
)
from protos.resume import Received
from protos.retry import Attempts, ClientConfig
from protos.routers import (
    DEFAULT_ADDRESS,
    LEARN_AFTER_S,
    LEARN_INTERVAL_S,
    LEARN_TIMEOUT_S,
    Router,
    Routers,
    aio_channels,
)
from protos.tls import Access, ClientTls
from protos.v1 import cluster_pb2, generation_pb2, session_pb2


class AsyncClient(AsyncBatchCalls):
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
        self._routers = Routers(address, aio_channels(Access(tls=tls, api_key=api_key)))
        self._learn_at = 0.0
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

    async def generate(
        self, prompt: Prompt, **options: Unpack[GenerateOptions]
    ) -> AsyncIterator[Event]:
        """Yield a generation's events; see `Client.generate`.

        Leave the loop early only with `contextlib.aclosing`, which cancels the request at once.
        """
        async for message in self.messages(*build_request(prompt, options)):
            for event in events_of(message):
                yield event

    async def messages(
        self, request: generation_pb2.GenerateRequest, timeout_s: float | None = None
    ) -> AsyncIterator[generation_pb2.GenerateResponse]:
        """Yield a generation's raw messages; see `generate`."""
        received = Received(request)
        attempts = self._attempts(timeout_s or self._config.timeout_s)
        wanted, is_open = received.first(), False
        while True:
            router = self._routers.current()
            call = router.generation.Generate(wanted, timeout=attempts.left_s())
            try:
                async for message in call:
                    is_open = True
                    attempts.note_progress()
                    self._learn_now_and_then(router, attempts)
                    if (news := received.take(message)) is not None:
                        yield news
                return
            except grpc.RpcError as error:
                wait_s = attempts.wait_before_next(
                    error, is_open=is_open, can_resume=received.can_resume
                )
                self._routers.failed(router)
                await asyncio.sleep(wait_s)
                wanted = received.again()
            finally:
                call.cancel()

    async def complete(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Completion:
        """Return a whole generation."""
        completion = Completion()
        async for event in self.generate(prompt, **options):
            completion.add(event)
        return completion

    async def chat(self, messages: ChatMessages, **options: Unpack[GenerateOptions]) -> Completion:
        """Return the answer to a chat."""
        return await self.complete(messages, **options)

    async def tokenize(
        self, prompt: str | ChatMessages, *, add_special_tokens: bool = True
    ) -> list[int]:
        """Return the token ids of a text or chat, as `generate` would make them."""
        request = build_tokenize(prompt, add_special_tokens)
        return list((await self.tokenize_message(request)).token_ids)

    async def tokenize_message(
        self, request: generation_pb2.TokenizeRequest
    ) -> generation_pb2.TokenizeResponse:
        """Return the answer to a message of `tokenize`."""
        answer: generation_pb2.TokenizeResponse = await self._unary(
            lambda router: router.generation.Tokenize, request
        )
        return answer

    async def detokenize(
        self, token_ids: Sequence[int], *, skip_special_tokens: bool = True
    ) -> str:
        """Return the text of token ids."""
        request = generation_pb2.DetokenizeRequest(
            token_ids=token_ids, skip_special_tokens=skip_special_tokens
        )
        text: str = (await self._unary(lambda router: router.generation.Detokenize, request)).text
        return text

    async def list_models(self) -> list[generation_pb2.Model]:
        """Return what is served."""
        request = generation_pb2.ListModelsRequest()
        return list(
            (await self._unary(lambda router: router.generation.ListModels, request)).models
        )

    async def cancel(self, *request_ids: str) -> list[str]:
        """Cancel requests; return the ids that were live."""
        request = generation_pb2.CancelRequestsRequest(request_ids=request_ids)
        return list(
            (await self._unary(lambda router: router.generation.CancelRequests, request)).cancelled
        )

    async def status(self) -> cluster_pb2.ClusterStatus:
        """Return what runs where."""
        answer: cluster_pb2.ClusterStatus = await self._unary(
            lambda router: router.cluster.GetStatus, cluster_pb2.GetStatusRequest()
        )
        return answer

    async def create_session(
        self,
        session_id: str = "",
        *,
        ttl_s: float | None = None,
        quota_tokens: int | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> session_pb2.Session:
        """Make an empty session; see `Client.create_session`."""
        request = build_create(session_id, ttl_s, quota_tokens, metadata)
        return await self._session(lambda router: router.sessions.CreateSession, request)

    async def get_session(
        self, session_id: str, *, include_turns: bool = False, include_token_ids: bool = False
    ) -> session_pb2.Session:
        """Return a session as it is now."""
        request = session_pb2.GetSessionRequest(
            session_id=session_id, include_turns=include_turns, include_token_ids=include_token_ids
        )
        return await self._session(lambda router: router.sessions.GetSession, request)

    async def list_sessions(self, page_size: int = PAGE_SIZE) -> AsyncIterator[session_pb2.Session]:
        """Yield all sessions in the order of their ids, asking page by page."""
        request = session_pb2.ListSessionsRequest(page_size=page_size)
        while True:
            page = await self._unary(lambda router: router.sessions.ListSessions, request)
            for session in page.sessions:
                yield session
            request.page_token = page.next_page_token
            if not request.page_token:
                return

    async def fork_session(
        self,
        session_id: str,
        new_session_id: str = "",
        *,
        at_tokens: int | None = None,
        ttl_s: float | None = None,
        quota_tokens: int | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> session_pb2.Session:
        """Make a session that begins like another; see `Client.fork_session`."""
        request = build_fork(session_id, new_session_id, at_tokens, ttl_s, quota_tokens, metadata)
        return await self._session(lambda router: router.sessions.ForkSession, request)

    async def delete_session(self, session_id: str) -> bool:
        """Delete a session; return whether it was there."""
        request = session_pb2.DeleteSessionRequest(session_id=session_id)
        answer = await self._unary(lambda router: router.sessions.DeleteSession, request)
        return bool(answer.deleted)

    async def _session(self, method: Callable[[Router], Any], request: Any) -> session_pb2.Session:
        answer: session_pb2.Session = await self._unary(method, request)
        return answer

    async def _unary(self, method: Callable[[Router], Any], request: Any) -> Any:
        attempts = self._attempts(self._config.short_timeout_s)
        while True:
            router = self._routers.current()
            try:
                return await method(router)(request, timeout=attempts.left_s())
            except grpc.RpcError as error:
                wait_s = attempts.wait_before_next(error, is_open=False, can_resume=False)
                self._routers.failed(router)
                await asyncio.sleep(wait_s)

    def _attempts(self, timeout_s: float) -> Attempts:
        return Attempts(self._config, timeout_s, lambda: len(self._routers))

    def _learn_now_and_then(self, router: Router, attempts: Attempts) -> None:
        """Ask which routers there are, beside a stream that lasts."""
        now = time.monotonic()
        if now < self._learn_at or attempts.age_s < LEARN_AFTER_S or not attempts.may_resume:
            return
        self._learn_at = now + LEARN_INTERVAL_S
        self._learning = asyncio.create_task(self._learn(router))

    async def _learn(self, router: Router) -> None:
        request = cluster_pb2.GetStatusRequest()
        with suppress(grpc.RpcError):
            status = await router.cluster.GetStatus(request, timeout=LEARN_TIMEOUT_S)
            self._routers.learn(status, router)
