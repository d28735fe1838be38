"""Every key in Redis, its type, its TTL and its owner, on one screen.

    meta: one server with append-only file, noeviction; replicas, but not a Redis Cluster, because
    forks and the index of a tenant touch several hash slots in one script
    key                              type    holds                                TTL
    qs1:s:{<tenant>/<session>}:m     HASH    the session: turn, ntok, epoch, ...  session's
    qs1:s:{<tenant>/<session>}:tok   STRING  uint32le ids of finished turns       session's
    qs1:s:{<tenant>/<session>}:log   STREAM  `<turn>-0`: request id, record       session's
    qs1:s:{<tenant>/<session>}:o     HASH    the open turn: request, seed, ...    session's
    qs1:s:{<tenant>/<session>}:p     STRING  uint32le ids of the open turn        session's
    qs1:s:{<tenant>/<session>}:l     STRING  lease `<engine>#<boot>#<random>`     15 s
    qs1:i:{<tenant>}                 ZSET    the tenant's sessions, score 0       the longest
    qs1:e                            ZSET    engine -> ms of its last heartbeat   1 h
    qs1:e:<engine>                   HASH    heartbeat: address, load, warm       10 s
    qs1:dead:<engine>#<boot>         STRING  this process is dead                 1 h
    qs1:j:{<tenant>/<batch>}         HASH    the batch: state, counts, lease      batch's
    qs1:ji:{<tenant>}                ZSET    the tenant's batches, score 0        the longest
    qs1:jw:<model>                   ZSET    batches to run, by ms of creation    -
    qs1:jk:{<tenant>/<key>}          STRING  idempotency key -> batch             1 day

    blob: servers without persistence, volatile-ttl; written by `router.state.tier`
    qs1:b:<namespace>:<hash>         STRING  one KV block, or its first part      priority
    qs1:b:<namespace>:<hash>:<part>  STRING  a further part of a large one        priority
    qs1:g:<namespace>:<hash>:<part>  STRING  one stripe of a snapshot             priority

A session's keys live and expire together: each script that writes one sets the TTL of all.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from protos.errors import InvalidFieldError

ENGINES = b"qs1:e"
DEAD_PREFIX = b"qs1:dead:"
"""Scripts put the process of a lease behind it."""
_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_RULE = "must be 1 to 128 of A-Z a-z 0-9 . _ : -"


class SessionKeys(NamedTuple):
    """The keys of one session, in the order in which every script takes them."""

    meta: bytes
    tokens: bytes
    log: bytes
    open_turn: bytes
    open_tokens: bytes
    lease: bytes
    of_tenant: bytes
    """The index of the session's tenant."""


def session_keys(tenant: str, session_id: str) -> SessionKeys:
    """Return the keys of a session.

    Raises:
        InvalidFieldError: The id, or a tenant other than the unnamed one, breaks the rule of names.
    """
    if tenant:
        check_id(tenant, "tenant")
    check_id(session_id, "session_id")
    stem = f"qs1:s:{{{tenant}/{session_id}}}:"
    meta, tokens, log, open_turn, open_tokens, lease = (
        (stem + name).encode() for name in ("m", "tok", "log", "o", "p", "l")
    )
    return SessionKeys(
        meta, tokens, log, open_turn, open_tokens, lease, of_tenant=tenant_index(tenant)
    )


def tenant_index(tenant: str) -> bytes:
    """Return the key of the set of a tenant's sessions."""
    return b"qs1:i:{%b}" % tenant.encode()


class BatchKeys(NamedTuple):
    """The keys of one batch, in the order in which every script takes them."""

    record: bytes
    of_tenant: bytes
    """The index of the batch's tenant."""
    waiting: bytes
    """The batches of the model that have not ended, of all tenants."""
    known: bytes
    """Under its idempotency key."""


def batch_keys(tenant: str, name: str, model: str = "", known: str = "") -> BatchKeys:
    """Return the keys of a batch.

    Args:
        tenant: Whose it is.
        name: Its name.
        model: That it is for; where a script does not take it out of what waits, any.
        known: The idempotency key that it is made under, if any.

    Raises:
        InvalidFieldError: A name that cannot be part of a key.
    """
    if tenant:
        check_id(tenant, "tenant")
    check_id(name, "name")
    if known:
        check_id(known, "idempotency_key")
    return BatchKeys(
        record=f"qs1:j:{{{tenant}/{name}}}".encode(),
        of_tenant=b"qs1:ji:{%b}" % tenant.encode(),
        waiting=b"qs1:jw:%b" % model.encode(),
        known=f"qs1:jk:{{{tenant}/{known}}}".encode(),
    )


def engine_key(engine: str) -> bytes:
    """Return the key of a router's heartbeat."""
    return b"qs1:e:%b" % engine.encode()


def dead_key(engine: str, boot: str) -> bytes:
    """Return the key that says that a process is dead."""
    return DEAD_PREFIX + b"%b#%b" % (engine.encode(), boot.encode())


def block_key(namespace: str, position_hash: bytes) -> bytes:
    """Return the key of the KV block whose end has this hash (its first 16 bytes are used)."""
    return b"qs1:b:%b:%b" % (namespace.encode(), position_hash[:16].hex().encode())


def part_key(key: bytes, part: int) -> bytes:
    """Return the key of part `part` of the value that is named `key`, which is that of part 0."""
    return key + b":%d" % part if part else key


def stripe_key(namespace: str, position_hash: bytes, part: int) -> bytes:
    """Return the key of stripe `part` of the snapshot at a position."""
    return b"qs1:g:%b:%b:%d" % (namespace.encode(), position_hash[:16].hex().encode(), part)


def check_id(text: str, field: str) -> None:
    """Refuse a name that cannot be part of a key.

    Raises:
        InvalidFieldError: It is empty, too long or holds other characters.
    """
    if not _ID.fullmatch(text):
        raise InvalidFieldError(field, _RULE, text)
