"""The Python client: text in, typed events out, errors as the classes of `protos.errors`.

    with Client("127.0.0.1:50051") as client:
        for event in client.generate("Once upon a time", max_tokens=64):
            if isinstance(event, Delta):
                print(event.text, end="", flush=True)

`AsyncClient` has the same methods as coroutines. Every call has a deadline. A call that failed with
UNAVAILABLE before its first message is sent again, after the delay that the server asked for or a
growing one; once a message has arrived nothing is retried silently.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypedDict, TypeVar, Unpack

import grpc

from protos.errors import ExpertMeshError, from_rpc_error
from protos.events import Completion, Event, events_of
from protos.tls import Access, ClientTls
from protos.v1 import cluster_pb2, cluster_pb2_grpc, generation_pb2, generation_pb2_grpc

DEFAULT_ADDRESS = "127.0.0.1:50051"
MAX_MESSAGE_BYTES = 64 << 20

T = TypeVar("T")
ChatMessages = Sequence[Mapping[str, str]]
Prompt = str | Sequence[int] | ChatMessages
"""Text, token ids, or chat messages with `role` and `content`."""


class GenerateOptions(TypedDict, total=False):
    """Fields of `GenerateRequest`, flat; `generation.proto` says what each means."""

    model: str
    request_id: str
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    seed: int
    n: int
    logit_bias: Mapping[int, float]
    max_tokens: int
    min_tokens: int
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    include_stop: bool
    ignore_eos: bool
    top_logprobs: int
    prompt_logprobs: int
    return_token_ids: bool
    skip_special_tokens: bool
    add_generation_prompt: bool
    template_kwargs: Mapping[str, Any]
    timeout_s: float
    """Deadline of this call instead of the client's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientConfig:
    """How patient a client is."""

    timeout_s: float = 600.0
    """Deadline of a generation, all retries together."""
    short_timeout_s: float = 30.0
    """Deadline of every other call."""
    max_attempts: int = 5
    """Sends of one call, the first included."""
    first_backoff_s: float = 0.1
    """Wait before the second send where the server names none; doubles, with jitter."""
    max_backoff_s: float = 2.0


class Client:
    """A connection to a router, for threads. Methods may be called from several at once.

    Args:
        address: `host:port`, or `grpcs://host:port` for TLS with a public CA.
        config: Deadlines and retries.
        tls: Connect with TLS: which CA to trust, which certificate to show.
        api_key: Sent with every call.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        config: ClientConfig | None = None,
        *,
        tls: ClientTls | None = None,
        api_key: str | None = None,
    ) -> None:
        self._config = config or ClientConfig()
        self._channel = Access(tls=tls, api_key=api_key).channel(address, _CHANNEL_OPTIONS)
        self._generation = generation_pb2_grpc.GenerationServiceStub(self._channel)
        self._cluster = cluster_pb2_grpc.ClusterServiceStub(self._channel)

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
        """Close the connection; running calls end with `RequestCancelledError`."""
        self._channel.close()

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
        attempts = _Attempts(self._config, timeout_s or self._config.timeout_s)
        while True:
            call = self._generation.Generate(request, timeout=attempts.left_s())
            is_open = False
            try:
                for message in call:
                    is_open = True
                    yield message
                return
            except grpc.RpcError as error:
                time.sleep(attempts.wait_before_next(error, is_open))
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
        return list(self._unary(self._generation.Tokenize, request).token_ids)

    def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of token ids."""
        request = generation_pb2.DetokenizeRequest(
            token_ids=token_ids, skip_special_tokens=skip_special_tokens
        )
        text: str = self._unary(self._generation.Detokenize, request).text
        return text

    def list_models(self) -> list[generation_pb2.Model]:
        """Return what is served."""
        answer = self._unary(self._generation.ListModels, generation_pb2.ListModelsRequest())
        return list(answer.models)

    def cancel(self, *request_ids: str) -> list[str]:
        """Cancel requests; return the ids that were live."""
        request = generation_pb2.CancelRequestsRequest(request_ids=request_ids)
        return list(self._unary(self._generation.CancelRequests, request).cancelled)

    def status(self) -> cluster_pb2.ClusterStatus:
        """Return what runs where."""
        answer: cluster_pb2.ClusterStatus = self._unary(
            self._cluster.GetStatus, cluster_pb2.GetStatusRequest()
        )
        return answer

    def _unary(self, method: Callable[..., Any], request: Any) -> Any:
        attempts = _Attempts(self._config, self._config.short_timeout_s)
        while True:
            try:
                return method(request, timeout=attempts.left_s())
            except grpc.RpcError as error:
                time.sleep(attempts.wait_before_next(error, is_open=False))


