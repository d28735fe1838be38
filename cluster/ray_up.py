"""`expertmesh up` and `down`: `ray up` and `ray down` of one file, and what they leave open.

Before: the file is checked, the secret made, every machine that is known asked for what it needs.
After `up`: the service's own progress, until it is ready. After `down`: the machines of an on-prem
cluster are told at once, instead of noticing after their reconnect timeout, and looked at until
nothing of ours runs there.

Ray's command line is the interface (its Python one is private); its output is shown when it fails.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from cluster.cluster_file import LOCAL, ClusterFile
from cluster.remote import Machine, ask_all, checking_ssh, is_open
from cluster.status import ask_status
from protos.errors import (
    ConfigurationError,
    DeadlineExceededError,
    ExpertMeshError,
    NotReadyError,
    UnauthenticatedError,
    UnreachableError,
)
from protos.tls import Access
from protos.v1 import cluster_pb2

READY = "READY"
LOOK_S = 0.5
DOWN_TIMEOUT_S = 120.0
TAIL_LINES = 40
END_COMMAND = (
    "PATH=~/expertmesh/.venv/bin:$PATH ray stop --force >/dev/null 2>&1;"
    " pid=~/.expertmesh/service.pid;"
    ' test ! -e $pid || ! kill -0 "$(cat $pid)" 2>/dev/null'
)
"""Succeeds where nothing of ours runs any more; a killed supervisor leaves the file behind. Many a
~/.bashrc ends at once in a shell without a terminal, before it says where `ray` is."""
_PHASE = re.compile(r"\[\d/\d\] (.+)")

Progress = Callable[[str], None]


def up(
    file: ClusterFile,
    access: Access,
    progress: Progress,
    *,
    restart: bool,
    wait_s: float,
) -> cluster_pb2.ClusterStatus | None:
    """Start the cluster, or bring a running one to what the file says.

    A service that answers goes on, unless `restart`.

    Args:
        file: Checked.
        access: How the service is asked.
        progress: Takes a sentence for the user.
        restart: Start Ray and the service anew.
        wait_s: How long to wait until the service is ready; 0: not at all.

    Returns:
        The service's status; None where nobody waited or the file names no status port.

    Raises:
        ConfigurationError: A machine lacks something.
        UnreachableError: A machine cannot be reached, a service runs that `access` does not reach,
            or `ray up` failed.
        UnauthenticatedError: A service runs that wants another API key.
        DeadlineExceededError: Not ready after `wait_s`.
    """
    check_machines(file)
    flags = ["-y", "--no-config-cache"]
    address = status_address(file) if file.head_ip else None
    if address is not None and not restart and _is_running(address, access):
        progress("the service runs and goes on; --restart would start it anew")
        flags.append("--no-restart")
    _run_ray(file, ["up", *flags], progress)
    address = status_address(file)
    if address is None or not wait_s:
        return None
    return wait_ready(address, access, progress, wait_s)


def down(file: ClusterFile, progress: Progress) -> None:
    """End the service, Ray, and the machines where they were started for it.

    Raises:
        UnreachableError: `ray down` failed, or a machine does not answer.
        DeadlineExceededError: Something still runs on a machine after `DOWN_TIMEOUT_S`.
    """
    _run_ray(file, ["down", "-y"], progress)
    if file.provider != LOCAL or file.is_docker:
        return
    machines = [Machine.of(file, address) for address in file.machines]
    deadline = time.monotonic() + DOWN_TIMEOUT_S
    while left := [a for a, r in ask_all(machines, END_COMMAND).items() if r.code]:
        if time.monotonic() > deadline:
            raise DeadlineExceededError(
                f"the end of the service on {', '.join(left)}", DOWN_TIMEOUT_S
            )
        time.sleep(LOOK_S)
    state = Path("/tmp/ray")
    for path in (state / f"cluster-{file.name}.state", state / f"cluster-{file.name}.lock"):
        path.unlink(missing_ok=True)
    progress(f"nothing runs on {len(machines)} machines any more")


def check_machines(file: ClusterFile) -> None:
    """Ask every machine that is known for its shell, its tools and the checkpoint.

    Raises:
        UnreachableError: No ssh to a machine.
        ConfigurationError: A machine lacks something.
    """
    if file.provider != LOCAL:
        return
    path = file.checkpoint
    tools = "rsync docker" if file.is_docker else "rsync make python3.11"
    command = f"for t in {tools}; do command -v $t >/dev/null || echo no $t; done"
    if "://" not in path:
        command += f"; test -f {path}/config.json || echo no checkpoint {path}"
    lacking = []
    for address, answer in ask_all([Machine.of(file, a) for a in file.machines], command).items():
        if answer.code:
            why = f"{answer.error}; {answer.remedy}" if answer.remedy else answer.error
            raise UnreachableError(f"ssh {file.ssh_user}@{address}: {why}")
        lacking += [f"{address}: {line}" for line in answer.output.splitlines()]
    if lacking:
        raise ConfigurationError(
            "cluster file.provider", "must name machines that are prepared", "; ".join(lacking)
        )


def status_address(file: ClusterFile) -> str | None:
    """Return where the head answers; asks Ray where the provider chose the machine."""
    port = file.status_port
    if port is None:
        return None
    host = file.head_ip
    if host is None:
        answer = subprocess.run(
            [_ray(), "get-head-ip", str(file.path)], capture_output=True, text=True, timeout=120
        )
        lines = answer.stdout.split()
        if answer.returncode or not lines:
            raise UnreachableError(f"ray get-head-ip: {answer.stderr.strip()[-200:]}")
        host = lines[-1]
    return f"{host}:{port}"


def wait_ready(
    address: str, access: Access, progress: Progress, wait_s: float
) -> cluster_pb2.ClusterStatus:
    """Show the service's progress until it is ready.

    Raises:
        UnauthenticatedError: It wants another API key.
        DeadlineExceededError: Not within `wait_s`; says what came instead.
    """
    deadline = time.monotonic() + wait_s
    told = 0
    while True:
        said = "it loads"
        try:
            status = ask_status(address, access)
        except UnauthenticatedError:
            raise
        except ExpertMeshError as error:
            said = str(error)
        else:
            if status.state == READY:
                return status
            told = told if told <= len(status.progress) else 0  # it was started again
            for sentence in status.progress[told:]:
                progress(sentence)
            told = len(status.progress)
        if time.monotonic() > deadline:
            log = "~/.expertmesh/service.log there"
            raise DeadlineExceededError(f"the service at {address} ({said}), see {log}", wait_s)
        time.sleep(LOOK_S)


def _is_running(address: str, access: Access) -> bool:
    """Return whether a service runs; where that is not clear, nothing may be started anew.

    Raises:
        UnauthenticatedError: It wants another API key.
        UnreachableError: Something is there, and does not speak to us: certificates, most likely.
    """
    try:
        ask_status(address, access)
    except UnauthenticatedError:
        raise
    except NotReadyError:
        return True  # its routers are being started again
    except ExpertMeshError as error:
        if is_open(address):
            raise UnreachableError(
                f"{address} is open and does not answer ({error}): give --tls-ca and its like,"
                " or --restart to start what runs there anew"
            ) from error
        return False
    return True


def _ray() -> str:
    return str(Path(sys.executable).with_name("ray"))


def _run_ray(file: ClusterFile, arguments: list[str], progress: Progress) -> None:
    """Run Ray's command on a cluster file, one sentence a phase.

    Its ssh looks at the host keys of machines that are known; a cloud's are new each time.

    Raises:
        UnreachableError: It failed; with the end of what it printed.
    """
    arguments = [*arguments, str(file.path)]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    with contextlib.ExitStack() as stack:
        if file.provider == LOCAL:
            ssh = stack.enter_context(checking_ssh(file.known_hosts))
            environment["PATH"] = f"{ssh}{os.pathsep}{environment.get('PATH', os.defpath)}"
        process = stack.enter_context(
            subprocess.Popen(
                [_ray(), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=environment,
            )
        )
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line.rstrip())
            phase = _PHASE.search(line)
            if phase is not None:
                progress(f"ray {arguments[0]}: {phase[1].strip()}")
    if process.returncode:
        tail = "\n".join(lines[-TAIL_LINES:])
        raise UnreachableError(f"`ray {' '.join(arguments)}` failed:\n{tail}")
