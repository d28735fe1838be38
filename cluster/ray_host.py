"""The process that holds a private Ray cluster, apart from `serve` and never outliving it.

`serve` starts it in a session of its own, so that a signal to `serve`'s process group (Ctrl-C,
`kill %1`, `timeout`) reaches `serve` alone and requests can be drained. It starts Ray, prints the
address, and waits for its standard input to close, which happens when `serve` is done or gone,
even by SIGKILL. Then every process below it is killed and the folder with Ray's sockets and logs is
removed.

It adopts orphans (PR_SET_CHILD_SUBREAPER), so nothing that Ray started escapes; Ray ties its own
daemons to this process's life, so they do not survive it either.

Usage: `python -m cluster.ray_host FOLDER NUM_CPUS NAMESPACE LOG_LEVEL`, rest by environment.
"""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import sys
import threading
from typing import NoReturn

import psutil

from cluster import ray_api

PR_SET_CHILD_SUBREAPER = 36
KILL_ROUND_S = 1.0


def main(folder: str, num_cpus: int, namespace: str, log_level: int) -> None:
    """Start Ray and hold it until stdin closes."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    holder = threading.Thread(target=_hold, args=(folder,), name="holder")
    holder.start()
    try:
        address = ray_api.start_local_ray(folder, num_cpus, namespace, log_level)
    except Exception:
        # The outermost frame of this process: say why, then end everything that did start.
        logging.getLogger(__name__).exception("ray_failed")
        _end(folder)
    print(address, flush=True)
    holder.join()


def _hold(folder: str) -> None:
    while sys.stdin.buffer.read(4096):
        pass
    _end(folder)


def _end(folder: str) -> NoReturn:
    """Kill everything below this process, remove the folder, and go; no Ray call can block it."""
    while children := psutil.Process().children(recursive=True):
        for child in children:
            try:
                child.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(children, timeout=KILL_ROUND_S)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
