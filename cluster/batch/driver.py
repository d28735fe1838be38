"""The process that drives one batch of the service: `run_batch`, told by a pipe, heard by another.

It ends early by SIGTERM, or when its standard input closes, which happens when `serve` is gone,
however it went; rows that were committed stay, and the next driver goes on from there. See
`cluster.batch.job` for what the pipes carry. Run as `python -m cluster.batch.driver`.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from typing import BinaryIO

from cluster.batch.drive import run_batch
from cluster.batch.job import end_line, read_job
from cluster.batch.progress import Meter
from cluster.console import EXIT_OK, EXIT_PARTIAL
from cluster.logs import configure_logging
from cluster.stopping import StopRequested, StopSignals
from protos.client import Client
from protos.errors import ExpertMeshError, InternalError

log = logging.getLogger(__name__)

TELL_INTERVAL_S = 0.5
END_S = 10.0
"""How long an orphan gets to end in good order."""


class Teller:
    """Says on a pipe how far a batch is, until its `with` block ends.

    Args:
        meter: Of the batch.
        out: The pipe.
    """

    def __init__(self, meter: Meter, out: BinaryIO) -> None:
        self._meter = meter
        self._out = out
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._tell, name="teller", daemon=True)

    def __enter__(self) -> Teller:
        self._say("in_progress")
        self._thread.start()
        return self

    def __exit__(self, *ended: object) -> None:
        self._ended.set()
        self._thread.join()
        self._say("finalizing" if self._meter.is_whole else "in_progress")

    def _tell(self) -> None:
        while not self._ended.wait(TELL_INTERVAL_S):
            self._say("in_progress")

    def _say(self, phase: str) -> None:
        line = json.dumps({"phase": phase, **self._meter.document()}).encode() + b"\n"
        try:
            self._out.write(line)
            self._out.flush()
        except OSError:  # nobody listens any more: standard input closes too
            self._ended.set()


def main() -> int:
    """Drive a batch to its end; return the exit code."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever Ray and its processes print
    configure_logging("batch-driver", verbose=False)
    signals = StopSignals()
    signals.catch()
    try:
        options = read_job(sys.stdin.buffer.readline())
        threading.Thread(target=_follow_parent, name="parent", daemon=True).start()

        def report(meter: Meter, client: Client) -> Teller:
            return Teller(meter, out)

        result = run_batch(options, signals.catch, report)
        manifest = result.manifest
        counts = {name: manifest[name] for name in _COUNTS}
        last = end_line(result.state, counts)
    except StopRequested:
        signals.ignore()
        last = end_line("interrupted", {})
    except ExpertMeshError as error:
        last = end_line("failed", {}, error)
    except Exception as error:  # outermost frame: who started us learns it
        log.exception("batch_driver_failed")
        last = end_line("failed", {}, InternalError(f"{type(error).__name__}: {error}"))
    try:
        out.write(last)
        out.flush()
    except OSError:
        return EXIT_PARTIAL
    return EXIT_OK


_COUNTS = ("rows", "failed", "prompt_tokens", "completion_tokens")


def _follow_parent() -> None:
    """End this process when the one that started it is gone."""
    while os.read(0, 4096):  # not by `sys.stdin`: a lock of it would be held at the exit
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    threading.Event().wait(END_S)
    os._exit(EXIT_PARTIAL)


if __name__ == "__main__":
    sys.exit(main())
