"""A connection to a blob server: opened when needed, bounded in time, closed when out of step.

Sends what is gathered from the caller's buffers, receives into them, and takes RESP2 apart as far
as lines and lengths. Sockets release the interpreter lock, so a thread per connection keeps several
of them busy beside the engine. What is asked and answered: `router.state.bulk`.

A connection belongs to one thread. Any exception leaves the stream out of step, so it closes the
connection, and the next call opens a fresh one; nothing is retried here. Every wait ends at the
earliest of: `io_s` without a byte of progress, the operation's deadline, its cancellation (noticed
within `SLICE_S`).
"""

from __future__ import annotations

import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterable

from router.state.endpoint import Endpoint

CONNECT_S = 0.2
IO_S = 2.0
SLICE_S = 0.05
"""A blocked send or receive looks at its deadline and cancellation this often."""

_READ_BYTES = 16 << 10
_GATHER = 64
_MAX_LINE_BYTES = 4096

Bytes = bytes | bytearray | memoryview


class BulkError(Exception):
    """The server could not be reached, gave no answer in time or one that makes no sense."""


class BulkLateError(BulkError):
    """The operation's own deadline passed.

    Attributes:
        is_stalled: Whether the server was silent at the end; else it was merely not fast enough.
    """

    def __init__(self, message: str, *, is_stalled: bool) -> None:
        super().__init__(message)
        self.is_stalled = is_stalled


class BulkCancelledError(BulkError):
    """The operation was cancelled; says nothing about the server."""


