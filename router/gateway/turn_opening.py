"""What a turn starts from: a new prompt, or an open turn that another call or router has left.

Decides which tokens a turn continues, what it may still generate within the session's quota, and
whether a turn that the store has lost may begin again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np

from protos.errors import InvalidFieldError, SessionFencedError, SessionQuotaError
from protos.v1 import generation_pb2
from router.gateway.continuation import SystemPrefixes, continue_session
from router.gateway.open_turn import Turn, kept_request, prompt_digest
from router.gateway.request_reader import RequestReader, in_thread_if_large
from router.state.session_records import Lease, OpenTurn, TokenIds, TurnRecord
from router.state.sessions import SessionStore

logger = logging.getLogger(__name__)


class TurnOpener:
    """Begins the turns of one router.

    Args:
        store: Holds the sessions.
        reader: Says what requests mean.
        prefixes: Knows where chats begin alike.
        clock: The engine's and the store's.
    """

    def __init__(
        self,
        store: SessionStore,
        reader: RequestReader,
        prefixes: SystemPrefixes,
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._reader = reader
        self._prefixes = prefixes
        self._clock = clock

    async def begin(
        self, request: generation_pb2.GenerateRequest, request_id: str, lease: Lease
    ) -> Turn | None:
        """Return the turn to run; None where the one to resume is not open.

        Args:
            request: Checked.
            request_id: Its own, or drawn for it.
            lease: Of the session.

        Raises:
            InvalidFieldError: The client holds other tokens than were saved.
            SessionFencedError: The turn to resume was lost, and another stands in its place.
            SessionQuotaError: The turn could pass the session's quota.
            StateUnavailableError: The store does not answer.
        """
        history = await self._store.tokens(lease)
        if request.HasField("resume_from"):
            opened = await self._store.open_turn_of(lease)
            if opened is not None and opened.request_id == request_id:
                return self._resumed(request, lease, history, opened)
            if await self.finished(request, lease.tenant) is not None:
                return None
            has_input = request.WhichOneof("input") is not None
            if not has_input or (request.resume_from and not _may_be_lost(request, opened)):
                return None
        return await self._opened(request, request_id, lease, history)

    async def _opened(
        self,
        request: generation_pb2.GenerateRequest,
        request_id: str,
        lease: Lease,
        history: TokenIds,
    ) -> Turn:
        """Begin a new turn and save its prompt. A turn that another request left open is lost.

        One that the client knows and the store has lost begins again with the tokens that arrived.

        Raises:
            SessionFencedError: It knows another: a turn was lost before this one, or came instead.
        """
        large = request.ByteSize()
        prompt_ids = await in_thread_if_large(large, self._encode, request, history)
        kept = kept_request(request, request_id)
        kept.sampling.seed = self._reader.sampling(request.sampling).seed
        num_prompt = len(history) + len(prompt_ids)
        self._reader.check_prompt(request, num_prompt)
        self._apply_quota(kept, lease, num_prompt)
        junctions: tuple[int, ...] = ()
        if not len(history):
            junctions = await in_thread_if_large(
                large, self._prefixes.junctions, request, prompt_ids, lease.tenant
            )
        prompt = np.array(prompt_ids, dtype=np.uint32)
        if request.resume_from:
            digest = prompt_digest(lease.turn, kept.sampling.seed, history, prompt)
            if digest != request.resume_prompt_digest:
                raise SessionFencedError(
                    lease.session_id,
                    f"the store lost the turn of request {request_id}, which began with other "
                    f"tokens than turn {lease.turn + 1} of the session would now: it has "
                    f"{len(history)} tokens; read it, and send the turn as a new request",
                )
            logger.warning("turn.begun_again id=%s session=%s", request_id, lease.session_id)
        turn = Turn(
            self._reader,
            kept,
            lease,
            history,
            prompt,
            self._store.settings,
            forced_ids=tuple(request.resume_tokens.ids),
            resume_from=request.resume_from,
            junctions=junctions,
            clock=self._clock,
        )
        await self._store.abandon_turn(lease)
        await self._store.open_turn(lease, turn.opening())
        return turn

    def _resumed(
        self,
        request: generation_pb2.GenerateRequest,
        lease: Lease,
        history: TokenIds,
        opened: OpenTurn,
    ) -> Turn:
        """Go on with an open turn: its own request, and the longer of saved and held tokens.

        Raises:
            InvalidFieldError: The client holds other tokens than were saved.
        """
        saved = tuple(opened.generated_ids.tolist())
        held = tuple(request.resume_tokens.ids)
        for position, (ours, theirs) in enumerate(zip(saved, held, strict=False)):
            if ours != theirs:
                field = f"resume_tokens.ids[{position}]"
                raise InvalidFieldError(field, f"must be the token that was sent, {ours}", theirs)
        return Turn(
            self._reader,
            generation_pb2.GenerateRequest.FromString(opened.request),
            lease,
            history,
            opened.prompt_ids,
            self._store.settings,
            forced_ids=max(saved, held, key=len),
            num_saved=len(saved),
            resume_from=request.resume_from,
            clock=self._clock,
        )

    def _encode(self, request: generation_pb2.GenerateRequest, history: TokenIds) -> list[int]:
        if not len(history):
            return self._reader.encode_input(request)
        return continue_session(self._reader.text, request, history)

    @staticmethod
    def _apply_quota(
        request: generation_pb2.GenerateRequest, lease: Lease, num_prompt: int
    ) -> None:
        """Let an output without `max_tokens` end at the quota; refuse one that would pass it."""
        if not lease.quota_tokens:
            return
        room = lease.quota_tokens - num_prompt
        wanted = max(1, request.stopping.max_tokens)
        if wanted > room:
            total = num_prompt + wanted
            raise SessionQuotaError(lease.session_id, total, lease.quota_tokens)
        if not request.stopping.HasField("max_tokens"):
            request.stopping.max_tokens = room

    async def finished(
        self, request: generation_pb2.GenerateRequest, tenant: str
    ) -> TurnRecord | None:
        """Return the turn of this request in the session's history; None where there is none."""
        turns = await self._store.turns(tenant, request.session_id)
        found = (t for t in reversed(turns) if t.request_id == request.request_id)
        return next(found, None)


def _may_be_lost(request: generation_pb2.GenerateRequest, opened: OpenTurn | None) -> bool:
    """Say whether the turn that a client resumes may be one that the store has lost: nobody else
    has begun one since, and the client brings all that it takes to begin it again."""
    return (
        opened is None
        and bool(request.resume_prompt_digest)
        and len(request.resume_tokens.ids) == request.resume_from - 1
    )
