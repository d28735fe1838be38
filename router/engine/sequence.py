"""The scheduled state of one sequence.

A `Sequence` is one of a request's n continuations. Only the engine thread changes it. Its
properties are the vocabulary in which the scheduler and the engine are written.

Words: a token is *computed* when it is in the caches. Every token but the newest is computed while
a sequence decodes; a new or preempted sequence has none computed and prefills all of its tokens,
generated ones included, but for those that the prefix cache or the tier puts in place.
"""

from __future__ import annotations

from enum import Enum

import numpy as np
from numpy.typing import NDArray

from protos.errors import InvalidFieldError
from router.engine.cold_store import ColdSequence
from router.engine.prefix_cache import PrefixUse
from router.engine.request import (
    EngineRequest,
    FinishReason,
    Logprobs,
    PrefillProgress,
    Priority,
    Sink,
    Timings,
)
from router.engine.sampler import SamplerState


class SequenceState(Enum):
    """Where a sequence stands."""

    PROBING = "probing"
    """New, or it starts over, and the tier is looking how far it could be restored."""
    WAITING = "waiting"
    RESTORING = "restoring"
    """Owns blocks and a state slot, which the tier is filling."""
    RUNNING = "running"
    """Owns blocks and a state slot."""
    PREEMPTED = "preempted"
    """Waits again, with all its tokens and without blocks; nothing it has sent is sent again."""
    FINISHED = "finished"


