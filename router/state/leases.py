"""Leases and turns: who may write a session, and what a request puts down while it runs.

Decides what each answer of a script means; the atomic steps themselves are in `scripts.py`, time
bounds and retries in `control.py`.

A turn's life: `acquire` -> `tokens` -> `open_turn` -> `checkpoint` ... -> `commit_turn` ->
`release`, with `renew` every few seconds. What is lost when a process dies is at most the tokens
since the last checkpoint; what is committed is as safe as the server's append-only file.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from protos.errors import SessionBusyError, SessionFencedError
from router.state import scripts
from router.state.control import Argument, ControlClient
from router.state.redis_keys import DEAD_PREFIX, SessionKeys, check_id, session_keys
from router.state.scripts import Script
from router.state.session_codec import check_reply, ids_from_bytes, ids_to_bytes
from router.state.session_records import Lease, OpenTurn, TokenIds, TurnRecord, holder_of

READ_TOKENS = 1 << 18
"""Tokens read by one command: a megabyte, well within the bound of one."""
TOKENS = 1 + SessionKeys._fields.index("tokens")
_OPEN_TOKENS = 1 + SessionKeys._fields.index("open_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSettings:
    """How long things live, and how often a running turn is saved."""

    lease_s: float = 15.0
    """A lease that is not renewed for so long is free."""
    margin_s: float = 3.0
    """Its holder stops sending tokens so long before that."""
    max_snapshots: int = 32
    """Positions remembered of a session; the lowest go first."""
    commit_interval_tokens: int = 64
    """Generated tokens that wait at most before they are saved."""
    commit_interval_s: float = 1.0
    """How long they wait at most; a third of a lease or less."""


class LeaseStore:
    """The writing side of `router.state.sessions.SessionStore`; use that.

    Args:
        client: Calls to the meta server.
        engine: This router's name, in errors that others get.
        boot: Differs with every start of this process; random when empty.
        settings: How long things live, and how often a running turn is saved.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        client: ControlClient,
        *,
        engine: str,
        boot: str = "",
        settings: StoreSettings | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        check_id(engine, "engine")
        self.engine = engine
        self.boot = boot or secrets.token_hex(8)
        check_id(self.boot, "boot")
        self._process = f"{engine}#{self.boot}#".encode()
        self._client = client
        self.settings = settings or StoreSettings()
        self._clock = clock
        self._held: set[bytes] = set()
        self.num_fenced = 0
        """Writes refused because another has the session, or its history is another."""
        self.num_lost = 0
        """Leases that were another's, or of a deleted session, before they were given back."""

    @property
    def num_leases(self) -> int:
        """Leases that this process holds, as far as it knows."""
        return len(self._held)

    async def acquire(self, tenant: str, session_id: str) -> Lease:
        """Take the right to write a session.

        The lease of a process that was reported dead is taken over at once, as is one that this
        process holds without knowing it (its release was lost).

        Raises:
            SessionNotFoundError: There is no such session.
            SessionBusyError: Another request holds it; names its engine and the seconds left.
        """
        keys = session_keys(tenant, session_id)
        token = self._process + secrets.token_hex(8).encode()
        self._held.add(token)  # before the server knows it: another request may meet it first
        try:
            sent_at, reply = await self._acquire(keys, token)
            if reply[0] == b"BUSY":
                expires_s = max(0.0, reply[2] / 1000)
                raise SessionBusyError(session_id, holder_of(reply[1]), expires_s)
            check_reply(reply, session_id)
        except BaseException:
            self._held.discard(token)
            raise
        return Lease(
            tenant=tenant,
            session_id=session_id,
            token=token,
            epoch=reply[1],
            turn=reply[2],
            num_tokens=reply[3],
            quota_tokens=reply[4],
            namespace=reply[5].decode(),
            renewed_at=sent_at,
            ttl_s=self.settings.lease_s,
            margin_s=self.settings.margin_s,
        )

    async def renew(self, lease: Lease) -> Lease:
        """Keep a lease; also one that ran out, as long as nobody else took the session.

        Raises:
            SessionFencedError: Another holds the session.
            SessionNotFoundError: It was deleted.
        """
        await self._fenced(scripts.RENEW, lease)
        return lease

    async def release(self, lease: Lease) -> None:
        """Give a lease back; one that is not ours any more is left as it is."""
        self._held.discard(lease.token)
        keys = session_keys(lease.tenant, lease.session_id)
        await self._client.script(scripts.RELEASE, keys, [lease.token])

    # The turn of a lease

    async def tokens(self, lease: Lease) -> TokenIds:
        """Return the history, uint32 `[lease.num_tokens]`.

        Raises:
            SessionFencedError: The history is not that of the lease any more.
        """
        keys = session_keys(lease.tenant, lease.session_id)
        ids = await self._ids(keys, TOKENS, lease.num_tokens)
        if ids is None:
            raise SessionFencedError(lease.session_id, f"it has no {lease.num_tokens} tokens now")
        return ids

    async def open_turn(self, lease: Lease, turn: OpenTurn) -> Lease:
        """Put down a request and its prompt, before anything is generated for it.

        An open turn of another request is given up. One of the same request stays as it is:
        `lease.open_tokens` tells how much of it is saved.

        Raises:
            SessionQuotaError: Prompt and one token do not fit.
            SessionFencedError: Another holds the session, or its history is another.
            SessionNotFoundError: It was deleted.
        """
        prompt = ids_to_bytes(turn.prompt_ids)
        reply = await self._fenced(
            scripts.OPEN,
            lease,
            lease.turn,
            lease.num_tokens,
            turn.request_id,
            prompt,
            turn.seed,
            turn.request,
        )
        lease.request_id, lease.open_tokens = turn.request_id, int(reply[1])
        return lease

    async def open_turn_of(self, lease: Lease) -> OpenTurn | None:
        """Return the open turn, prompt and saved tokens; None when there is none.

        The lease then goes on from there: `checkpoint` appends behind what is saved.
        """
        keys = session_keys(lease.tenant, lease.session_id)
        _, fields, num_bytes = await self._client.script(scripts.READ_OPEN, keys)
        if fields[0] is None:
            lease.request_id, lease.open_tokens = "", 0
            return None
        tokens = await self._ids(keys, _OPEN_TOKENS, num_bytes // 4)
        if tokens is None:
            raise SessionFencedError(lease.session_id, "its open turn is gone")
        lease.request_id, lease.open_tokens = fields[0].decode(), len(tokens)
        prompt_tokens = int(fields[1])
        return OpenTurn(
            request_id=lease.request_id,
            prompt_ids=tokens[:prompt_tokens],
            generated_ids=tokens[prompt_tokens:],
            seed=int(fields[2]),
            request=fields[3],
            started_ms=int(fields[4]),
        )

    async def checkpoint(
        self, lease: Lease, new_ids: Sequence[int] | NDArray[Any], start: int | None = None
    ) -> Lease:
        """Save further tokens of the open turn.

        After a failure the same tokens, or those and more, may be sent again: what arrived before
        is recognised.

        Args:
            lease: With an open turn.
            new_ids: The turn's tokens from `start` on.
            start: Position in the turn, prompt included; None is `lease.open_tokens`.

        Raises:
            SessionQuotaError: They do not fit.
            SessionFencedError: Another holds the session, or the turn is not as we left it.
            SessionNotFoundError: It was deleted.
        """
        reply = await self._fenced(
            scripts.CHECKPOINT,
            lease,
            lease.turn,
            lease.num_tokens,
            lease.request_id,
            lease.open_tokens if start is None else start,
            ids_to_bytes(new_ids),
        )
        lease.open_tokens = int(reply[1])
        return lease

    async def commit_turn(
        self,
        lease: Lease,
        request_id: str,
        record: TurnRecord,
        new_ids: Sequence[int] | NDArray[Any] = (),
    ) -> Lease:
        """Make the open turn, and the tokens that were not saved yet, part of the history.

        May be sent again after any failure, also under a lease that was lost meanwhile: a turn that
        is in the log under this request id counts as committed.

        Args:
            lease: With the open turn.
            request_id: Its request.
            record: What the log keeps of it.
            new_ids: Tokens from `lease.open_tokens` on.

        Raises:
            SessionFencedError: Another holds the session; the turn is not part of the history.
            SessionQuotaError: They do not fit.
            SessionNotFoundError: It was deleted.
        """
        reply = await self._fenced(
            scripts.COMMIT,
            lease,
            lease.turn,
            lease.num_tokens,
            request_id,
            lease.open_tokens,
            ids_to_bytes(new_ids),
            record.to_bytes(),
            durable=True,
        )
        lease.turn, lease.num_tokens = int(reply[1]), int(reply[2])
        lease.request_id, lease.open_tokens = "", 0
        return lease

    async def abandon_turn(self, lease: Lease) -> Lease:
        """Give up the open turn, and the snapshots noted inside it.

        Raises:
            SessionFencedError: Another holds the session.
            SessionNotFoundError: It was deleted.
        """
        await self._fenced(scripts.ABANDON, lease)
        lease.request_id, lease.open_tokens = "", 0
        return lease

    # Inside

    async def _acquire(self, keys: SessionKeys, token: bytes) -> tuple[float, list[Any]]:
        """Return when the last attempt was sent, and its answer."""
        lost = b""
        while True:
            sent_at = self._clock()
            arguments: list[Argument] = [token, self._lease_ms, lost, DEAD_PREFIX]
            reply = await self._client.script(scripts.ACQUIRE, keys, arguments, durable=True)
            if reply[0] != b"BUSY" or not self._is_lost(reply[1]) or reply[1] == lost:
                return sent_at, reply
            lost = reply[1]

    def _is_lost(self, token: bytes) -> bool:
        """Whether a lease is of this process and nobody in it knows."""
        return token.startswith(self._process) and token not in self._held

    @property
    def _lease_ms(self) -> int:
        return round(1000 * self.settings.lease_s)

    async def _fenced(
        self, script: Script, lease: Lease, *arguments: Argument, durable: bool = False
    ) -> list[Any]:
        """Run a script that checks the lease; its success is also a renewal."""
        sent_at = self._clock()
        reply = await self._client.script(
            script,
            session_keys(lease.tenant, lease.session_id),
            [lease.token, lease.epoch, self._lease_ms, *arguments],
            durable=durable,
        )
        if reply[0] in (b"FENCED", b"CONFLICT"):
            self.num_fenced += 1
        if reply[0] in (b"FENCED", b"MISSING") and lease.token in self._held:
            self._held.remove(lease.token)
            self.num_lost += 1
        check_reply(reply, lease.session_id)
        lease.renewed_at = max(lease.renewed_at, sent_at)
        return reply

    async def _ids(self, keys: SessionKeys, key_number: int, num_tokens: int) -> TokenIds | None:
        """Read a string of ids piece by piece; None when it does not have exactly so many."""
        pieces: list[bytes] = []
        for first in range(0, max(1, num_tokens), READ_TOKENS):
            last = 4 * min(num_tokens, first + READ_TOKENS) - 1
            arguments = [key_number, 4 * first, max(0, last)]
            _, num_bytes, piece = await self._client.script(scripts.READ_IDS, keys, arguments)
            if num_bytes != 4 * num_tokens:
                return None
            pieces.append(piece)
        return ids_from_bytes(b"".join(pieces))
