"""`GenerationService`: from a client's request to the engine, and its output back.

Decides what a request means (defaults, prompt, stop conditions) and how long it lives: it ends with
its last sequence, with its deadline, with `CancelRequests`, or with its client. Every way out goes
through one `finally` that frees what the engine still holds. Must not know the model or the
cluster.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import grpc

from protos.errors import (
    ContextLengthExceededError,
    DeadlineExceededError,
    InvalidFieldError,
    UnsupportedFeatureError,
)
from protos.ids import new_request_id
from protos.v1 import generation_pb2, generation_pb2_grpc
from protos.validate import (
    RequestLimits,
    validate_cancel,
    validate_detokenize,
    validate_generate,
    validate_tokenize,
)
from router.engine.request import EngineRequest, SamplingParams, Sink, StoppingParams
from router.gateway.defaults import SamplingDefaults
from router.gateway.stream import MAX_PENDING_TOKENS, RequestStream, StreamOptions
from router.gateway.text import TextProcessor, TextStop, TextStream

LARGE_INPUT_BYTES = 16 << 10
"""Requests from this size on are checked and tokenised in a thread, not in the event loop."""
MAX_PROMPT_LOGPROB_VALUES = 4 << 20
"""Most values that a prompt's log-probabilities may have: they travel in one message."""

T = TypeVar("T")
Context = grpc.aio.ServicerContext[Any, Any]


class EngineCalls(Protocol):
    """What the service needs of the engine; its sinks run in the event loop (`LoopDelivery`)."""

    def submit(self, request: EngineRequest, sink: Sink) -> int:
        """Queue a request; return how many wait before it."""
        ...

    def cancel(self, request_id: str, reason: str = "") -> bool:
        """End a live request; return whether it was live."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """What `ListModels` tells, and what requests are checked against."""

    name: str
    model_type: str
    max_model_len: int
    vocab_size: int
    dtype: str

    @property
    def limits(self) -> RequestLimits:
        """Return the bounds on a request's fields."""
        return RequestLimits(
            model=self.name, vocab_size=self.vocab_size, max_model_len=self.max_model_len
        )


