"""Asking the machines of an on-prem cluster over ssh, all at the same time."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cluster.cluster_file import ClusterFile

CONNECT_TIMEOUT_S = 10
ANSWER_TIMEOUT_S = 90.0
PARALLEL = 32
OPTIONS = (
    "BatchMode=yes",
    "StrictHostKeyChecking=no",
    "UserKnownHostsFile=/dev/null",
    "LogLevel=ERROR",
    f"ConnectTimeout={CONNECT_TIMEOUT_S}",
)
"""As `ray up` connects: the keys of the machines are not looked at."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command on a machine came to."""

    code: int
    """Its exit code; 255: ssh itself failed."""
    output: str
    error: str
    """Last line on stderr."""


@dataclass(frozen=True, slots=True)
class Machine:
    """How to log in to one."""

    address: str
    user: str
    key: str | None

    @classmethod
    def of(cls, file: ClusterFile, address: str) -> Machine:
        """Return a machine of a cluster file."""
        return cls(address, file.ssh_user, file.ssh_key)

    def ask(self, command: str) -> Answer:
        """Run a command in a login shell, as Ray does; never raises."""
        key = ["-i", str(Path(self.key).expanduser())] if self.key else []
        options = [part for option in OPTIONS for part in ("-o", option)]
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
        lines = answer.stderr.strip().splitlines()
        return Answer(answer.returncode, answer.stdout, lines[-1] if lines else "")


def ask_all(machines: Sequence[Machine], command: str) -> dict[str, Answer]:
    """Run a command on all machines; return address -> answer."""
    with ThreadPoolExecutor(min(PARALLEL, max(1, len(machines)))) as pool:
        answers = pool.map(lambda machine: machine.ask(command), machines)
        return {machine.address: answer for machine, answer in zip(machines, answers, strict=True)}
