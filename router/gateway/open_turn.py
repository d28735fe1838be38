"""One turn of a session as it runs: its request, its tokens, how far they are saved.

Knows no store: `router.gateway.turn_writer` saves its tokens, and commits it.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import struct
import time
from collections.abc import Callable, Sequence

import numpy as np

from protos.v1 import generation_pb2
from router.engine.request import EngineRequest, FinishReason, SessionHint, StepOutput
from router.gateway.request_reader import RequestReader
from router.gateway.turn_stream import TurnStream
from router.state.leases import StoreSettings
from router.state.session_records import Lease, OpenTurn, TokenIds, TurnRecord


class Turn:
    """A turn under way.

    Args:
        reader: Says what the request means.
        request: As it is kept in the store: with its seed, without its input.
        lease: Of the session.
        history: Tokens of earlier turns.
        prompt_ids: What this turn adds to them.
        settings: How often it is saved.
        forced_ids: Generated tokens that are there already.
        num_saved: How many of them are in the store.
        resume_from: Sequence of the last message that the client has.
        junctions: See `EngineRequest`.
        clock: Monotonic seconds.

    Attributes:
        is_committed: Whether the turn is part of the history.
        hint: What the engine is told of the session.
        snapshots: New ones that the session's record does not name yet, by position.
        is_fenced: Whether another has gone on with the session; then nothing is written any more.
        num_reopened: Times that it was opened anew because the store had lost it.
        reopening: Held while that happens.
    """

    def __init__(
        self,
        reader: RequestReader,
        request: generation_pb2.GenerateRequest,
        lease: Lease,
        history: TokenIds,
        prompt_ids: TokenIds,
        settings: StoreSettings,
        *,
        forced_ids: tuple[int, ...] = (),
        num_saved: int = 0,
        resume_from: int = 0,
        junctions: tuple[int, ...] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.request = request
        self.request_id = request.request_id
        self.lease = lease
        self.history = history
        self.prompt_ids = prompt_ids
        self.num_saved = num_saved
        self.resume_from = resume_from
        self.is_committed = False
        self.hint: SessionHint | None = None
        self.snapshots: dict[int, bytes] = {}
        self.is_fenced = False
        self.num_reopened = 0
        self.reopening = asyncio.Lock()
        self._reader = reader
        self._settings = settings
        self._forced_ids = forced_ids
        self._junctions = junctions
        self._clock = clock
        self._unsaved_since = self._taken_at = clock()
        self._savable = asyncio.Event()
        self._is_saved_last = False
        self._last: generation_pb2.GenerateResponse | None = None
        self._stream: TurnStream | None = None

    @property
    def num_prompt_tokens(self) -> int:
        """Earlier turns and this one's prompt."""
        return len(self.history) + len(self.prompt_ids)

    @property
    def has_ended(self) -> bool:
        """Whether the engine has brought the turn to its end, so that it can be committed."""
        return self._stream is not None and self._stream.ended is not None

    @property
    def token_ids(self) -> list[int]:
        """Generated tokens so far."""
        return [] if self._stream is None else self._stream.token_ids

    def engine_request(
        self, engine_id: str, deadline: float | None, namespace: str
    ) -> EngineRequest:
        """Return what the engine is to do; its prefixes are named in the given namespace."""
        return self._reader.engine_request(
            self.request,
            request_id=engine_id,
            prompt_ids=[*self.history.tolist(), *self.prompt_ids.tolist()],
            deadline=deadline,
            forced_ids=self._forced_ids,
            namespace=namespace,
            junctions=self._junctions,
            session=self.hint,
        )

    def open_stream(self, on_overflow: Callable[[], object]) -> TurnStream:
        """Return the turn's messages."""
        self._stream = TurnStream(
            self._reader.text_stream(self.request),
            self._reader.stream_options(self.request, self.num_prompt_tokens),
            on_overflow,
            forced_ids=self._forced_ids,
            resume_from=self.resume_from,
        )
        return self._stream

    def accepted(self, queue_position: int, address: str) -> generation_pb2.Accepted:
        """Return the first message's content."""
        return generation_pb2.Accepted(
            request_id=self.request_id,
            queue_position=queue_position,
            prompt_tokens=self.num_prompt_tokens,
            seed=self.request.sampling.seed,
            router_address=address,
            session_tokens=len(self.history),
            turn=self.lease.turn + 1,
            prompt_digest=prompt_digest(
                self.lease.turn, self.request.sampling.seed, self.history, self.prompt_ids
            ),
        )

    def opening(self) -> OpenTurn:
        """Return what the store is told when the turn is opened."""
        return OpenTurn(
            request_id=self.request_id,
            prompt_ids=self.prompt_ids,
            seed=self.request.sampling.seed,
            request=self.request.SerializeToString(),
        )

    def begins_with(self, ids: Sequence[int]) -> bool:
        """Say whether these are the first of its generated tokens."""
        return self.token_ids[: len(ids)] == list(ids)

    def move_to(self, lease: Lease, num_saved: int) -> None:
        """Go on under another lease, whose open turn has so many of the generated tokens."""
        self.lease, self.num_saved = lease, num_saved
        self._savable.set()

    # Tokens

    def put(self, output: StepOutput) -> None:
        """Take what one step did; the engine's sink."""
        assert self._stream is not None
        if not self.num_unsaved:
            self._unsaved_since = self._clock()
        self._stream.put(output)
        waiting = self._stream.num_savable - self.num_saved
        if waiting and waiting % self._settings.commit_interval_tokens == 0:
            self._savable.set()

    async def wait_savable(self) -> bool:
        """Return True when enough tokens wait to be saved, or have waited for long enough.

        False after `stop_saving`.
        """
        try:
            async with asyncio.timeout(self._settings.commit_interval_s):
                await self._savable.wait()
        except TimeoutError:
            pass
        self._savable.clear()
        return not self._is_saved_last

    def stop_saving(self) -> None:
        """End `wait_savable`: from here on the commit does it."""
        self._is_saved_last = True
        self._savable.set()

    def take_savable(self) -> list[int]:
        """Return the generated tokens that are not saved yet and do not end the turn.

        None of a turn with log-probabilities: they would come back without theirs.
        """
        if self._stream is None or self.request.output.HasField("top_logprobs"):
            return []
        self._taken_at = self._clock()
        return self._stream.token_ids[self.num_saved : self._stream.num_savable]

    def note_saved(self, count: int) -> None:
        """Say that so many of the tokens that were taken are in the store."""
        self.num_saved += count
        self._unsaved_since = self._taken_at

    @property
    def num_unsaved(self) -> int:
        """Generated tokens that a death of this router would cost; any thread."""
        return 0 if self.is_committed else len(self.token_ids) - self.num_saved

    @property
    def unsaved_s(self) -> float:
        """Seconds that the oldest of them has waited, at most; any thread."""
        return self._clock() - self._unsaved_since if self.num_unsaved else 0.0

    def unsaved_ids(self) -> list[int]:
        """Return the generated tokens that are not in the store, to the end."""
        return self.token_ids[max(0, self.lease.open_tokens - len(self.prompt_ids)) :]

    def close_stream(self) -> None:
        """Take nothing more from the engine."""
        if self._stream is not None:
            self._stream.close()

    # Its end

    def last_message(self) -> generation_pb2.GenerateResponse | None:
        """Return the message that ends the turn; None where the client has it."""
        assert self._stream is not None
        if self._last is None:
            self._stream.take()  # what a lost client did not get is replayed
            self._last = self._stream.last()
        return self._last if self._last.sequence > self.resume_from else None

    def record(self) -> TurnRecord:
        """Return what the session's log keeps of the turn."""
        self.last_message()
        last = self._last
        assert last is not None
        return TurnRecord(
            request_id=self.request_id,
            first_token=len(self.history),
            prompt_tokens=len(self.prompt_ids),
            completion_tokens=len(self.token_ids),
            finish_reason=_NAMES[last.finished.reason],
            finished_ms=time.time_ns() // 1_000_000,
            details={
                "request": base64.b64encode(self.request.SerializeToString()).decode(),
                "cached": last.usage.cached_prompt_tokens,
                "stop_token_id": (
                    last.finished.stop_token_id if last.finished.HasField("stop_token_id") else None
                ),
            },
        )


