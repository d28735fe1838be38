"""Values of a blob server, moved by the megabyte with no copy but the kernel's.

Speaks the few commands of RESP2 that blobs need, pipelined, over one connection of one thread
(`router.state.bulk_connection`), whose errors every method raises.

A value too large for one key (`codec.part_lengths`) is several here and one to the caller, who says
how large it is: each call sends and takes all of its parts.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Mapping, Sequence

from router.state.bulk_connection import CONNECT_S, IO_S, BulkConnection, Bytes, command
from router.state.codec import part_lengths
from router.state.endpoint import Endpoint
from router.state.redis_keys import part_key

EXISTS_BATCH = 4096
"""Keys whose EXISTS may be under way at once: 16 KiB of answers, which any socket holds."""


class Bulk(BulkConnection):
    """The values of one server; see `BulkConnection`."""

    def __init__(
        self, endpoint: Endpoint, *, connect_s: float = CONNECT_S, io_s: float = IO_S
    ) -> None:
        super().__init__(endpoint, connect_s=connect_s, io_s=io_s)
        self._gets: deque[list[int]] = deque()
        """Of each value asked for, the lengths of its parts."""
        self._sets: deque[int] = deque()
        """Of each value sent, the number of its parts."""

    def close(self) -> None:
        """Close the connection, and forget what was asked on it; the next call opens another."""
        super().close()
        self._gets.clear()
        self._sets.clear()

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
        self._send([b"".join(command(b"EXISTS", key) for key in keys)])

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
                commands.append(command(b"EXISTS", name))
                commands.append(command(b"EXPIRE", name, b"%d" % ttl, b"GT"))
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
            command(b"EXPIRE", name, expire, b"GT") + command(b"GET", name)
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
            command(b"EXPIRE", part_key(key, part), b"%d" % ttl, b"GT")
            + command(b"GETRANGE", part_key(key, part), b"%d" % first, b"%d" % (stop - 1))
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

    def set(self, key: bytes, pieces: Sequence[Bytes], ttl_s: int) -> str:
        """Store one value and wait for the answer."""
        self.send_set(key, pieces, ttl_s)
        return self.receive_status()

    def info(self, *sections: str) -> Mapping[str, str]:
        """Return the fields of INFO."""
        fields: dict[str, str] = {}
        for section in sections:
            self._send([command(b"INFO", section.encode())])
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
