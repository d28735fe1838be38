"""What sessions are made of, as values: record, lease, turns, heartbeat. No Redis here.

Words: the *history* is the tokens of finished turns; the *open turn* is what a request has put down
since, prompt first; a *lease* is the right of one request in one process to write a session.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protos.errors import InternalError

TokenIds = NDArray[np.uint32]
NO_TOKENS: TokenIds = np.empty(0, dtype=np.uint32)
RECORD_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionRecord:
    """A session as a reader sees it."""

    tenant: str
    session_id: str
    num_tokens: int
    """Of the history."""
    num_turns: int
    """Finished ones."""
    created_ms: int
    """Server's clock, milliseconds since 1970."""
    updated_ms: int
    """Of the last write."""
    ttl_s: float
    """Seconds that the session is kept after its last write."""
    quota_tokens: int
    """Most tokens; 0 is no bound."""
    metadata: Mapping[str, str]
    namespace: str
    """What its cached values depend on, besides tokens, when it was made."""
    nonce: bytes
    """Tells it from an earlier or later session of the same id."""
    holder: str | None
    """Engine that holds the lease."""
    open_turn: OpenTurnSummary | None
    snapshots: Mapping[int, bytes]
    """Number of tokens -> 32-byte position hash, of snapshots that may be in the blob tier."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenTurnSummary:
    """A turn that is under way, or was when its router died."""

    request_id: str
    prompt_tokens: int
    """New ones of this turn."""
    num_tokens: int
    """Prompt and what is generated and saved so far."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OpenTurn:
    """All that another router needs to go on with a turn."""

    request_id: str
    prompt_ids: TokenIds
    """New tokens of this turn, uint32 `[prompt_tokens]`."""
    seed: int
    """Of the sampler, 0 to 2**64 - 1."""
    request: bytes
    """The serialised request."""
    generated_ids: TokenIds = field(default_factory=lambda: NO_TOKENS)
    """Saved ones, uint32 `[n]`; empty when the turn opens."""
    started_ms: int = 0
    """Server's clock; set by the store."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnRecord:
    """A finished turn."""

    request_id: str
    first_token: int
    """Where the turn begins in the history."""
    prompt_tokens: int
    """New ones of this turn."""
    completion_tokens: int
    finish_reason: str
    """stop, length, cancelled; or fork, of a turn that a fork cut."""
    finished_ms: int = 0
    """Router's clock, milliseconds since 1970."""
    turn: int = 0
    """1, 2, 3, ...; set by the store."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Whatever a replay of the turn's last message needs; JSON values."""

    @property
    def num_tokens(self) -> int:
        """Length of the history right after this turn."""
        return self.first_token + self.prompt_tokens + self.completion_tokens

    def to_bytes(self) -> bytes:
        """Return the record as JSON."""
        values = {
            "v": RECORD_VERSION,
            "first": self.first_token,
            "prompt": self.prompt_tokens,
            "completion": self.completion_tokens,
            "finish": self.finish_reason,
            "finished_ms": self.finished_ms,
            "details": dict(self.details),
        }
        return json.dumps(values, separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, turn: int, request_id: str, payload: bytes) -> TurnRecord:
        """Read what `to_bytes` wrote.

        Raises:
            InternalError: It is of another version.
        """
        values = json.loads(payload)
        if values["v"] != RECORD_VERSION:
            raise InternalError(f"turn record of version {values['v']}, ours is {RECORD_VERSION}")
        return cls(
            turn=turn,
            request_id=request_id,
            first_token=values["first"],
            prompt_tokens=values["prompt"],
            completion_tokens=values["completion"],
            finish_reason=values["finish"],
            finished_ms=values["finished_ms"],
            details=values["details"],
        )


@dataclass(slots=True, kw_only=True, eq=False)
class Lease:
    """The right to write one session; the store keeps it current, in place.

    Each write that succeeds renews it. `may_emit` is false from a margin before it can have expired
    for others: a writer that was asleep for too long must not send tokens that nobody will keep.
    """

    tenant: str
    session_id: str
    token: bytes
    """`<engine>#<boot>#<random>`; what the server compares."""
    epoch: int
    """Number of leases that the session has had."""
    turn: int
    """Finished turns."""
    num_tokens: int
    """Of the history."""
    quota_tokens: int
    """Most tokens of the session; 0 is no bound."""
    namespace: str
    """The session's; see `SessionRecord.namespace`."""
    renewed_at: float
    """Monotonic seconds right before the last renewal was sent."""
    ttl_s: float
    margin_s: float
    request_id: str = ""
    """Of the open turn; empty when none is known."""
    open_tokens: int = 0
    """Of the open turn, as far as they are saved; its prompt counts."""

    @property
    def engine(self) -> str:
        """Who holds it."""
        return holder_of(self.token)

    def may_emit(self, now: float) -> bool:
        """Whether a token may be sent at the monotonic second `now`."""
        return now < self.renewed_at + self.ttl_s - self.margin_s


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRecord:
    """A router's heartbeat: a hint for choosing one, never the truth."""

    engine: str
    boot: str
    """Differs with every start of the process."""
    address: str
    """host:port of its gRPC port."""
    namespace: str
    load: float
    """Of the same unit in all routers; the lowest is preferred."""
    warm: bytes = b""
    """First 8 bytes of each position hash that it can go on from without the blob tier."""


def holder_of(token: bytes) -> str:
    """Return the engine's name in a lease."""
    return token.split(b"#", 1)[0].decode("utf-8", "replace")
