"""Machines of a cluster, as namespaces of this one.

A host has an address, a process table, a mount table and shared memory of its own: `/tmp`, `/root`
and `/dev/shm` are empty file systems that go with it, and no process sees those of another host.
All hosts hang on one bridge, whose own address is this machine's. A host runs sshd, which is its
first process: when that ends, the kernel ends everything on the host.

Needs root, and the programs of `PROGRAMS`; `obstacle` says what is missing.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.eventually import eventually

PROGRAMS = ("ip", "unshare", "nsenter", "ssh", "ssh-keygen", "sshd", "rsync", "make", "bash")
HIDDEN = ("/tmp", "/root", "/dev/shm", "/run")
"""Folders of this machine that a host does not see."""
VENV = Path(sys.prefix)
MAX_LOAD_PER_CORE = 4.0
"""A raylet aborts when one of its agents takes 15 s to start: on a machine that is busy with other
things the tests would fail for no reason of ours."""


def obstacle() -> str | None:
    """Return why this machine cannot hold hosts, or None if it can."""
    if os.geteuid() != 0:
        return "hosts as network namespaces need root"
    missing = [name for name in PROGRAMS if _program(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (apt install openssh-server rsync iproute2)"
    load = os.getloadavg()[0] / (os.cpu_count() or 1)
    if load > MAX_LOAD_PER_CORE:
        return f"the machine is too busy to start four Ray nodes: load {load:.1f} per core"
    probe = ["unshare", "--net", "--mount", "--pid", "--ipc", "--uts", "--fork", "--mount-proc"]
    test = (
        "ip link add p0 type bridge && ip link add p1 type veth peer name p2"
        " && mount -t tmpfs tmpfs /tmp"
    )
    answer = subprocess.run([*probe, "sh", "-c", test], capture_output=True, text=True, timeout=60)
    if answer.returncode:
        return f"this machine allows no namespaces: {answer.stderr.strip()}"
    return None


@dataclass(slots=True)
class Host:
    """One machine of the cluster."""

    name: str
    address: str
    process: subprocess.Popen[bytes]
    programs: list[subprocess.Popen[str]] = field(default_factory=list)
    """Started by `start`."""

    def run(self, command: str, timeout_s: float = 60.0) -> str:
        """Run a shell command on the host and return what it prints."""
        return subprocess.run(
            [*self._enter(), "bash", "-c", command],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=True,
        ).stdout

    def start(self, *command: str, is_read: bool = False) -> subprocess.Popen[str]:
        """Start a program on the host; it ends with the host.

        Args:
            command: Of the program.
            is_read: Its `stdout` is a pipe of what it prints, errors too; the caller reads it.
        """
        program = subprocess.Popen(
            [*self._enter(), *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if is_read else subprocess.DEVNULL,
            stderr=subprocess.STDOUT if is_read else None,
            text=True,
        )
        self.programs.append(program)
        return program

    def processes(self) -> dict[int, str]:
        """Return pid -> command line of everything that runs here, but for sshd."""
        listing = self.run("ps -eo pid=,stat=,args=")
        found = {}
        for line in listing.splitlines():
            pid, state, command = line.split(None, 2)
            is_ours = command.startswith(("ps ", "bash -c ps", "/usr/sbin/sshd", "sshd:"))
            if not is_ours and not state.startswith("Z"):
                found[int(pid)] = command
        return found

    def _enter(self) -> list[str]:
        init = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        pid = init.split()[0]
        return ["nsenter", "-t", pid, "-n", "-m", "-p", "-u", "-i", "--wd=/"]


@dataclass(slots=True)
class Hosts:
    """The machines of one cluster; `close` ends them and everything on them.

    Args:
        seen: Folders of this machine that the hosts see although they lie in one of `HIDDEN`.
    """

    seen: Sequence[Path] = ()
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="hosts", dir="/tmp")))
    hosts: dict[str, Host] = field(default_factory=dict)
    _bridge: str = ""
    _net: str = ""

    def __post_init__(self) -> None:
        """Make the bridge and the keys."""
        self._bridge = f"em{os.getpid()}"
        taken = _ip("-o", "-4", "addr")
        self._net = next(f"10.99.{n}" for n in range(256) if f" 10.99.{n}." not in taken)
        _ip("link", "add", self._bridge, "type", "bridge")
        _ip("addr", "add", f"{self._net}.254/24", "dev", self._bridge)
        _ip("link", "set", self._bridge, "up")
        for name in ("id", "host_key"):
            make = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name)]
            subprocess.run(make, check=True)
        names = "".join(f"{self._address(n)} h{n}\n" for n in range(1, 100))
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        (self.folder / "resolv.conf").write_text("")

    @property
    def key(self) -> Path:
        """The private key that opens every host for root."""
        return self.folder / "id"

    def add(self, count: int = 1) -> list[Host]:
        """Start hosts: `h1`, `h2`, ...; returns when their sshd answers."""
        hosts = [self._start() for _ in range(count)]
        for host in hosts:
            eventually(lambda host=host: self._answers(host), 30)
        return hosts

    def _start(self) -> Host:
        number = len(self.hosts) + 1
        name, address = f"h{number}", self._address(number)
        space, link = f"{self._bridge}{name}", f"{self._bridge}v{number}"
        _ip("netns", "add", space)
        _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", space)
        _ip("link", "set", link, "master", self._bridge, "up")
        _ip("-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
        _ip("-n", space, "link", "set", "lo", "up")
        _ip("-n", space, "link", "set", "eth0", "up")
        settings = {
            "ListenAddress": address,
            "HostKey": self.folder / "host_key",
            "AuthorizedKeysFile": self.folder / "id.pub",
            "PermitRootLogin": "prohibit-password",
            "PasswordAuthentication": "no",
            "UsePAM": "no",
            "StrictModes": "no",
            "PidFile": "none",
            "MaxStartups": 64,
        }
        configuration = self.folder / f"{name}.conf"
        configuration.write_text("".join(f"{k} {v}\n" for k, v in settings.items()))
        script = self.folder / f"{name}.sh"
        script.write_text(self._script(name, configuration))
        unshare = ["unshare", "--mount", "--pid", "--fork", "--uts", "--ipc", "--mount-proc"]
        enter = ["ip", "netns", "exec", space]
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [*enter, *unshare, "--kill-child", "bash", str(script)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        host = self.hosts[name] = Host(name, address, process)
        return host

    def close(self) -> None:
        """End the hosts and remove what they left on this machine."""
        for host in self.hosts.values():
            host.process.send_signal(signal.SIGKILL)
            host.process.wait()
            for program in host.programs:
                program.wait()
        for number, name in enumerate(self.hosts, 1):
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("link", "del", f"{self._bridge}v{number}")
            eventually(lambda name=name: self._is_removed(f"{self._bridge}{name}"), 20)
        with contextlib.suppress(subprocess.CalledProcessError):
            _ip("link", "del", self._bridge)
        shutil.rmtree(self.folder, ignore_errors=True)

    def leftovers(self) -> list[str]:
        """Return namespaces and links of these hosts that are still there."""
        names = [*_ip("netns", "list").split("\n"), *_ip("-o", "link").split("\n")]
        return [name for name in names if self._bridge in name]

    def _address(self, number: int) -> str:
        return f"{self._net}.{10 + number}"

    def _script(self, name: str, configuration: Path) -> str:
        """Return what the first process of a host does before it becomes sshd.

        The environment stands in for what `make node` would install: it is the one that runs the
        tests, below the folder where the node's setup looks for it, with a fresh stamp.
        """
        venv = "/root/expertmesh/.venv"
        kept = [p for p in (*self.seen, VENV, Path(sys.base_prefix), self.folder) if _is_hidden(p)]
        lines = ["set -e", "mount --make-rprivate /", f"hostname {name}"]
        places = [f"/mnt/{self._bridge}{name}.{i}" for i in range(len(kept))]
        for place, path in zip(places, kept, strict=True):
            lines += [f"mkdir -p {place}", f"mount --bind {shlex.quote(str(path))} {place}"]
        lines += [f"mount -t tmpfs -o size=4g tmpfs {hidden}" for hidden in HIDDEN]
        lines += ["chmod 1777 /tmp /dev/shm", "mkdir -p /run/sshd"]
        for place, path in zip(places, kept, strict=True):
            quoted = shlex.quote(str(path))
            lines += [f"mkdir -p {quoted}", f"mount --move {place} {quoted}", f"rmdir {place}"]
        lines += [f"mkdir -p {venv}", f"cp {VENV}/pyvenv.cfg {venv}/"]
        lines += [f"ln -s {VENV}/{part} {venv}/{part}" for part in ("bin", "lib")]
        lines += [
            f"touch -d 2100-01-01 {venv}/.node",  # whatever changes meanwhile: nothing is installed
            "echo 'export PYTHONPATH=/root/expertmesh' > /root/.bashrc",
            f"mount --bind {self.folder}/hosts /etc/hosts",
            f"mount --bind {self.folder}/resolv.conf /etc/resolv.conf",
            f"exec {_program('sshd')} -D -e -f {configuration}",
        ]
        return "\n".join(lines) + "\n"

    def _answers(self, host: Host) -> bool:
        assert host.process.poll() is None, (self.folder / f"{host.name}.log").read_text()
        with contextlib.suppress(OSError), socket.create_connection((host.address, 22), 5) as port:
            return port.recv(4) == b"SSH-"
        return False

    def _is_removed(self, space: str) -> bool:
        with contextlib.suppress(subprocess.CalledProcessError):
            _ip("netns", "del", space)
        return space not in _ip("netns", "list")


@contextlib.contextmanager
def running_hosts(number: int, seen: Sequence[Path] = ()) -> Iterator[Hosts]:
    """Run this many hosts; nothing of them is left at the end."""
    hosts = Hosts(seen)
    try:
        hosts.add(number)
        yield hosts
    finally:
        hosts.close()


def _program(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")


def _is_hidden(path: Path) -> bool:
    return any(path.is_relative_to(hidden) for hidden in HIDDEN)


def _ip(*arguments: str) -> str:
    command = ["ip", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
