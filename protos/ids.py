"""Names of requests, routers and hosts."""

from __future__ import annotations

import os
import re
import socket
import time
import uuid
from pathlib import Path

from protos.errors import InvalidFieldError

MAX_ID_CHARS = 128
_ID = re.compile(r"[A-Za-z0-9._:/-]{1,128}\Z")
_SESSION_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}\Z")
_BATCH_NAME = re.compile(r"batch-[0-9a-f]{12}-[0-9a-f]{8}\Z")
_SESSION_ID_RULE = f"must be 1 to {MAX_ID_CHARS} characters of A-Z a-z 0-9 . _ : -"
_ID_RULE = f"must be 1 to {MAX_ID_CHARS} characters of A-Z a-z 0-9 . _ : / -"


def new_request_id() -> str:
    """Return an id for a request whose client chose none."""
    return f"req-{uuid.uuid4().hex}"


def new_session_id() -> str:
    """Return an id for a session whose client chose none."""
    return f"session-{uuid.uuid4().hex}"


def new_batch_name() -> str:
    """Return a name for a batch; names sort by the time they were made, to the millisecond."""
    return f"batch-{time.time_ns() // 1_000_000:012x}-{uuid.uuid4().hex[:8]}"


def is_batch_name(text: str) -> bool:
    """Return whether `text` looks like a name of `new_batch_name`."""
    return _BATCH_NAME.match(text) is not None


def is_valid_id(text: str) -> bool:
    """Return whether `text` may name a request, a router or a group."""
    return _ID.match(text) is not None


def check_id(text: str, *, field: str) -> str:
    """Return `text` when it may name something.

    Raises:
        InvalidFieldError: Empty, too long, or with characters that logs and keys do not take.
    """
    if not is_valid_id(text):
        raise InvalidFieldError(field, _ID_RULE, text)
    return text


def id_rule() -> str:
    """Return the rule that `check_id` applies, for lists of violations."""
    return _ID_RULE


def is_valid_session_id(text: str) -> bool:
    """Return whether `text` may name a session; `/` stands between tenant and session."""
    return _SESSION_ID.match(text) is not None


def session_id_rule() -> str:
    """Return the rule that `is_valid_session_id` applies."""
    return _SESSION_ID_RULE


def host_id() -> str:
    """Return a name that two processes share if and only if they share this machine's sockets.

    Made of the boot id, the host name, and the network and mount namespaces: two containers on one
    machine differ, because a Unix socket's path in one does not exist in the other.
    """
    parts = [socket.gethostname()]
    boot_id = Path("/proc/sys/kernel/random/boot_id")
    parts.append(boot_id.read_text().strip() if boot_id.exists() else f"{uuid.getnode():x}")
    for namespace in ("net", "mnt"):
        path = Path("/proc/self/ns") / namespace
        parts.append(str(os.stat(path).st_ino) if path.exists() else "-")
    return ":".join(parts)
