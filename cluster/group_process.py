"""What runs in the process of an expert group: a runtime with weights, and its server."""

from __future__ import annotations

import logging
import threading

from cluster.config import Config
from cluster.group_metrics import group_metrics_text, open_group_metrics
from cluster.members import ProcessFacts, new_boot
from cluster.metrics import MetricsServer
from cluster.preflight import checkpoint_folder
from cluster.security import load_member
from experts.device import current_device, require_deepspeed
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
        self._metrics: MetricsServer | None = None

    def facts(self, node_id: str, address: str) -> ProcessFacts:
        """Return where this process runs."""
        return ProcessFacts.here(node_id, address, self._boot)

    def load(
        self, placement_json: str, dtype: str, threads: int, host: str, compute: str
    ) -> tuple[str, int, str]:
        """Load this group's experts and open its port.

        Args:
            placement_json: Where every expert lives.
            dtype: Of weights, rows and outputs.
            threads: Threads that work on one forward.
            host: Address to bind; the port is a free one.
            compute: As `experts.compute`. What the other groups chose, where they have: ways to
                compute differ in the last bits, and an expert's must not change when it moves.

        Returns:
            `host:port`, the placement's epoch, and how it computes.

        Raises:
            ExpertMeshError: From the checkpoint, the memory, the placement, or the certificate.
        """
        placement = Placement.from_json(placement_json)
        if self._config.experts.compute == "auto" and not _is_possible(compute):
            compute = "auto"
        self._runtime = ExpertRuntime(
            group_id=self.group_id,
            checkpoint=checkpoint_folder(self._config.model),
            dtype=dtype,
            compute=compute,
            num_threads=threads,
        )
        self._runtime.load(placement)
        member = load_member(self._config)
        tls = member.server if member is not None else None
        self._server = start_expert_server(self._runtime, host, 0, tls)
        address: str = self._server.address
        if self._config.experts.metrics_port is not None:
            self._metrics = open_group_metrics(
                host, self._config.experts.metrics_port, self._metrics_text
            )
            log.info("metrics_ready group=%s port=%d", self.group_id, self._metrics.port)
        log.info("group_ready group=%s address=%s", self.group_id, address)
        return address, placement.epoch, self._kind

    def take(self, placement_json: str) -> tuple[str, int, str]:
        """Load what a placement gives this group, beside what it holds, while forwards go on.

        Returns:
            As `load`.

        Raises:
            ResourceError: It does not fit; nothing has changed.
            CheckpointError: A weight cannot be read.
        """
        assert self._runtime is not None  # the caller's order: load comes first
        assert self._server is not None
        placement = Placement.from_json(placement_json)
        given = _keys(placement.experts_of(self.group_id))
        missing = given - _keys(self._runtime.status().layers)
        self._runtime.load_experts(sorted(missing), placement.epoch)
        return self._server.address, placement.epoch, self._kind

    def trim(self, placement_json: str) -> int:
        """Forget what a placement does not give this group; return its epoch."""
        assert self._runtime is not None  # the caller's order: load comes first
        placement = Placement.from_json(placement_json)
        given = _keys(placement.experts_of(self.group_id))
        surplus = _keys(self._runtime.status().layers) - given
        # A plan that was given up may have told the group of a later epoch.
        epoch = max(placement.epoch, self._runtime.epoch)
        self._runtime.drop_experts(sorted(surplus), epoch)
        return placement.epoch

    @property
    def _kind(self) -> str:
        """How it computes, as `experts.compute` says it."""
        assert self._runtime is not None  # the caller's order: load comes first
        return self._runtime.status().compute.partition("-")[0]

    def stop(self) -> None:
        """Close the ports."""
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
        if self._server is not None:
            self._server.stop(STOP_GRACE_S)
            self._server = None
        self.stopped.set()

    def _metrics_text(self) -> str:
        assert self._runtime is not None  # the port opens after it is loaded
        layer_pairs = self._runtime.load_counts().sum(axis=1).tolist()
        return group_metrics_text(self._runtime.status(), layer_pairs)


def _is_possible(compute: str) -> bool:
    """Return whether this device can compute so: native kernels are for CPUs."""
    return compute != "native" or current_device().type == "cpu"


def _keys(layers: dict[int, list[int]]) -> set[tuple[int, int]]:
    """Return `(layer_id, expert_id)` of experts by layer."""
    return {(layer_id, expert_id) for layer_id, ids in layers.items() for expert_id in ids}
