"""A session's turn: from the lease to the message that says it is written.

Decides what a `Generate` with a session id means: what a lost stream gets when it is resumed, and
when a token may be sent. What a turn starts from is in `turn_opening`, and how it gets into the
store in `turn_writer`. The order of a turn:

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
from collections.abc import Callable
from typing import Any

import grpc

from protos.errors import SessionBusyError, SessionFencedError
from protos.ids import new_request_id
from protos.v1 import generation_pb2
from protos.validate import validate_generate
from router.engine.chain import tenant_namespace
from router.gateway.continuation import SystemPrefixes
from router.gateway.live import LiveRequest, LiveRequests
from router.gateway.open_turn import Turn, replayed
from router.gateway.request_reader import RequestReader, in_thread_if_large
from router.gateway.session_leases import SessionKey, SessionLeases, answers
from router.gateway.snapshot_names import SnapshotNames
from router.gateway.turn_figures import TurnFigures
from router.gateway.turn_opening import TurnOpener
from router.gateway.turn_writer import TurnWriter
from router.state.session_records import Lease
from router.state.sessions import SessionStore

COMMIT_WAIT_S = 2.0
"""How long the last message waits for a store that does not answer."""
NEWS_WAIT_S = 1.0
"""How long a resumed turn waits for the lease of the router that lost its stream: if that died, the
report of it comes within a fraction of a second, as a rule behind the client."""

Context = grpc.aio.ServicerContext[Any, Any]


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
        self._snapshots = SnapshotNames(store)
        self._leases = SessionLeases(store, clock)
        self._opener = TurnOpener(store, reader, prefixes, clock)
        self._writer = TurnWriter(store, self._leases, self._snapshots, self.figures, clock)

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
            await self._leases.settle(key)
            if is_resumed and await self._replay(request, key, live):
                return
            lease = await self._acquire(key, NEWS_WAIT_S if is_resumed else 0.0)
            turn: Turn | None = None
            try:
                turn = await self._opener.begin(request, request_id, lease)
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

    @property
    def is_settled(self) -> bool:
        """Whether every turn that has ended here has let go of its session."""
        return self._leases.is_settled

    async def settle_all(self) -> None:
        """Wait until every turn that has ended here has let go of its session."""
        await self._leases.settle_all()

    async def _acquire(self, key: SessionKey, wait_s: float) -> Lease:
        try:
            return await self._leases.acquire(key, wait_s)
        except SessionBusyError:
            self.figures.num_conflicts += 1
            raise

    async def _run(self, turn: Turn, live: LiveRequest, deadline: float | None) -> None:
        large = 4 * len(turn.history)
        namespace = tenant_namespace(self._namespace, turn.lease.tenant)
        engine_request = await in_thread_if_large(
            large, turn.engine_request, live.engine_id, deadline, namespace
        )
        stream = turn.open_stream(on_overflow=lambda: live.release("slow reader"))
        position = live.submit(engine_request, turn.put)
        keeper = asyncio.create_task(self._writer.save_behind(turn, live))
        try:
            if not turn.resume_from:
                accepted = turn.accepted(position, self._address())
                await live.write(generation_pb2.GenerateResponse(sequence=1, accepted=accepted))
            while stream.ended is None or stream.has_news:
                await stream.wait()
                for message in stream.take():
                    await self._writer.check_lease(turn)
                    await live.write(message)
                if stream.error is not None and not stream.has_news:
                    raise stream.error
        finally:
            turn.stop_saving()
            await asyncio.wait([keeper])
        last = turn.last_message()
        persisted = await self._writer.commit(turn, self._clock() + COMMIT_WAIT_S)
        if persisted:
            await answers("release", self._store.release(turn.lease))
        else:
            self.figures.num_not_persisted += 1
        if last is not None:
            last.finished.persisted = persisted
            await live.write(last)

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
        task = self._leases.close_behind(key, self._writer.let_go(lease, turn))
        if turn is None or not turn.has_ended:
            await asyncio.shield(task)

    async def _replay(
        self, request: generation_pb2.GenerateRequest, key: SessionKey, live: LiveRequest
    ) -> bool:
        """Send the rest of a committed turn from the store; return whether there was one."""
        record = await self._opener.finished(request, key[0])
        if record is None:
            return False
        history = await self._store.history(*key)
        messages = replayed(self._reader, record, history, request.resume_from, self._address())
        for message in messages:
            await live.write(message)
        return True