_NAMES = {
    generation_pb2.FINISH_REASON_STOP: FinishReason.STOP.value,
    generation_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH.value,
    generation_pb2.FINISH_REASON_CANCELLED: FinishReason.CANCELLED.value,
}


def prompt_digest(turn: int, seed: int, history: TokenIds, prompt_ids: TokenIds) -> bytes:
    """Return 16 bytes that stand for what a turn begins with. Whoever shows them again, with the
    request that they came from, means the same turn of the same session as it was.

    Args:
        turn: Turns before it.
        seed: It draws with.
        history: Tokens of the turns before.
        prompt_ids: What it adds to them.
    """
    digest = hashlib.sha256(struct.pack("<QQQ", turn, seed, len(history)))
    for ids in (history, prompt_ids):
        digest.update(np.ascontiguousarray(ids, dtype="<u4").data)
    return digest.digest()[:16]


def kept_request(
    request: generation_pb2.GenerateRequest, request_id: str
) -> generation_pb2.GenerateRequest:
    """Return a copy for the store: what is to be done, without the input."""
    kept = generation_pb2.GenerateRequest(request_id=request_id, session_id=request.session_id)
    kept.sampling.CopyFrom(request.sampling)
    kept.stopping.CopyFrom(request.stopping)
    kept.output.CopyFrom(request.output)
    return kept


def replayed(
    reader: RequestReader,
    record: TurnRecord,
    history: TokenIds,
    resume_from: int,
    address: str,
) -> Sequence[generation_pb2.GenerateResponse]:
    """Form the messages of a committed turn again, without log-probabilities and timing.

    Args:
        reader: Says what the turn's request means.
        record: Of the turn.
        history: At least up to the turn's end.
        resume_from: Sequence of the last message that the client has.
        address: This router's.
    """
    request = generation_pb2.GenerateRequest.FromString(base64.b64decode(record.details["request"]))
    first = record.first_token + record.prompt_tokens
    ids: list[int] = history[first : first + record.completion_tokens].tolist()
    reason = FinishReason(record.finish_reason)
    num_forced = len(ids) if reason is FinishReason.CANCELLED else len(ids) - 1
    stream = TurnStream(
        reader.text_stream(request),
        reader.stream_options(request, first),
        on_overflow=lambda: None,
        forced_ids=ids[:num_forced],
        resume_from=resume_from,
    )
    stream.cached = record.details["cached"]
    stream.put(
        StepOutput(
            record.request_id,
            0,
            ids[num_forced:],
            finish_reason=reason,
            stop_token_id=record.details["stop_token_id"],
        )
    )
    messages = []
    if not resume_from:
        accepted = generation_pb2.Accepted(
            request_id=record.request_id,
            prompt_tokens=first,
            seed=request.sampling.seed,
            router_address=address,
            session_tokens=record.first_token,
            turn=record.turn,
        )
        messages.append(generation_pb2.GenerateResponse(sequence=1, accepted=accepted))
    messages += stream.take()
    last = stream.last()
    last.finished.persisted = True
    if last.sequence > resume_from:
        messages.append(last)
    return messages
