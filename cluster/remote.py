"""Asking the machines of an on-prem cluster over ssh, all at the same time.

A machine is held to the host key that it showed first, here and in the ssh that `ray up` runs from
here: Ray itself looks at no host key, and sends the cluster's secret to whoever answers.
"""

from __future__ import annotations

import shlex
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from cluster.cluster_file import ClusterFile

CONNECT_TIMEOUT_S = 10
ANSWER_TIMEOUT_S = 90.0
PARALLEL = 32
OPEN_TIMEOUT_S = 3.0
OPTIONS = (
    "BatchMode=yes",
    "LogLevel=ERROR",
    f"ConnectTimeout={CONNECT_TIMEOUT_S}",
)
_WRONG_KEY = "Host key verification failed."
"""ssh's last line."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command on a machine came to."""

    code: int
    """Its exit code; 255: ssh itself failed."""
    output: str
    error: str
    """Last line on stderr."""
    remedy: str = ""
    """What to do about the error, where that is known."""


@dataclass(frozen=True, slots=True)
class Machine:
    """How to log in to one."""

    address: str
    user: str
    key: str | None
    known_hosts: Path
    """Gets the host key that it shows first, and is asked from then on."""

    @classmethod
    def of(cls, file: ClusterFile, address: str) -> Machine:
        """Return a machine of a cluster file."""
        return cls(address, file.ssh_user, file.ssh_key, file.known_hosts)

    def ask(self, command: str) -> Answer:
        """Run a command in a login shell, as Ray does; never raises."""
        key = ["-i", str(Path(self.key).expanduser())] if self.key else []
        options = _flags((*OPTIONS, *host_key_options(self.known_hosts)))
        quoted = command.replace("'", "'\\''")
        shell = f"bash --login -c 'source ~/.bashrc 2>/dev/null; {quoted}'"
        try:
            answer = subprocess.run(
                ["ssh", *key, *options, f"{self.user}@{self.address}", shell],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=ANSWER_TIMEOUT_S,
            )
        except subprocess.TimeoutExpired:
            return Answer(255, "", f"no answer within {ANSWER_TIMEOUT_S:g} s")
        except OSError as error:
            return Answer(255, "", f"ssh: {error.strerror}")
        said = answer.stderr.strip().rpartition("\n")[2]
        if answer.returncode == 255 and said == _WRONG_KEY:
            said = f"another host key than {self.known_hosts} (or ~/.ssh/known_hosts) has for it"
            remedy = f"was it installed anew? ssh-keygen -R {self.address} -f {self.known_hosts}"
            return Answer(255, "", said, remedy)
        return Answer(answer.returncode, answer.stdout, said)


def ask_all(machines: Sequence[Machine], command: str) -> dict[str, Answer]:
    """Run a command on all machines; return address -> answer."""
    with ThreadPoolExecutor(min(PARALLEL, max(1, len(machines)))) as pool:
        answers = pool.map(lambda machine: machine.ask(command), machines)
        return {machine.address: answer for machine, answer in zip(machines, answers, strict=True)}


def is_open(address: str) -> bool:
    """Return whether something answers at `host:port`."""
    host, _, port = address.rpartition(":")
    with suppress(OSError), socket.create_connection((host, int(port)), OPEN_TIMEOUT_S):
        return True
    return False


def host_key_options(known_hosts: Path) -> tuple[str, ...]:
    """Return ssh options by which an unknown machine is remembered, and a changed one refused."""
    return (
        "StrictHostKeyChecking=accept-new",
        f'UserKnownHostsFile="{known_hosts}" ~/.ssh/known_hosts',
    )


@contextmanager
def checking_ssh(known_hosts: Path) -> Iterator[Path]:
    """Make a folder whose `ssh` looks at host keys; first in PATH, it stands in for the real one.

    Of an option that is given twice, ssh takes the first: what a caller says comes too late.
    """
    ssh = shutil.which("ssh") or "ssh"
    flags = shlex.join(_flags(host_key_options(known_hosts)))
    with tempfile.TemporaryDirectory(prefix="expertmesh-ssh-") as folder:
        script = Path(folder) / "ssh"
        script.write_text(f'#!/bin/sh\nexec {shlex.quote(ssh)} {flags} "$@"\n')
        script.chmod(0o700)
        yield Path(folder)


def _flags(options: Sequence[str]) -> list[str]:
    return [part for option in options for part in ("-o", option)]
