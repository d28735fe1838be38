"""Starts a service and ends it: the order of things, and who waits for whom.

    checks that need no torch
    in parallel: examination of the checkpoint, and Ray (each a process of its own)
    actors for all groups and routers; they import torch in parallel
    groups load their experts, routers their trunk, all in parallel
    routers connect to the groups and open their ports
    every router answers a request of one token
    ready

Whatever fails on the way ends everything that was started. Once it is ready, a group that dies ends
the service, and a router that dies comes back (`cluster.routers`). Knows Ray only through
`ray_api`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from cluster.autoscale_loop import Membership
from cluster.autoscaler import Autoscaler, check_mode
from cluster.config import Config, parse_groups
from cluster.kv_budget import format_bytes
from cluster.members import (
    GroupMember,
    ProcessFacts,
    RouterStart,
    engine_id,
    new_service_id,
    threads_per_group,
)
from cluster.preflight import Examination, Facts, metrics_port, quick_checks, router_port
from cluster.preflight_state import check_state_servers
from cluster.ray_api import GROUP_RESOURCE, Actor, Guard, PrivateRay, RayCluster
from cluster.routers import Router, Routers
from cluster.security import config_of_group
from cluster.state_servers import ServiceState
from experts.placement import Placement
from experts.planner import plan_placement
from protos.errors import (
    ConfigurationError,
    DeadlineExceededError,
    ExpertMeshError,
    RouterLostError,
)

STOP_TIMEOUT_S = 10.0
"""How long a drained process gets to close its port before it is killed."""
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
    _reservation: Any = None
    """Of `RayCluster.reserve`: a bundle per group, then one per router."""
    _groups: dict[str, Actor] = field(default_factory=dict)
    _members: list[GroupMember] = field(default_factory=list)
    _placement: Placement | None = None
    _routers: Routers | None = None
    _examination: Examination | None = None
    _facts: Facts | None = None
    _state: ServiceState | None = None
    _autoscaler: Autoscaler | None = None
    _service_id: str = field(default_factory=new_service_id)
    _private: PrivateRay | None = None
    _deadline: float = 0.0
    is_ready: bool = False

    def connect(self) -> None:
        """Check everything, and start or join Ray. First phase.

        Raises:
            ExpertMeshError: What stands in the way.
        """
        self._deadline = time.monotonic() + self.config.cluster.start_timeout_s
        check_mode(self.config)
        for warning in quick_checks(self.config):
            self.progress(f"warning: {warning}")
        if self.config.state.enabled:
            for warning in check_state_servers(self.config.state):
                self.progress(f"warning: {warning}")
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
        self._open_state()
        self._routers = Routers(
            calls=self._running,
            recipe=self,
            progress=self.progress,
            start_timeout_s=self.config.cluster.start_timeout_s,
        )
        self._spawn(facts)
        where = self._gather("prepare", self._groups | self._router_actors, "start the processes")
        self._placement = self._plan(facts)
        self._load(facts, where)
        self._open_ports()
        addresses = self._routers.addresses()
        for name, address in addresses.items():
            self.progress(f"{name} listens on {address}")
        self._gather("check", self._router_actors, "answer a request")
        who = (self._members, addresses)
        self._gather("join_group", self._router_actors, "exchange addresses", *who)
        self._autoscaler = Autoscaler.start(
            self.config, self._membership, facts.expert_bytes, self.progress
        )
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
        """Block until the service cannot go on, and return why; None when all routers drained.

        A router that dies starts again meanwhile.
        """
        cluster, routers = self._running, self._watched
        groups = {name: actor.call("wait") for name, actor in self._groups.items()}
        routers.watch()
        while not routers.is_over:
            name = cluster.first_finished(groups | routers.references())
            if name in groups:
                try:
                    cluster.result(name, groups[name])
                except ExpertMeshError as error:
                    return str(error)
                return f"{name} stopped"
            if name is not None:
                routers.finished(name)
            routers.tick()
            if self._autoscaler is not None:
                self._autoscaler.tick([router.actor for router in routers.up])
        given_up = routers.given_up
        return f"{', '.join(given_up)} died too often" if given_up else None

    def drain(self) -> int:
        """Take nothing new, finish what runs; return what is left after `shutdown_timeout_s`."""
        timeout_s = self.config.cluster.shutdown_timeout_s
        pending = {r.router_id: r.actor.call("drain", timeout_s) for r in self._watched.up}
        deadline = time.monotonic() + timeout_s + STOP_TIMEOUT_S
        left = 0
        while pending and time.monotonic() < deadline:
            name = self._running.first_finished(pending)
            if name is not None:
                try:
                    left += self._running.result(name, pending.pop(name), RouterLostError)
                except RouterLostError as error:
                    self.progress(f"not drained: {error}")
        return left

    def _membership(self) -> Membership:
        """Return how many members there are to be, and where the routers are."""
        return Membership(groups=len(self._groups), routers=self._watched.addresses())

    def _open_state(self) -> None:
        """Find or start the servers of sessions and cached KV."""
        section = self.config.state
        if not section.enabled:
            return
        host = None if self._running.is_private else self._running.own_address()
        self._state = ServiceState.open(section, host)
        if self._state.is_embedded:
            self.progress("sessions are kept in an embedded Valkey, as long as this service lives")

    # What `Routers` asks, to start a router again.

    def spawn_router(self, router_id: str) -> Actor:
        """Create the actor of a router, where its reservation is."""
        from cluster.actors import RouterActor

        cluster = self._running
        index = self._watched.all[router_id].index
        here = self._routers_here
        bundle = None if here else (self._reservation, len(self._groups) + index)
        node_id = cluster.own_node_id() if here else None
        return cluster.spawn(
            RouterActor, router_id, router_id, self.config, bundle=bundle, node_id=node_id
        )

    def call_load(self, router: Router) -> Any:
        """Start loading a router's trunk."""
        assert self._facts is not None
        assert router.facts is not None
        threads = self.config.router.threads or router.facts.cores
        return router.actor.call("load", self._facts.dtype, self._facts.max_model_len, threads)

    def call_start(self, router: Router) -> Any:
        """Start opening a router's port: the one it had, or the configured one."""
        assert router.facts is not None
        host = self.config.router.host
        advertised = host
        if host.strip("[]") in WILDCARDS:
            advertised = "127.0.0.1" if self._running.is_private else router.facts.address
        here = [r for r in self._watched.all.values() if r.facts is not None]
        start = RouterStart(
            host=host,
            port=router.port or router_port(self.config, router.index),
            advertised_host=advertised,
            model_name=self.model_name,
            placement_json=self._placement.to_json() if self._placement else None,
            groups=tuple(self._members),
            num_routers_here=sum(r.facts.node_id == router.facts.node_id for r in here if r.facts),
            num_kv_blocks=router.ready.num_kv_blocks if router.ready else None,
            metrics_port=metrics_port(self.config, router.index),
            service_id=self._service_id,
            state=self._state.servers if self._state else None,
        )
        return router.actor.call("start", start)

    def router_died(self, router: Router) -> None:
        """Free the sessions that a dead router held; nobody waits for it."""
        if self._state is not None and router.facts is not None:
            name = engine_id(router.router_id, self._service_id)
            self._state.report_dead(name, router.facts.boot)

    def routers_changed(self) -> None:
        """Tell the routers that are up who else serves; nobody waits for it."""
        for router in self._watched.up:
            router.actor.call("join_group", self._members, self._watched.addresses())
            if self._autoscaler is not None:
                self._autoscaler.welcome(router.actor)

    def close(self) -> None:
        """End every process of the service. Never raises."""
        if self._autoscaler is not None:
            self._autoscaler.close()
        if self._examination is not None:
            self._examination.cancel()
        if self._cluster is not None:
            self._cluster.guard = nullcontext
            for actors in (self._router_actors, self._groups):
                references = {name: actor.call("stop") for name, actor in actors.items()}
                self._cluster.settle(references, STOP_TIMEOUT_S)
            self._cluster.close()
            self._cluster = None
        if self._private is not None:
            self._private.close()
            self._private = None
        if self._state is not None:
            self._state.close()
            self._state = None

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
        from cluster.actors import ExpertGroupActor

        cluster = self._running
        group_ids = list(parse_groups(self.config.experts.groups)) if facts.num_experts else []
        router_ids = [f"router-{i}" for i in range(self.config.router.count)]
        clash = set(group_ids) & set(router_ids)
        if clash:
            raise ConfigurationError(
                "experts.groups", "must not use the name of a router", sorted(clash)[0]
            )
        cluster.refuse_taken_names([*group_ids, *router_ids])
        resource = self.config.cluster.group_resource
        if resource is None and any(GROUP_RESOURCE in node.resources for node in cluster.nodes()):
            resource = GROUP_RESOURCE
        group_bundle = {"CPU": 1.0, **({resource: 1.0} if resource else {})}
        bundles = [group_bundle for _ in group_ids]
        bundles += [] if self._routers_here else [{"CPU": 1.0} for _ in router_ids]
        if bundles:
            self._wait_notice(bundles)
            self._reservation = cluster.reserve(bundles, self._left())
        config = config_of_group(self.config)
        for index, group_id in enumerate(group_ids):
            self._groups[group_id] = cluster.spawn(
                ExpertGroupActor, group_id, group_id, config, bundle=(self._reservation, index)
            )
        for index, router_id in enumerate(router_ids):
            self._watched.all[router_id] = router = Router(router_id, index)
            router.actor = self.spawn_router(router_id)

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

    def _load(self, facts: Facts, where: dict[str, ProcessFacts]) -> None:
        """Load experts and trunk in parallel; learn the groups' addresses."""
        routers = self._watched.all
        cores = {process.node_id: process.cores for process in where.values()}
        threads = threads_per_group(
            self.config.experts.threads,
            {group_id: where[group_id].node_id for group_id in self._groups},
            cores,
        )
        calls: dict[str, Any] = {}
        for group_id, actor in self._groups.items():
            assert self._placement is not None
            host = "127.0.0.1" if self._running.is_private else where[group_id].address
            calls[group_id] = actor.call(
                "load", self._placement.to_json(), facts.dtype, threads[group_id], host
            )
        for router_id, router in routers.items():
            router.facts = where[router_id]
            calls[router_id] = self.call_load(router)
        started = time.monotonic()
        results = self._running.gather(
            calls,
            self._left(),
            "load the weights",
            lambda name, _: self.progress(f"{name} loaded in {time.monotonic() - started:.1f} s"),
        )
        capacities = parse_groups(self.config.experts.groups)
        self._members = [
            GroupMember(
                group_id=group_id,
                grpc_address=results[group_id],
                node_id=where[group_id].node_id,
                pid=where[group_id].pid,
                capacity=capacities[group_id],
            )
            for group_id in self._groups
        ]

    def _open_ports(self) -> None:
        routers = self._watched.all
        calls = {router_id: self.call_start(router) for router_id, router in routers.items()}
        opened = self._running.gather(calls, self._left(), "open the routers' ports")
        for router_id, router in routers.items():
            router.ready = opened[router_id]

    def _gather(
        self, method: str, actors: dict[str, Actor], what: str, *args: Any
    ) -> dict[str, Any]:
        calls = {name: actor.call(method, *args) for name, actor in actors.items()}
        return self._running.gather(calls, self._left(), what)

    @property
    def _routers_here(self) -> bool:
        """Whether the routers run on this node, outside any reservation: they bind its address."""
        return not self._running.is_private and self.config.router.host not in WILDCARDS

    @property
    def _watched(self) -> Routers:
        assert self._routers is not None  # `start` makes them first
        return self._routers

    @property
    def _router_actors(self) -> dict[str, Actor]:
        """The routers that have a process."""
        routers = self._routers.all.values() if self._routers is not None else ()
        return {router.router_id: router.actor for router in routers if router.actor is not None}

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
