"""`SessionService`: create, read, list, fork and delete sessions.

Checks what clients send and says what the store answers; turns are in `router.gateway.turn`. Whose
sessions a call means is said by its API key, never by the request: another tenant's session is one
that does not exist.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import grpc
from google.protobuf import duration_pb2

from protos.errors import StateUnavailableError, Violation
from protos.ids import is_valid_session_id, new_session_id, session_id_rule
from protos.v1 import session_pb2, session_pb2_grpc
from protos.validate import raise_violations
from router.engine.chain import tenant_namespace
from router.gateway.authentication import Callers
from router.state.paging import MAX_PAGE_SIZE
from router.state.session_records import SessionRecord, TokenIds, TurnRecord
from router.state.sessions import SessionStore

MAX_TTL_S = 3650 * 86400.0
DEFAULT_PAGE_SIZE = 100
MAX_METADATA_ENTRIES = 32
MAX_METADATA_CHARS = 1024
"""Of one key or value."""

Context = grpc.aio.ServicerContext[Any, Any]


class SessionServicer(session_pb2_grpc.SessionServiceServicer):
    """Serves the sessions of the calls' tenants.

    Args:
        store: Where they are.
        namespace: What this router's cached values depend on, besides tokens.
        callers: Says whose they are; None: the unnamed tenant's.
        default_ttl_s: Of a session that is made without one.
    """

    def __init__(
        self,
        store: SessionStore,
        namespace: str = "",
        callers: Callers | None = None,
        *,
        default_ttl_s: float = 7 * 86400.0,
    ) -> None:
        self._default_ttl_s = default_ttl_s
        self._store = store
        self._namespace = namespace
        self._callers = callers or Callers()

    async def CreateSession(
        self, request: session_pb2.CreateSessionRequest, context: Context
    ) -> session_pb2.Session:
        """Make an empty session; see `session.proto`."""
        found = _id_violations("session_id", request.session_id, may_be_empty=True)
        found += _option_violations(request)
        raise_violations(found)
        tenant = self._tenant_of(context)
        record = await self._store.create(
            tenant,
            request.session_id or new_session_id(),
            ttl_s=_ttl_s(request) or self._default_ttl_s,
            quota_tokens=request.quota_tokens,
            metadata=dict(request.metadata),
            namespace=tenant_namespace(self._namespace, tenant),
        )
        return session_message(record)

    async def GetSession(
        self, request: session_pb2.GetSessionRequest, context: Context
    ) -> session_pb2.Session:
        """Return a session; see `session.proto`."""
        raise_violations(_id_violations("session_id", request.session_id))
        key = (self._tenant_of(context), request.session_id)
        record = await self._store.get(*key)
        return session_message(
            record,
            addresses=await self._addresses() if record.holder else {},
            turns=await self._store.turns(*key) if request.include_turns else (),
            token_ids=await self._store.history(*key) if request.include_token_ids else None,
        )

    async def ListSessions(
        self, request: session_pb2.ListSessionsRequest, context: Context
    ) -> session_pb2.ListSessionsResponse:
        """Return one page of sessions; see `session.proto`."""
        if request.page_size > MAX_PAGE_SIZE:
            rule = f"must be at most {MAX_PAGE_SIZE}"
            raise_violations([Violation("page_size", rule, request.page_size)])
        size = request.page_size or DEFAULT_PAGE_SIZE
        tenant = self._tenant_of(context)
        records, next_token = await self._store.list(tenant, size, request.page_token)
        return session_pb2.ListSessionsResponse(
            sessions=[session_message(record) for record in records], next_page_token=next_token
        )

    async def ForkSession(
        self, request: session_pb2.ForkSessionRequest, context: Context
    ) -> session_pb2.Session:
        """Make a session that begins like another; see `session.proto`."""
        found = _id_violations("session_id", request.session_id)
        found += _id_violations("new_session_id", request.new_session_id, may_be_empty=True)
        found += _option_violations(request)
        raise_violations(found)
        record = await self._store.fork(
            self._tenant_of(context),
            request.session_id,
            request.new_session_id or new_session_id(),
            request.at_tokens if request.HasField("at_tokens") else None,
            ttl_s=_ttl_s(request),
            quota_tokens=request.quota_tokens if request.HasField("quota_tokens") else None,
            metadata=dict(request.metadata) or None,
        )
        return session_message(record)

    async def DeleteSession(
        self, request: session_pb2.DeleteSessionRequest, context: Context
    ) -> session_pb2.DeleteSessionResponse:
        """Delete a session; see `session.proto`."""
        raise_violations(_id_violations("session_id", request.session_id))
        deleted = await self._store.delete(self._tenant_of(context), request.session_id)
        return session_pb2.DeleteSessionResponse(deleted=deleted)

    def _tenant_of(self, context: Context) -> str:
        return self._callers.tenant_of(context.invocation_metadata())

    async def _addresses(self) -> dict[str, str]:
        """Return the address of each router that has said it lately."""
        try:
            return {engine.engine: engine.address for engine in await self._store.engines()}
        except StateUnavailableError:
            return {}


def session_message(
    record: SessionRecord,
    *,
    addresses: Mapping[str, str] | None = None,
    turns: Sequence[TurnRecord] = (),
    token_ids: TokenIds | None = None,
) -> session_pb2.Session:
    """Return a session as its clients see it."""
    message = session_pb2.Session(
        session_id=record.session_id,
        num_tokens=record.num_tokens,
        num_turns=record.num_turns,
        quota_tokens=record.quota_tokens,
        metadata=dict(record.metadata),
        holder=record.holder or "",
        holder_address=(addresses or {}).get(record.holder or "", ""),
        token_ids=[] if token_ids is None else token_ids.tolist(),
    )
    message.created_at.FromMilliseconds(record.created_ms)
    message.updated_at.FromMilliseconds(record.updated_ms)
    message.ttl.FromMilliseconds(round(1000 * record.ttl_s))
    if record.open_turn is not None:
        message.open_request_id = record.open_turn.request_id
        message.open_tokens = record.open_turn.num_tokens
    for turn in turns:
        added = message.turns.add(
            turn=turn.turn,
            request_id=turn.request_id,
            first_token=turn.first_token,
            prompt_tokens=turn.prompt_tokens,
            completion_tokens=turn.completion_tokens,
            finish_reason=turn.finish_reason,
        )
        added.finished_at.FromMilliseconds(turn.finished_ms)
    return message


def _id_violations(field: str, value: str, *, may_be_empty: bool = False) -> list[Violation]:
    if is_valid_session_id(value) or (may_be_empty and not value):
        return []
    return [Violation(field, session_id_rule(), value)]


def _option_violations(
    request: session_pb2.CreateSessionRequest | session_pb2.ForkSessionRequest,
) -> list[Violation]:
    found: list[Violation] = []
    ttl_s = _ttl_s(request)
    if ttl_s is not None and not 1.0 <= ttl_s <= MAX_TTL_S:
        found.append(Violation("ttl", f"must be in [1, {MAX_TTL_S:.0f}] seconds", ttl_s))
    if len(request.metadata) > MAX_METADATA_ENTRIES:
        rule = f"must have at most {MAX_METADATA_ENTRIES} entries"
        found.append(Violation("metadata", rule, len(request.metadata)))
    for key, value in request.metadata.items():
        longest = max(len(key), len(value))
        if longest > MAX_METADATA_CHARS:
            rule = f"must have at most {MAX_METADATA_CHARS} characters a key or value"
            found.append(Violation(f"metadata[{key[:32]}]", rule, longest))
    return found


def _ttl_s(
    request: session_pb2.CreateSessionRequest | session_pb2.ForkSessionRequest,
) -> float | None:
    if not request.HasField("ttl"):
        return None
    duration: duration_pb2.Duration = request.ttl
    return float(duration.seconds + duration.nanos / 1e9)
