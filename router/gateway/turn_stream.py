"""The messages of a session's turn: numbered by its tokens, so that any router can go on with them.

Message 1 is `accepted`; message 1 + i has the i-th generated token and no other, even where its
text is held. The message that ends the turn is kept back until the turn is written. Everything here
runs in the event loop.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence

from protos.errors import ExpertMeshError, SlowReaderError
from protos.v1 import generation_pb2
from router.engine.request import PrefillProgress, StepOutput
from router.gateway.stream import (
    FINISH_REASONS,
    StreamOptions,
    fill_logprobs,
    fill_prefill,
    fill_timing,
)
from router.gateway.text import TextStream


class TurnStream:
    """Collects the engine's outputs of one turn and forms its messages.

    Args:
        text: Of the generated tokens, none pushed yet; None without a tokeniser.
        options: What the messages carry.
        on_overflow: Called once when the client reads too slowly, to end the request.
        forced_ids: Generated tokens that are there already.
        resume_from: Sequence of the last message that the client has.

    Attributes:
        token_ids: All generated tokens, the forced ones too.
        cached: Prompt tokens that were not computed.
        ended: The engine's last output, of a turn that has come to its end.
        error: What ended the turn early.
    """

    def __init__(
        self,
        text: TextStream | None,
        options: StreamOptions,
        on_overflow: Callable[[], object],
        *,
        forced_ids: Sequence[int] = (),
        resume_from: int = 0,
    ) -> None:
        self.token_ids: list[int] = list(forced_ids)
        self.cached = 0
        self.ended: StepOutput | None = None
        self.error: ExpertMeshError | None = None
        self._text = text
        self._options = options
        self._on_overflow = on_overflow
        self._resume_from = resume_from
        self._num_formed = 0
        self._prefill: PrefillProgress | None = None
        self._is_closed = False
        self._news = asyncio.Event()
        self._pending: deque[StepOutput] = deque()
        for token_id in forced_ids:
            self._pending.append(StepOutput("", 0, [token_id]))
        if forced_ids:
            self._news.set()

    @property
    def has_news(self) -> bool:
        """Whether something came since the last `wait`."""
        return self._news.is_set()

    @property
    def num_savable(self) -> int:
        """Generated tokens of which it is known that they do not end the turn."""
        return len(self.token_ids) - (1 if self.ended is not None and self.ended.token_ids else 0)

    def put(self, output: StepOutput) -> None:
        """Take what one step did; the engine's sink."""
        if self._is_closed or self.error is not None:
            return
        self._news.set()
        if output.error is not None:
            self.error = output.error
            return
        if output.prefill is not None:
            self._prefill = output.prefill
            self.cached = output.prefill.tokens_cached
        self.token_ids += output.token_ids
        if output.finish_reason is not None:
            self.ended = output
            return
        if output.token_ids:
            self._pending.append(output)
        waiting = len(self._pending) * self._options.values_per_token
        if waiting > self._options.max_pending_tokens:
            self.error = SlowReaderError(waiting, self._options.max_pending_tokens)
            self._pending.clear()
            self._on_overflow()

    async def wait(self) -> None:
        """Wait until `take` has something, or the turn ended."""
        await self._news.wait()
        self._news.clear()

    def take(self) -> list[generation_pb2.GenerateResponse]:
        """Return a message for each token that waits, but for those that the client has."""
        messages = []
        while self._pending:
            message = self._message(self._pending.popleft())
            if message.sequence > self._resume_from:
                messages.append(message)
        return messages

    def close(self) -> None:
        """Take nothing more: what the engine still says is of a stream without a reader."""
        self._is_closed = True

    def last(self) -> generation_pb2.GenerateResponse:
        """Return the message that ends the turn; call once, when all others are taken.

        A cancelled turn may end without a token: then it is a message of its own.
        """
        ended = self.ended
        assert ended is not None
        assert ended.finish_reason is not None
        if ended.token_ids:
            message = self._message(ended)
        else:
            message = generation_pb2.GenerateResponse(sequence=self._num_formed + 2)
        if self._text is not None:
            message.text_delta += self._text.finish()
        message.finished.reason = FINISH_REASONS[ended.finish_reason]
        if self._text is not None and self._text.matched is not None:
            message.finished.reason = generation_pb2.FINISH_REASON_STOP
            message.finished.stop_string = self._text.matched
        elif ended.stop_token_id is not None:
            message.finished.stop_token_id = ended.stop_token_id
        message.usage.prompt_tokens = self._options.num_prompt_tokens
        message.usage.completion_tokens = len(self.token_ids)
        message.usage.cached_prompt_tokens = self.cached
        if ended.timings is not None:
            fill_timing(message.timing, ended.timings)
        return message

    def _message(self, output: StepOutput) -> generation_pb2.GenerateResponse:
        (token_id,) = output.token_ids
        self._num_formed += 1
        message = generation_pb2.GenerateResponse(sequence=1 + self._num_formed)
        is_shown = output.stop_token_id is None or self._options.include_stop
        if self._text is not None and is_shown:
            message.text_delta = self._text.push(token_id)
        if self._options.return_token_ids:
            message.token_ids.append(token_id)
        if output.logprobs is not None:
            fill_logprobs(message.logprobs, output.logprobs)
        if self._num_formed == 1 and self._prefill is not None:
            fill_prefill(message.prefill, self._prefill)
        return message