class AsyncClient:
    """`Client` for an event loop; make and use it inside the loop."""

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        config: ClientConfig | None = None,
        *,
        tls: ClientTls | None = None,
        api_key: str | None = None,
    ) -> None:
        self._config = config or ClientConfig()
        self._channel = Access(tls=tls, api_key=api_key).aio_channel(address, _CHANNEL_OPTIONS)
        self._generation = generation_pb2_grpc.GenerationServiceStub(self._channel)
        self._cluster = cluster_pb2_grpc.ClusterServiceStub(self._channel)

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
        """Close the connection; running calls are cancelled."""
        await self._channel.close()

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
        attempts = _Attempts(self._config, timeout_s or self._config.timeout_s)
        while True:
            call = self._generation.Generate(request, timeout=attempts.left_s())
            is_open = False
            try:
                async for message in call:
                    is_open = True
                    yield message
                return
            except grpc.RpcError as error:
                await asyncio.sleep(attempts.wait_before_next(error, is_open))
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
        return list((await self._unary(self._generation.Tokenize, request)).token_ids)

    async def detokenize(
        self, token_ids: Sequence[int], *, skip_special_tokens: bool = True
    ) -> str:
        """Return the text of token ids."""
        request = generation_pb2.DetokenizeRequest(
            token_ids=token_ids, skip_special_tokens=skip_special_tokens
        )
        text: str = (await self._unary(self._generation.Detokenize, request)).text
        return text

    async def list_models(self) -> list[generation_pb2.Model]:
        """Return what is served."""
        request = generation_pb2.ListModelsRequest()
        return list((await self._unary(self._generation.ListModels, request)).models)

    async def cancel(self, *request_ids: str) -> list[str]:
        """Cancel requests; return the ids that were live."""
        request = generation_pb2.CancelRequestsRequest(request_ids=request_ids)
        return list((await self._unary(self._generation.CancelRequests, request)).cancelled)

    async def status(self) -> cluster_pb2.ClusterStatus:
        """Return what runs where."""
        answer: cluster_pb2.ClusterStatus = await self._unary(
            self._cluster.GetStatus, cluster_pb2.GetStatusRequest()
        )
        return answer

    async def _unary(self, method: Callable[..., Any], request: Any) -> Any:
        attempts = _Attempts(self._config, self._config.short_timeout_s)
        while True:
            try:
                return await method(request, timeout=attempts.left_s())
            except grpc.RpcError as error:
                await asyncio.sleep(attempts.wait_before_next(error, is_open=False))


def build_request(
    prompt: Prompt, options: GenerateOptions
) -> tuple[generation_pb2.GenerateRequest, float | None]:
    """Return the message of a generation, and its deadline where one was given.

    Raises:
        TypeError: An option that there is not.
        ValueError: A value that its field cannot hold.
    """
    left: dict[str, Any] = dict(options)
    timeout_s = left.pop("timeout_s", None)
    request = generation_pb2.GenerateRequest(
        model=left.pop("model", ""), request_id=left.pop("request_id", "")
    )
    chat_options = {
        name: left.pop(name)
        for name in ("add_generation_prompt", "template_kwargs")
        if name in left
    }
    if isinstance(prompt, str):
        request.text = prompt
    elif prompt and isinstance(prompt[0], Mapping):
        _fill_chat(request.chat, prompt, **chat_options)  # type: ignore[arg-type]
    else:
        request.tokens.ids.extend(prompt)  # type: ignore[arg-type]
        request.tokens.SetInParent()
    parts: tuple[Any, ...] = (request.sampling, request.stopping, request.output)
    for part in parts:
        names = left.keys() & part.DESCRIPTOR.fields_by_name.keys()
        if names:
            part.MergeFrom(type(part)(**{name: left.pop(name) for name in names}))
    if left:
        raise TypeError(f"generate() has no option {min(left)!r}")
    return request, timeout_s


def build_tokenize(
    prompt: str | ChatMessages, add_special_tokens: bool
) -> generation_pb2.TokenizeRequest:
    """Return the message of `tokenize`."""
    request = generation_pb2.TokenizeRequest(add_special_tokens=add_special_tokens)
    if isinstance(prompt, str):
        request.text = prompt
    else:
        _fill_chat(request.chat, prompt)
    return request


def _fill_chat(
    chat: generation_pb2.Chat,
    messages: ChatMessages,
    add_generation_prompt: bool | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> None:
    for message in messages:
        chat.messages.add(role=message["role"], content=message["content"])
    if add_generation_prompt is not None:
        chat.add_generation_prompt = add_generation_prompt
    if template_kwargs:
        chat.template_kwargs_json = json.dumps(dict(template_kwargs))


class _Attempts:
    """The retries of one call, under one deadline."""

    def __init__(self, config: ClientConfig, timeout_s: float) -> None:
        self._config = config
        self._end = time.monotonic() + timeout_s
        self._num_failed = 0

    def left_s(self) -> float:
        """Return what is left of the deadline."""
        return max(0.001, self._end - time.monotonic())

    def wait_before_next(self, error: grpc.RpcError, is_open: bool) -> float:
        """Return how long to wait before the next send.

        Raises:
            ExpertMeshError: There is to be none.
        """
        ours = from_rpc_error(error)
        self._num_failed += 1
        wait_s = self._backoff_s(ours)
        if (
            is_open
            or ours.code != grpc.StatusCode.UNAVAILABLE
            or self._num_failed >= self._config.max_attempts
            or wait_s >= self.left_s()
        ):
            raise ours from error
        return wait_s

    def _backoff_s(self, error: ExpertMeshError) -> float:
        config = self._config
        grown = config.first_backoff_s * 2.0 ** (self._num_failed - 1)
        backoff_s: float = min(config.max_backoff_s, grown) * random.uniform(0.75, 1.25)
        return max(backoff_s, error.retry_after_s or 0.0)


_CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
]