class BulkConnection:
    """One connection of one thread, opened when it is first needed.

    Args:
        endpoint: The server.
        connect_s: Bound of connecting; of a TLS handshake and of AUTH it is `io_s`.
        io_s: Bound of a wait without progress.

    Raises:
        ConfigurationError: The endpoint's certificates cannot be read.
    """

    def __init__(
        self, endpoint: Endpoint, *, connect_s: float = CONNECT_S, io_s: float = IO_S
    ) -> None:
        self.endpoint = endpoint
        self._connect_s = connect_s
        self._io_s = io_s
        self._tls = endpoint.ssl_context()
        self._socket: socket.socket | None = None
        self._buffer = bytearray(_READ_BYTES)
        self._view = memoryview(self._buffer)
        self._start = self._stop = 0  # what of the buffer has arrived and is not yet taken
        self._deadline = float("inf")
        self._cancelled: threading.Event | None = None

    @property
    def is_open(self) -> bool:
        """Whether a connection stands, as far as this side knows."""
        return self._socket is not None

    def bound(self, deadline: float, cancelled: threading.Event | None = None) -> None:
        """Set what ends the calls from now on: monotonic seconds, and an event."""
        self._deadline = deadline
        self._cancelled = cancelled

    def close(self) -> None:
        """Close the connection; the next call opens another."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        self._start = self._stop = 0

    def open(self) -> None:
        """Connect, shake hands and log in, unless a connection stands."""
        if self._socket is not None:
            return
        endpoint = self.endpoint
        timeout_s = max(1e-3, min(self._connect_s, self._deadline - time.monotonic()))
        try:
            if endpoint.path:
                plain = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                try:
                    plain.settimeout(timeout_s)
                    plain.connect(endpoint.path)
                except OSError:
                    plain.close()
                    raise
            else:
                plain = socket.create_connection((endpoint.host, endpoint.port), timeout_s)
                plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._socket = plain
            if self._tls:
                plain.settimeout(self._io_s)
                self._socket = self._tls.wrap_socket(plain, server_hostname=endpoint.host)
                self._socket.settimeout(SLICE_S)
            else:
                # Blocking in the kernel, with its own timeout: one call then fills a whole buffer.
                plain.settimeout(None)
                slice_ = struct.pack("ll", 0, round(SLICE_S * 1e6))
                plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, slice_)
                plain.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, slice_)
        except OSError as error:
            self.close()
            raise BulkError(f"{endpoint}: {error}") from error
        self._log_in()

    def _log_in(self) -> None:
        endpoint = self.endpoint
        commands = []
        if endpoint.password is not None:
            user = (endpoint.username or "default").encode()
            commands.append(command(b"AUTH", user, endpoint.password.encode()))
        if endpoint.db:
            commands.append(command(b"SELECT", b"%d" % endpoint.db))
        if not commands:
            return
        self._send([b"".join(commands)])
        for _ in commands:
            if (status := self._status()) != "OK":
                raise self._broken(f"refused the login: {status}")

    def _send(self, pieces: Iterable[Bytes]) -> None:
        self.open()
        assert self._socket is not None
        views = [memoryview(piece).cast("B") for piece in pieces if len(piece)]
        is_tls = isinstance(self._socket, ssl.SSLSocket)
        first = 0
        progress = time.monotonic()
        while first < len(views):
            try:
                if is_tls:
                    sent = self._socket.send(views[first])
                else:
                    sent = self._socket.sendmsg(views[first : first + _GATHER])
            except (TimeoutError, BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                self._wait_on(progress)
                continue
            except OSError as error:
                raise self._broken(f"send: {error}") from error
            progress = time.monotonic()
            while first < len(views) and sent >= len(views[first]):
                sent -= len(views[first])
                first += 1
            if sent:
                views[first] = views[first][sent:]
            if first < len(views):
                self._wait_on(progress)

    def _receive_some(self, view: memoryview, flags: int = 0) -> int:
        """Receive at least one byte."""
        if self._socket is None:
            raise BulkError(f"{self.endpoint}: nothing was asked for")
        progress = time.monotonic()
        while True:
            try:
                if isinstance(self._socket, ssl.SSLSocket):
                    count = self._socket.recv_into(view)
                else:
                    count = self._socket.recv_into(view, 0, flags)
            except (TimeoutError, BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                self._wait_on(progress)
                continue
            except OSError as error:
                raise self._broken(f"receive: {error}") from error
            if not count:
                raise self._broken("closed the connection")
            return count

    def _wait_on(self, progress: float) -> None:
        """Raise unless the operation may go on waiting, without progress since `progress`."""
        now = time.monotonic()
        if self._cancelled is not None and self._cancelled.is_set():
            self.close()
            raise BulkCancelledError(f"{self.endpoint}: cancelled")
        if now >= self._deadline:
            self.close()
            is_stalled = now - progress >= SLICE_S / 2
            raise BulkLateError(f"{self.endpoint}: the deadline passed", is_stalled=is_stalled)
        if now - progress >= self._io_s:
            raise self._broken(f"no progress within {self._io_s:g} s")

    def _broken(self, what: str) -> BulkError:
        self.close()
        return BulkError(f"{self.endpoint}: {what}")

    def _receive_exactly(self, view: memoryview) -> None:
        done = min(len(view), self._stop - self._start)
        view[:done] = self._view[self._start : self._start + done]
        self._start += done
        while done < len(view):
            done += self._receive_some(view[done:], socket.MSG_WAITALL)
            if done < len(view):
                self._wait_on(time.monotonic())

    def _discard(self, length: int) -> None:
        scratch = memoryview(bytearray(min(length, 1 << 20)))
        while length:
            part = scratch[: min(length, len(scratch))]
            self._receive_exactly(part)
            length -= len(part)

    def _line(self) -> bytes:
        """Return the next line without its end."""
        while True:
            stop = self._buffer.find(b"\r\n", self._start, self._stop)
            if stop >= 0:
                line = bytes(self._view[self._start : stop])
                self._start = stop + 2
                return line
            if self._stop - self._start > _MAX_LINE_BYTES:
                raise self._broken("sent a line without end")
            self._fill()

    def _fill(self) -> None:
        """Receive more into the buffer, which is never full here."""
        rest = bytes(self._view[self._start : self._stop])
        self._view[: len(rest)] = rest
        self._start, self._stop = 0, len(rest)
        self._stop += self._receive_some(self._view[self._stop :])

    def _status(self) -> str:
        line = self._line()
        if line[:1] in (b"+", b"-"):
            return line[1:].decode(errors="replace")
        raise self._broken(f"answered {line[:40]!r} to SET")

    def _number(self, line: bytes, mark: bytes) -> int:
        if line[:1] == mark and line[1:].lstrip(b"-").isdigit():
            return int(line[1:])
        raise self._broken(f"answered {line[:80].decode(errors='replace')}")

    def _integer(self) -> int:
        return self._number(self._line(), b":")

    def _length_in(self, line: bytes) -> int | None:
        length = self._number(line, b"$")
        return None if length < 0 else length

    def _end_of_value(self) -> None:
        # Through the buffer: one call brings the head of the next answer, too.
        while self._stop - self._start < 2:
            self._fill()
        end = self._buffer[self._start : self._start + 2]
        self._start += 2
        if end != b"\r\n":
            raise self._broken("sent a value of another length than it said")


def command(*words: bytes) -> bytes:
    """Return a command as it is sent."""
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(w), w) for w in words)
