"""A session's turn: from the lease to the message that says it is written.

Decides what a `Generate` with a session id means: which tokens it continues, what a lost stream
gets when it is resumed, and when a token may be sent. The order of a turn:

    lease -> history -> prompt saved as the open turn -> engine -> tokens, saved behind the stream
    -> commit -> lease given back -> last message

Words: *saved* tokens are in the store as part of the open turn; a turn is *committed* when it is
part of the session's history; a turn is *left open* when its client is lost, for `resume_from`.
What the store is, and what it does when it fails, is in `router.state.sessions`.

A failover to a replica that lags may lose the open turn. Its router opens it again where nobody has
taken the session meanwhile. If the router is lost as well, the client begins it again on any other:
it knows the tokens that arrived, its request, and a digest of what the turn began with, which the
session must still give. So two histories are never merged, and no token comes twice.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

import grpc
import numpy as np

from protos.errors import (
    ExpertMeshError,
    InvalidFieldError,
    SessionBusyError,
    SessionFencedError,
    SessionQuotaError,
    StateUnavailableError,
)
from protos.ids import new_request_id
from protos.v1 import generation_pb2
from protos.validate import validate_generate
from router.engine.chain import tenant_namespace
from router.gateway.continuation import SystemPrefixes, continue_session
from router.gateway.live import LiveRequest, LiveRequests
from router.gateway.open_turn import Turn, kept_request, prompt_digest, replayed
from router.gateway.request_reader import RequestReader, in_thread_if_large
from router.gateway.snapshot_names import SnapshotNames
from router.gateway.turn_figures import TurnFigures
from router.state.session_records import Lease, OpenTurn, TokenIds, TurnRecord
from router.state.sessions import SessionStore

logger = logging.getLogger(__name__)

COMMIT_WAIT_S = 2.0
"""How long the last message waits for a store that does not answer."""
COMMIT_PAUSE_S = 0.2
NEWS_WAIT_S = 1.0
"""How long a resumed turn waits for the lease of the router that lost its stream: if that died, the
report of it comes within a fraction of a second, as a rule behind the client."""
NEWS_PAUSE_S = 0.05
_MAX_REOPENED = 3
"""Failovers of the store that one turn outlives."""
SETTLE_TIMEOUT_S = 5.0
"""How long a turn waits until this router has given back the lease of the turn before."""

Context = grpc.aio.ServicerContext[Any, Any]
SessionKey = tuple[str, str]
"""Tenant and session id."""


class SessionTurns:
    """The turns of one router.

    Args:
        store: Holds the sessions.
        reader: Says what requests mean.
        live: Runs them in the engine.
        prefixes: Knows where chats begin alike.
        clock: The engine's and the store's.
        address: Returns the router's own `host:port`.
        namespace: Of the router's cached values; a tenant's is made of it.

    Attributes:
        figures: What the turns have gone through.
    """

    def __init__(
        self,
        store: SessionStore,
        reader: RequestReader,
        live: LiveRequests,
        prefixes: SystemPrefixes,
        *,
        clock: Callable[[], float],
        address: Callable[[], str],
        namespace: str = "",
    ) -> None:
        self.figures = TurnFigures(store)
        self._store = store
        self._reader = reader
        self._live = live
        self._clock = clock
        self._address = address
        self._namespace = namespace
        self._prefixes = prefixes
        self._closing: dict[SessionKey, asyncio.Task[None]] = {}
        self._snapshots = SnapshotNames(store)

    async def generate(
        self,
        request: generation_pb2.GenerateRequest,
        context: Context,
        deadline: float | None,
        tenant: str = "",
    ) -> None:
        """Serve one `Generate` with a session id.

        Args:
            request: As it came.
            context: Of its call.
            deadline: On the engine's clock.
            tenant: Whose session is meant; never from the request.

        Raises:
            SessionNotFoundError: There is no such session.
            SessionBusyError: Another request writes it; names the router.
            SessionFencedError: The session went on elsewhere, or the turn to resume is not open.
            SessionQuotaError: The turn could pass the session's quota.
            StateUnavailableError: The store does not answer.
            ExpertMeshError: As without a session.
        """
        size = request.ByteSize()
        await in_thread_if_large(size, validate_generate, request, self._reader.limits)
        request_id = request.request_id or new_request_id()
        is_resumed = request.HasField("resume_from")
        key = (tenant, request.session_id)
        async with self._live.enter(tenant, request_id, context, takes_over=is_resumed) as live:
            await self._settle(key)
            if is_resumed and await self._replay(request, key, live):
                return
            lease = await self._acquire(key, NEWS_WAIT_S if is_resumed else 0.0)
            turn: Turn | None = None
            try:
                turn = await self._begin(request, request_id, lease)
                if turn is not None:
                    self.figures.running.add(turn)
                    turn.hint = await self._snapshots.hint(turn)
                    await self._run(turn, live, deadline)
            finally:
                await self._close(lease, turn, live)
            if turn is None and not await self._replay(request, key, live):
                detail = (
                    f"the turn of request {request_id} is not open: another request has taken its "
                    "place, or the store has lost it; read the session, and send it as a new one"
                )
                raise SessionFencedError(request.session_id, detail)

    async def settle_all(self) -> None:
        """Wait until every turn that has ended here has let go of its session."""
        if self._closing:
            await asyncio.wait(list(self._closing.values()), timeout=SETTLE_TIMEOUT_S)

    async def _settle(self, key: SessionKey) -> None:
        if (task := self._closing.get(key)) is not None:
            await asyncio.wait([task], timeout=SETTLE_TIMEOUT_S)

    async def _acquire(self, key: SessionKey, wait_s: float) -> Lease:
        """Take the lease, held by another for `wait_s` at most."""
        until = self._clock() + wait_s
        while True:
            try:
                return await self._acquire_now(key)
            except SessionBusyError:
                if self._clock() + NEWS_PAUSE_S > until:
                    self.figures.num_conflicts += 1
                    raise
            await asyncio.sleep(NEWS_PAUSE_S)

    async def _acquire_now(self, key: SessionKey) -> Lease:
        """Take the lease; a client that is lost meanwhile does not leave it behind."""
        task = asyncio.ensure_future(self._store.acquire(*key))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            self._close_behind(key, self._give_back(task))
            raise

    async def _give_back(self, acquiring: asyncio.Future[Lease]) -> None:
        try:
            await self._store.release(await acquiring)
        except ExpertMeshError as error:
            logger.info("lease.not_taken why=%s", error)

    # What a turn starts from

    async def _begin(
        self, request: generation_pb2.GenerateRequest, request_id: str, lease: Lease
    ) -> Turn | None:
        """Return the turn to run; None where the one to resume is not open."""
        history = await self._store.tokens(lease)
        if request.HasField("resume_from"):
            opened = await self._store.open_turn_of(lease)
            if opened is not None and opened.request_id == request_id:
                return self._resumed(request, lease, history, opened)
            if await self._finished_turn(request, lease.tenant) is not None:
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

    # How it runs

    async def _run(self, turn: Turn, live: LiveRequest, deadline: float | None) -> None:
        large = 4 * len(turn.history)
        namespace = tenant_namespace(self._namespace, turn.lease.tenant)
        engine_request = await in_thread_if_large(
            large, turn.engine_request, live.engine_id, deadline, namespace
        )
        stream = turn.open_stream(on_overflow=lambda: live.release("slow reader"))
        position = live.submit(engine_request, turn.put)
        keeper = asyncio.create_task(self._save_behind(turn, live))
        try:
            if not turn.resume_from:
                accepted = turn.accepted(position, self._address())
                await live.write(generation_pb2.GenerateResponse(sequence=1, accepted=accepted))
            while stream.ended is None or stream.has_news:
                await stream.wait()
                for message in stream.take():
                    await self._check_lease(turn)
                    await live.write(message)
                if stream.error is not None and not stream.has_news:
                    raise stream.error
        finally:
            turn.stop_saving()
            await asyncio.wait([keeper])
        last = turn.last_message()
        persisted = await self._commit(turn, self._clock() + COMMIT_WAIT_S)
        if persisted:
            await self._quietly("release", self._store.release(turn.lease))
        else:
            self.figures.num_not_persisted += 1
        if last is not None:
            last.finished.persisted = persisted
            await live.write(last)

    async def _check_lease(self, turn: Turn) -> None:
        """Return when a token may be sent.

        A process that slept through its lease learns here that another has the session. While the
        store does not answer, the stream goes on and ends with `persisted` false: nobody else can
        get the session from a store that is down.
        """
        if not turn.lease.may_emit(self._clock()):
            lease = turn.lease
            try:
                await self._quietly("renew", self._store.renew(lease))
            except SessionFencedError:
                if not await self._take_again(turn, lease):
                    raise

    async def _save_behind(self, turn: Turn, live: LiveRequest) -> None:
        """Save tokens and renew the lease, never in front of a token."""
        try:
            while await turn.wait_savable():
                lease = turn.lease
                try:
                    await self._save(turn)
                except SessionFencedError:
                    if not await self._take_again(turn, lease):
                        raise
        except ExpertMeshError as error:
            live.fail(error)

    async def _save(self, turn: Turn) -> None:
        """Save what waits, or renew the lease."""
        lease = turn.lease
        ids = turn.take_savable()
        if ids:
            save = self._store.checkpoint(lease, ids, len(turn.prompt_ids) + turn.num_saved)
            if await self._quietly("checkpoint", save) and lease is turn.lease:
                turn.note_saved(len(ids))
        elif self._clock() - lease.renewed_at >= lease.ttl_s / 3:
            await self._quietly("renew", self._store.renew(lease))

    async def _take_again(self, turn: Turn, lost: Lease) -> bool:
        """Go on with a turn that the store does not know any more under its lease.

        A failover to a replica that lags loses leases, open turns and saved tokens. Where nobody
        has taken the session since, and it stands exactly where the turn began, the turn is opened
        again; else another has gone on, and the turn is over.

        Returns:
            Whether it goes on.
        """
        async with turn.reopening:
            if turn.lease is not lost:
                return True
            turn.num_reopened += 1
            turn.is_fenced |= turn.num_reopened > _MAX_REOPENED
            if turn.is_fenced:
                return False
            lease: Lease | None = None
            try:
                await self._store.release(lost)
                lease = await self._acquire_now((lost.tenant, lost.session_id))
                num_saved = await self._open_again(turn, lease)
            except (SessionBusyError, SessionFencedError):
                num_saved, turn.is_fenced = None, True
            except ExpertMeshError as error:
                logger.warning("turn.not_reopened id=%s why=%s", turn.request_id, error)
                num_saved = None
            if lease is None or num_saved is None:
                if lease is not None:
                    turn.is_fenced = True
                    await self._quietly("release", self._store.release(lease))
                return False
            turn.move_to(lease, num_saved)
            logger.warning("turn.reopened id=%s session=%s", turn.request_id, lease.session_id)
            return True

    async def _open_again(self, turn: Turn, lease: Lease) -> int | None:
        """Return how many generated tokens the store has of a turn, opened again if it is not;
        None where the session does not stand where the turn began."""
        if (lease.turn, lease.num_tokens) != (turn.lease.turn, turn.lease.num_tokens):
            return None
        if not np.array_equal(await self._store.tokens(lease), turn.history):
            return None
        opened = await self._store.open_turn_of(lease)
        if opened is None:
            await self._store.open_turn(lease, turn.opening())
            return 0
        saved = opened.generated_ids.tolist()
        if opened.request_id != turn.request_id or not turn.begins_with(saved):
            return None
        return len(saved)

    async def _commit(self, turn: Turn, until: float) -> bool:
        """Make the turn part of the history; return whether it is.

        Raises:
            SessionFencedError: It never will be: another has the session.
        """
        record = turn.record()
        begun = self._clock()
        while not turn.is_committed:
            lease = turn.lease
            try:
                await self._store.commit_turn(lease, turn.request_id, record, turn.unsaved_ids())
                turn.is_committed = True
                self.figures.commit_s.add(self._clock() - begun)
                self._snapshots.name_behind(turn)
            except SessionFencedError:
                if not await self._take_again(turn, lease):
                    raise
            except StateUnavailableError as error:
                if self._clock() + COMMIT_PAUSE_S > until:
                    logger.warning("turn.unwritten id=%s why=%s", turn.request_id, error)
                    return False
                await asyncio.sleep(COMMIT_PAUSE_S)
        return True

    # How it ends

    async def _close(self, lease: Lease, turn: Turn | None, live: LiveRequest) -> None:
        """Give the session back, whatever happened; a cancelled handler does not cut this short."""
        if turn is not None and turn.is_committed:
            self.figures.running.discard(turn)
            return
        live.is_ending = True
        if turn is not None:
            turn.close_stream()
        live.release("stream ended")
        key = (lease.tenant, lease.session_id)
        task = self._close_behind(key, self._let_go(lease, turn))
        if turn is None or not turn.has_ended:
            await asyncio.shield(task)

    def _close_behind(self, key: SessionKey, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Do work that the session's next turn waits for."""
        task = asyncio.create_task(work)
        self._closing[key] = task

        def forget(done: asyncio.Task[None]) -> None:
            if self._closing.get(key) is done:
                del self._closing[key]

        task.add_done_callback(forget)
        return task

    async def _let_go(self, lease: Lease, turn: Turn | None) -> None:
        """Commit what has ended, as long as the lease can still be ours; leave the rest open."""
        try:
            if turn is not None and turn.is_fenced:
                return
            if turn is not None:
                lease = turn.lease
            if turn is not None and turn.has_ended:
                await self._commit(turn, lease.renewed_at + lease.ttl_s)
                lease = turn.lease
            elif turn is not None and (ids := turn.take_savable()):
                await self._store.checkpoint(lease, ids, len(turn.prompt_ids) + turn.num_saved)
            await self._store.release(lease)
        except ExpertMeshError as error:
            logger.warning("turn.left session=%s why=%s", lease.session_id, error)
        finally:
            if turn is not None:
                self.figures.running.discard(turn)

    async def _quietly(self, what: str, call: Coroutine[Any, Any, object]) -> bool:
        """Await a call of the store that may fail to answer; return whether it did answer."""
        try:
            await call
        except StateUnavailableError as error:
            logger.warning("session.%s_failed why=%s", what, error)
            return False
        return True

    # What is over

    async def _replay(
        self, request: generation_pb2.GenerateRequest, key: SessionKey, live: LiveRequest
    ) -> bool:
        """Send the rest of a committed turn from the store; return whether there was one."""
        record = await self._finished_turn(request, key[0])
        if record is None:
            return False
        history = await self._store.history(*key)
        messages = replayed(self._reader, record, history, request.resume_from, self._address())
        for message in messages:
            await live.write(message)
        return True

    async def _finished_turn(
        self, request: generation_pb2.GenerateRequest, tenant: str
    ) -> TurnRecord | None:
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
