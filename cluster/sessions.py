"""`expertmesh sessions`: lists, shows, forks and deletes the conversations that a service keeps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from cluster.console import out_console, print_json, table
from cluster.status import message_document
from protos.errors import from_rpc_error
from protos.tls import Access
from protos.v1 import session_pb2, session_pb2_grpc

TIMEOUT_S = 10.0
PAGE_SIZE = 1000


@contextmanager
def session_calls(url: str, access: Access) -> Iterator[session_pb2_grpc.SessionServiceStub]:
    """Hold a connection; errors of its calls leave as ours.

    Raises:
        ExpertMeshError: Not reachable, or what the router answered.
    """
    with access.channel(url) as channel:
        try:
            yield session_pb2_grpc.SessionServiceStub(channel)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error


def list_sessions(url: str, access: Access, *, as_json: bool) -> None:
    """Print every session of the caller's tenant, by id."""
    sessions: list[session_pb2.Session] = []
    request = session_pb2.ListSessionsRequest(page_size=PAGE_SIZE)
    with session_calls(url, access) as stub:
        while True:
            page = stub.ListSessions(request, timeout=TIMEOUT_S)
            sessions += page.sessions
            if not page.next_page_token:
                break
            request.page_token = page.next_page_token
    if as_json:
        print_json([message_document(session) for session in sessions])
        return
    rows = table("", "id", ">tokens", ">turns", "updated", "expires", "holder", "open turn")
    for session in sessions:
        rows.add_row(
            session.session_id,
            str(session.num_tokens),
            str(session.num_turns),
            _time(session.updated_at),
            _expiry(session.updated_at, session.ttl),
            session.holder,
            session.open_request_id,
        )
    out_console().print(rows)


def show_session(url: str, access: Access, session_id: str, *, as_json: bool) -> None:
    """Print a session with its turns."""
    request = session_pb2.GetSessionRequest(session_id=session_id, include_turns=True)
    with session_calls(url, access) as stub:
        session = stub.GetSession(request, timeout=TIMEOUT_S)
    if as_json:
        print_json(message_document(session))
    else:
        _print(session)


def fork_session(
    url: str,
    access: Access,
    session_id: str,
    new_id: str | None,
    at_tokens: int | None,
    *,
    as_json: bool,
) -> None:
    """Make a session that begins as another one, and print it."""
    request = session_pb2.ForkSessionRequest(
        session_id=session_id, new_session_id=new_id or "", at_tokens=at_tokens
    )
    with session_calls(url, access) as stub:
        session = stub.ForkSession(request, timeout=TIMEOUT_S)
    if as_json:
        print_json(message_document(session))
    else:
        _print(session)


def delete_sessions(url: str, access: Access, session_ids: list[str], *, as_json: bool) -> bool:
    """Delete sessions and say which there were; return whether all were."""
    deleted = {}
    with session_calls(url, access) as stub:
        for session_id in session_ids:
            request = session_pb2.DeleteSessionRequest(session_id=session_id)
            deleted[session_id] = stub.DeleteSession(request, timeout=TIMEOUT_S).deleted
    if as_json:
        print_json(deleted)
    else:
        for session_id, found in deleted.items():
            print(f"{session_id} {'deleted' if found else 'not found'}")
    return all(deleted.values())


def _print(session: session_pb2.Session) -> None:
    console = out_console()
    quota = f" of {session.quota_tokens}" if session.quota_tokens else ""
    lines = {
        "session": session.session_id,
        "tokens": f"{session.num_tokens}{quota}",
        "created": _time(session.created_at),
        "updated": _time(session.updated_at),
        "expires": _expiry(session.updated_at, session.ttl),
        "metadata": ", ".join(f"{k}={v}" for k, v in sorted(session.metadata.items())),
        "held by": f"{session.holder} {session.holder_address}".strip(),
        "open turn": f"{session.open_request_id}, {session.open_tokens} tokens saved"
        if session.open_request_id
        else "",
    }
    for name, value in lines.items():
        if value:
            console.print(f"{name:<10}{value}", markup=False)
    rows = table("turns", ">turn", "request", ">from token", ">prompt", ">answer", "end", "when")
    for turn in session.turns:
        rows.add_row(
            str(turn.turn),
            turn.request_id,
            str(turn.first_token),
            str(turn.prompt_tokens),
            str(turn.completion_tokens),
            turn.finish_reason,
            _time(turn.finished_at),
        )
    if session.turns:
        console.print(rows)


def _time(at: Timestamp) -> str:
    return at.ToDatetime(UTC).strftime("%Y-%m-%d %H:%M:%S")


def _expiry(updated: Timestamp, ttl: Duration) -> str:
    """Return when an idle session goes, or how that looks without a TTL."""
    if not ttl.seconds:
        return "never"
    at: datetime = updated.ToDatetime(UTC) + ttl.ToTimedelta()
    return at.strftime("%Y-%m-%d %H:%M:%S")
