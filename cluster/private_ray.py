"""A Ray cluster on this machine for one process alone: its settings, its token, its life.

Does not import Ray: that is done by the process that holds it, see `cluster.ray_host`.
"""

from __future__ import annotations

import logging
import os
import secrets
import select
import shutil
import subprocess
import sys
import tempfile

from cluster.ray_api import ray_log_level
from protos.errors import DeadlineExceededError, InternalError

log = logging.getLogger(__name__)

MAX_TMP_CHARS = 24
START_TIMEOUT_S = 300.0
EXIT_TIMEOUT_S = 10.0
"""How long the process that holds a private Ray gets to end it."""


class PrivateRay:
    """A Ray cluster on this machine for this process alone; see `cluster.ray_host`.

    Its ports take only callers that know the token drawn here. The constructor returns at once;
    `address` waits until Ray runs.

    Args:
        num_actors: Actors to come; Ray counts one CPU each, whatever the machine has.
        namespace: Ray namespace of the actors.
        verbose: Show Ray's own log, too.
    """

    def __init__(self, *, num_actors: int, namespace: str, verbose: bool) -> None:
        os.environ.pop("RAY_ADDRESS", None)
        os.environ.update(
            RAY_AUTH_MODE="token",
            RAY_AUTH_TOKEN=secrets.token_hex(32),
            RAY_USAGE_STATS_ENABLED="0",
            RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
            RAY_SCHEDULER_EVENTS="0",
            RAY_COLOR_PREFIX="1" if sys.stderr.isatty() else "0",
        )
        # Ray's socket paths add 62 characters, and the kernel takes 107.
        parent = tempfile.gettempdir() if len(tempfile.gettempdir()) <= MAX_TMP_CHARS else "/tmp"
        self._folder = tempfile.mkdtemp(prefix="expertmesh-", dir=parent)
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "cluster.ray_host", self._folder),
                *(str(num_actors), namespace, str(ray_log_level(verbose))),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # Sockets of the lanes and the like go with the folder, even after a SIGKILL.
            env={**os.environ, "TMPDIR": self._folder},
        )

    def address(self, timeout_s: float = START_TIMEOUT_S) -> str:
        """Wait until Ray runs and return `host:port` of its head.

        Raises:
            DeadlineExceededError: It does not run within `timeout_s`.
            InternalError: Ray did not start; its reason is on stderr.
        """
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], timeout_s)[0]:
            raise DeadlineExceededError("the start of Ray on this machine", timeout_s)
        address = self._process.stdout.readline().strip()
        if not address:
            raise InternalError("Ray did not start on this machine, see the lines above")
        return address

    def close(self) -> None:
        """End Ray and everything it started, and wait for it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(EXIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            log.warning("ray_host_killed pid=%d", self._process.pid)
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)
