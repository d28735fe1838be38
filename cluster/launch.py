"""Starts a service and ends it: the order of things, and who waits for whom.

    checks that need no torch
    in parallel: examination of the checkpoint, and Ray (each a process of its own)
    actors for all groups and routers; they import torch in parallel
    groups load their experts, routers their trunk, all in parallel
    routers connect to the groups and open their ports
    every router answers a request of one token
    ready

Whatever fails on the way ends everything that was started. Knows Ray only through `ray_api`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import grpc

from cluster.config import Config, parse_groups
from cluster.kv_budget import format_bytes
from cluster.members import GroupMember, ProcessFacts, RouterStart, threads_per_group
from cluster.preflight import Examination, Facts, quick_checks, router_port
from cluster.ray_api import GROUP_RESOURCE, Actor, Guard, PrivateRay, RayCluster
from experts.placement import Placement
from experts.planner import plan_placement
from protos.errors import (
    ConfigurationError,
    DeadlineExceededError,
    ExpertMeshError,
    from_rpc_error,
)
from protos.v1 import generation_pb2, generation_pb2_grpc

STOP_TIMEOUT_S = 10.0
"""How long a drained process gets to close its port before it is killed."""
NODES_NOTICE_S = 3.0
"""After this long without nodes the user hears what is missing."""
WILDCARDS = ("0.0.0.0", "::", "")

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """A service that answers."""

    addresses: tuple[str, ...]
    """gRPC address of every router."""
    model: str
    num_groups: int

    def line(self) -> str:
        """Return the line that `serve` prints on stdout."""
        return (
            f"ready grpc={self.addresses[0]} model={self.model} groups={self.num_groups}"
            f" routers={len(self.addresses)}"
        )


@dataclass(slots=True)
class Service:
    """One served model: its groups and routers. Use as a context; leaving it ends everything."""

    config: Config
    progress: Progress
    guard: Guard = nullcontext
    """Held around calls into Ray, see `cluster.stopping`."""
    _cluster: RayCluster | None = None
    _groups: dict[str, Actor] = field(default_factory=dict)
    _routers: dict[str, Actor] = field(default_factory=dict)
    _examination: Examination | None = None
    _facts: Facts | None = None
    _private: PrivateRay | None = None
    _deadline: float = 0.0
    is_ready: bool = False

    def connect(self) -> None:
        """Check everything, and start or join Ray. First phase.

        Raises:
            ExpertMeshError: What stands in the way.
        """
        self._deadline = time.monotonic() + self.config.cluster.start_timeout_s
        quick_checks(self.config)
        self._examination = Examination(self.config)
        cluster = self.config.cluster
        if cluster.ray_address is None:
            self.progress("starting a private Ray cluster on this machine")
            groups = parse_groups(self.config.experts.groups)
            self._private = PrivateRay(
                num_actors=len(groups) + self.config.router.count,
                namespace=cluster.namespace,
                verbose=cluster.verbose,
            )
        self._facts = self._examination.finish()
        self._announce(self._facts)
        if self._private is not None:
            address = self._private.address()
            with self.guard():
                self._cluster = RayCluster.connect_private(
                    address, namespace=cluster.namespace, verbose=cluster.verbose
                )
        else:
            assert cluster.ray_address is not None
            self.progress(f"joining the Ray cluster {cluster.ray_address}")
            with self.guard():
                self._cluster = RayCluster.join(
                    cluster.ray_address, namespace=cluster.namespace, verbose=cluster.verbose
                )
        self._cluster.guard = self.guard

    def start(self) -> Ready:
        """Bring the service up; returns when every router has answered a request. Second phase.

        Raises:
            ExpertMeshError: What stands in the way.
        """
        assert self._facts is not None  # `connect` comes first
        facts = self._facts
        self._spawn(facts)
        where = self._gather("prepare", self._groups | self._routers, "start the processes")
        placement = self._plan(facts)
        members = self._load(facts, placement, where)
        addresses = self._open_ports(placement, members, where)
        for name, address in addresses.items():
            self.progress(f"{name} listens on {address}")
            check_answers(address, self._left())
        self._gather("join_group", self._routers, "exchange addresses", members, addresses)
        self.is_ready = True
        return Ready(
            addresses=tuple(addresses.values()),
            model=self.model_name,
            num_groups=len(self._groups),
        )

    @property
    def model_name(self) -> str:
        """The name that clients use."""
        path = self.config.model.checkpoint.rstrip("/")
        return self.config.model.served_model_name or path.rsplit("/", 1)[-1]

    def wait(self) -> str | None:
        """Block until a process dies, and return what happened; None when all routers drained."""
        cluster = self._running
        references = {
            name: actor.call("wait") for name, actor in (self._groups | self._routers).items()
        }
        while True:
            name = cluster.first_finished(references)
            if name is None:
                continue
            try:
                cluster.result(name, references[name])
            except ExpertMeshError as error:
                return str(error)
            if name not in self._routers:
                return f"{name} stopped"
            self._let_go(name)
            del references[name]
            if not self._routers:
                return None

    def _let_go(self, name: str) -> None:
        """End the process of a router that was drained; the others go on."""
        router = self._routers.pop(name)
        self._running.settle({name: router.call("stop")}, STOP_TIMEOUT_S)
        self._running.kill(router)
        self.progress(f"{name} was drained and left")

    def drain(self) -> int:
        """Take nothing new, finish what runs; return what is left after `shutdown_timeout_s`."""
        timeout_s = self.config.cluster.shutdown_timeout_s
        references = {name: actor.call("drain", timeout_s) for name, actor in self._routers.items()}
        left = self._running.gather(references, timeout_s + STOP_TIMEOUT_S, "drain the routers")
        return sum(left.values())

    def close(self) -> None:
        """End every process of the service. Never raises."""
        if self._examination is not None:
            self._examination.cancel()
        if self._cluster is not None:
            self._cluster.guard = nullcontext
            for actors in (self._routers, self._groups):
                references = {name: actor.call("stop") for name, actor in actors.items()}
                self._cluster.settle(references, STOP_TIMEOUT_S)
            self._cluster.close()
            self._cluster = None
        if self._private is not None:
            self._private.close()
            self._private = None

    def _announce(self, facts: Facts) -> None:
        experts = f"{facts.num_experts} experts a layer" if facts.num_experts else "dense"
        self.progress(
            f"{self.model_name}: {facts.model_type}, {facts.num_layers} layers, {experts},"
            f" {facts.dtype}, window {facts.max_model_len} tokens;"
            f" experts {format_bytes(facts.expert_bytes)}, trunk {format_bytes(facts.trunk_bytes)}"
        )
        if not facts.num_experts and self.config.experts.groups is not None:
            self.progress("warning: a dense model has no experts; no expert groups are started")
        if not facts.has_tokenizer:
            self.progress(
                "warning: no tokenizer.json: token ids in and out only, no text and no chat"
            )
        elif not facts.has_chat_template:
            self.progress("warning: no chat template: text and token ids only, no chat")

    def _spawn(self, facts: Facts) -> None:
        """Create all actors at once; Ray starts their processes in parallel."""
        from cluster.actors import ExpertGroupActor, RouterActor

        cluster = self._running
        group_ids = list(parse_groups(self.config.experts.groups)) if facts.num_experts else []
        router_ids = [f"router-{i}" for i in range(self.config.router.count)]
        clash = set(group_ids) & set(router_ids)
        if clash:
            raise ConfigurationError(
                "experts.groups", "must not use the name of a router", sorted(clash)[0]
            )
        cluster.refuse_taken_names([*group_ids, *router_ids])
        is_shared = any(GROUP_RESOURCE in node.resources for node in cluster.nodes())
        group_bundle = {"CPU": 1.0, **({GROUP_RESOURCE: 1.0} if is_shared else {})}
        routers_here = not cluster.is_private and self.config.router.host not in WILDCARDS
        bundles = [group_bundle for _ in group_ids]
        bundles += [] if routers_here else [{"CPU": 1.0} for _ in router_ids]
        reservation = None
        if bundles:
            self._wait_notice(bundles)
            reservation = cluster.reserve(bundles, self._left())
        for index, group_id in enumerate(group_ids):
            assert reservation is not None
            self._groups[group_id] = cluster.spawn(
                ExpertGroupActor, group_id, group_id, self.config, bundle=(reservation, index)
            )
        for index, router_id in enumerate(router_ids):
            bundle = (reservation, len(group_ids) + index) if reservation else None
            self._routers[router_id] = cluster.spawn(
                RouterActor,
                router_id,
                router_id,
                self.config,
                bundle=None if routers_here else bundle,
                node_id=cluster.own_node_id() if routers_here else None,
            )

    def _wait_notice(self, bundles: list[dict[str, float]]) -> None:
        """Say early when the cluster as it is cannot hold the service; it may still grow."""
        missing = self._running.missing(bundles)
        if missing:
            self.progress(f"waiting for nodes: the Ray cluster lacks {missing}")

    def _plan(self, facts: Facts) -> Placement | None:
        if not facts.num_experts:
            return None
        capacities = parse_groups(self.config.experts.groups)
        return plan_placement(facts.num_layers, facts.num_experts, capacities)

    def _load(
        self, facts: Facts, placement: Placement | None, where: dict[str, ProcessFacts]
    ) -> list[GroupMember]:
        """Load experts and trunk in parallel; return the groups with their addresses."""
        cores = {process.node_id: process.cores for process in where.values()}
        threads = threads_per_group(
            self.config.experts.threads,
            {group_id: where[group_id].node_id for group_id in self._groups},
            cores,
        )
        calls: dict[str, Any] = {}
        for group_id, actor in self._groups.items():
            assert placement is not None
            host = "127.0.0.1" if self._running.is_private else where[group_id].address
            calls[group_id] = actor.call(
                "load", placement.to_json(), facts.dtype, threads[group_id], host
            )
        for router_id, actor in self._routers.items():
            router_threads = self.config.router.threads or where[router_id].cores
            calls[router_id] = actor.call("load", facts.dtype, facts.max_model_len, router_threads)
        started = time.monotonic()
        results = self._running.gather(
            calls,
            self._left(),
            "load the weights",
            lambda name, _: self.progress(f"{name} loaded in {time.monotonic() - started:.1f} s"),
        )
        capacities = parse_groups(self.config.experts.groups)
        return [
            GroupMember(
                group_id=group_id,
                grpc_address=results[group_id],
                node_id=where[group_id].node_id,
                pid=where[group_id].pid,
                capacity=capacities[group_id],
            )
            for group_id in self._groups
        ]

    def _open_ports(
        self,
        placement: Placement | None,
        members: list[GroupMember],
        where: dict[str, ProcessFacts],
    ) -> dict[str, str]:
        nodes = [where[router_id].node_id for router_id in self._routers]
        calls = {
            router_id: actor.call(
                "start",
                RouterStart(
                    host=self.config.router.host,
                    port=router_port(self.config, index),
                    model_name=self.model_name,
                    placement_json=placement.to_json() if placement else None,
                    groups=tuple(members),
                    num_routers_here=nodes.count(where[router_id].node_id),
                ),
            )
            for index, (router_id, actor) in enumerate(self._routers.items())
        }
        bound = self._running.gather(calls, self._left(), "open the routers' ports")
        addresses = {}
        for router_id in self._routers:
            host, _, port = bound[router_id].rpartition(":")
            if host.strip("[]") in WILDCARDS:
                host = "127.0.0.1" if self._running.is_private else where[router_id].address
            addresses[router_id] = f"{host}:{port}"
        return addresses

    def _gather(
        self, method: str, actors: dict[str, Actor], what: str, *args: Any
    ) -> dict[str, Any]:
        calls = {name: actor.call(method, *args) for name, actor in actors.items()}
        return self._running.gather(calls, self._left(), what)

    @property
    def _running(self) -> RayCluster:
        assert self._cluster is not None  # `start` connects first
        return self._cluster

    def _left(self) -> float:
        """Seconds left of `start_timeout_s`.

        Raises:
            DeadlineExceededError: None.
        """
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise DeadlineExceededError("the start", self.config.cluster.start_timeout_s)
        return left


def check_answers(address: str, timeout_s: float) -> None:
    """Ask a router for one token and wait for it: the whole path works, and is warm.

    Raises:
        ExpertMeshError: What the router answered.
    """
    request = generation_pb2.GenerateRequest(
        tokens=generation_pb2.TokenIds(ids=[0]),
        sampling=generation_pb2.Sampling(temperature=0.0),
        stopping=generation_pb2.Stopping(max_tokens=1, ignore_eos=True),
    )
    with grpc.insecure_channel(address) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        try:
            for _ in stub.Generate(request, timeout=timeout_s, wait_for_ready=True):
                pass
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
