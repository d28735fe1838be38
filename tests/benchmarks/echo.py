"""The bare transports that dispatch is measured against: gRPC and Unix-socket echoes.

A server process answers every message of n bytes with m bytes that it has ready; the first eight
bytes of a message say m. Nothing is parsed, copied or computed: what is left is the transport's own
price for the same bytes. The gRPC side is a bidirectional stream with the synchronous stub and raw
bytes; the socket side is `sendall` and `recv_into` on preallocated buffers.
"""

from __future__ import annotations

import multiprocessing
import queue
import socket
import struct
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

import grpc

METHOD = "/echo.Echo/Stream"
OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
SOCKET_BUFFER_BYTES = 4 << 20
START_TIMEOUT_S = 60.0
_SIZES = struct.Struct("<QQ")


def message(num_bytes: int, answer_bytes: int) -> bytes:
    """Return a message of `num_bytes` (at least 16) that asks for `answer_bytes`."""
    return _SIZES.pack(answer_bytes, num_bytes) + bytes(num_bytes - _SIZES.size)


class EchoServers:
    """`count` processes, each with both echoes, and connections to all of them."""

    def __init__(self, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        self._channels: list[grpc.Channel] = []
        self._requests: list[queue.SimpleQueue[bytes | None]] = []
        self._answers: list[Any] = []
        self._sockets: list[socket.socket] = []
        self._buffer = bytearray(1 << 20)
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        for pipe in self._pipes:
            if not pipe.poll(START_TIMEOUT_S):
                raise RuntimeError("an echo server did not start")
            self._connect(*pipe.recv())

    def _connect(self, port: int, path: str) -> None:
        channel = grpc.insecure_channel(f"127.0.0.1:{port}", options=OPTIONS)
        requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        stream: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(METHOD)
        self._channels.append(channel)
        self._requests.append(requests)
        self._answers.append(stream(iter(requests.get, None)))
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        _tune(connection)
        connection.connect(path)
        self._sockets.append(connection)

    def grpc_call(self, messages: Sequence[bytes]) -> None:
        """Send one message to each of the first servers at once and wait for all answers."""
        for requests, payload in zip(self._requests, messages, strict=False):
            requests.put(payload)
        for answers, _ in zip(self._answers, messages, strict=False):
            next(answers)

    def socket_call(self, messages: Sequence[bytes]) -> None:
        """The same over the Unix sockets."""
        for connection, payload in zip(self._sockets, messages, strict=False):
            connection.sendall(payload)
        for connection, payload in zip(self._sockets, messages, strict=False):
            answer_bytes, _ = _SIZES.unpack_from(payload)
            if len(self._buffer) < answer_bytes:
                self._buffer = bytearray(answer_bytes)
            _receive(connection, memoryview(self._buffer)[:answer_bytes])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for requests in self._requests:
            requests.put(None)
        for channel in self._channels:
            channel.close()
        for connection in self._sockets:
            connection.close()
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()


def _tune(connection: socket.socket) -> None:
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        connection.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)


def _receive(connection: socket.socket, view: memoryview) -> bool:
    done = 0
    while done < len(view):
        got = connection.recv_into(view[done:], len(view) - done, socket.MSG_WAITALL)
        if got == 0:
            return False
        done += got
    return True


def _serve(pipe: Connection) -> None:
    """Run both echoes until the pipe is closed."""
    ready: dict[int, bytes] = {}

    def answer_of(payload: bytes | memoryview) -> bytes:
        size = _SIZES.unpack_from(payload)[0]
        if size not in ready:
            ready[size] = bytes(size)
        return ready[size]

    def stream(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        for payload in requests:
            yield answer_of(payload)

    handler = grpc.method_handlers_generic_handler(
        "echo.Echo", {"Stream": grpc.stream_stream_rpc_method_handler(stream)}
    )
    server = grpc.server(ThreadPoolExecutor(4), handlers=[handler], options=OPTIONS)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with tempfile.TemporaryDirectory(prefix="echo-") as folder:
        path = str(Path(folder) / "socket")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(path)
        listener.listen()

        def serve_socket() -> None:
            connection, _ = listener.accept()
            _tune(connection)
            buffer = memoryview(bytearray(1 << 20))
            while _receive(connection, buffer[: _SIZES.size]):
                answer_bytes, num_bytes = _SIZES.unpack_from(buffer)
                rest = num_bytes - _SIZES.size
                if rest > len(buffer):
                    buffer = memoryview(bytearray(rest))
                if not _receive(connection, buffer[:rest]):
                    return
                if answer_bytes not in ready:
                    ready[answer_bytes] = bytes(answer_bytes)
                connection.sendall(ready[answer_bytes])

        threading.Thread(target=serve_socket, daemon=True).start()
        pipe.send((port, path))
        try:
            pipe.recv()
        except (EOFError, KeyboardInterrupt):
            server.stop(0)
