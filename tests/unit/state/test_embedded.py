from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from protos.errors import ResourceError
from router.state.embedded import EmbeddedServer, Role, answers, find_binary
from router.state.endpoint import Endpoint
from tests.eventually import eventually
from tests.unit.state.conftest import StartServer

ROOT = Path(__file__).resolve().parents[3]

PARENT = """
import sys, threading
from pathlib import Path
from router.state.embedded import EmbeddedServer, Role

def start():
    global server
    server = EmbeddedServer.start(Role[sys.argv[1]], binary=Path(sys.argv[2]))

thread = threading.Thread(target=start)  # the thread that forks ends at once, the server lives on
thread.start()
thread.join()
print(server.pid, server._guard.pid, server.folder, flush=True)
sys.stdin.readline()
{end}
"""


def ask(endpoint: Endpoint, *lines: str) -> list[str]:
    """Send lines one after the other and return the first line of each answer."""
    family = socket.AF_UNIX if endpoint.path else socket.AF_INET
    with socket.socket(family) as connection, connection.makefile("rwb") as stream:
        connection.settimeout(10)
        connection.connect(endpoint.path or (endpoint.host, endpoint.port))
        found = []
        for line in lines:
            stream.write(line.encode() + b"\r\n")
            stream.flush()
            found.append(stream.readline().decode().strip())
        return found


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def parent(
    role: Role, program: Path, end: str = ""
) -> tuple[subprocess.Popen[str], int, int, Path]:
    """Start a process that starts a server; return it, the ids of server and guard, the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT.format(end=end), role.name, str(program)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    server, guard, folder = process.stdout.readline().split()
    return process, int(server), int(guard), Path(folder)


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
def test_it_starts_answers_and_leaves_nothing(
    role: Role, tcp: bool, start_server: StartServer
) -> None:
    server = start_server(role, tcp=tcp, maxmemory_bytes=64 << 20)
    assert server.is_alive
    assert stat.S_IMODE(server.folder.stat().st_mode) == 0o700
    if tcp:
        login = f"AUTH {server.endpoint.password}"
        assert ask(server.endpoint, "GET x", login, "SET x 1", "GET x")[0].startswith("-NOAUTH")
        assert ask(server.endpoint, login, "SET x 1", "GET x") == ["+OK", "+OK", "$1"]
    else:
        assert ask(server.endpoint, "PING", "SET x 1") == ["+PONG", "+OK"]
    server.close()
    server.close()
    assert is_gone(server.pid)
    assert not server.is_alive
    assert not server.folder.exists()
    assert not answers(server.endpoint)


@pytest.mark.parametrize(
    ("role", "expected"),
    [
        (Role.META, {"appendonly": "yes", "maxmemory-policy": "noeviction", "save": ""}),
        (Role.META, {"appendfsync": "everysec", "maxmemory": "67108864"}),
        (Role.BLOB, {"appendonly": "no", "maxmemory-policy": "volatile-ttl", "save": ""}),
        (Role.BLOB, {"lazyfree-lazy-user-del": "yes", "maxmemory": "67108864"}),
    ],
)
def test_a_role_has_its_settings(
    role: Role, expected: dict[str, str], start_server: StartServer
) -> None:
    server = start_server(role, maxmemory_bytes=64 << 20)
    with socket.socket(socket.AF_UNIX) as connection, connection.makefile("rwb") as stream:
        connection.connect(server.endpoint.path)
        for name, value in expected.items():
            stream.write(f"CONFIG GET {name}\r\n".encode())
            stream.flush()
            lines = [stream.readline().strip().decode() for _ in range(5)]
            assert (lines[2], lines[4]) == (name, value)


def test_cached_values_preempt_nobody(start_server: StartServer) -> None:
    assert os.sched_getscheduler(start_server(Role.BLOB).pid) == os.SCHED_BATCH
    assert os.sched_getscheduler(start_server(Role.META).pid) == os.SCHED_OTHER


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_it_dies_with_a_parent_that_is_killed(number: int, server_program: Path) -> None:
    process, server, guard, folder = parent(Role.META, server_program)
    assert not is_gone(server)
    with process:
        process.send_signal(number)
    eventually(lambda: is_gone(server) and is_gone(guard) and not folder.exists(), 20)


@pytest.mark.parametrize("end", ["", "import os; os._exit(3)", "raise SystemExit(4)", "1 / 0"])
def test_it_dies_with_a_parent_that_ends(end: str, server_program: Path) -> None:
    process, server, guard, folder = parent(Role.BLOB, server_program, end)
    process.communicate("go\n", timeout=30)
    eventually(lambda: is_gone(server) and is_gone(guard) and not folder.exists(), 20)


def test_a_frozen_server_dies_too(server_program: Path) -> None:
    process, server, _, folder = parent(Role.META, server_program)
    os.kill(server, signal.SIGSTOP)
    with process:
        process.kill()
    eventually(lambda: is_gone(server) and not folder.exists(), 20)


def test_a_server_that_is_frozen_for_a_while_lives_on(start_server: StartServer) -> None:
    server = start_server()
    os.kill(server.pid, signal.SIGSTOP)
    assert not answers(server.endpoint)
    os.kill(server.pid, signal.SIGCONT)
    eventually(lambda: answers(server.endpoint))
    assert server.is_alive


def test_it_dies_with_its_guard(start_server: StartServer) -> None:
    server = start_server()
    os.kill(server._guard.pid, signal.SIGKILL)
    eventually(lambda: is_gone(server.pid))
    assert not server.is_alive
    server.close()
    assert not server.folder.exists()


def test_a_server_that_ends_takes_its_guard_along(start_server: StartServer) -> None:
    server = start_server()
    os.kill(server.pid, signal.SIGKILL)
    eventually(lambda: not server.is_alive)
    server.close()
    assert not server.folder.exists()


def test_a_server_that_does_not_start_says_why() -> None:
    with pytest.raises(ResourceError, match="Bad directive"):
        EmbeddedServer.start(Role.META, extra="no-such-setting yes")


def test_a_program_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="no-such-server"):
        EmbeddedServer.start(Role.META, binary=tmp_path / "no-such-server")


def test_the_package_brings_a_program() -> None:
    assert os.access(find_binary(), os.X_OK)
