"""What a request means: its prompt's tokens, its sampling, its stop conditions, its messages.

Applies the defaults and checks what needs the tokeniser. Knows neither engine nor session: a
session's history comes in as `before`, and what is said of a prompt holds for both parts together.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from protos.errors import (
    ContextLengthExceededError,
    InvalidFieldError,
    UnsupportedFeatureError,
)
from protos.v1 import generation_pb2
from protos.validate import RequestLimits, validate_generate
from router.engine.request import EngineRequest, Priority, SamplingParams, StoppingParams
from router.gateway.defaults import SamplingDefaults
from router.gateway.stream import MAX_PENDING_TOKENS, StreamOptions
from router.gateway.text import TextProcessor, TextStop, TextStream

LARGE_INPUT_BYTES = 16 << 10
"""Requests from this size on are checked and tokenised in a thread, not in the event loop."""
MAX_PROMPT_LOGPROB_VALUES = 4 << 20
"""Most values that a prompt's log-probabilities may have: they travel in one message."""

PRIORITIES = {
    generation_pb2.PRIORITY_UNSPECIFIED: Priority.INTERACTIVE,
    generation_pb2.PRIORITY_INTERACTIVE: Priority.INTERACTIVE,
    generation_pb2.PRIORITY_BATCH: Priority.BATCH,
}

BATCH_MESSAGE_TOKENS = 32
"""Of one message to a batch request: nobody reads along, and messages cost the router time."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """What `ListModels` tells, and what requests are checked against."""

    name: str
    model_type: str
    max_model_len: int
    vocab_size: int
    dtype: str
    weights_digest: str = ""
    """See `experts.weights_digest`; empty: unknown."""

    @property
    def limits(self) -> RequestLimits:
        """Return the bounds on a request's fields."""
        return RequestLimits(
            model=self.name, vocab_size=self.vocab_size, max_model_len=self.max_model_len
        )


