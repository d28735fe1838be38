"""Byte ranges of a remote file, kept in a local one that is empty elsewhere.

A cached file lies beside two others: `NAME.remote`, which says where its bytes come from, and
`NAME.ranges`, a journal with a line `start length checksum` for each range that is here. The local
file has the size of the remote one from the beginning, with holes; a range is written, flushed to
disk, and only then gets its line, so that whatever is cut off by a crash is fetched again. A range
that is read for the first time in a process is held against its checksum.

Several processes may use one cache at the same time: they write the same bytes, and a line is one
append. What a range is, the reader decides: a tensor, or an expert's part of one. The same reader
asks for the same ranges at its next start, and reads nothing from afar.
"""

from __future__ import annotations

import json
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

from protos.errors import CheckpointError

REMOTE, RANGES = ".remote", ".ranges"
PARALLEL = 4
"""Ranges that are fetched ahead at the same time."""


def open_filesystem(uri: str) -> tuple[Any, str]:
    """Return a pyarrow filesystem and the path in it.

    pyarrow's own ones (file, s3, gs, hdfs, abfs), else one that fsspec knows by the scheme.

    Raises:
        CheckpointError: Nobody knows the scheme, or it cannot be used here.
    """
    from pyarrow import fs

    try:
        return fs.FileSystem.from_uri(uri)  # type: ignore[no-any-return]
    except (OSError, ValueError) as error:
        first = str(error)
    import fsspec

    scheme, _, path = uri.partition("://")
    try:
        return fs.PyFileSystem(fs.FSSpecHandler(fsspec.filesystem(scheme))), path
    except (ImportError, ValueError) as error:
        raise CheckpointError(uri, f"cannot be opened: {first}; {error}") from None


class RangeCache:
    """The local copy of one remote file. Safe to use from several threads.

    Args:
        path: Of the local file; `prepare` made it.
    """

    def __init__(self, path: Path) -> None:
        self._source: dict[str, Any] = json.loads(path.with_name(path.name + REMOTE).read_text())
        self._journal = path.with_name(path.name + RANGES)
        self._known: dict[tuple[int, int], int] = _read_journal(self._journal)
        self._checked: set[tuple[int, int]] = set()
        self._pending: dict[tuple[int, int], Future[None]] = {}
        self._lock = threading.Lock()
        self._remote: Any = None
        self._pool: ThreadPoolExecutor | None = None
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)

    @staticmethod
    def prepare(path: Path, uri: str, size: int) -> None:
        """Make an empty local file for a remote one, unless there is one."""
        if path.with_name(path.name + REMOTE).exists():
            return
        with path.open("ab") as file:
            file.truncate(size)
        write_whole(path.with_name(path.name + REMOTE), json.dumps({"uri": uri}).encode())

    @staticmethod
    def beside(path: Path) -> RangeCache | None:
        """Return the cache that a file is the local copy of; None for an ordinary file."""
        return RangeCache(path) if path.with_name(path.name + REMOTE).exists() else None

    def close(self) -> None:
        """Stop fetching ahead and close the file."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def ensure(self, start: int, length: int) -> None:
        """Make sure that a range is here and is what was fetched.

        Raises:
            CheckpointError: The remote file cannot be read.
        """
        key = (start, length)
        with self._lock:
            if key in self._checked:
                return
            pending = self._pending.pop(key, None)
        if pending is not None and not pending.cancelled():
            pending.result()
        else:
            self._fetch(key)

    def prefetch(self, start: int, length: int) -> None:
        """Begin to fetch what `ensure` will want next; errors show there."""
        key = (start, length)
        with self._lock:
            if key in self._checked or key in self._pending or len(self._pending) >= PARALLEL:
                return
            if self._pool is None:
                self._pool = ThreadPoolExecutor(PARALLEL, thread_name_prefix="fetch")
            self._pending[key] = self._pool.submit(self._fetch, key)

    def _fetch(self, key: tuple[int, int]) -> None:
        start, length = key
        checksum = self._known.get(key)
        if checksum is None or _checksum(os.pread(self._fd, length, start)) != checksum:
            content = self._read_remote(start, length)
            view, position = memoryview(content), start
            while view:
                written = os.pwrite(self._fd, view, position)
                view, position = view[written:], position + written
            os.fdatasync(self._fd)
            line = f"{start} {length} {_checksum(content):016x}\n".encode()
            with self._journal.open("ab", buffering=0) as journal:
                journal.write(line)
        with self._lock:
            self._checked.add(key)

    def _read_remote(self, start: int, length: int) -> bytes:
        uri = self._source["uri"]
        try:
            with self._lock:
                if self._remote is None:
                    filesystem, path = open_filesystem(uri)
                    self._remote = filesystem.open_input_file(path)
            content: bytes = self._remote.read_at(length, start)
        except OSError as error:
            raise CheckpointError(uri, f"cannot be read: {error}") from None
        if len(content) != length:
            raise CheckpointError(uri, f"ends {length - len(content)} bytes early")
        return content


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    temporary.write_bytes(content)
    temporary.replace(path)


def fetched_bytes(folder: Path) -> int:
    """Return how many bytes of safetensors files a cache folder holds."""
    return sum(length for path in folder.glob(f"*{RANGES}") for _, length in _read_journal(path))


def _read_journal(path: Path) -> dict[tuple[int, int], int]:
    """Return what the journal says; a line that was cut off by a crash counts for nothing."""
    if not path.exists():
        return {}
    found = {}
    for line in path.read_text().splitlines():
        fields = line.split()
        if len(fields) == 3 and len(fields[2]) == 16:
            found[int(fields[0]), int(fields[1])] = int(fields[2], 16)
    return found


def _checksum(content: bytes) -> int:
    return xxhash.xxh3_64_intdigest(content)
