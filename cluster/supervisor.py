"""`expertmesh service`: `serve` without a terminal, for as long as Ray runs on this machine.

    start   ends the one that runs, then starts a supervisor in a session of its own and returns
    watch   the same without `serve`, for a machine that holds only what Ray places there; to be
            called before `ray start`, so that no moment is missed
    stop    SIGTERM to the supervisor, which passes it on: `serve` drains and ends

The supervisor starts `serve` again when it fails: after 1, 2, 4, ... `MAX_BACKOFF_S` seconds, from
the beginning once it was up for `SOUND_S`. It gives up where another try cannot help: all routers
were drained, or the command line or configuration is wrong, which it is not where the same one was
up before: then something else is, like a port or a mount, and may come right. When Ray has gone
from this machine, whether by `ray stop`, by `ray down` or because its head went, it ends `serve`,
what Ray left running, and the temporary files of processes that Ray killed; those lie in `tmp` of
`folder()`, if Ray was started with that as TMPDIR, beside the log and the process id.

Run as `python -m cluster.supervisor FOLDER ARGUMENTS...`, with the arguments of `serve`, or none.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import psutil

from cluster.console import EXIT_CONFIGURATION, EXIT_OK, EXIT_USAGE
from protos.errors import InternalError

WRONG_CODES = (EXIT_USAGE, EXIT_CONFIGURATION)
"""Exit codes of `serve` that another try would only repeat, unless it was up before."""
FIRST_BACKOFF_S = 1.0
MAX_BACKOFF_S = 30.0
SOUND_S = 60.0
RAY_LOOK_S = 1.0
END_LOOK_S = 0.05
RAY_START_S = 300.0
"""How long `watch` waits for a Ray node that is about to start."""
STOP_TIMEOUT_S = 75.0
"""How long `stop` waits for the drain and the end; longer than `cluster.shutdown_timeout_s`."""
KILL_TIMEOUT_S = 10.0
RAY_STOP_TIMEOUT_S = 60.0


def folder() -> Path:
    """Return where the log and the process id of this user's service lie."""
    return Path.home() / ".expertmesh"


def start(arguments: Sequence[str], at: Path | None = None) -> Path:
    """Start a supervisor and return the path of its log.

    Args:
        arguments: Of `serve`; none: there is no `serve`, only Ray is watched.
        at: Instead of `folder()`.
    """
    at = at or folder()
    stop(at)
    (at / "tmp").mkdir(mode=0o700, parents=True, exist_ok=True)
    log = at / "service.log"
    # Not subprocess.Popen: this process does not wait for it.
    out = (os.POSIX_SPAWN_OPEN, 1, log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    pid = os.posix_spawn(
        sys.executable,
        [sys.executable, "-m", "cluster.supervisor", str(at), *arguments],
        os.environ,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            out,
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
    )
    (at / "service.pid").write_text(str(pid))
    return log


def stop(at: Path | None = None) -> bool:
    """End the service that runs; return whether one did.

    Raises:
        InternalError: Something of it still runs after `STOP_TIMEOUT_S`, and a SIGKILL.
    """
    pid_file = (at or folder()) / "service.pid"
    found = _supervisor(pid_file)
    if found is None:
        return False
    family = [found, *found.children(recursive=True)]
    found.terminate()
    if not _end_within(STOP_TIMEOUT_S, [found]):
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if not _end_within(KILL_TIMEOUT_S, family):
            raise InternalError(f"the service (pid {found.pid}) does not end")
    pid_file.unlink(missing_ok=True)
    return True


def _supervisor(pid_file: Path) -> psutil.Process | None:
    try:
        process = psutil.Process(int(pid_file.read_text()))
        is_ours = "cluster.supervisor" in process.cmdline()
    except (OSError, ValueError, psutil.Error):
        return None
    return process if is_ours and _runs(process) else None


def _end_within(timeout_s: float, processes: Sequence[psutil.Process]) -> bool:
    """Wait until these processes have ended, reaped or not; return whether they did.

    In a container without an init nobody ever reaps an orphan.
    """
    deadline = time.monotonic() + timeout_s
    while any(_runs(process) for process in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(END_LOOK_S)
    return True


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Supervisor:
    """Runs one command again and again.

    Args:
        command: What to run; nothing: it waits for the end of Ray, or for a signal.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._command = list(command)
        self._stopped = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None

    def run(self) -> int:
        """Run until it ends for good; return its last exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        if not self._command:
            self._watch()
            return EXIT_OK
        backoff_s, was_sound = FIRST_BACKOFF_S, False
        while True:
            started = time.monotonic()
            self._process = subprocess.Popen(self._command)
            code = self._wait(self._process)
            is_sound = time.monotonic() - started > SOUND_S
            was_sound |= is_sound
            if self._stopped.is_set() or code == EXIT_OK:
                return code
            if code in WRONG_CODES and not was_sound:
                return code
            if not has_ray_node():
                _say("no Ray node runs here any more; the service ends with it")
                return code
            if is_sound:
                backoff_s = FIRST_BACKOFF_S
            _say(f"serve ended with exit code {code}; starting it again in {backoff_s:g} s")
            if self._stopped.wait(backoff_s):
                return code
            backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)

    def _watch(self) -> None:
        """Wait until Ray has come and gone."""
        deadline = time.monotonic() + RAY_START_S
        while not has_ray_node() and time.monotonic() < deadline:
            if self._stopped.wait(RAY_LOOK_S):
                return
        while has_ray_node() and not self._stopped.wait(RAY_LOOK_S):
            pass

    def _wait(self, process: subprocess.Popen[bytes]) -> int:
        """Wait for its end, and end it when Ray has gone."""
        while True:
            try:
                return process.wait(RAY_LOOK_S)
            except subprocess.TimeoutExpired:
                if not self._stopped.is_set() and not has_ray_node():
                    process.kill()  # it cannot drain: its routers went with Ray

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stopped.set()
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)


def has_ray_node() -> bool:
    """Whether a Ray node runs on this machine."""
    return any(
        process.info["name"] == "raylet" and process.info["status"] != psutil.STATUS_ZOMBIE
        for process in psutil.process_iter(["name", "status"])
    )


def _say(text: str) -> None:
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    print(f"{stamp} supervisor {text}", file=sys.stderr, flush=True)


def clear_up(at: Path) -> None:
    """End what Ray left running on this machine, and remove what its processes left."""
    ray = Path(sys.executable).with_name("ray")
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        subprocess.run([ray, "stop", "--force"], timeout=RAY_STOP_TIMEOUT_S)
    shutil.rmtree(at / "tmp", ignore_errors=True)


def main(at: str, *arguments: str) -> int:
    """Run until the end, and leave nothing behind."""
    command = [sys.executable, "-m", "cluster.cli", "serve", *arguments] if arguments else []
    try:
        return Supervisor(command).run()
    finally:
        if not has_ray_node():
            clear_up(Path(at))
        (Path(at) / "service.pid").unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
