"""The store of sessions: what there is, what it holds, and who may write it.

One store serves one router process, from its event loop. `SessionStore` is the whole of it; the
part that writes turns under a lease is in `leases.py`.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping

from protos.errors import (
    InternalError,
    InvalidFieldError,
    SessionNotFoundError,
    SessionQuotaError,
)
from router.state import directory, paging, scripts
from router.state.breaker import CircuitBreaker
from router.state.control import Argument, ControlClient, ControlSettings
from router.state.endpoint import Endpoint
from router.state.leases import TOKENS, LeaseStore, StoreSettings
from router.state.redis_keys import session_keys
from router.state.session_codec import (
    SNAPSHOT,
    check_reply,
    cut_turn,
    record_of,
    session_fields,
    turn_of,
)
from router.state.session_records import (
    EngineRecord,
    SessionRecord,
    TokenIds,
    TurnRecord,
)

Turns = list[TurnRecord]
Page = tuple[list[SessionRecord], str]
Engines = list[EngineRecord]
Arguments = list[Argument]


HISTORY_TRIES = 8
"""Reads of a history, each of which a commit may spoil."""


class SessionStore(LeaseStore):
    """Sessions in Redis; every method takes the tenant first and never mixes tenants.

    All methods raise `StateUnavailableError` when the server does not answer in time or refuses,
    and `InvalidFieldError` for a malformed tenant or session id.
    """

    @classmethod
    def connect(
        cls,
        endpoint: Endpoint,
        *,
        engine: str,
        boot: str = "",
        settings: StoreSettings | None = None,
        control: ControlSettings | None = None,
    ) -> SessionStore:
        """Return a store with a client of its own; nothing is sent yet."""
        client = ControlClient(endpoint, control)
        return cls(client, engine=engine, boot=boot, settings=settings)

    @property
    def breaker(self) -> CircuitBreaker:
        """Of the meta server."""
        return self._client.breaker

    async def ping(self) -> None:
        """Check that the server answers."""
        await self._client.command("PING")

    async def close(self) -> None:
        """Close the connections; leases that are still held run out."""
        await self._client.close()

    # Sessions

    async def create(
        self,
        tenant: str,
        session_id: str | None = None,
        *,
        ttl_s: float,
        quota_tokens: int = 0,
        metadata: Mapping[str, str] | None = None,
        namespace: str = "",
    ) -> SessionRecord:
        """Make an empty session.

        Args:
            tenant: Whose it is.
            session_id: Its id; None draws one.
            ttl_s: Seconds that it is kept after its last write.
            quota_tokens: Most tokens; 0 is no bound.
            metadata: Text under text keys.
            namespace: What its cached values depend on, besides tokens.

        Raises:
            SessionExistsError: There is one of this id.
            InvalidFieldError: A value is out of its range.
        """
        session_id = session_id or secrets.token_hex(16)
        fields = session_fields(ttl_s, quota_tokens, metadata or {}, namespace)
        keys = session_keys(tenant, session_id)
        arguments: Arguments = [secrets.token_hex(8), *fields, session_id]
        reply = await self._client.script(scripts.CREATE, keys, arguments, durable=True)
        check_reply(reply, session_id)
        await paging.prune_some(self._client, tenant)
        return await self.get(tenant, session_id)

    async def get(self, tenant: str, session_id: str) -> SessionRecord:
        """Return a session as it is now.

        Raises:
            SessionNotFoundError: There is none.
        """
        record = await self._read(tenant, session_id)
        if record is None:
            raise SessionNotFoundError(session_id)
        return record

    async def list(self, tenant: str, page_size: int = 100, page_token: str = "") -> Page:
        """Return one page of a tenant's sessions, in the order of their ids.

        Sessions that are made or deleted between two pages may or may not appear; the others appear
        once. Expired ones do not.

        Returns:
            At most `page_size` records, and the token of the next page; empty after the last.

        Raises:
            InvalidFieldError: The size is not in [1, 1000], or no page gave out the token.
        """
        return await paging.page(self._client, self._read, tenant, page_size, page_token)

    async def fork(
        self,
        tenant: str,
        session_id: str,
        new_session_id: str | None = None,
        at_tokens: int | None = None,
        *,
        ttl_s: float | None = None,
        quota_tokens: int | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> SessionRecord:
        """Make a session that begins with the first tokens of another; cached values are shared.

        A turn that the cut goes through is kept up to there, with the finish reason `fork`. A turn
        that is open in the first session is not taken over.

        Args:
            tenant: Whose they are.
            session_id: The first session.
            new_session_id: Id of the new one; None draws one.
            at_tokens: Tokens to take; None takes the whole history.
            ttl_s: None takes the first one's, as with the following.
            quota_tokens: Most tokens; 0 is no bound.
            metadata: Text under text keys.

        Raises:
            SessionNotFoundError: The first session is not there.
            SessionExistsError: The new one is.
            SessionQuotaError: The new one would begin above its quota.
            InvalidFieldError: `at_tokens` is beyond the history.
        """
        first = await self.get(tenant, session_id)
        new_id = new_session_id or secrets.token_hex(16)
        at = first.num_tokens if at_tokens is None else at_tokens
        if not 0 <= at <= first.num_tokens:
            raise InvalidFieldError("at_tokens", f"must be in [0, {first.num_tokens}]", at)
        quota = first.quota_tokens if quota_tokens is None else quota_tokens
        if quota and at > quota:
            raise SessionQuotaError(new_id, at, quota)
        turns = [
            cut_turn(t, at) for t in await self.turns(tenant, session_id) if t.first_token < at
        ]
        kept = [(n, value) for n, value in first.snapshots.items() if n <= at]
        arguments: Arguments = [
            secrets.token_hex(8),
            *session_fields(
                first.ttl_s if ttl_s is None else ttl_s,
                quota,
                first.metadata if metadata is None else metadata,
                first.namespace,
            ),
            new_id,
            first.nonce,
            at,
            len(turns),
            len(kept),
        ]
        for num_tokens, value in kept:
            arguments += [SNAPSHOT + b"%d" % num_tokens, value]
        for turn in turns:
            arguments += [turn.turn, turn.request_id, turn.to_bytes()]
        keys = (*session_keys(tenant, session_id), *session_keys(tenant, new_id)[:6])
        reply = await self._client.script(scripts.FORK, keys, arguments, durable=True)
        check_reply(reply, new_id if reply[0] == b"EXISTS" else session_id)
        return await self.get(tenant, new_id)

    async def delete(self, tenant: str, session_id: str) -> bool:
        """Delete a session, whoever holds it; its writer is told at its next write.

        Returns:
            Whether it was there; False also when the answer to a first attempt was lost.
        """
        keys = session_keys(tenant, session_id)
        reply = await self._client.script(scripts.DELETE, keys, [session_id], durable=True)
        return bool(reply[1])

    async def turns(self, tenant: str, session_id: str) -> Turns:
        """Return the finished turns, oldest first; none for a session that is not there."""
        log = session_keys(tenant, session_id).log
        return [turn_of(entry) for entry in await self._client.command("XRANGE", log, "-", "+")]

    async def history(self, tenant: str, session_id: str) -> TokenIds:
        """Return the history without a lease, for reading: uint32 `[num_tokens]`.

        Raises:
            SessionNotFoundError: There is no such session.
        """
        for _ in range(HISTORY_TRIES):
            record = await self.get(tenant, session_id)
            keys = session_keys(tenant, session_id)
            ids = await self._ids(keys, TOKENS, record.num_tokens)
            if ids is not None:
                return ids
            # A turn was committed between the two reads.
        raise InternalError(f"session {session_id} has not the tokens that its record says")

    async def attach_snapshot(
        self, tenant: str, session_id: str, num_tokens: int, position_hash: bytes
    ) -> bool:
        """Note that the blob tier has a snapshot at a position of the history or the open turn.

        A hint that needs no lease: the hash names the tokens, so a wrong one is only a miss.

        Returns:
            Whether it was noted; not for a position that the session does not have.
        """
        reply = await self._client.script(
            scripts.ATTACH,
            session_keys(tenant, session_id),
            [num_tokens, position_hash, self.settings.max_snapshots],
        )
        return bool(reply[0] == b"OK")

    # Routers

    async def heartbeat(self, engine: EngineRecord) -> None:
        """Publish a router for 10 s; see `router.state.directory`."""
        await directory.heartbeat(self._client, engine)

    async def engines(self) -> Engines:
        """Return the routers that sent a heartbeat lately, in the order of their names."""
        return await directory.engines(self._client)

    async def report_dead(self, engine: str, boot: str) -> None:
        """Say that a process has ended: its leases are free at once."""
        await directory.report_dead(self._client, engine, boot)

    async def _read(self, tenant: str, session_id: str) -> SessionRecord | None:
        reply = await self._client.script(scripts.READ, session_keys(tenant, session_id))
        return record_of(tenant, session_id, reply)
