"""One request's output between the engine's steps and the client's reading.

Decides what goes into one message. Whatever the client has not read yet is kept as one pending
message for each of the request's sequences: a slow reader gets fewer, larger messages. What waits
is bounded; beyond the bound the request fails with `SlowReaderError`. Everything here runs in the
event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from google.protobuf import duration_pb2

from protos.errors import ExpertMeshError, SlowReaderError
from protos.v1 import generation_pb2
from router.engine.request import FinishReason, Logprobs, PrefillProgress, StepOutput, Timings
from router.gateway.text import TextStream

MAX_PENDING_TOKENS = 16384
"""Tokens that may wait for a client, a log-probability counting as one."""

FINISH_REASONS = {
    FinishReason.STOP: generation_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: generation_pb2.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: generation_pb2.FINISH_REASON_CANCELLED,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamOptions:
    """What a client wants in its messages."""

    num_prompt_tokens: int
    return_token_ids: bool = True
    include_stop: bool = False
    """Whether a matched stop string or stop token stays in the text."""
    values_per_token: int = 1
    """1, and the log-probabilities asked for with each token."""
    max_pending_tokens: int = MAX_PENDING_TOKENS
    min_pending_tokens: int = 0
    """A message waits for so many tokens, but for a sequence's last."""


class _Sequence:
    """What waits of one of the request's n sequences."""

    __slots__ = (
        "cached",
        "ended",
        "has_news",
        "logprobs",
        "num_tokens",
        "prefill",
        "text",
        "tokens",
    )

    def __init__(self, text: TextStream | None, num_tokens: int) -> None:
        self.text = text
        self.tokens: list[int] = []
        self.logprobs: Logprobs | None = None
        self.prefill: PrefillProgress | None = None
        self.ended: StepOutput | None = None
        self.has_news = False
        self.num_tokens = num_tokens
        self.cached = 0


