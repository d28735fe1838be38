"""Turns and clients that tests of sessions share."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import numpy as np
import redis.asyncio
from numpy.typing import NDArray

from router.state.embedded import EmbeddedServer
from router.state.session_records import Lease, OpenTurn, TurnRecord
from router.state.sessions import SessionStore

_requests = itertools.count(1)
Ids = Sequence[int] | NDArray[Any]


def turn_record(
    request_id: str,
    first_token: int,
    prompt_tokens: int,
    completion_tokens: int,
    finish_reason: str = "stop",
    details: Mapping[str, Any] | None = None,
) -> TurnRecord:
    """The record of a turn."""
    return TurnRecord(
        request_id=request_id,
        first_token=first_token,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        finish_reason=finish_reason,
        finished_ms=1_700_000_000_000,
        details=details or {},
    )


def opening(request_id: str, prompt_ids: Ids, seed: int = 0) -> OpenTurn:
    """A turn as it opens."""
    return OpenTurn(
        request_id=request_id, prompt_ids=np.asarray(prompt_ids), seed=seed, request=b"request"
    )


async def commit(store: SessionStore, lease: Lease, new_ids: Ids = (), prompt: int = 1) -> Lease:
    """Commit the open turn of a lease, whose first `prompt` tokens were its prompt."""
    done = lease.open_tokens + len(new_ids) - prompt
    record = turn_record(lease.request_id, lease.num_tokens, prompt, done)
    return await store.commit_turn(lease, lease.request_id, record, new_ids)


async def add_turn(
    store: SessionStore,
    tenant: str,
    session_id: str,
    prompt_ids: Ids,
    new_ids: Ids,
    *,
    release: bool = True,
) -> Lease:
    """Run a whole turn; the lease is given back unless `release` is false."""
    lease = await store.acquire(tenant, session_id)
    await store.open_turn(lease, opening(f"turn-{next(_requests)}", prompt_ids))
    await commit(store, lease, new_ids, len(prompt_ids))
    if release:
        await store.release(lease)
    return lease


@contextlib.asynccontextmanager
async def redis_of(server: EmbeddedServer) -> AsyncIterator[redis.asyncio.Redis]:
    """A plain client, to see and disturb what the store keeps."""
    client = redis.asyncio.Redis(
        **server.endpoint.redis_arguments(), protocol=2, driver_info=None, socket_timeout=10
    )
    async with client:
        yield client