class RequestReader:
    """Reads the requests for one model.

    Args:
        text: The checkpoint's tokeniser and template.
        model: What is served.
        defaults: Values of unset sampling fields.
        max_pending_tokens: What may wait for one client that reads slowly.
    """

    def __init__(
        self,
        text: TextProcessor,
        model: ServedModel,
        defaults: SamplingDefaults | None = None,
        max_pending_tokens: int = MAX_PENDING_TOKENS,
    ) -> None:
        self.text = text
        self.model = model
        self.limits = model.limits
        self._defaults = defaults or SamplingDefaults()
        self._max_pending_tokens = max_pending_tokens

    def check_and_encode(self, request: generation_pb2.GenerateRequest) -> list[int]:
        """Check every field of a request without a session; return its prompt's token ids.

        Raises:
            InvalidFieldError: With every violation.
            ContextLengthExceededError: Prompt and `max_tokens` do not fit the context window.
            UnsupportedFeatureError: It needs a tokeniser or a template that there is not.
            UnknownModelError: It names another model.
        """
        num_ids = len(request.tokens.ids)
        if num_ids:  # before the checks that look at every id
            self.check_length(num_ids, request.stopping)
        validate_generate(request, self.limits)
        ids = self.encode_input(request)
        self.check_prompt(request, len(ids))
        sampling = request.sampling
        is_drawn = self._value(sampling, "temperature") > 0
        if request.resume_tokens.ids and is_drawn and not sampling.HasField("seed"):
            rule = "must be the seed of the first call's `accepted`"
            raise InvalidFieldError("sampling.seed", rule, "")
        return ids

    def encode_input(self, request: generation_pb2.GenerateRequest) -> list[int]:
        """Return the token ids of a request's input as it stands, without any history.

        Raises:
            InvalidFieldError: There are none.
        """
        kind = request.WhichOneof("input")
        if kind == "tokens":
            ids = list(request.tokens.ids)
        elif kind == "chat":
            ids = self.encode_chat(request.chat)
        else:
            ids = self.text.encode(request.text)
        if not ids:
            raise InvalidFieldError(str(kind), "must have at least one token", 0)
        return ids

    def encode_chat(self, chat: generation_pb2.Chat) -> list[int]:
        """Return the token ids of a whole chat."""
        text = self.text.render_chat(
            chat_messages(chat),
            add_generation_prompt=opens_answer(chat),
            variables=json.loads(chat.template_kwargs_json or "{}"),
        )
        return self.text.encode(text, add_special_tokens=False)

    def check_prompt(self, request: generation_pb2.GenerateRequest, num_tokens: int) -> None:
        """Check what depends on the length of the whole prompt, and on the tokeniser."""
        if request.stopping.stop and not self.text.has_tokenizer:
            raise UnsupportedFeatureError("stopping.stop: the checkpoint has no tokenizer.json")
        self.check_length(num_tokens, request.stopping)
        per_token = 1 + request.output.prompt_logprobs
        if request.output.HasField("prompt_logprobs") and (
            num_tokens * per_token > MAX_PROMPT_LOGPROB_VALUES
        ):
            most = MAX_PROMPT_LOGPROB_VALUES // num_tokens
            rule = f"must be less than {most} for a prompt of {num_tokens} tokens"
            raise InvalidFieldError("output.prompt_logprobs", rule, request.output.prompt_logprobs)

    def check_length(self, num_tokens: int, stopping: generation_pb2.Stopping) -> None:
        """Raise `ContextLengthExceededError` unless prompt and output fit the window."""
        max_tokens = stopping.max_tokens or 1
        if num_tokens + max_tokens > self.model.max_model_len:
            raise ContextLengthExceededError(num_tokens, max_tokens, self.model.max_model_len)

    def engine_request(
        self,
        request: generation_pb2.GenerateRequest,
        *,
        request_id: str,
        prompt_ids: list[int],
        deadline: float | None,
        forced_ids: tuple[int, ...] = (),
        **extra: Any,
    ) -> EngineRequest:
        """Return what the engine is to do.

        Args:
            request: Checked.
            request_id: Of the client, or ours.
            prompt_ids: All of them, history included.
            deadline: On the engine's clock.
            forced_ids: Generated tokens that are there already. The prompt's log-probabilities
                came with the first of them, so they are not computed again.
            extra: Further fields of `EngineRequest`.
        """
        stopping, output = request.stopping, request.output
        wants_prompt = output.HasField("prompt_logprobs") and not forced_ids
        return EngineRequest(
            request_id=request_id,
            prompt_ids=prompt_ids,
            sampling=self.sampling(request.sampling),
            stopping=StoppingParams(
                max_tokens=stopping.max_tokens if stopping.HasField("max_tokens") else None,
                min_tokens=stopping.min_tokens,
                stop_token_ids=tuple(stopping.stop_token_ids),
                ignore_eos=stopping.ignore_eos,
            ),
            logprobs=output.top_logprobs if output.HasField("top_logprobs") else None,
            prompt_logprobs=output.prompt_logprobs if wants_prompt else None,
            deadline=deadline,
            priority=PRIORITIES[request.priority],
            text_stop=(lambda: TextStop(self._new_text(request))) if stopping.stop else None,
            forced_ids=forced_ids,
            **extra,
        )

    def sampling(self, sampling: generation_pb2.Sampling) -> SamplingParams:
        """Return the sampling with its defaults, and a seed."""
        return SamplingParams(
            temperature=self._value(sampling, "temperature"),
            top_p=self._value(sampling, "top_p"),
            top_k=self._value(sampling, "top_k"),
            min_p=self._value(sampling, "min_p"),
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            repetition_penalty=self._value(sampling, "repetition_penalty"),
            seed=sampling.seed if sampling.HasField("seed") else secrets.randbits(63),
            n=sampling.n if sampling.HasField("n") else 1,
            logit_bias=dict(sampling.logit_bias),
        )

    @property
    def description(self) -> generation_pb2.Model:
        """What is served, for `ListModels`."""
        model = self.model
        return generation_pb2.Model(
            name=model.name,
            model_type=model.model_type,
            max_model_len=model.max_model_len,
            vocab_size=model.vocab_size,
            dtype=model.dtype,
            weights_digest=model.weights_digest,
            text_digest=self.text.digest,
            sampling_defaults_json=json.dumps(asdict(self._defaults)),
        )

    def _value(self, sampling: generation_pb2.Sampling, name: str) -> Any:
        return getattr(sampling if sampling.HasField(name) else self._defaults, name)

    def text_stream(
        self, request: generation_pb2.GenerateRequest, forced_ids: tuple[int, ...] = ()
    ) -> TextStream | None:
        """Return the text of one sequence, past these first tokens; None without a tokeniser."""
        if not self.text.has_tokenizer:
            return None
        stream = self._new_text(request)
        for token_id in forced_ids:
            stream.push(token_id)
        return stream

    def _new_text(self, request: generation_pb2.GenerateRequest) -> TextStream:
        output = request.output
        return self.text.stream(
            stop=request.stopping.stop,
            include_stop=request.stopping.include_stop,
            min_tokens=request.stopping.min_tokens,
            skip_special_tokens=(
                not output.HasField("skip_special_tokens") or output.skip_special_tokens
            ),
        )

    def stream_options(
        self, request: generation_pb2.GenerateRequest, num_prompt_tokens: int
    ) -> StreamOptions:
        """Return what the request's messages carry."""
        output = request.output
        is_batch = PRIORITIES[request.priority] is Priority.BATCH
        waits = BATCH_MESSAGE_TOKENS if is_batch else 0
        return StreamOptions(
            num_prompt_tokens=num_prompt_tokens,
            return_token_ids=not output.HasField("return_token_ids") or output.return_token_ids,
            include_stop=request.stopping.include_stop,
            values_per_token=1 + output.top_logprobs,
            max_pending_tokens=self._max_pending_tokens,
            min_pending_tokens=min(waits, self._max_pending_tokens),
        )


def chat_messages(chat: generation_pb2.Chat) -> list[dict[str, str]]:
    """Return a chat's messages as templates take them."""
    return [{"role": message.role, "content": message.content} for message in chat.messages]


def opens_answer(chat: generation_pb2.Chat) -> bool:
    """Whether the chat ends with the opening of an answer; otherwise its last message goes on."""
    return not chat.HasField("add_generation_prompt") or chat.add_generation_prompt


async def in_thread_if_large(num_bytes: int, function: Callable[..., T], *arguments: Any) -> T:
    """Call `function`; with large input in a thread, so that other streams go on."""
    if num_bytes < LARGE_INPUT_BYTES:
        return function(*arguments)
    return await asyncio.to_thread(function, *arguments)
