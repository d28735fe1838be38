"""Between what Redis answers and what sessions are: checks of fields, parsing, ids as bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from protos.errors import (
    InternalError,
    InvalidFieldError,
    SessionExistsError,
    SessionFencedError,
    SessionNotFoundError,
    SessionQuotaError,
)
from router.state.session_records import (
    OpenTurnSummary,
    SessionRecord,
    TokenIds,
    TurnRecord,
    holder_of,
)

SNAPSHOT = b"snap:"
MAX_METADATA_BYTES = 16 << 10
MAX_TTL_S = 10 * 365 * 86400.0


def session_fields(
    ttl_s: float, quota_tokens: int, metadata: Mapping[str, str], namespace: str
) -> tuple[int, int, str, bytes]:
    """Return ttl_ms, quota, namespace and metadata as scripts take them.

    Raises:
        InvalidFieldError: A value is out of its range.
    """
    if not 1 <= ttl_s <= MAX_TTL_S:
        raise InvalidFieldError("ttl", f"must be in [1, {MAX_TTL_S:.0f}] seconds", ttl_s)
    if not 0 <= quota_tokens < 1 << 32:
        raise InvalidFieldError("quota_tokens", "must be in [0, 2**32)", quota_tokens)
    text = json.dumps(dict(metadata), separators=(",", ":"), ensure_ascii=False).encode()
    if len(text) > MAX_METADATA_BYTES:
        raise InvalidFieldError(
            "metadata", f"must have {MAX_METADATA_BYTES} bytes or less", len(text)
        )
    return round(1000 * ttl_s), quota_tokens, namespace, text


def check_reply(reply: Sequence[Any], session_id: str) -> None:
    """Raise what a script's answer says is wrong, if anything.

    Raises:
        SessionNotFoundError: MISSING.
        SessionExistsError: EXISTS.
        SessionQuotaError: QUOTA.
        SessionFencedError: FENCED or CONFLICT.
    """
    if reply[0] != b"OK":
        _raise(reply, session_id)


def _raise(reply: Sequence[Any], session_id: str) -> NoReturn:
    word = reply[0]
    if word == b"MISSING":
        raise SessionNotFoundError(session_id)
    if word == b"EXISTS":
        raise SessionExistsError(session_id)
    if word == b"QUOTA":
        raise SessionQuotaError(session_id, int(reply[1]), int(reply[2]))
    if word in (b"FENCED", b"CONFLICT"):
        raise SessionFencedError(session_id, reply[1].decode("utf-8", "replace"))
    raise InternalError(f"a session script answered {word!r}")


def record_of(tenant: str, session_id: str, reply: Sequence[Any]) -> SessionRecord | None:
    """Return the record in an answer of `scripts.READ`; None when there is no session."""
    _, flat, lease, request_id, prompt_tokens, open_bytes = reply
    meta: dict[bytes, bytes] = dict(zip(flat[::2], flat[1::2], strict=True))
    if not meta:
        return None
    open_turn = None
    if request_id is not None:
        open_turn = OpenTurnSummary(
            request_id=request_id.decode(),
            prompt_tokens=int(prompt_tokens),
            num_tokens=open_bytes // 4,
        )
    snapshots = {
        int(name[len(SNAPSHOT) :]): value
        for name, value in meta.items()
        if name.startswith(SNAPSHOT)
    }
    return SessionRecord(
        tenant=tenant,
        session_id=session_id,
        num_tokens=int(meta[b"ntok"]),
        num_turns=int(meta[b"turn"]),
        created_ms=int(meta[b"created_ms"]),
        updated_ms=int(meta[b"updated_ms"]),
        ttl_s=int(meta[b"ttl_ms"]) / 1000,
        quota_tokens=int(meta[b"quota"]),
        metadata=json.loads(meta[b"metadata"]),
        namespace=meta[b"ns"].decode(),
        nonce=meta[b"nonce"],
        holder=None if lease is None else holder_of(lease),
        open_turn=open_turn,
        snapshots=dict(sorted(snapshots.items())),
    )


def turn_of(entry: tuple[bytes, Mapping[bytes, bytes]]) -> TurnRecord:
    """Return the record of an entry of the turn log."""
    entry_id, fields = entry
    turn = int(entry_id.partition(b"-")[0])
    return TurnRecord.from_bytes(turn, fields[b"req"].decode(), fields[b"d"])


def cut_turn(turn: TurnRecord, at_tokens: int) -> TurnRecord:
    """Return a turn as far as it lies before a position that is behind its beginning."""
    if turn.num_tokens <= at_tokens:
        return turn
    kept = at_tokens - turn.first_token
    prompt_tokens = min(turn.prompt_tokens, kept)
    return replace(
        turn,
        prompt_tokens=prompt_tokens,
        completion_tokens=kept - prompt_tokens,
        finish_reason="fork",
        details={},
    )


def ids_to_bytes(ids: Sequence[int] | NDArray[Any]) -> bytes:
    """Return token ids as uint32, little-endian.

    Raises:
        ValueError: An id does not fit 32 bits.
    """
    wide = np.asarray(ids, dtype=np.int64)
    if len(wide) and (int(wide.min()) < 0 or int(wide.max()) >> 32):
        raise ValueError(f"token ids must be in [0, 2**32): {wide.min()} .. {wide.max()}")
    return wide.astype("<u4").tobytes()


def ids_from_bytes(payload: bytes) -> TokenIds:
    """Return what `ids_to_bytes` was given."""
    return np.frombuffer(payload, dtype="<u4").astype(np.uint32, copy=False)