class RequestStream:
    """Collects the engine's outputs of one request and forms its messages.

    Args:
        texts: One text stream a sequence; None where the checkpoint has no tokeniser.
        options: What the messages carry.
        on_overflow: Called once when the client reads too slowly, to end the request.
        num_sent: Messages that went out before, of a stream that is resumed.
        num_tokens: Tokens that went out with them.

    Attributes:
        error: What ended the request early.
    """

    def __init__(
        self,
        texts: list[TextStream | None],
        options: StreamOptions,
        on_overflow: Callable[[], object],
        num_sent: int = 0,
        num_tokens: int = 0,
    ) -> None:
        self._sequences = [_Sequence(text, num_tokens) for text in texts]
        self._options = options
        self._on_overflow = on_overflow
        self._num_open = len(texts)
        self._num_pending = 0
        self._num_sent = num_sent
        self._news = asyncio.Event()
        self.error: ExpertMeshError | None = None

    @property
    def is_ended(self) -> bool:
        """Whether the engine has ended every sequence of the request."""
        return self._num_open == 0

    @property
    def has_news(self) -> bool:
        """Whether something came since the last `wait`."""
        return self._news.is_set()

    def put(self, output: StepOutput) -> None:
        """Take what one step did for one sequence; the engine's sink."""
        if output.is_last:
            self._num_open -= 1
        if self.error is not None:
            return
        if output.error is not None:
            self.error = output.error
            self._news.set()
            return
        sequence = self._sequences[output.index]
        sequence.has_news = True
        sequence.tokens += output.token_ids
        if output.logprobs is not None:
            if sequence.logprobs is None:
                sequence.logprobs = output.logprobs
            else:
                sequence.logprobs.extend(output.logprobs)
        if output.prefill is not None:
            _keep_prefill(sequence, output.prefill)
        if output.finish_reason is not None:
            sequence.ended = output
        self._num_pending += len(output.token_ids) * self._options.values_per_token
        if output.is_last or self._num_pending >= self._options.min_pending_tokens:
            self._news.set()
        if self._num_pending > self._options.max_pending_tokens:
            self.error = SlowReaderError(self._num_pending, self._options.max_pending_tokens)
            self._sequences.clear()
            self._on_overflow()

    async def wait(self) -> None:
        """Wait until `take` has something, or the request ended."""
        await self._news.wait()
        self._news.clear()

    def number(self, message: generation_pb2.GenerateResponse) -> generation_pb2.GenerateResponse:
        """Give a message its place in the stream."""
        self._num_sent += 1
        message.sequence = self._num_sent
        return message

    def take(self) -> list[generation_pb2.GenerateResponse]:
        """Return what waits, at most one message a sequence, by index."""
        self._num_pending = 0
        messages = []
        for index, sequence in enumerate(self._sequences):
            if sequence.has_news:
                sequence.has_news = False
                message = self._message(index, sequence)
                if message is not None:
                    messages.append(self.number(message))
        return messages

    def _message(self, index: int, sequence: _Sequence) -> generation_pb2.GenerateResponse | None:
        tokens, sequence.tokens = sequence.tokens, []
        ended = sequence.ended
        sequence.num_tokens += len(tokens)
        delta = self._text_of(sequence, tokens) if sequence.text is not None else ""
        shown = tokens if self._options.return_token_ids else []
        if not (delta or shown or sequence.logprobs or sequence.prefill or ended):
            return None  # tokens whose text is held
        message = generation_pb2.GenerateResponse(index=index, text_delta=delta, token_ids=shown)
        if sequence.logprobs is not None:
            fill_logprobs(message.logprobs, sequence.logprobs)
            sequence.logprobs = None
        if sequence.prefill is not None:
            fill_prefill(message.prefill, sequence.prefill)
            sequence.prefill = None
        if ended is not None:
            self._fill_end(message, sequence, ended)
        return message

    def _text_of(self, sequence: _Sequence, tokens: list[int]) -> str:
        text, ended = sequence.text, sequence.ended
        assert text is not None
        if ended is not None and ended.stop_token_id is not None and not self._options.include_stop:
            tokens = tokens[:-1]
        delta = "".join(map(text.push, tokens))
        return delta if ended is None else delta + text.finish()

    def _fill_end(
        self,
        message: generation_pb2.GenerateResponse,
        sequence: _Sequence,
        ended: StepOutput,
    ) -> None:
        assert ended.finish_reason is not None
        finished = message.finished
        finished.reason = FINISH_REASONS[ended.finish_reason]
        if sequence.text is not None and sequence.text.matched is not None:
            finished.reason = generation_pb2.FINISH_REASON_STOP
            finished.stop_string = sequence.text.matched
        elif ended.stop_token_id is not None:
            finished.stop_token_id = ended.stop_token_id
        message.usage.prompt_tokens = self._options.num_prompt_tokens
        message.usage.completion_tokens = sequence.num_tokens
        message.usage.cached_prompt_tokens = sequence.cached
        if ended.timings is not None:
            fill_timing(message.timing, ended.timings)


def _keep_prefill(sequence: _Sequence, progress: PrefillProgress) -> None:
    """Keep the newest progress, and the prompt's log-probabilities, which come once."""
    before = sequence.prefill
    if before is not None and progress.prompt_logprobs is None and before.prompt_logprobs:
        progress = PrefillProgress(
            progress.tokens_done,
            progress.tokens_total,
            progress.tokens_cached,
            before.prompt_logprobs,
        )
    sequence.prefill = progress
    sequence.cached = progress.tokens_cached


def fill_logprobs(message: generation_pb2.Logprobs, logprobs: Logprobs) -> None:
    """Write log-probabilities into a message."""
    message.token_ids.extend(logprobs.token_ids)
    message.logprobs.extend(logprobs.logprobs)
    for token_ids, values in logprobs.top:
        message.top.add(token_ids=token_ids, logprobs=values)


def fill_prefill(message: generation_pb2.PrefillProgress, progress: PrefillProgress) -> None:
    """Write a prompt's progress into a message."""
    message.tokens_done = progress.tokens_done
    message.tokens_total = progress.tokens_total
    message.tokens_cached = progress.tokens_cached
    if progress.prompt_logprobs is not None:
        fill_logprobs(message.prompt_logprobs, progress.prompt_logprobs)


def fill_timing(message: generation_pb2.Timing, timings: Timings) -> None:
    """Write a sequence's times into a message."""
    _fill_duration(message.queued, timings.queued_s)
    _fill_duration(message.prefill, timings.prefill_s)
    _fill_duration(message.decode, timings.decode_s)
    _fill_duration(message.time_to_first_token, timings.time_to_first_token_s)


def _fill_duration(message: duration_pb2.Duration, seconds: float) -> None:
    message.FromNanoseconds(round(seconds * 1e9))
