"""Pages over a tenant's sessions, in the order of their ids, and the upkeep of that index.

The index is a sorted set whose scores are all 0, so Redis keeps it in the order of the ids. Expired
sessions leave it when a page meets them, and a few at random whenever a session is made: an index
that nobody lists stays in proportion to what lives.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Awaitable, Callable

from protos.errors import InvalidFieldError
from router.state import scripts
from router.state.control import ControlClient
from router.state.redis_keys import session_keys, tenant_index
from router.state.session_records import SessionRecord

MAX_PAGE_SIZE = 1000
PRUNED_AT_ONCE = 4
Reader = Callable[[str, str], Awaitable[SessionRecord | None]]


async def page(
    client: ControlClient, read: Reader, tenant: str, page_size: int, page_token: str
) -> tuple[list[SessionRecord], str]:
    """Return a page and the token of the next; see `SessionStore.list`."""
    if not 1 <= page_size <= MAX_PAGE_SIZE:
        raise InvalidFieldError("page_size", f"must be in [1, {MAX_PAGE_SIZE}]", page_size)
    last = from_token(page_token)
    index = tenant_index(tenant)
    found: list[SessionRecord] = []
    while True:
        start = b"(" + last if last else b"-"
        wanted = page_size - len(found) + 1  # one more tells whether there is a next page
        ids = await client.command("ZRANGEBYLEX", index, start, b"+", "LIMIT", 0, wanted)
        for raw in ids:
            if len(found) == page_size:
                return found, to_token(last)
            record = await read(tenant, raw.decode())
            if record is None:
                await _prune(client, tenant, raw.decode())
            else:
                found.append(record)
            last = raw
        if len(ids) < wanted:
            return found, ""


async def prune_some(client: ControlClient, tenant: str) -> None:
    """Take a few expired sessions out of the index, if a random look meets any."""
    index = tenant_index(tenant)
    for raw in await client.command("ZRANDMEMBER", index, PRUNED_AT_ONCE):
        if not await client.command("EXISTS", session_keys(tenant, raw.decode()).meta):
            await _prune(client, tenant, raw.decode())


async def _prune(client: ControlClient, tenant: str, session_id: str) -> None:
    await client.script(scripts.PRUNE, session_keys(tenant, session_id), [session_id])


def to_token(last: bytes) -> str:
    """Return the token of the page behind this member of an index."""
    return base64.urlsafe_b64encode(last).decode()


def from_token(token: str) -> bytes:
    """Return the member that a token stands for; empty for the first page's.

    Raises:
        InvalidFieldError: No page gave it out.
    """
    try:
        return base64.b64decode(token, altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise InvalidFieldError("page_token", "must be one that a page gave out", token) from None
