"""What runs in the process of a router: trunk, dispatcher, engine and gateway, wired together.

load   config -> ops -> trunk weights, while the groups load their experts
start  dispatcher -> decoder -> engine -> gateway on its port
drain  the gateway says NOT_SERVING, the engine takes nothing new, what runs ends
stop   the port closes, the engine ends, the groups' connections close
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from dataclasses import replace
from functools import partial

import torch

from cluster.config import Config
from cluster.engine_plan import plan_engine
from cluster.figures import Figures
from cluster.known_service import KnownService
from cluster.members import (
    GroupMember,
    ProcessFacts,
    RouterReady,
    RouterStart,
    ServiceView,
    Wish,
    engine_id,
    new_boot,
)
from cluster.metrics import MetricsServer, metrics_text
from cluster.probe import check_answers
from cluster.router_experts import RouterExperts
from cluster.router_model import RouterModel, load_router_model
from cluster.router_services import RouterServices, router_services
from cluster.router_sleep import RouterSleep
from cluster.router_state import RouterState, cache_namespace
from cluster.router_status import router_status
from cluster.security import Security, load_security
from cluster.served_decoder import ServedDecoder
from cluster.service import ClusterServicer
from cluster.stopping import ends_within
from experts.placement import Placement
from protos.errors import InternalError
from protos.v1 import cluster_pb2
from router.engine.engine import Engine
from router.gateway.delivery import LoopDelivery
from router.gateway.routing import PeerView, RouterLoad, unpack_warm, warm_set
from router.gateway.server import Gateway, GatewayOptions, GatewayThread
from router.model.cache_io import DecoderCacheIo
from router.model.decoder import Decoder
from router.model.warm_up import WARM_UP_TOKENS, warm_up
from router.state.restore import ValueSizes

log = logging.getLogger(__name__)

DRAIN_POLL_S = 0.05
ENGINE_LOOK_S = 0.5
CHECK_TIMEOUT_S = 60.0
LEAVE_DELAY_S = 0.2
"""Between the answer to `Drain` and the end of the process, so that the answer gets out."""
STREAM_END_S = 1.0
"""How long the gateway gets to tell the clients of cut streams what happened."""
STEP_END_S = 2.0
"""How long the step under way, or a call of `GatingService`, gets to end."""


class RouterProcess:
    """One router. The constructor imports torch (by this file's imports) and reads nothing."""

    def __init__(self, router_id: str, config: Config) -> None:
        self.router_id = router_id
        self.shutdown_timeout_s = config.cluster.shutdown_timeout_s
        self._boot = new_boot()
        self._config = config
        self._members = KnownService(router_id)
        self._state = "STARTING"
        self._ended = threading.Event()
        self._address = ""
        self._experts: RouterExperts | None = None
        self._services: RouterServices | None = None
        self._gateway: GatewayThread | None = None
        self._shared: RouterState | None = None
        self._metrics: MetricsServer | None = None
        self._engine: Engine | None = None
        self._sleep: RouterSleep | None = None

    def facts(self, node_id: str, address: str) -> ProcessFacts:
        """Return where this process runs."""
        return ProcessFacts.here(node_id, address, self._boot)

    def load(self, dtype: str, max_model_len: int, threads: int) -> int:
        """Load the trunk.

        Args:
            dtype: Of matrices and KV cache.
            max_model_len: Most tokens of a sequence.
            threads: Threads of the trunk's kernels.

        Returns:
            The trunk's bytes.

        Raises:
            ExpertMeshError: From the checkpoint or the kernels.
        """
        torch.set_num_threads(threads)
        self._model: RouterModel = load_router_model(
            self._config.model,
            dtype=dtype,
            max_model_len=max_model_len,
            trunk_ops=self._config.router.trunk_ops,
        )
        return self._model.memory.trunk_bytes

    def start(self, start: RouterStart) -> RouterReady:
        """Connect to the groups, start the engine and open the port.

        Raises:
            GroupLostError: A group cannot be reached.
            ConfigurationError: The port is taken, or a certificate cannot be used.
            ResourceError: The KV cache does not fit.
        """
        model, section = self._model, self._config.engine
        self._model_name = start.model_name
        self._engine_id = engine_id(self.router_id, start.service_id)
        self._security = security = load_security(self._config)
        self._members.begin(start.groups)
        self._experts = experts = RouterExperts(
            self.router_id, model, self._config.experts, security.to_groups
        )
        if start.placement_json is not None:
            experts.connect(Placement.from_json(start.placement_json), start.group_addresses)
        decoder = Decoder(model.config, model.weights, model.ops, experts.engine)
        self._kv_block_bytes = decoder.kv_bytes_per_block(section.block_size)
        io = decoder.cache_io(decoder.allocate_caches(1, section.block_size, 1))
        namespace = cache_namespace(
            model.digest, model.config.raw, io.layout, self._config.state.tenant_salt
        )
        self._shared = self._share(start, namespace, io)
        delivery = LoopDelivery()
        served = ServedDecoder(decoder, experts.engine)
        self._engine = engine = Engine(
            served,
            plan_engine(
                section,
                self._config.state,
                start,
                model=model,
                decoder=decoder,
                namespace=namespace,
            ),
            deliver=delivery,
            tier=self._shared.tier if self._shared else None,
            cold_tier=self._shared.cold if self._shared else None,
        )
        self._services = router_services(
            engine,
            model,
            model_name=start.model_name,
            address=lambda: self._address,
            api_keys=security.api_keys,
            cluster=ClusterServicer(
                self, experts, self._members, security.to_routers, security.to_groups
            ),
            experts=experts,
            shared=self._shared,
            session_ttl_s=self._config.state.session_ttl_s,
            batch=self._config.batch,
        )
        self._gateway = GatewayThread(
            self._services.registered, _gateway_options(start, security), delivery
        )
        if self._services.gating is not None:
            self._sleep = RouterSleep(
                engine, self._services.gating, self._gateway, self._members.wish
            )
        warm_up(decoder, min(WARM_UP_TOKENS, engine.config.max_num_batched_tokens))
        served.begin()
        engine.start()
        port = self._gateway.start().rpartition(":")[2]
        self._address = f"{start.advertised_host}:{port}"
        if self._shared is not None:
            self._gateway.call(self._shared.start())
        if start.metrics_port is not None:
            self._metrics = MetricsServer(
                start.host, start.metrics_port, lambda: metrics_text(self._figures())
            )
            log.info("metrics_ready router=%s port=%d", self.router_id, self._metrics.port)
        self._state = "READY"
        self._members.open(self._address)
        log.info("router_ready router=%s address=%s", self.router_id, self._address)
        return RouterReady(address=self._address, num_kv_blocks=engine.config.num_blocks)

    def check(self) -> None:
        """Ask this router for a token, over its port.

        Raises:
            ExpertMeshError: What it answered.
        """
        check_answers(self._address, CHECK_TIMEOUT_S, self._security.to_routers)

    def set_view(self, view: ServiceView) -> None:
        """Learn how the whole service is; what is older than what is known is left out."""
        self._members.learn(view)

    def connect(self, placement_json: str, members: list[GroupMember]) -> tuple[str, int]:
        """Connect to the groups of a placement to come, beside those in use.

        Raises:
            GroupLostError: A group cannot be reached; nothing has changed.
        """
        assert self._experts is not None  # the caller's order: start comes first
        placement = Placement.from_json(placement_json)
        addresses = {member.group_id: member.grpc_address for member in members}
        self._experts.prepare(placement, addresses)
        return "connect", placement.epoch

    def switch(self, epoch: int) -> tuple[str, int]:
        """Follow the placement of this epoch, which is connected, from the next call on.

        Returns once no call follows an older one any more.

        Raises:
            DeadlineExceededError: A call of before lasts; ask again.
        """
        assert self._experts is not None  # the caller's order: start comes first
        self._experts.switch(epoch)
        return "switch", epoch

    def sleep(self) -> tuple[str, bool]:
        """Let requests wait; False where there are any. See `RouterSleep`."""
        assert self._sleep is not None  # only a router that serves, and has groups, is asked
        return "sleep", self._sleep.sleep()

    def wake(self) -> tuple[str, bool]:
        """Answer requests again."""
        assert self._sleep is not None  # as above
        self._sleep.wake()
        return "wake", True

    def next_wish(self) -> Wish | None:
        """Wait until someone asks for a change of the service, and return it; None at the end."""
        return self._members.next_wish()

    def note_decisions(self, mode: str, decisions: list[bytes]) -> None:
        """Keep decisions of the autoscaler, oldest first, to explain them."""
        self._members.note_decisions(mode, decisions)

    def wait(self) -> None:
        """Block until this router ended.

        Raises:
            InternalError: Its engine ended by a fault: it would answer nothing any more.
        """
        while not self._ended.wait(ENGINE_LOOK_S):
            engine = self._engine
            if self._state == "READY" and engine is not None and not engine.is_running:
                raise InternalError("its engine failed")

    def drain(self, timeout_s: float) -> int:
        """Take nothing new and wait for what runs; return how many requests are left."""
        engine, gateway = self._engine, self._gateway
        if engine is None or gateway is None:
            return 0
        self._state = "DRAINING"
        gateway.set_serving(False)
        engine.drain()
        deadline = time.monotonic() + timeout_s
        pause = threading.Event()
        while (left := engine.num_live) and time.monotonic() < deadline:
            pause.wait(DRAIN_POLL_S)
        log.info("router_drained router=%s left=%d", self.router_id, left)
        return left

    def stop(self) -> None:
        """End the router. Streams that still run end with UNAVAILABLE.

        Takes a few seconds at most: a step or a call that waits for a silent group (for minutes)
        is left behind, and ends with the process.
        """
        self._state = "STOPPING"
        self._members.end()
        if self._experts is not None:
            self._experts.give_up()
        if self._metrics is not None:
            self._metrics.close()
        engine = self._engine
        gating = self._services.gating if self._services is not None else None
        if engine is not None and ends_within(STEP_END_S, partial(engine.stop, drain=False)):
            engine = None
        if self._gateway is not None:
            self._gateway.call(self._close_gateway(self._gateway.gateway))
            self._gateway.stop()
        if self._shared is not None and not ends_within(STEP_END_S, self._shared.tier.close):
            log.warning("router_left_waiting router=%s reason=%r", self.router_id, "a silent store")
        if gating is not None and ends_within(STEP_END_S, gating.close):
            gating = None
        if engine is not None or gating is not None:
            log.warning("router_left_waiting router=%s reason=%r", self.router_id, "a silent group")
        elif self._experts is not None:
            self._experts.close()
        self._ended.set()

    async def _close_gateway(self, gateway: Gateway) -> None:
        """Close the port, let ended turns reach the store, and leave the store."""
        await gateway.stop(STREAM_END_S)
        if self._services is not None:
            await self._services.generation.settle()
        if self._shared is not None:
            await self._shared.close()

    # What `ClusterServicer` asks.

    def status(self) -> cluster_pb2.RouterStatus:
        """Return this router's figures."""
        assert self._engine is not None  # the port opens after the engine exists
        return router_status(
            self._figures(),
            state=self._state,
            address=self._members.routers.get(self.router_id, self._address),
            pid=os.getpid(),
            trunk_ops=self._model.ops_name,
            block_bytes=self._kv_block_bytes,
            max_snapshot_bytes=self._engine.config.max_snapshot_bytes,
        )

    def service_status(self) -> cluster_pb2.ClusterStatus:
        """Return what is the same for every router."""
        return cluster_pb2.ClusterStatus(
            model=self._model_name,
            state="READY",
            dtype=self._model.dtype_name,
            placement_epoch=self._experts.epoch if self._experts is not None else 0,
            max_model_len=self._model.max_model_len,
            scaling=self._members.scaling(),
        )

    async def drain_and_leave(self, timeout_s: float) -> int:
        """Drain, then end the process a moment after the answer."""
        loop = asyncio.get_running_loop()
        left = await loop.run_in_executor(None, self.drain, timeout_s)
        threading.Timer(LEAVE_DELAY_S, self._ended.set).start()
        return left

    def _share(self, start: RouterStart, namespace: str, io: DecoderCacheIo) -> RouterState | None:
        """Make what is shared with other routers; None where the service has no servers for it."""
        if start.state is None:
            return None
        return RouterState(
            start.state,
            self._config.state,
            ValueSizes(block_bytes=io.kv_block_bytes, state_bytes=io.state_bytes),
            engine=self._engine_id,
            boot=self._boot,
            service=start.service_id,
            namespace=namespace,
            own=self._view,
            access=replace(self._security.to_routers, api_key=None),
        )

    def _figures(self) -> Figures:
        assert self._engine is not None  # the ports open after the engine exists
        gating = self._services.gating if self._services is not None else None
        figures = Figures(
            router_id=self.router_id,
            model=self._model_name,
            stats=self._engine.stats(),
            turns=self._services.generation.turn_stats() if self._services else None,
            route_streams=gating.num_streams if gating is not None else 0,
        )
        if (shared := self._shared) is not None:
            figures = replace(
                figures,
                tier=shared.tier.stats(),
                cold=shared.cold.stats(),
                servers=shared.servers(),
                forwards=shared.forwarder.stats,
                sessions_held=shared.store.num_leases,
                prefill_tokens_per_s=shared.tier.cost.prefill_tokens_per_s,
            )
        return figures

    def _view(self) -> PeerView:
        """Return this router as the others are to see it."""
        assert self._engine is not None
        stats = self._engine.stats()
        rate = self._shared.tier.cost.prefill_tokens_per_s if self._shared else 0.0
        load = RouterLoad(
            prefill_tokens_per_s=rate,
            queued_tokens=stats.num_queued_tokens,
            num_running=stats.num_running + stats.num_waiting,
            max_running=self._engine.config.max_num_seqs,
        )
        warm = unpack_warm(warm_set(self._engine.warm_positions()))
        return PeerView(router_id=self._engine_id, address=self._address, load=load, warm=warm)


def _gateway_options(start: RouterStart, security: Security) -> GatewayOptions:
    return GatewayOptions(
        host=start.host,
        port=start.port,
        tls=security.port.server if security.port else None,
        api_keys=security.api_keys,
    )
