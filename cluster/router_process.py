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
import queue
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import numpy as np
import numpy.typing as npt
import psutil
import torch

from cluster.autoscale_log import DecisionLog
from cluster.config import Config, EngineSection
from cluster.hf_overrides import parse_hf_overrides
from cluster.kv_budget import GIB, plan_cold_bytes, plan_kv_blocks
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
from cluster.metrics import Figures, MetricsServer, metrics_text
from cluster.placement_follower import PlacementFollower
from cluster.preflight import checkpoint_folder
from cluster.probe import check_answers
from cluster.router_state import RouterState, cache_namespace
from cluster.router_status import (
    cache_status,
    cold_status,
    latency_status,
    scaling_status,
    store_status,
)
from cluster.security import load_security
from cluster.served_decoder import ServedDecoder
from cluster.service import ClusterServicer
from cluster.stopping import ends_within
from experts.native.kernels import Kernels, load_kernels
from experts.placement import Placement
from experts.weights import SafetensorsCheckpoint
from experts.weights_digest import weights_digest
from protos.errors import InternalError
from protos.v1 import cluster_pb2, cluster_pb2_grpc
from router.engine.config import EngineConfig
from router.engine.engine import Engine
from router.gateway.authentication import Callers
from router.gateway.defaults import SamplingDefaults
from router.gateway.delivery import LoopDelivery
from router.gateway.gating import GatingServicer
from router.gateway.generation import GenerationServicer
from router.gateway.request_reader import ServedModel
from router.gateway.routing import Load, RouterView, unpack_warm, warm_set
from router.gateway.server import (
    Gateway,
    GatewayOptions,
    GatewayThread,
    Service,
    gating_service,
    generation_service,
    session_service,
)
from router.gateway.sessions import SessionServicer
from router.gateway.text import TextProcessor
from router.gating.dispatch import ExpertDispatcher
from router.gating.gate import Gate
from router.model.cache_io import DecoderCacheIo
from router.model.config import ModelConfig
from router.model.decoder import Decoder
from router.model.memory import estimate_memory
from router.model.ops import Ops, choose_ops
from router.model.warm_up import WARM_UP_TOKENS, warm_up
from router.model.weights import TrunkWeights, load_trunk
from router.state.cold import ColdStats
from router.state.restore import ValueSizes

log = logging.getLogger(__name__)

DRAIN_POLL_S = 0.05
ENGINE_LOOK_S = 0.5
CHECK_TIMEOUT_S = 60.0
LEAVE_DELAY_S = 0.2
"""Between the answer to `Drain` and the end of the process, so that the answer gets out."""


