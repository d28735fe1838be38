"""The Python client: text in, typed events out, errors as the classes of `protos.errors`.

    with Client("127.0.0.1:50051") as client:
        for event in client.generate("Once upon a time", max_tokens=64):
            if isinstance(event, Delta):
                print(event.text, end="", flush=True)

`AsyncClient` has the same methods as coroutines. Every call has a deadline. A client may be given
several routers (`"a:50051,b:50051"`, or a list) and learns the others from the cluster. A call that
failed with UNAVAILABLE is sent again, to the next router, and when all were asked after the delay
that the server wants or a growing one. A stream that breaks goes on where it broke, on any router,
under the same deadline: every token comes once. Several sequences (`n`) cannot do that; they fail
once a message has arrived.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Unpack

import grpc

from protos.async_client import AsyncClient
from protos.batch_calls import BatchCalls, BatchOptions
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
    channels,
)
from protos.tls import Access, ClientTls
from protos.v1 import cluster_pb2, generation_pb2, session_pb2

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


class Client(BatchCalls):
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
        self._routers = Routers(address, channels(Access(tls=tls, api_key=api_key)))
        self._learn_at = 0.0

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

    def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Iterator[Event]:
        """Yield a generation's events. The request is sent at the first `next`.

        Closing the iterator cancels the request.

        Raises:
            ExpertMeshError: The class that the server raised, with its fields.
        """
        for message in self.messages(*build_request(prompt, options)):
            yield from events_of(message)

    def messages(
        self, request: generation_pb2.GenerateRequest, timeout_s: float | None = None
    ) -> Iterator[generation_pb2.GenerateResponse]:
        """Yield a generation's raw messages; see `generate`."""
        received = Received(request)
        attempts = self._attempts(timeout_s or self._config.timeout_s)
        wanted, is_open = received.first(), False
        while True:
            router = self._routers.current()
            call = router.generation.Generate(wanted, timeout=attempts.left_s())
            try:
                for message in call:
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
                time.sleep(wait_s)
                wanted = received.again()
            finally:
                call.cancel()

    def complete(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Completion:
        """Return a whole generation; see `generate`."""
        completion = Completion()
        for event in self.generate(prompt, **options):
            completion.add(event)
        return completion

    def chat(self, messages: ChatMessages, **options: Unpack[GenerateOptions]) -> Completion:
        """Return the answer to a chat; see `generate`."""
        return self.complete(messages, **options)

    def tokenize(self, prompt: str | ChatMessages, *, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of a text or chat, as `generate` would make them."""
        request = build_tokenize(prompt, add_special_tokens)
        return list(self._unary(lambda router: router.generation.Tokenize, request).token_ids)

    def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of token ids."""
        request = generation_pb2.DetokenizeRequest(
            token_ids=token_ids, skip_special_tokens=skip_special_tokens
        )
        text: str = self._unary(lambda router: router.generation.Detokenize, request).text
        return text

    def list_models(self) -> list[generation_pb2.Model]:
        """Return what is served."""
        answer = self._unary(
            lambda router: router.generation.ListModels, generation_pb2.ListModelsRequest()
        )
        return list(answer.models)

    def cancel(self, *request_ids: str) -> list[str]:
        """Cancel requests; return the ids that were live."""
        request = generation_pb2.CancelRequestsRequest(request_ids=request_ids)
        return list(self._unary(lambda router: router.generation.CancelRequests, request).cancelled)

    def status(self) -> cluster_pb2.ClusterStatus:
        """Return what runs where."""
        answer: cluster_pb2.ClusterStatus = self._unary(
            lambda router: router.cluster.GetStatus, cluster_pb2.GetStatusRequest()
        )
        return answer

    def create_session(
        self,
        session_id: str = "",
        *,
        ttl_s: float | None = None,
        quota_tokens: int | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> session_pb2.Session:
        """Make an empty session; without an id the router chooses one."""
        request = build_create(session_id, ttl_s, quota_tokens, metadata)
        return self._session(lambda router: router.sessions.CreateSession, request)

    def get_session(
        self, session_id: str, *, include_turns: bool = False, include_token_ids: bool = False
    ) -> session_pb2.Session:
        """Return a session as it is now."""
        request = session_pb2.GetSessionRequest(
            session_id=session_id, include_turns=include_turns, include_token_ids=include_token_ids
        )
        return self._session(lambda router: router.sessions.GetSession, request)

    def list_sessions(self, page_size: int = PAGE_SIZE) -> Iterator[session_pb2.Session]:
        """Yield all sessions in the order of their ids, asking page by page."""
        request = session_pb2.ListSessionsRequest(page_size=page_size)
        while True:
            page = self._unary(lambda router: router.sessions.ListSessions, request)
            yield from page.sessions
            request.page_token = page.next_page_token
            if not request.page_token:
                return

    def fork_session(
        self,
        session_id: str,
        new_session_id: str = "",
        *,
        at_tokens: int | None = None,
        ttl_s: float | None = None,
        quota_tokens: int | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> session_pb2.Session:
        """Make a session that begins with the first `at_tokens` tokens of another, or with all."""
        request = build_fork(session_id, new_session_id, at_tokens, ttl_s, quota_tokens, metadata)
        return self._session(lambda router: router.sessions.ForkSession, request)

    def delete_session(self, session_id: str) -> bool:
        """Delete a session; return whether it was there."""
        request = session_pb2.DeleteSessionRequest(session_id=session_id)
        answer = self._unary(lambda router: router.sessions.DeleteSession, request)
        return bool(answer.deleted)

    def _session(self, method: Callable[[Router], Any], request: Any) -> session_pb2.Session:
        answer: session_pb2.Session = self._unary(method, request)
        return answer

    def _unary(self, method: Callable[[Router], Any], request: Any) -> Any:
        attempts = self._attempts(self._config.short_timeout_s)
        while True:
            router = self._routers.current()
            try:
                return method(router)(request, timeout=attempts.left_s())
            except grpc.RpcError as error:
                wait_s = attempts.wait_before_next(error, is_open=False, can_resume=False)
                self._routers.failed(router)
                time.sleep(wait_s)

    def _attempts(self, timeout_s: float) -> Attempts:
        return Attempts(self._config, timeout_s, lambda: len(self._routers))

    def _learn_now_and_then(self, router: Router, attempts: Attempts) -> None:
        """Ask which routers there are, beside a stream that lasts."""
        now = time.monotonic()
        if now < self._learn_at or attempts.age_s < LEARN_AFTER_S or not attempts.may_resume:
            return
        self._learn_at = now + LEARN_INTERVAL_S
        threading.Thread(target=self._learn, args=(router,), daemon=True).start()

    def _learn(self, router: Router) -> None:
        request = cluster_pb2.GetStatusRequest()
        with suppress(grpc.RpcError, ValueError):  # ValueError: the client was closed
            status = router.cluster.GetStatus(request, timeout=LEARN_TIMEOUT_S)
            self._routers.learn(status, router)
