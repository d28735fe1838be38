"""The directory of a lane's unix socket: made for one process; those of killed ones are removed.

A group that is killed leaves its directory behind, with a socket in it that nobody listens on.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
import time
from pathlib import Path

SOCKET_NAME = "lane"
MAX_PATH_BYTES = 100
"""Of a unix socket; below the 108 of `sockaddr_un`."""
YOUNG_S = 60.0
"""A socket of this age may be bound already and not yet listened on."""
_PREFIX = "expertmesh-"
_SUFFIX_BYTES = 24
"""Of the names that are put behind the parent's, socket included."""


def make_directory() -> Path:
    """Make a directory of mode 0700 whose path leaves room for `SOCKET_NAME`."""
    parent = _parent()
    remove_leftovers(parent)
    return Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))


def remove_leftovers(parent: Path) -> None:
    """Remove what killed processes of this user have left in `parent`."""
    for found in parent.glob(f"{_PREFIX}*/{SOCKET_NAME}"):
        with contextlib.suppress(OSError):  # another process is quicker
            is_ours = found.parent.stat().st_uid == os.getuid()
            if is_ours and time.time() - found.stat().st_mtime > YOUNG_S and _is_deaf(found):
                shutil.rmtree(found.parent)


def _is_deaf(path: Path) -> bool:
    """Return whether nobody listens on a unix socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.setblocking(False)  # a full queue is no reason to wait
        try:
            sock.connect(str(path))
        except ConnectionRefusedError:
            return True
        return False


def _parent() -> Path:
    default = tempfile.gettempdir()
    is_short = len(os.fsencode(default)) < MAX_PATH_BYTES - _SUFFIX_BYTES
    return Path(default if is_short else "/tmp")
