"""A link of a given bandwidth in front of a server, for benchmarks that need one."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

CHUNK_BYTES = 1 << 16


class SlowLink:
    """Relays TCP connections; replies come at `bytes_per_s`, all connections together."""

    def __init__(self, host: str, port: int, bytes_per_s: float) -> None:
        self._target = (host, port)
        self._bytes_per_s = bytes_per_s
        self._lock = threading.Lock()
        self._free_at = 0.0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
                for source, sink, is_slow in ((near, far, False), (far, near, True)):
                    sink.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    arguments = (source, sink, is_slow)
                    threading.Thread(target=self._relay, args=arguments, daemon=True).start()

    def _relay(self, source: socket.socket, sink: socket.socket, is_slow: bool) -> None:
        with contextlib.suppress(OSError):
            while chunk := source.recv(CHUNK_BYTES):
                if is_slow:
                    self._wait_turn(len(chunk))
                sink.sendall(chunk)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _wait_turn(self, num_bytes: int) -> None:
        """Sleep until the link has sent so many bytes more."""
        with self._lock:
            begin = max(self._free_at, time.monotonic())
            self._free_at = end = begin + num_bytes / self._bytes_per_s
        time.sleep(max(0.0, end - time.monotonic()))
