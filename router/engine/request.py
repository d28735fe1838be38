"""What a caller hands to the engine, and what the engine hands back.

Decides the shape of a request and of its outputs. Knows neither text (the gateway renders,
tokenises and detokenises) nor scheduling. The gateway validates user input; `Engine.submit` checks
only what would hurt other requests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import Protocol

from protos.errors import ExpertMeshError


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is drawn.

    The order is: logit bias, repetition penalty, frequency and presence penalty, ban of stop tokens
    before `min_tokens`, temperature, top-k, top-p over what top-k left, min-p. Ties go to the lower
    token id.
    """

    temperature: float = 1.0
    """0 is greedy."""

    top_p: float = 1.0
    """In (0, 1]."""

    top_k: int = 0
    """0 means all."""

    min_p: float = 0.0
    """In [0, 1], relative to the most probable token."""

    presence_penalty: float = 0.0
    """Subtracted from every token generated so far."""

    frequency_penalty: float = 0.0
    """Subtracted once per time a token was generated."""

    repetition_penalty: float = 1.0
    """> 0; divides positive and multiplies negative logits of tokens in the prompt or the
    output."""

    seed: int = 0
    """64 bits. The gateway draws one where the client gave none."""

    n: int = 1
    """Sequences of this request; where prefixes are reused, one prefills the prompt for all."""

    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoppingParams:
    """When a sequence ends."""

    max_tokens: int | None = None
    """Generated tokens, at least 1; None: up to the context window."""

    min_tokens: int = 0
    """Before so many generated tokens neither end-of-sequence nor stop tokens can be drawn, and
    stop strings do not end it."""

    stop_token_ids: tuple[int, ...] = ()

    ignore_eos: bool = False
    """The model's end-of-sequence tokens are ordinary tokens."""


class StopChecker(Protocol):
    """Finds stop strings in one sequence's text; called in the engine thread, so it must be
    cheap."""

    def __call__(self, token_id: int) -> bool:
        """Take the next generated token; return whether a stop string has matched in the text so
        far."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionHint:
    """What the record of a session says about its cached values, and who keeps the record."""

    snapshot_positions: tuple[int, ...] = ()
    """Token counts at which the tier may hold a snapshot."""

    on_snapshot: Callable[[int, bytes], None] | None = None
    """Told position and position hash of a snapshot of this request, once the tier holds it. Runs
    on a thread of the tier, perhaps after the request's end; must be cheap and not raise."""


class Priority(IntEnum):
    """Who goes first; `router.engine.priority` says what that means."""

    INTERACTIVE = 0
    BATCH = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    """One request: a prompt and how to continue it."""

    request_id: str
    prompt_ids: list[int]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stopping: StoppingParams = field(default_factory=StoppingParams)

    logprobs: int | None = None
    """None: none; 0: the chosen token's; k: also those of the k most probable tokens.
    Of the model's own distribution, before bias, penalties and temperature."""

    prompt_logprobs: int | None = None
    """The same for the prompt's tokens."""

    deadline: float | None = None
    """On the engine's monotonic clock."""

    priority: Priority = Priority.INTERACTIVE

    text_stop: Callable[[], StopChecker] | None = None
    """Makes the stop checker of one sequence; None: no stop strings."""

    forced_ids: tuple[int, ...] = ()
    """Generated tokens that are there already, drawn by another router. They count as output in
    everything (penalties, limits, stop strings, random numbers), are prefilled and not sent. None
    of them ends the sequence."""

    namespace: str = ""
    """Seed of the names of its prefixes: requests of different namespaces share nothing. Empty: the
    engine's own."""

    junctions: tuple[int, ...] = ()
    """Prompt positions up to which other requests will begin alike, such as the end of the system
    prompt; rounded down to multiples of 128."""

    session: SessionHint | None = None
    """None: no session."""


class FinishReason(Enum):
    """Why a sequence ended without an error."""

    STOP = "stop"
    """An end-of-sequence token, a stop token or a stop string."""
    LENGTH = "length"
    """`max_tokens` or the context window."""
    CANCELLED = "cancelled"


@dataclass(slots=True)
class Logprobs:
    """Log-probabilities of consecutive tokens, column by column."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[tuple[list[int], list[float]]] = field(default_factory=list)
    """Per token the most probable ids, most probable first, and their values; empty where not asked
    for."""

    def extend(self, other: Logprobs) -> None:
        """Append the tokens of `other`."""
        self.token_ids += other.token_ids
        self.logprobs += other.logprobs
        self.top += other.top


@dataclass(frozen=True, slots=True)
class PrefillProgress:
    """How far a prompt is prefilled."""

    tokens_done: int
    tokens_total: int
    tokens_cached: int
    """Of `tokens_done`: not computed, because an earlier sequence had."""
    prompt_logprobs: Logprobs | None
    """Of the prompt's second to last token (the first has no distribution), in the output where
    prefill ends."""


@dataclass(frozen=True, slots=True)
class Timings:
    """Where a sequence's time went, in seconds."""

    queued_s: float
    """From submission to admission; up to the end where it was never admitted."""
    prefill_s: float
    """From admission to the first token."""
    decode_s: float
    """From the first token to the last."""
    time_to_first_token_s: float
    """From submission; 0 where no token came."""


@dataclass(slots=True)
class StepOutput:
    """What one step did for one sequence. A sequence's last output has `finish_reason` or
    `error`."""

    request_id: str
    index: int
    """Which of the request's n sequences."""
    token_ids: list[int]
    """New tokens; a stop token is among them."""
    logprobs: Logprobs | None = None
    """Of `token_ids`."""
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    """The token that ended the sequence; None for a stop string, which its `StopChecker` knows."""
    error: ExpertMeshError | None = None
    prefill: PrefillProgress | None = None
    timings: Timings | None = None
    """In the last output."""

    @property
    def is_last(self) -> bool:
        """Whether the sequence is over."""
        return self.finish_reason is not None or self.error is not None


Sink = Callable[[StepOutput], None]