class Sequence:
    """One of a request's n sequences."""

    __slots__ = (
        "admitted_s",
        "arrival",
        "blocks",
        "cold",
        "first_token_s",
        "index",
        "is_interactive",
        "last_token_s",
        "max_new_tokens",
        "num_cached",
        "num_computed",
        "num_preemptions",
        "num_restarts",
        "output_ids",
        "prefix",
        "prompt",
        "prompt_len",
        "prompt_logprobs",
        "prompt_reported",
        "request",
        "request_id",
        "row",
        "sampler",
        "sink",
        "state",
        "state_slot",
        "stop_checker",
        "stop_ids",
        "submitted_s",
    )

    def __init__(
        self,
        request: EngineRequest,
        index: int,
        sink: Sink,
        *,
        prompt: NDArray[np.int64],
        arrival: int,
        now: float,
        max_model_len: int,
        eos_token_ids: tuple[int, ...] = (),
        prefix: PrefixUse | None = None,
    ) -> None:
        stopping = request.stopping
        self.request = request
        self.request_id = request.request_id
        self.index = index
        self.sink = sink
        self.arrival = arrival
        """Position in the order of submission."""
        self.is_interactive = request.priority is Priority.INTERACTIVE
        self.prompt = prompt
        self.prompt_len = len(prompt)
        self.output_ids: list[int] = []
        self.max_new_tokens = max_model_len - self.prompt_len
        if stopping.max_tokens is not None:
            self.max_new_tokens = min(self.max_new_tokens, stopping.max_tokens)
        self.stop_ids = frozenset(stopping.stop_token_ids)
        if not stopping.ignore_eos:
            self.stop_ids |= frozenset(eos_token_ids)
        self.stop_checker = request.text_stop() if request.text_stop is not None else None
        self.sampler = SamplerState(
            request.sampling,
            index=index,
            prompt=prompt,
            logprobs=request.logprobs,
            banned_ids=self.stop_ids,
            min_tokens=stopping.min_tokens,
        )
        self.state = SequenceState.WAITING
        self.blocks: list[int] = []
        self.state_slot = -1
        self.row = -1
        """Row among the decoding sequences; -1 while it does not decode."""
        self.num_computed = 0
        self.num_cached = 0
        """Tokens that were in place when it first ran, or when it started over without having
        said anything."""
        self.prefix = prefix
        """None where no prefixes are reused."""
        self.cold: ColdSequence | None = None
        """Its oldest cache blocks, which have left the pool; None while it does not spill. Then
        `blocks` begins behind them."""
        self.num_preemptions = 0
        self.num_restarts = 0
        """Times that it started over for want of cold KV."""
        self.prompt_logprobs = Logprobs() if request.prompt_logprobs is not None else None
        self.prompt_reported = 0
        self.submitted_s = now
        self.admitted_s: float | None = None
        self.first_token_s: float | None = None
        self.last_token_s: float | None = None
        for number, token_id in enumerate(request.forced_ids):
            if self._take(token_id) is not None:
                rule = "must not go on after a token that ends the sequence"
                raise InvalidFieldError(f"resume_tokens.ids[{number}]", rule, token_id)

    def __repr__(self) -> str:
        return (
            f"Sequence({self.request_id}/{self.index} {self.state.value}, "
            f"{self.prompt_len}+{len(self.output_ids)} tokens, {self.num_computed} computed)"
        )

    @property
    def order(self) -> tuple[bool, int]:
        """Lower goes first, the highest is preempted first: interactive before batch, then age."""
        return not self.is_interactive, self.arrival

    @property
    def num_generated(self) -> int:
        """Tokens drawn so far."""
        return len(self.output_ids)

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens."""
        return self.prompt_len + len(self.output_ids)

    @property
    def num_to_compute(self) -> int:
        """Tokens that are not in the caches yet."""
        return self.prompt_len + len(self.output_ids) - self.num_computed

    @property
    def num_cold_blocks(self) -> int:
        """Cache blocks in front of `blocks`."""
        return 0 if self.cold is None else self.cold.num_blocks

    @property
    def is_decoding(self) -> bool:
        """Whether it adds one token a step."""
        return self.row >= 0

    @property
    def is_finished(self) -> bool:
        """Whether it has sent its last output."""
        return self.state is SequenceState.FINISHED

    @property
    def next_cut(self) -> int:
        """Position at which its next prefill chunk ends at the latest."""
        use = self.prefix
        return use.snapshot_at[-1] if use is not None and use.snapshot_at else self.num_tokens

    @property
    def num_prompt_logprobs_due(self) -> int:
        """Prompt tokens whose log-probability is still to be computed."""
        if self.prompt_logprobs is None:
            return 0
        return self.prompt_len - 1 - len(self.prompt_logprobs.token_ids)

    def tokens_between(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the ids of the tokens at positions `start .. stop - 1`."""
        if stop <= self.prompt_len:
            return self.prompt[start:stop]
        generated = self.output_ids[max(0, start - self.prompt_len) : stop - self.prompt_len]
        return np.concatenate([self.prompt[start:], np.array(generated, dtype=np.int64)])

    def append(self, token_id: int, now: float) -> FinishReason | None:
        """Take a drawn token; return why the sequence ends with it, or None."""
        if self.first_token_s is None:
            self.first_token_s = now
        self.last_token_s = now
        return self._take(token_id)

    def _take(self, token_id: int) -> FinishReason | None:
        output_ids = self.output_ids
        output_ids.append(token_id)
        if not self.sampler.is_plain:
            self.sampler.observe(token_id)
        matched = self.stop_checker is not None and self.stop_checker(token_id)
        if token_id in self.stop_ids:
            return FinishReason.STOP
        if matched and len(output_ids) >= self.request.stopping.min_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(output_ids) >= self.max_new_tokens else None

    def report_prefill(self) -> PrefillProgress | None:
        """Return the prompt's progress where it is further than ever reported, else None."""
        done = min(self.num_computed, self.prompt_len)
        if done <= self.prompt_reported:
            return None
        self.prompt_reported = done
        is_whole = done == self.prompt_len
        cached = min(self.num_cached, self.prompt_len)
        logprobs = self.prompt_logprobs if is_whole else None
        return PrefillProgress(done, self.prompt_len, cached, logprobs)

    def timings(self, now: float) -> Timings:
        """Return where the time went, for the last output."""
        admitted = now if self.admitted_s is None else self.admitted_s
        first = now if self.first_token_s is None else self.first_token_s
        last = first if self.last_token_s is None else self.last_token_s
        return Timings(
            queued_s=admitted - self.submitted_s,
            prefill_s=first - admitted,
            decode_s=last - first,
            time_to_first_token_s=0.0 if self.first_token_s is None else first - self.submitted_s,
        )