class GenerationServicer(generation_pb2_grpc.GenerationServiceServicer):
    """Serves one model.

    Args:
        engine: Runs the requests.
        text: The checkpoint's tokeniser and template.
        model: What is served.
        defaults: Values of unset sampling fields.
        clock: The engine's.
        max_pending_tokens: What may wait for one client that reads slowly.
    """

    def __init__(
        self,
        engine: EngineCalls,
        text: TextProcessor,
        model: ServedModel,
        defaults: SamplingDefaults | None = None,
        clock: Callable[[], float] = time.monotonic,
        max_pending_tokens: int = MAX_PENDING_TOKENS,
    ) -> None:
        self._max_pending_tokens = max_pending_tokens
        self._engine = engine
        self._text = text
        self._model = model
        self._limits = model.limits
        self._defaults = defaults or SamplingDefaults()
        self._clock = clock

    async def Generate(self, request: generation_pb2.GenerateRequest, context: Context) -> None:
        """Stream a request's output; see `generation.proto`."""
        deadline = self._deadline(context)
        prompt_ids = await self._in_thread_if_large(request, self._check_and_encode, request)
        engine_request = self._engine_request(request, prompt_ids, deadline)
        request_id, count = engine_request.request_id, engine_request.sampling.n
        stream = RequestStream(
            [self._text_stream(request) for _ in range(count)],
            self._stream_options(request, len(prompt_ids)),
            on_overflow=lambda: self._engine.cancel(request_id, "slow reader"),
        )
        position = self._engine.submit(engine_request, stream.put)
        try:
            accepted = generation_pb2.Accepted(
                request_id=request_id,
                queue_position=position,
                prompt_tokens=len(prompt_ids),
                seed=engine_request.sampling.seed,
            )
            first = generation_pb2.GenerateResponse(accepted=accepted)
            await context.write(stream.number(first))
            while True:
                await stream.wait()
                for message in stream.take():
                    await context.write(message)
                if stream.has_news:  # more came while the client read
                    continue
                if stream.error is not None:
                    raise stream.error
                if stream.is_ended:
                    return
        finally:
            if not stream.is_ended:
                self._engine.cancel(request_id, "stream ended")

    async def Tokenize(
        self, request: generation_pb2.TokenizeRequest, context: Context
    ) -> generation_pb2.TokenizeResponse:
        """Return the token ids of a text or chat; see `generation.proto`."""
        validate_tokenize(request, self._limits)
        if request.WhichOneof("input") == "chat":
            ids = await self._in_thread_if_large(request, self._encode_chat, request.chat)
        else:
            add = not request.HasField("add_special_tokens") or request.add_special_tokens
            ids = await self._in_thread_if_large(
                request, lambda: self._text.encode(request.text, add_special_tokens=add)
            )
        return generation_pb2.TokenizeResponse(
            token_ids=ids, max_model_len=self._model.max_model_len
        )

    async def Detokenize(
        self, request: generation_pb2.DetokenizeRequest, context: Context
    ) -> generation_pb2.DetokenizeResponse:
        """Return the text of token ids; see `generation.proto`."""
        skip = not request.HasField("skip_special_tokens") or request.skip_special_tokens

        def decode() -> str:
            validate_detokenize(request, self._limits)
            return self._text.decode(list(request.token_ids), skip_special_tokens=skip)

        text = await self._in_thread_if_large(request, decode)
        return generation_pb2.DetokenizeResponse(text=text)

    async def ListModels(
        self, request: generation_pb2.ListModelsRequest, context: Context
    ) -> generation_pb2.ListModelsResponse:
        """Return the served model; see `generation.proto`."""
        model = self._model
        return generation_pb2.ListModelsResponse(
            models=[
                generation_pb2.Model(
                    name=model.name,
                    model_type=model.model_type,
                    max_model_len=model.max_model_len,
                    vocab_size=model.vocab_size,
                    dtype=model.dtype,
                )
            ]
        )

    async def CancelRequests(
        self, request: generation_pb2.CancelRequestsRequest, context: Context
    ) -> generation_pb2.CancelRequestsResponse:
        """Cancel requests by id; see `generation.proto`."""
        validate_cancel(request)
        answer = generation_pb2.CancelRequestsResponse()
        for request_id in dict.fromkeys(request.request_ids):
            is_live = self._engine.cancel(request_id, "CancelRequests")
            (answer.cancelled if is_live else answer.unknown).append(request_id)
        return answer

    @staticmethod
    async def _in_thread_if_large(request: Any, function: Callable[..., T], *arguments: Any) -> T:
        """Call `function`; a large request's in a thread, so that other streams go on."""
        if request.ByteSize() < LARGE_INPUT_BYTES:
            return function(*arguments)
        return await asyncio.to_thread(function, *arguments)

    def _deadline(self, context: Context) -> float | None:
        left_s = context.time_remaining()
        if left_s is None:
            return None
        if left_s <= 0:
            raise DeadlineExceededError("the request, on arrival,")
        return self._clock() + left_s

    def _check_and_encode(self, request: generation_pb2.GenerateRequest) -> list[int]:
        """Check every field and return the prompt's token ids."""
        num_ids = len(request.tokens.ids)
        if num_ids:  # before the checks that look at every id
            self._check_length(num_ids, request.stopping)
        validate_generate(request, self._limits)
        kind = request.WhichOneof("input")
        if kind == "tokens":
            ids = list(request.tokens.ids)
        elif kind == "chat":
            ids = self._encode_chat(request.chat)
        else:
            ids = self._text.encode(request.text)
        if not ids:
            raise InvalidFieldError(str(kind), "must have at least one token", 0)
        if request.stopping.stop and not self._text.has_tokenizer:
            raise UnsupportedFeatureError("stopping.stop: the checkpoint has no tokenizer.json")
        self._check_length(len(ids), request.stopping)
        per_token = 1 + request.output.prompt_logprobs
        if request.output.HasField("prompt_logprobs") and (
            len(ids) * per_token > MAX_PROMPT_LOGPROB_VALUES
        ):
            most = MAX_PROMPT_LOGPROB_VALUES // len(ids)
            rule = f"must be less than {most} for a prompt of {len(ids)} tokens"
            raise InvalidFieldError("output.prompt_logprobs", rule, request.output.prompt_logprobs)
        return ids

    def _check_length(self, num_tokens: int, stopping: generation_pb2.Stopping) -> None:
        max_tokens = stopping.max_tokens or 1
        if num_tokens + max_tokens > self._model.max_model_len:
            raise ContextLengthExceededError(num_tokens, max_tokens, self._model.max_model_len)

    def _encode_chat(self, chat: generation_pb2.Chat) -> list[int]:
        text = self._text.render_chat(
            [{"role": message.role, "content": message.content} for message in chat.messages],
            add_generation_prompt=(
                not chat.HasField("add_generation_prompt") or chat.add_generation_prompt
            ),
            variables=json.loads(chat.template_kwargs_json or "{}"),
        )
        return self._text.encode(text, add_special_tokens=False)

    def _engine_request(
        self,
        request: generation_pb2.GenerateRequest,
        prompt_ids: list[int],
        deadline: float | None,
    ) -> EngineRequest:
        stopping, output = request.stopping, request.output
        return EngineRequest(
            request_id=request.request_id or new_request_id(),
            prompt_ids=prompt_ids,
            sampling=self._sampling(request.sampling),
            stopping=StoppingParams(
                max_tokens=stopping.max_tokens if stopping.HasField("max_tokens") else None,
                min_tokens=stopping.min_tokens,
                stop_token_ids=tuple(stopping.stop_token_ids),
                ignore_eos=stopping.ignore_eos,
            ),
            logprobs=output.top_logprobs if output.HasField("top_logprobs") else None,
            prompt_logprobs=(
                output.prompt_logprobs if output.HasField("prompt_logprobs") else None
            ),
            deadline=deadline,
            text_stop=(lambda: TextStop(self._new_text(request))) if stopping.stop else None,
        )

    def _sampling(self, sampling: generation_pb2.Sampling) -> SamplingParams:
        defaults = self._defaults

        def value(name: str) -> Any:
            chosen = sampling if sampling.HasField(name) else defaults
            return getattr(chosen, name)

        return SamplingParams(
            temperature=value("temperature"),
            top_p=value("top_p"),
            top_k=value("top_k"),
            min_p=value("min_p"),
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            repetition_penalty=value("repetition_penalty"),
            seed=sampling.seed if sampling.HasField("seed") else secrets.randbits(63),
            n=sampling.n if sampling.HasField("n") else 1,
            logit_bias=dict(sampling.logit_bias),
        )

    def _text_stream(self, request: generation_pb2.GenerateRequest) -> TextStream | None:
        return self._new_text(request) if self._text.has_tokenizer else None

    def _new_text(self, request: generation_pb2.GenerateRequest) -> TextStream:
        output = request.output
        return self._text.stream(
            stop=request.stopping.stop,
            include_stop=request.stopping.include_stop,
            min_tokens=request.stopping.min_tokens,
            skip_special_tokens=(
                not output.HasField("skip_special_tokens") or output.skip_special_tokens
            ),
        )

    def _stream_options(
        self, request: generation_pb2.GenerateRequest, num_prompt_tokens: int
    ) -> StreamOptions:
        output = request.output
        return StreamOptions(
            num_prompt_tokens=num_prompt_tokens,
            return_token_ids=not output.HasField("return_token_ids") or output.return_token_ids,
            include_stop=request.stopping.include_stop,
            values_per_token=1 + output.top_logprobs,
            max_pending_tokens=self._max_pending_tokens,
        )