class RouterProcess:
    """One router. The constructor imports torch (by this file's imports) and reads nothing."""

    def __init__(self, router_id: str, config: Config) -> None:
        self.router_id = router_id
        self.shutdown_timeout_s = config.cluster.shutdown_timeout_s
        self._boot = new_boot()
        self._config = config
        self._state = "STARTING"
        self._ended = threading.Event()
        self._address = ""
        self._members: tuple[GroupMember, ...] = ()
        self._routers: dict[str, str] = {}
        self._service: ServiceView | None = None
        self._placements = PlacementFollower()
        self._wishes: queue.SimpleQueue[Wish | None] = queue.SimpleQueue()
        self._placement: Placement | None = None
        self._dispatcher: ExpertDispatcher | None = None
        self._gating: GatingServicer | None = None
        self._gating_dispatcher: ExpertDispatcher | None = None
        self._gateway: GatewayThread | None = None
        self._generation: GenerationServicer | None = None
        self._shared: RouterState | None = None
        self._metrics: MetricsServer | None = None
        self._engine: Engine | None = None
        self._decisions = DecisionLog()

    def facts(self, node_id: str, address: str) -> ProcessFacts:
        """Return where this process runs."""
        cores = len(os.sched_getaffinity(0))
        return ProcessFacts(
            node_id=node_id, address=address, pid=os.getpid(), cores=cores, boot=self._boot
        )

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
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._max_model_len = max_model_len
        self._path = checkpoint_folder(self._config.model)
        overrides = parse_hf_overrides(self._config.model.hf_overrides)
        self._model = ModelConfig.from_checkpoint(self._path, overrides)
        self._text = TextProcessor.from_checkpoint(self._path)
        self._defaults = SamplingDefaults.from_checkpoint(self._path)
        self._ops: Ops = choose_ops(self._dtype, torch.device("cpu"), self._config.router.trunk_ops)
        self._kernels = load_kernels() if self._ops.name == "native" else None
        self._ops_name = f"native-{self._kernels.isa}" if self._kernels else self._ops.name
        with SafetensorsCheckpoint(self._path) as checkpoint:
            self._weights: TrunkWeights = load_trunk(
                checkpoint, self._model, self._ops, self._dtype
            )
            self._gate = self._read_gate(checkpoint)
            self._weights_digest = weights_digest(checkpoint)
        return estimate_memory(self._model, self._dtype).trunk_bytes

    def start(self, start: RouterStart) -> RouterReady:
        """Connect to the groups, start the engine and open the port.

        Raises:
            GroupLostError: A group cannot be reached.
            ConfigurationError: The port is taken, or a certificate cannot be used.
            ResourceError: The KV cache does not fit.
        """
        self._model_name = start.model_name
        self._members = start.groups
        self._engine_id = engine_id(self.router_id, start.service_id)
        self._security = security = load_security(self._config)
        if start.placement_json is not None:
            self._placement = Placement.from_json(start.placement_json)
            self._dispatcher = self._connect(start, self._kernels)
            self._placements.add(self._dispatcher)
        decoder = Decoder(self._model, self._weights, self._ops, self._dispatcher)
        delivery = LoopDelivery()
        io = decoder.cache_io(decoder.allocate_caches(1, self._config.engine.block_size, 1))
        namespace = cache_namespace(
            self._weights_digest, self._model.raw, io.layout, self._config.state.tenant_salt
        )
        self._shared = self._share(start, namespace, io)
        engine = Engine(
            ServedDecoder(decoder, self._dispatcher),
            self._engine_config(decoder, start, namespace),
            deliver=delivery,
            tier=self._shared.tier if self._shared else None,
            cold_tier=self._shared.cold if self._shared else None,
        )
        self._engine = engine
        self._kv_block_bytes = decoder.kv_bytes_per_block(self._config.engine.block_size)
        self._gateway = GatewayThread(
            self._services(start, engine),
            GatewayOptions(
                host=start.host,
                port=start.port,
                tls=security.port.server if security.port else None,
                api_keys=security.api_keys,
            ),
            delivery,
        )
        warm_up(decoder, min(WARM_UP_TOKENS, engine.config.max_num_batched_tokens))
        engine.start()
        port = self._gateway.start().rpartition(":")[2]
        self._address = f"{start.advertised_host}:{port}"
        if self._shared is not None:
            self._gateway.call(self._shared.start())
        if start.metrics_port is not None:
            self._metrics = MetricsServer(start.host, start.metrics_port, self._metrics_text)
            log.info("metrics_ready router=%s port=%d", self.router_id, self._metrics.port)
        self._state = "READY"
        self._routers = {self.router_id: self._address}
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
        if self._service is not None and view.version <= self._service.version:
            return
        self._service, self._members, self._routers = view, view.groups, dict(view.routers)

    def connect(self, placement_json: str, members: list[GroupMember]) -> tuple[str, int]:
        """Connect to the groups of a placement to come, beside those in use.

        Raises:
            GroupLostError: A group cannot be reached; nothing has changed.
        """
        placement = Placement.from_json(placement_json)
        addresses = {member.group_id: member.grpc_address for member in members}
        self._placements.prepare(placement, addresses)
        return "connect", placement.epoch

    def switch(self, epoch: int) -> tuple[str, int]:
        """Follow the placement of this epoch, which is connected, from the next call on.

        Returns once no call follows an older one any more.

        Raises:
            DeadlineExceededError: A call of before lasts; ask again.
        """
        self._placements.switch(epoch, SWITCH_TIMEOUT_S)
        return "switch", epoch

    def next_wish(self) -> Wish | None:
        """Wait until someone asks for a change of the service, and return it; None at the end."""
        return self._wishes.get()

    def note_decisions(self, mode: str, decisions: list[bytes]) -> None:
        """Keep decisions of the autoscaler, oldest first, to explain them."""
        found = [cluster_pb2.AutoscaleDecision.FromString(part) for part in decisions]
        self._decisions.add(mode, found)

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
        self._wishes.put(None)
        self._placements.give_up()
        if self._metrics is not None:
            self._metrics.close()
        engine, gating = self._engine, self._gating
        if engine is not None and ends_within(STEP_END_S, partial(engine.stop, drain=False)):
            engine = None
        if self._gateway is not None:
            self._gateway.call(self._close_gateway(self._gateway.gateway))
            self._gateway.stop()
        if self._shared is not None and not ends_within(STEP_END_S, self._shared.tier.close):
            log.warning("router_left_waiting router=%s reason=%r", self.router_id, "a silent store")
        if gating is not None and ends_within(STEP_END_S, gating.close):
            gating = None
        if engine is None and gating is None:
            for dispatcher in (self._dispatcher, self._gating_dispatcher):
                if dispatcher is not None:
                    dispatcher.close()
        else:
            log.warning("router_left_waiting router=%s reason=%r", self.router_id, "a silent group")
        self._ended.set()

    async def _close_gateway(self, gateway: Gateway) -> None:
        """Close the port, let ended turns reach the store, and leave the store."""
        await gateway.stop(STREAM_END_S)
        if self._generation is not None:
            await self._generation.settle()
        if self._shared is not None:
            await self._shared.close()

    # What `ClusterServicer` asks.

    def status(self) -> cluster_pb2.RouterStatus:
        """Return this router's figures."""
        assert self._engine is not None  # the port opens after the engine exists
        stats = self._engine.stats()
        status = cluster_pb2.RouterStatus(
            router_id=self.router_id,
            state=self._state,
            grpc_address=self._routers.get(self.router_id, self._address),
            requests_running=stats.num_running,
            requests_waiting=stats.num_waiting,
            kv_blocks_used=stats.num_blocks_used,
            kv_blocks_total=stats.num_blocks,
            state_slots_used=stats.num_state_slots_used,
            state_slots_total=stats.num_state_slots,
            prompt_tokens=stats.prompt_tokens,
            generation_tokens=stats.generation_tokens,
            preemptions=stats.preemptions,
            steps=stats.steps,
            step_s=stats.step_s,
            dispatch_s=stats.dispatch_s,
            pid=os.getpid(),
            trunk_ops=self._ops_name,
            waiting_tokens=stats.num_queued_tokens,
            latency=latency_status(stats.latency),
        )
        shared = self._shared
        if stats.reuse.is_on:
            status.cache.CopyFrom(
                cache_status(
                    stats,
                    shared.tier.stats() if shared else None,
                    block_bytes=self._kv_block_bytes,
                    max_snapshot_bytes=self._engine.config.max_snapshot_bytes,
                )
            )
        status.cold.CopyFrom(cold_status(stats, shared.cold.stats() if shared else ColdStats()))
        if shared is not None:
            status.prefill_tokens_per_s = shared.tier.cost.prefill_tokens_per_s
            status.sessions_held = shared.store.num_leases
            status.stores.extend(store_status(server) for server in shared.servers())
        return status

    def service_status(self) -> cluster_pb2.ClusterStatus:
        """Return what is the same for every router."""
        return cluster_pb2.ClusterStatus(
            model=self._model_name,
            state="READY",
            dtype=str(self._dtype).removeprefix("torch."),
            placement_epoch=self._placements.epoch,
            max_model_len=self._max_model_len,
            scaling=scaling_status(self._service) if self._service else None,
        )

    def wish(self, wish: Wish) -> None:
        """Ask the process of `serve` for a change of the service; returns at once."""
        self._wishes.put(wish)

    def is_member(self, group_id: str) -> bool:
        """Return whether the service has this expert group, as far as this router knows."""
        return any(member.group_id == group_id for member in self._members)

    @property
    def num_experts(self) -> int:
        """Experts of a layer; 0 in a dense model."""
        return self._model.num_experts if self._placement is not None else 0

    def group_members(self) -> tuple[GroupMember, ...]:
        """Return the expert groups."""
        return self._members

    def router_addresses(self) -> Mapping[str, str]:
        """Return the address of every router."""
        return self._routers

    def transport_of(self, group_id: str) -> str:
        """Return how this router reaches the group."""
        transports = self._dispatcher.transports if self._dispatcher is not None else ()
        return next((t.name for t in transports if t.group_id == group_id), "")

    def placement(self) -> Placement | None:
        """Return the placement in force."""
        return None if self._dispatcher is None else self._dispatcher.placement

    def load_counts(self) -> npt.NDArray[np.int64]:
        """Return `[num_layers, num_experts]` pairs dispatched by this router."""
        if self._dispatcher is None:
            return np.zeros((self._model.num_layers, self._model.num_experts), np.int64)
        return self._dispatcher.load.snapshot()

    def expert_bytes(self) -> int:
        """Return the bytes of one expert."""
        return estimate_memory(self._model, self._dtype).expert_bytes

    def explain_autoscale(self, limit: int) -> cluster_pb2.ExplainAutoscaleResponse:
        """Return the last decisions on the number of members."""
        return self._decisions.explain(limit)

    async def drain_and_leave(self, timeout_s: float) -> int:
        """Drain, then end the process a moment after the answer."""
        loop = asyncio.get_running_loop()
        left = await loop.run_in_executor(None, self.drain, timeout_s)
        threading.Timer(LEAVE_DELAY_S, self._ended.set).start()
        return left

    def _connect(self, start: RouterStart, kernels: Kernels | None) -> ExpertDispatcher:
        assert self._placement is not None
        return ExpertDispatcher.connect(
            self._placement,
            start.group_addresses,
            router_id=self.router_id,
            hidden=self._model.hidden_size,
            top_k=self._model.top_k,
            dtype=self._dtype,
            transport=self._config.experts.transport,
            kernels=kernels,
            patience_s=self._config.experts.patience_s,
            access=self._security.to_groups,
        )

    def _engine_config(self, decoder: Decoder, start: RouterStart, namespace: str) -> EngineConfig:
        section: EngineSection = self._config.engine
        state_bytes = decoder.state_bytes_per_slot * section.max_num_seqs
        free = psutil.virtual_memory().available / start.num_routers_here - state_bytes
        num_blocks = start.num_kv_blocks or plan_kv_blocks(
            section,
            block_bytes=decoder.kv_bytes_per_block(section.block_size),
            max_model_len=self._max_model_len,
            free_bytes=free,
            has_blob_tier=self._shared is not None,
        )
        kv_bytes = num_blocks * decoder.kv_bytes_per_block(section.block_size)
        return EngineConfig(
            vocab_size=self._model.vocab_size,
            max_model_len=self._max_model_len,
            num_blocks=num_blocks,
            num_state_slots=section.max_num_seqs,
            block_size=section.block_size,
            max_num_seqs=section.max_num_seqs,
            max_num_batched_tokens=section.max_num_batched_tokens,
            max_queued=section.max_queued,
            eos_token_ids=self._model.eos_token_ids,
            prefix_caching=section.enable_prefix_caching,
            namespace=namespace,
            max_snapshot_bytes=int(self._config.state.snapshot_cache_gib * GIB),
            snapshot_interval=self._config.state.snapshot_interval_tokens,
            max_cold_bytes=plan_cold_bytes(section, kv_bytes=kv_bytes, free_bytes=free),
        )

    def _services(self, start: RouterStart, engine: Engine) -> list[Service]:
        served = ServedModel(
            name=start.model_name,
            model_type=self._model.model_type,
            max_model_len=self._max_model_len,
            vocab_size=self._model.vocab_size,
            dtype=str(self._dtype).removeprefix("torch."),
            weights_digest=self._weights_digest,
        )
        shared = self._shared
        callers = Callers(self._security.api_keys)
        self._generation = GenerationServicer(
            engine,
            self._text,
            served,
            self._defaults,
            address=lambda: self._address,
            store=shared.store if shared else None,
            forwarder=shared.forwarder if shared else None,
            callers=callers,
            namespace=engine.config.namespace,
        )
        services = [
            generation_service(self._generation),
            Service(
                cluster_pb2.DESCRIPTOR.services_by_name["ClusterService"].full_name,
                ClusterServicer(self, self._security.to_routers, self._security.to_groups),
                cluster_pb2_grpc.add_ClusterServiceServicer_to_server,
            ),
        ]
        if shared is not None:
            servicer = SessionServicer(
                shared.store,
                shared.namespace,
                callers,
                default_ttl_s=self._config.state.session_ttl_s,
            )
            services.append(session_service(servicer))
        if self._placement is not None:
            # A dispatcher has one call in flight: the service's own keeps it off the engine's.
            self._gating_dispatcher = self._connect(start, None)
            self._placements.add(self._gating_dispatcher)
            self._gating = GatingServicer(self._gate, self._gating_dispatcher, start.model_name)
            services.append(gating_service(self._gating))
        return services

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

    def _metrics_text(self) -> str:
        assert self._engine is not None  # the port opens after the engine exists
        figures = Figures(
            router_id=self.router_id,
            model=self._model_name,
            stats=self._engine.stats(),
            turns=self._generation.turn_stats() if self._generation else None,
        )
        if (shared := self._shared) is not None:
            figures = replace(
                figures,
                tier=shared.tier.stats(),
                cold=shared.cold.stats(),
                servers=shared.servers(),
                forwards=shared.forwarder.stats,
                sessions_held=shared.store.num_leases,
            )
        return metrics_text(figures)

    def _view(self) -> RouterView:
        """Return this router as the others are to see it."""
        assert self._engine is not None
        stats = self._engine.stats()
        rate = self._shared.tier.cost.prefill_tokens_per_s if self._shared else 0.0
        load = Load(
            prefill_tokens_per_s=rate,
            queued_tokens=stats.num_queued_tokens,
            num_running=stats.num_running + stats.num_waiting,
            max_running=self._engine.config.max_num_seqs,
        )
        warm = unpack_warm(warm_set(self._engine.warm_positions()))
        return RouterView(router_id=self._engine_id, address=self._address, load=load, warm=warm)

    def _read_gate(self, checkpoint: SafetensorsCheckpoint) -> Gate:
        """Read the gate weights once more, unpacked, for `GatingService`."""
        layers = range(self._model.num_layers if self._model.is_moe else 0)
        weights = {
            layer_id: checkpoint.get(f"layers.{layer_id}.mlp.gate.weight", dtype=self._dtype)
            for layer_id in layers
        }
        return Gate(weights, self._model.top_k)


STREAM_END_S = 1.0
"""How long the gateway gets to tell the clients of cut streams what happened."""
SWITCH_TIMEOUT_S = 20.0
"""How long a call under way may keep a new placement waiting before the controller asks again."""
STEP_END_S = 2.0
"""How long the step under way, or a call of `GatingService`, gets to end."""
