"""What a generation's stream says, as typed events, and the result that they add up to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from protos.v1 import generation_pb2


class FinishReason(StrEnum):
    """Why a sequence ended."""

    UNKNOWN = "unknown"
    """A reason of a later version."""
    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Log-probabilities of consecutive tokens."""

    token_ids: Sequence[int]
    logprobs: Sequence[float]
    top: Sequence[tuple[Sequence[int], Sequence[float]]]
    """Per token the most probable ids and their log-probabilities; empty unless asked for."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a sequence cost."""

    prompt_tokens: int
    completion_tokens: int
    cached_prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Timing:
    """Where a sequence's time went, as the engine saw it, in seconds."""

    queued_s: float
    prefill_s: float
    decode_s: float
    time_to_first_token_s: float


@dataclass(frozen=True, slots=True)
class Accepted:
    """The first event: the request is queued."""

    request_id: str
    queue_position: int
    prompt_tokens: int
    seed: int


@dataclass(frozen=True, slots=True)
class Prefill:
    """A part of the prompt is computed."""

    index: int
    tokens_done: int
    tokens_total: int
    tokens_cached: int
    prompt_logprobs: Logprobs | None


@dataclass(frozen=True, slots=True)
class Delta:
    """New text and tokens of one sequence; text may lag behind tokens by a few characters."""

    index: int
    text: str
    token_ids: Sequence[int]
    logprobs: Logprobs | None


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of one sequence."""

    index: int
    reason: FinishReason
    stop_string: str | None
    stop_token_id: int | None
    usage: Usage
    timing: Timing


Event = Accepted | Prefill | Delta | Finished

_REASONS = {
    generation_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    generation_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    generation_pb2.FINISH_REASON_CANCELLED: FinishReason.CANCELLED,
}


def events_of(message: generation_pb2.GenerateResponse) -> Iterator[Event]:
    """Yield what one message says, in the order in which it happened."""
    index = message.index
    if message.HasField("accepted"):
        accepted = message.accepted
        yield Accepted(
            accepted.request_id, accepted.queue_position, accepted.prompt_tokens, accepted.seed
        )
    if message.HasField("prefill"):
        prefill = message.prefill
        yield Prefill(
            index,
            prefill.tokens_done,
            prefill.tokens_total,
            prefill.tokens_cached,
            _logprobs(prefill.prompt_logprobs) if prefill.HasField("prompt_logprobs") else None,
        )
    if message.text_delta or message.token_ids or message.HasField("logprobs"):
        yield Delta(
            index,
            message.text_delta,
            message.token_ids,
            _logprobs(message.logprobs) if message.HasField("logprobs") else None,
        )
    if message.HasField("finished"):
        yield _finished(message)


@dataclass(slots=True)
class Choice:
    """One finished sequence."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    """In pieces as they came."""
    finished: Finished | None = None

    @property
    def finish_reason(self) -> FinishReason:
        """Why it ended."""
        return self.finished.reason if self.finished is not None else FinishReason.UNKNOWN


@dataclass(slots=True)
class Completion:
    """A whole answer."""

    request_id: str = ""
    prompt_tokens: int = 0
    seed: int = 0
    choices: list[Choice] = field(default_factory=list)
    prompt_logprobs: Logprobs | None = None

    @property
    def text(self) -> str:
        """The first sequence's text."""
        return self.choices[0].text if self.choices else ""

    @property
    def token_ids(self) -> list[int]:
        """The first sequence's tokens."""
        return self.choices[0].token_ids if self.choices else []

    def add(self, event: Event) -> None:
        """Take the next event of the stream."""
        if isinstance(event, Accepted):
            self.request_id = event.request_id
            self.prompt_tokens, self.seed = event.prompt_tokens, event.seed
            return
        while len(self.choices) <= event.index:
            self.choices.append(Choice(len(self.choices)))
        choice = self.choices[event.index]
        if isinstance(event, Delta):
            choice.text += event.text
            choice.token_ids += event.token_ids
            if event.logprobs is not None:
                choice.logprobs.append(event.logprobs)
        elif isinstance(event, Finished):
            choice.finished = event
        elif event.prompt_logprobs is not None:
            self.prompt_logprobs = event.prompt_logprobs


def _logprobs(message: generation_pb2.Logprobs) -> Logprobs:
    return Logprobs(
        message.token_ids, message.logprobs, [(top.token_ids, top.logprobs) for top in message.top]
    )


def _finished(message: generation_pb2.GenerateResponse) -> Finished:
    finished, usage, timing = message.finished, message.usage, message.timing
    return Finished(
        message.index,
        _REASONS.get(finished.reason, FinishReason.UNKNOWN),
        finished.stop_string if finished.HasField("stop_string") else None,
        finished.stop_token_id if finished.HasField("stop_token_id") else None,
        Usage(usage.prompt_tokens, usage.completion_tokens, usage.cached_prompt_tokens),
        Timing(
            timing.queued.ToNanoseconds() / 1e9,
            timing.prefill.ToNanoseconds() / 1e9,
            timing.decode.ToNanoseconds() / 1e9,
            timing.time_to_first_token.ToNanoseconds() / 1e9,
        ),
    )
