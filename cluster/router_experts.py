"""The expert groups as one router reaches them: its dispatchers, and what they know.

A dispatcher has one call in flight, so there are two: the engine's, and `GatingService`'s own,
which keeps that service off the engine's. Both follow the same placement.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from cluster.config import ExpertsSection
from cluster.placement_follower import PlacementFollower
from cluster.router_model import RouterModel
from experts.native.kernels import Kernels
from experts.placement import Placement
from protos.tls import Access
from router.gating.dispatch import ExpertDispatcher

SWITCH_TIMEOUT_S = 20.0
"""How long a call under way may keep a new placement waiting before the controller asks again."""


class RouterExperts:
    """The dispatchers of one router; none until `connect`, and in a dense model.

    Args:
        router_id: Named to the groups.
        model: Whose experts they are.
        section: How they are reached, and how patiently.
        access: What the groups' ports demand.

    Attributes:
        engine: The engine's dispatcher.
        gating: `GatingService`'s.
    """

    def __init__(
        self, router_id: str, model: RouterModel, section: ExpertsSection, access: Access
    ) -> None:
        self.engine: ExpertDispatcher | None = None
        self.gating: ExpertDispatcher | None = None
        self._router_id = router_id
        self._model = model
        self._section = section
        self._access = access
        self._placements = PlacementFollower()

    def connect(self, placement: Placement, addresses: Mapping[str, str]) -> None:
        """Connect to the groups.

        Args:
            placement: Where every expert lives.
            addresses: group_id -> `host:port` of its gRPC server.

        Raises:
            GroupLostError: A group cannot be reached.
        """
        self.engine = self._dispatcher(placement, addresses, self._model.kernels)
        self.gating = self._dispatcher(placement, addresses, None)

    def prepare(self, placement: Placement, addresses: Mapping[str, str]) -> None:
        """Connect to the groups of a placement to come, beside those in use.

        Raises:
            GroupLostError: A group cannot be reached; nothing has changed.
        """
        self._placements.prepare(placement, addresses)

    def switch(self, epoch: int) -> None:
        """Follow the prepared placement from the next call on, and wait for the last one before.

        Raises:
            DeadlineExceededError: A call of before lasts; ask again.
        """
        self._placements.switch(epoch, SWITCH_TIMEOUT_S)

    def give_up(self) -> None:
        """Let calls that wait for a group fail: the router ends."""
        self._placements.give_up()

    def close(self) -> None:
        """Close the connections; no call may be under way."""
        for dispatcher in (self.engine, self.gating):
            if dispatcher is not None:
                dispatcher.close()

    # What `ClusterService` shows.

    @property
    def epoch(self) -> int:
        """Of the placement in force; 0 in a dense model."""
        return self._placements.epoch

    @property
    def placement(self) -> Placement | None:
        """The placement in force; None in a dense model."""
        return None if self.engine is None else self.engine.placement

    @property
    def num_experts(self) -> int:
        """Experts of a layer; 0 in a dense model."""
        return self._model.config.num_experts if self.engine is not None else 0

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert."""
        return self._model.memory.expert_bytes

    def transport_of(self, group_id: str) -> str:
        """Return how this router reaches the group: lane-unix, lane-tcp or grpc."""
        transports = self.engine.transports if self.engine is not None else ()
        return next((t.name for t in transports if t.group_id == group_id), "")

    def load_counts(self) -> npt.NDArray[np.int64]:
        """Return `[num_layers, num_experts]` pairs dispatched by this router's engine."""
        if self.engine is None:
            config = self._model.config
            return np.zeros((config.num_layers, config.num_experts), np.int64)
        return self.engine.load.snapshot()

    def _dispatcher(
        self, placement: Placement, addresses: Mapping[str, str], kernels: Kernels | None
    ) -> ExpertDispatcher:
        config = self._model.config
        dispatcher = ExpertDispatcher.connect(
            placement,
            addresses,
            router_id=self._router_id,
            hidden=config.hidden_size,
            top_k=config.top_k,
            dtype=self._model.dtype,
            transport=self._section.transport,
            kernels=kernels,
            patience_s=self._section.patience_s,
            access=self._access,
        )
        self._placements.add(dispatcher)
        return dispatcher
