"""One connection to a blob server that moves megabytes with no copy but the kernel's.

Speaks the few commands of RESP2 that blobs need, pipelined: what is sent is gathered from the
caller's buffers, what arrives is received into them. Sockets release the interpreter lock, so a
thread per connection keeps several of them busy beside the engine.

A connection belongs to one thread. Any exception leaves the stream out of step, so it closes the
connection, and the next call opens a fresh one; nothing is retried here. Every wait ends at the
earliest of: `io_s` without a byte of progress, the operation's deadline, its cancellation (noticed
within `SLICE_S`).

A value too large for one key (`codec.part_lengths`) is several here and one to the caller, who says
how large it is: each call sends and takes all of its parts.
"""

from __future__ import annotations

import itertools
import socket
import ssl
import struct
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence

from router.state.codec import part_lengths
from router.state.endpoint import Endpoint
from router.state.redis_keys import part_key

CONNECT_S = 0.2
IO_S = 2.0
SLICE_S = 0.05
"""A blocked send or receive looks at its deadline and cancellation this often."""
EXISTS_BATCH = 4096
"""Keys whose EXISTS may be under way at once: 16 KiB of answers, which any socket holds."""

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


class Bulk:
    """One connection of one thread.

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
        self._gets: deque[list[int]] = deque()
        """Of each value asked for, the lengths of its parts."""
        self._sets: deque[int] = deque()
        """Of each value sent, the number of its parts."""

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
        self._gets.clear()
        self._sets.clear()

    # Commands ------------------------------------------------------------------------------------

    def exists(self, keys: Sequence[bytes], value_bytes: int = 0) -> list[bool]:
        """Ask which values are there, many at a time.

        Args:
            keys: Any number.
            value_bytes: Of each, header included; matters for large ones.

        Raises:
            BulkError: As every method; the connection is closed then.
        """
        num_parts = len(part_lengths(value_bytes))
        keys = [part_key(key, part) for key in keys for part in range(num_parts)]
        found: list[bool] = []
        for start in range(0, len(keys), EXISTS_BATCH):
            batch = keys[start : start + EXISTS_BATCH]
            self.send_exists(batch)
            found += self.receive_exists(len(batch))
        return [all(found[i : i + num_parts]) for i in range(0, len(found), num_parts)]

    def send_exists(self, keys: Sequence[bytes]) -> None:
        """Send EXISTS of at most `EXISTS_BATCH` keys; `receive_exists` takes the answers."""
        self._send([b"".join(_command(b"EXISTS", key) for key in keys)])

    def receive_exists(self, count: int) -> list[bool]:
        """Receive the answers of `count` keys."""
        return [self._integer() > 0 for _ in range(count)]

    def touch(
        self, keys: Sequence[bytes], ttl_s: Sequence[int], value_bytes: Sequence[int]
    ) -> list[bool]:
        """Ask which values are there, and let those live at least `ttl_s` more seconds."""
        num_parts = [len(part_lengths(nbytes)) for nbytes in value_bytes]
        commands = []
        for key, ttl, count in zip(keys, ttl_s, num_parts, strict=True):
            for name in (part_key(key, part) for part in range(count)):
                commands.append(_command(b"EXISTS", name))
                commands.append(_command(b"EXPIRE", name, b"%d" % ttl, b"GT"))
        self._send([b"".join(commands)])
        found = []
        for count in num_parts:
            answers = [(self._integer(), self._integer())[0] for _ in range(count)]
            found.append(all(answers))
        return found

    def send_get(self, key: bytes, ttl_s: int, value_bytes: int = 0) -> None:
        """Ask for one value, and let it live at least `ttl_s` more seconds; `receive` takes it.

        GETEX would set the time: a reader that does not know how long the writer wanted the value
        to live could only shorten it.
        """
        lengths = part_lengths(value_bytes)
        expire = b"%d" % ttl_s
        self._send(
            _command(b"EXPIRE", name, expire, b"GT") + _command(b"GET", name)
            for name in (part_key(key, part) for part in range(len(lengths)))
        )
        self._gets.append(lengths)

    def send_get_ranges(
        self,
        keys: Sequence[bytes],
        start: int,
        nbytes: int,
        ttl_s: Sequence[int],
        value_bytes: int = 0,
    ) -> None:
        """Ask for `nbytes` bytes of each value, from byte `start` on; `receive` takes each.

        The answers of all are on their way at once: the keys are short, so the server never waits
        for this side to read while this side still sends.
        """
        ranges = _ranges(start, start + nbytes, value_bytes)
        self._send(
            _command(b"EXPIRE", part_key(key, part), b"%d" % ttl, b"GT")
            + _command(b"GETRANGE", part_key(key, part), b"%d" % first, b"%d" % (stop - 1))
            for key, ttl in zip(keys, ttl_s, strict=True)
            for part, first, stop in ranges
        )
        lengths = [stop - first for _, first, stop in ranges]
        self._gets.extend([lengths] * len(keys))

    def receive(self, into: Sequence[memoryview]) -> int | None:
        """Receive the oldest value asked for, into consecutive buffers.

        Returns:
            Its bytes; None where there is none, 0 where the key holds no string. A value that does
            not fill the buffers, or does not fit them, is read off the connection and its length
            returned: the buffers then hold nothing of use.
        """
        lengths = self._gets.popleft() if self._gets else [0]
        if len(lengths) == 1:
            return self._receive_part(into)
        stops = list(itertools.accumulate(lengths))
        received = [
            self._receive_part(_cut(into, stop - length, stop))
            for length, stop in zip(lengths, stops, strict=True)
        ]
        return None if None in received else sum(filter(None, received))

    def _receive_part(self, into: Sequence[memoryview]) -> int | None:
        self._integer()
        line = self._line()
        if line.startswith(b"-WRONGTYPE"):
            return 0
        length = self._length_in(line)
        if length is None:
            return None
        room = sum(len(view) for view in into)
        if length == room:
            for view in into:
                self._receive_exactly(view)
        else:
            self._discard(length)
        self._end_of_value()
        return length

    def send_set(self, key: bytes, pieces: Sequence[Bytes], ttl_s: int) -> None:
        """Store one value, given in consecutive pieces; `receive_status` takes the answer."""
        views = [memoryview(piece).cast("B") for piece in pieces]
        lengths = part_lengths(sum(len(view) for view in views))
        ttl = b"%d" % ttl_s
        tail = b"\r\n$2\r\nEX\r\n$%d\r\n%s\r\n" % (len(ttl), ttl)
        commands: list[Bytes] = []
        stop = 0
        for part, length in enumerate(lengths):
            name, start, stop = part_key(key, part), stop, stop + length
            head = b"*5\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%d\r\n" % (len(name), name, length)
            commands += [head, *_cut(views, start, stop), tail]
        self._send(commands)
        self._sets.append(len(lengths))

    def receive_status(self) -> str:
        """Receive the answer of a SET: `OK`, or the server's error (`OOM ...`), which is data."""
        num_parts = self._sets.popleft() if self._sets else 1
        answers = [self._status() for _ in range(num_parts)]
        return next((answer for answer in answers if answer != "OK"), "OK")

    def _status(self) -> str:
        line = self._line()
        if line[:1] in (b"+", b"-"):
            return line[1:].decode(errors="replace")
        raise self._broken(f"answered {line[:40]!r} to SET")

    def set(self, key: bytes, pieces: Sequence[Bytes], ttl_s: int) -> str:
        """Store one value and wait for the answer."""
        self.send_set(key, pieces, ttl_s)
        return self.receive_status()

    def info(self, *sections: str) -> Mapping[str, str]:
        """Return the fields of INFO."""
        fields: dict[str, str] = {}
        for section in sections:
            self._send([_command(b"INFO", section.encode())])
            length = self._length_in(self._line())
            if length is None:
                raise self._broken("answered nil to INFO")
            text = bytearray(length)
            self._receive_exactly(memoryview(text))
            self._end_of_value()
            lines = text.decode(errors="replace").splitlines()
            pairs = (line.partition(":") for line in lines)
            fields |= {name: value for name, colon, value in pairs if colon}
        return fields

    # Connection ----------------------------------------------------------------------------------

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
            commands.append(_command(b"AUTH", user, endpoint.password.encode()))
        if endpoint.db:
            commands.append(_command(b"SELECT", b"%d" % endpoint.db))
        if not commands:
            return
        self._send([b"".join(commands)])
        for _ in commands:
            if (status := self.receive_status()) != "OK":
                raise self._broken(f"refused the login: {status}")

    # Bytes ---------------------------------------------------------------------------------------

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


def _command(*words: bytes) -> bytes:
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(w), w) for w in words)


def _cut(views: Sequence[memoryview], start: int, stop: int) -> list[memoryview]:
    """Return bytes `start .. stop - 1` of consecutive buffers, nothing copied."""
    pieces, offset = [], 0
    for view in views:
        piece = view[max(0, start - offset) : max(0, stop - offset)]
        if len(piece):
            pieces.append(piece)
        offset += len(view)
    return pieces


def _ranges(start: int, stop: int, value_bytes: int) -> list[tuple[int, int, int]]:
    """Return which bytes of which parts are the bytes `start .. stop - 1` of a value: part, first,
    stop."""
    lengths = part_lengths(value_bytes)
    if len(lengths) == 1:
        return [(0, start, stop)]
    ends = list(itertools.accumulate(lengths))
    return [
        (part, max(start, end - length) - (end - length), min(stop, end) - (end - length))
        for part, (length, end) in enumerate(zip(lengths, ends, strict=True))
        if start < end and stop > end - length
    ]
