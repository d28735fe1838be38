"""The process between us and an embedded server: ends the server when we are gone, however we went.

It starts the server, prints its process id, and waits for its standard input to close, which
happens when we close it or are gone, even by SIGKILL. Then the server is ended and its folder
removed. Should the guard itself be killed, the kernel kills the server (PR_SET_PDEATHSIG): that
signal is tied to the *thread* that forked, and this process has only one, ours may have many.

Run as a script, isolated from our packages, so that it starts in milliseconds:
`python -I -S embedded_guard.py FOLDER POLICY COMMAND...`; POLICY `batch` keeps the server from
preempting others when it wakes, `normal` does not.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

STOP_S = 3.0
"""A server that has not ended so long after SIGTERM is killed; a frozen one never hears it."""
LOG_TAIL_BYTES = 2000
PR_SET_PDEATHSIG = 1


def main(folder: str, policy: str, command: list[str]) -> int:
    """Run the server until our standard input closes, it ends, or we get SIGTERM or SIGINT."""
    if policy == "batch" and sys.platform == "linux":
        with contextlib.suppress(OSError):  # a sandbox may forbid it; it is only faster
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))  # the server inherits it
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    guard = os.getpid()
    server = subprocess.Popen(
        command,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: _die_with(guard),
    )
    print(server.pid, flush=True)
    while server.poll() is None:
        ready, _, _ = select.select([sys.stdin, woken], [], [])
        if sys.stdin in ready:  # nobody writes to it: it is closed
            break
        signals = os.read(woken, 64)  # SIGCHLD comes also when the server is frozen or thawed
        if signal.SIGTERM in signals or signal.SIGINT in signals:
            break
    if server.poll() is None:
        server.terminate()
        try:
            server.wait(STOP_S)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        code = 0
    else:  # it ended by itself: say why
        code = 1
        for log in Path(folder).glob("*.log"):
            sys.stderr.write(log.read_bytes()[-LOG_TAIL_BYTES:].decode("utf-8", "replace"))
    shutil.rmtree(folder, ignore_errors=True)
    return code


def _die_with(parent: int) -> None:
    """In the new process: be killed when `parent` ends, and end now if it has already."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
