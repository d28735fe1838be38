"""What runs in the process of an expert group: a runtime with weights, and its server."""

from __future__ import annotations

import logging
import os
import threading

from cluster.config import Config
from cluster.members import ProcessFacts, new_boot
from cluster.security import load_member
from experts.device import require_deepspeed
from experts.placement import Placement
from experts.runtime import ExpertRuntime
from experts.service import ExpertServer, start_expert_server

log = logging.getLogger(__name__)

STOP_GRACE_S = 1.0
"""How long open calls get when the group stops; the routers are gone by then."""


class GroupProcess:
    """One expert group. The constructor imports deepspeed, which takes a second, no more."""

    def __init__(self, group_id: str, config: Config) -> None:
        require_deepspeed()
        self.group_id = group_id
        self.stopped = threading.Event()
        self._boot = new_boot()
        self._config = config
        self._runtime: ExpertRuntime | None = None
        self._server: ExpertServer | None = None

    def facts(self, node_id: str, address: str) -> ProcessFacts:
        """Return where this process runs."""
        cores = len(os.sched_getaffinity(0))
        return ProcessFacts(
            node_id=node_id, address=address, pid=os.getpid(), cores=cores, boot=self._boot
        )

    def load(self, placement_json: str, dtype: str, threads: int, host: str) -> str:
        """Load this group's experts and open its port.

        Args:
            placement_json: Where every expert lives.
            dtype: Of weights, rows and outputs.
            threads: Threads that work on one forward.
            host: Address to bind; the port is a free one.

        Returns:
            `host:port`.

        Raises:
            ExpertMeshError: From the checkpoint, the memory, the placement, or the certificate.
        """
        self._runtime = ExpertRuntime(
            group_id=self.group_id,
            checkpoint=self._config.model.checkpoint,
            dtype=dtype,
            compute=self._config.experts.compute,
            num_threads=threads,
        )
        self._runtime.load(Placement.from_json(placement_json))
        member = load_member(self._config)
        tls = member.server if member is not None else None
        self._server = start_expert_server(self._runtime, host, 0, tls)
        address: str = self._server.address
        log.info("group_ready group=%s address=%s", self.group_id, address)
        return address

    def stop(self) -> None:
        """Close the port."""
        if self._server is not None:
            self._server.stop(STOP_GRACE_S)
            self._server = None
        self.stopped.set()
