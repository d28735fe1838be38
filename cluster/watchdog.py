"""Cleans up after a `serve` that was killed without a chance to do it itself.

`serve` starts this file as a process of its own, before Ray, and keeps the other end of its
standard input. Each line it sends names a process of the private Ray cluster (`pid start_time`).
When the pipe closes, `serve` is gone: whatever of these processes still runs is killed, and the
folder with Ray's sockets and logs is removed. After an orderly end nothing is left. The kernel
already kills Ray's direct children (PR_SET_PDEATHSIG); Ray's agents would linger for a minute.

Run with `python -I -S`: only the standard library, about 8 MB.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
from pathlib import Path


def start_time(pid: int) -> str | None:
    """Return a process's start in clock ticks (pids are reused); None when it does not run."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    after_name = stat.rsplit(")", 1)[1].split()
    return None if after_name[0] == "Z" else after_name[19]


def kill_all(processes: dict[int, str]) -> list[int]:
    """SIGKILL every process that still is the one that was recorded; return their ids."""
    killed = []
    for pid, started in processes.items():
        if start_time(pid) == started:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
    return killed


def main(folder: str) -> None:
    """Read processes until the pipe closes, then kill what is left and remove `folder`."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    processes: dict[int, str] = {}
    for line in sys.stdin:
        pid, started = line.split()
        processes[int(pid)] = started
    kill_all(processes)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1])
