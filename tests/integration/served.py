"""A real `expertmesh serve` as a child process, and what it leaves behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import psutil

from tests.eventually import eventually

ROOT = Path(__file__).resolve().parents[2]
CLI = (sys.executable, "-m", "cluster.cli")
START_TIMEOUT_S = 200.0
"""Twenty times what a quiet machine needs."""
STOP_TIMEOUT_S = 30.0


def clean_environment(tmp: str | None = None) -> dict[str, str]:
    """The environment without settings that would change what is tested; `tmp` for its files."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "EXPERTMESH_"))}
    return {**kept, "TMPDIR": tmp} if tmp else kept


def run_cli(
    *arguments: str,
    stdin: str = "",
    timeout_s: float = 180.0,
    tmp: str | None = None,
    env: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command of `expertmesh` to its end."""
    return subprocess.run(
        [*CLI, *arguments],
        cwd=ROOT,
        env={**clean_environment(tmp), **(env or {})},
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


class Served:
    """`expertmesh serve` in a process group of its own; ends with the `with` block."""

    def __init__(
        self,
        checkpoint: Path,
        *flags: str,
        tmp: str | None = None,
        env: dict[str, str] | None = None,
    ) -> None:
        self._process = subprocess.Popen(
            [*CLI, "serve", str(checkpoint), "--port", "0", *flags],
            cwd=ROOT,
            env={**clean_environment(tmp), **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
        )
        self.ready = ""
        self.errors: list[str] = []
        self._reader = threading.Thread(target=self._read_errors, daemon=True)
        self._reader.start()
        self._family: list[psutil.Process] = []

    def __enter__(self) -> Served:
        assert self._process.stdout is not None
        watch = threading.Timer(START_TIMEOUT_S, self._process.kill)
        watch.start()
        self.ready = self._process.stdout.readline().strip()
        watch.cancel()
        if not self.ready.startswith("ready grpc="):
            self.close()
            raise AssertionError("".join(self.errors))
        self.note_processes()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the service if it runs, and wait for it."""
        if self._process.poll() is None:
            self.signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
                raise
        self._reader.join(STOP_TIMEOUT_S)
        for pipe in (self._process.stdout, self._process.stderr):
            assert pipe is not None
            pipe.close()

    @property
    def address(self) -> str:
        """`host:port` of the first router."""
        return self.fields["grpc"]

    @property
    def pid(self) -> int:
        """Of `serve`."""
        return self._process.pid

    @property
    def fields(self) -> dict[str, str]:
        """The ready line's `key=value` pairs."""
        return dict(part.split("=", 1) for part in self.ready.split()[1:])

    def signal(self, number: signal.Signals, *, to_group: bool = False) -> None:
        """Send a signal to `serve`, or to its whole process group, as a shell does."""
        if to_group:
            os.killpg(self._process.pid, number)
        else:
            self._process.send_signal(number)

    def wait(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """Return the exit code."""
        return self._process.wait(timeout_s)

    def note_processes(self) -> None:
        """Remember the processes that run now, for `survivors`."""
        self._family += psutil.Process(self._process.pid).children(recursive=True)

    def survivors(self, timeout_s: float = 10.0) -> list[str]:
        """Return what still runs of the processes that the service had, after a moment."""
        return [str(process) for process in running_after(self._family, timeout_s)]

    def process_named(self, name: str) -> psutil.Process:
        """Return the process of an actor class."""
        for process in self._family:
            if process.is_running() and name in " ".join(process.cmdline()):
                return process
        raise AssertionError(f"no process {name}")

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.errors.append(line)


def running_after(processes: Sequence[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    """Wait for the end of processes, and return those that still run.

    Not `psutil.wait_procs`: that waits until somebody has reaped them, for which an orphan's new
    parent takes its time.
    """
    with contextlib.suppress(AssertionError):
        eventually(lambda: not any(is_running(process) for process in processes), timeout_s)
    return [process for process in processes if is_running(process)]


def is_running(process: psutil.Process) -> bool:
    """Whether it runs; a zombie that nobody reaps does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
