"""Pages over a tenant's sessions or batches, in the order of their ids, and the index's upkeep.

An index is a sorted set whose scores are all 0, so Redis keeps it in the order of the ids. Expired
sessions leave it when a page meets them, and a few at random whenever a session is made: an index
that nobody lists stays in proportion to what lives.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Awaitable, Callable
from typing import TypeVar

from protos.errors import InvalidFieldError
from router.state import scripts
from router.state.control import ControlClient
from router.state.redis_keys import session_keys, tenant_index
from router.state.session_records import SessionRecord

MAX_PAGE_SIZE = 1000
PRUNED_AT_ONCE = 4
R = TypeVar("R")
Reader = Callable[[str, str], Awaitable[SessionRecord | None]]


async def page(
    client: ControlClient, read: Reader, tenant: str, page_size: int, page_token: str
) -> tuple[list[SessionRecord], str]:
    """Return a page of sessions and the token of the next; see `SessionStore.list`."""
    return await page_of(
        client,
        tenant_index(tenant),
        lambda session_id: read(tenant, session_id),
        lambda session_id: _prune(client, tenant, session_id),
        page_size,
        page_token,
    )


async def page_of(
    client: ControlClient,
    index: bytes,
    read: Callable[[str], Awaitable[R | None]],
    forget: Callable[[str], Awaitable[object]],
    page_size: int,
    page_token: str,
    *,
    is_descending: bool = False,
) -> tuple[list[R], str]:
    """Return a page of what an index names, and the token of the next; empty after the last.

    Args:
        client: Of the index.
        index: Key of a sorted set whose scores are all 0.
        read: Returns the record of a member; None where it has expired.
        forget: Takes an expired one out of the index.
        page_size: Most records.
        page_token: Of the page before; empty: the first page is meant.
        is_descending: Last members first.

    Raises:
        InvalidFieldError: The size is not in [1, 1000], or no page gave out the token.
    """
    if not 1 <= page_size <= MAX_PAGE_SIZE:
        raise InvalidFieldError("page_size", f"must be in [1, {MAX_PAGE_SIZE}]", page_size)
    last = _from_token(page_token)
    order, begin, end = "ZRANGEBYLEX", b"-", b"+"
    if is_descending:
        order, begin, end = "ZREVRANGEBYLEX", b"+", b"-"
    found: list[R] = []
    while True:
        start = b"(" + last if last else begin
        wanted = page_size - len(found) + 1  # one more tells whether there is a next page
        names = await client.command(order, index, start, end, "LIMIT", 0, wanted)
        for raw in names:
            if len(found) == page_size:
                return found, _to_token(last)
            record = await read(raw.decode())
            if record is None:
                await forget(raw.decode())
            else:
                found.append(record)
            last = raw
        if len(names) < wanted:
            return found, ""


async def prune_some(client: ControlClient, tenant: str) -> None:
    """Take a few expired sessions out of the index, if a random look meets any."""
    index = tenant_index(tenant)
    for raw in await client.command("ZRANDMEMBER", index, PRUNED_AT_ONCE):
        if not await client.command("EXISTS", session_keys(tenant, raw.decode()).meta):
            await _prune(client, tenant, raw.decode())


async def _prune(client: ControlClient, tenant: str, session_id: str) -> None:
    await client.script(scripts.PRUNE, session_keys(tenant, session_id), [session_id])


def _to_token(last: bytes) -> str:
    """Return the token of the page behind this member of an index."""
    return base64.urlsafe_b64encode(last).decode()


def _from_token(token: str) -> bytes:
    """Return the member that a token stands for; empty for the first page's.

    Raises:
        InvalidFieldError: No page gave it out.
    """
    try:
        return base64.b64decode(token, altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise InvalidFieldError("page_token", "must be one that a page gave out", token) from None
