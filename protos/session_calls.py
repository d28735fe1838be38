"""What both clients can do with sessions."""

from __future__ import annotations

from collections.abc import Mapping

from protos.calls import Ask, Pages, asks, lists
from protos.requests import PAGE_SIZE, build_create, build_fork
from protos.v1 import session_pb2


class SessionCalls:
    """The part of `Client` and `AsyncClient` for sessions."""

    @asks
    def create_session(
        self,
        session_id: str = "",
        *,
        ttl_s: float | None = None,
        quota_tokens: int | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Ask[session_pb2.Session]:
        """Make an empty session; without an id the router chooses one."""
        request = build_create(session_id, ttl_s, quota_tokens, metadata)
        return Ask(lambda router: router.sessions.CreateSession, request)

    @asks
    def get_session(
        self, session_id: str, *, include_turns: bool = False, include_token_ids: bool = False
    ) -> Ask[session_pb2.Session]:
        """Return a session as it is now."""
        request = session_pb2.GetSessionRequest(
            session_id=session_id, include_turns=include_turns, include_token_ids=include_token_ids
        )
        return Ask(lambda router: router.sessions.GetSession, request)

    @lists
    def list_sessions(self, page_size: int = PAGE_SIZE) -> Pages[session_pb2.Session]:
        """Yield all sessions in the order of their ids, asking page by page."""
        request = session_pb2.ListSessionsRequest(page_size=page_size)
        return Pages(
            lambda router: router.sessions.ListSessions, request, lambda page: page.sessions
        )

    @asks
    def fork_session(
        self,
        session_id: str,
        new_session_id: str = "",
        *,
        at_tokens: int | None = None,
        ttl_s: float | None = None,
        quota_tokens: int | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Ask[session_pb2.Session]:
        """Make a session that begins with the first `at_tokens` tokens of another, or with all."""
        request = build_fork(session_id, new_session_id, at_tokens, ttl_s, quota_tokens, metadata)
        return Ask(lambda router: router.sessions.ForkSession, request)

    @asks
    def delete_session(self, session_id: str) -> Ask[bool]:
        """Delete a session; return whether it was there."""
        request = session_pb2.DeleteSessionRequest(session_id=session_id)
        return Ask(
            lambda router: router.sessions.DeleteSession, request, lambda answer: answer.deleted
        )
