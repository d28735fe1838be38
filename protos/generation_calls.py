"""What both clients can ask about text, running requests and the cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Unpack

from protos.calls import Ask, Stream, T, asks, streams
from protos.events import Event, events_of
from protos.requests import (
    ChatMessages,
    GenerateOptions,
    Prompt,
    build_request,
    build_tokenize,
)
from protos.resume import Received
from protos.routers import RouterConnection
from protos.v1 import cluster_pb2, generation_pb2


class GenerationCalls:
    """The part of `Client` and `AsyncClient` for everything but sessions and batches."""

    @streams
    def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Stream[Event]:
        """Yield a generation's events. The request is sent when the first is asked for.

        Closing the iterator cancels the request; leave a loop of `AsyncClient` early only with
        `contextlib.aclosing`, which does so at once.

        Raises:
            ExpertMeshError: The class that the server raised, with its fields.
        """
        request, timeout_s = build_request(prompt, options)
        return Generation(request, timeout_s, events_of)

    @streams
    def messages(
        self, request: generation_pb2.GenerateRequest, timeout_s: float | None = None
    ) -> Stream[generation_pb2.GenerateResponse]:
        """Yield a generation's raw messages; see `generate`."""
        return Generation(request, timeout_s, lambda message: (message,))

    @asks
    def tokenize(
        self, prompt: str | ChatMessages, *, add_special_tokens: bool = True
    ) -> Ask[list[int]]:
        """Return the token ids of a text or chat, as `generate` would make them."""
        request = build_tokenize(prompt, add_special_tokens)
        return Ask(_tokenize, request, lambda answer: list(answer.token_ids))

    @asks
    def tokenize_message(
        self, request: generation_pb2.TokenizeRequest
    ) -> Ask[generation_pb2.TokenizeResponse]:
        """Return the answer to a message of `tokenize`."""
        return Ask(_tokenize, request)

    @asks
    def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> Ask[str]:
        """Return the text of token ids."""
        request = generation_pb2.DetokenizeRequest(
            token_ids=token_ids, skip_special_tokens=skip_special_tokens
        )
        return Ask(lambda router: router.generation.Detokenize, request, lambda answer: answer.text)

    @asks
    def list_models(self) -> Ask[list[generation_pb2.Model]]:
        """Return what is served."""
        request = generation_pb2.ListModelsRequest()
        return Ask(
            lambda router: router.generation.ListModels,
            request,
            lambda answer: list(answer.models),
        )

    @asks
    def cancel(self, *request_ids: str) -> Ask[list[str]]:
        """Cancel requests; return the ids that were live."""
        request = generation_pb2.CancelRequestsRequest(request_ids=request_ids)
        return Ask(
            lambda router: router.generation.CancelRequests,
            request,
            lambda answer: list(answer.cancelled),
        )

    @asks
    def status(self) -> Ask[cluster_pb2.ClusterStatus]:
        """Return what runs where."""
        return Ask(lambda router: router.cluster.GetStatus, cluster_pb2.GetStatusRequest())


class Generation(Stream[T]):
    """A generation that goes on at another router where one dies.

    Args:
        request: The caller's; it is not changed.
        timeout_s: Deadline; None: the client's.
        read: Returns what the caller gets of a message.
    """

    def __init__(
        self,
        request: generation_pb2.GenerateRequest,
        timeout_s: float | None,
        read: Callable[[generation_pb2.GenerateResponse], Iterable[T]],
    ) -> None:
        self.timeout_s = timeout_s
        self._received = Received(request)
        self._read = read
        self._is_sent = False
        self.can_resume = self._received.can_resume

    def method(self, router: RouterConnection) -> Any:
        """Return what takes the request."""
        return router.generation.Generate

    def next_request(self) -> generation_pb2.GenerateRequest:
        """Return the caller's request at first, then the one that gets the rest."""
        if self._is_sent:
            return self._received.again()
        self._is_sent = True
        return self._received.first()

    def take(self, message: generation_pb2.GenerateResponse) -> Iterable[T]:
        """Return what the caller gets of a message: nothing, where it says nothing new."""
        news = self._received.take(message)
        return () if news is None else self._read(news)


def _tokenize(router: RouterConnection) -> Any:
    return router.generation.Tokenize
