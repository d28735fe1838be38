"""Starts a service and ends it: the order of things, and who waits for whom.

    checks that need no torch
    in parallel: examination of the checkpoint, and Ray (each a process of its own)
    actors for all groups and routers; they import torch in parallel
    groups load their experts, routers their trunk, all in parallel
    routers connect to the groups and open their ports
    every router answers a request of one token
    ready

Whatever fails on the way ends everything that was started. Once it is ready, groups and routers
that die come back (`cluster.groups`, `cluster.routers`), and their numbers and the placement may
change (`cluster.scaling`). Knows Ray only through `ray_api`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cluster.autoscale_loop import Membership
from cluster.autoscaler import Autoscaler, check_bounds
from cluster.config import Config, parse_groups
from cluster.groups import Group
from cluster.kv_budget import format_bytes
from cluster.members import ProcessFacts, new_service_id
from cluster.preflight import Examination, Facts, quick_checks
from cluster.preflight_state import check_state_servers
from cluster.private_ray import PrivateRay
from cluster.processes import Processes
from cluster.ray_api import Actor, Guard, RayCluster, import_ray
from cluster.routers import Router
from cluster.security import load_security
from cluster.state_servers import ServiceState
from protos.errors import ConfigurationError, DeadlineExceededError, RouterLostError

if TYPE_CHECKING:
    from cluster.batch.supervisor import BatchSupervisor

STOP_TIMEOUT_S = 10.0
"""How long a drained process gets to close its port before it is killed."""

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
    _processes: Processes | None = None
    _examination: Examination | None = None
    _facts: Facts | None = None
    _state: ServiceState | None = None
    _autoscaler: Autoscaler | None = None
    _batches: BatchSupervisor | None = None
    _ray_address: str = ""
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
            batch = self.config.batch
            num_batches = batch.max_running if batch.roots else 0  # a CPU holds four clients
            self._private = PrivateRay(
                num_actors=len(groups) + self.config.router.count + num_batches,
                namespace=cluster.namespace,
                verbose=cluster.verbose,
            )
        self._facts = self._examination.finish(self._left())
        self._announce(self._facts)
        check_bounds(self.config, self._facts)
        if self._private is not None:
            with self.guard():
                import_ray()
            self._ray_address = self._private.address(self._left())
            with self.guard():
                self._cluster = RayCluster.connect_private(
                    self._ray_address, namespace=cluster.namespace, verbose=cluster.verbose
                )
        else:
            assert cluster.ray_address is not None
            self._ray_address = cluster.ray_address
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
        self._processes = processes = Processes(
            self.config,
            self._running,
            facts,
            state=self._state,
            model_name=self.model_name,
            service_id=self._service_id,
            progress=self.progress,
        )
        self._spawn(processes)
        actors = processes.group_actors | processes.router_actors
        where = self._gather("prepare", actors, "start the processes")
        self._load(processes, where)
        self._open_ports(processes)
        addresses = processes.routers.addresses()
        for name, address in addresses.items():
            self.progress(f"{name} listens on {address}")
        self._gather("check", processes.router_actors, "answer a request")
        processes.groups.watch()
        processes.routers.watch()
        view = processes.scaling.view()
        self._gather("join_group", processes.router_actors, "exchange addresses", view)
        self._start_batches(processes)
        self._autoscaler = processes.autoscaler = Autoscaler.start(
            self.config, self._membership, facts, self.progress, self.scale
        )
        self.is_ready = True
        return Ready(
            addresses=tuple(addresses.values()),
            model=self.model_name,
            num_groups=len(processes.groups.all),
        )

    def scale(self, expert_groups: int | None = None, routers: int | None = None) -> None:
        """Want other numbers of groups and routers; see `Scaling.scale`. After `start`."""
        self._made.scaling.scale(expert_groups, routers)

    def addresses(self) -> tuple[str, ...]:
        """Return the routers' addresses as they are now; any thread may ask, after `start`."""
        return tuple(self._made.routers.addresses().values())

    @property
    def model_name(self) -> str:
        """The name that clients use."""
        path = self.config.model.checkpoint.rstrip("/")
        return self.config.model.served_model_name or path.rsplit("/", 1)[-1]

    def wait(self) -> str | None:
        """Block until the service cannot go on, and return why; None when all routers drained.

        Groups and routers that die start again meanwhile, and their numbers may change.
        """
        cluster, routers, groups, scaling = (
            self._running,
            self._made.routers,
            self._made.groups,
            self._made.scaling,
        )
        while not (routers.is_over or groups.given_up):
            waiting = groups.references() | routers.references() | scaling.references()
            name = cluster.first_finished(waiting)
            if name in groups.all:
                groups.finished(name)
            elif name in routers.all:
                routers.finished(name)
            elif name is not None:
                scaling.finished(name)
            groups.tick()
            routers.tick()
            scaling.tick()
            if self._autoscaler is not None:
                self._autoscaler.tick([router.actor for router in routers.up])
        given_up = groups.given_up or routers.given_up
        return f"{', '.join(given_up)} died too often" if given_up else None

    def drain(self) -> int:
        """Take nothing new, finish what runs; return what is left after `shutdown_timeout_s`."""
        if self._batches is not None:  # its rows would be asked again and again
            self._batches.close()
        timeout_s = self.config.cluster.shutdown_timeout_s
        pending = {r.router_id: r.actor.call("drain", timeout_s) for r in self._made.routers.up}
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
        made = self._made
        groups = made.scaling.target.groups if made.scaling.placement else 0
        return Membership(
            groups=groups,
            num_routers=made.scaling.target.routers,
            routers=made.routers.addresses(),
            batches=self._batches.work if self._batches else None,
        )

    def _start_batches(self, processes: Processes) -> None:
        """Begin to run the batches that clients submit, where there may be any."""
        if not self.config.batch.roots:
            return
        assert self._state is not None  # the configuration is refused otherwise
        from cluster.batch.supervisor import BatchSite, BatchSupervisor

        site = BatchSite(
            model=self.model_name,
            section=self.config.batch,
            security=load_security(self.config),
            meta=self._state.servers.meta,
            ray_address=self._ray_address,
            routers=processes.routers.addresses,
            holder=f"serve.{self._service_id}",
            metrics_host=self.config.router.host,
        )
        self._batches = BatchSupervisor(site)
        self._batches.start()
        if self._batches.metrics_port is not None:
            self.progress(f"metrics of batches are on port {self._batches.metrics_port}")

    def _open_state(self) -> None:
        """Find or start the servers of sessions and cached KV."""
        section = self.config.state
        if not section.enabled:
            return
        host = None if self._running.is_private else self._running.own_address()
        self._state = ServiceState.open(section, host)
        if self._state.is_embedded:
            kept = "sessions and batches" if self.config.batch.roots else "sessions"
            self.progress(f"{kept} are kept in an embedded Valkey, as long as this service lives")

    def close(self) -> None:
        """End every process of the service. Never raises."""
        if self._batches is not None:
            self._batches.close()
        if self._autoscaler is not None:
            self._autoscaler.close()
        if self._examination is not None:
            self._examination.cancel()
        if self._cluster is not None:
            self._cluster.guard = nullcontext
            if (made := self._processes) is not None:
                for actors in (made.router_actors, made.group_actors):
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

    def _spawn(self, processes: Processes) -> None:
        """Create all actors at once; Ray starts their processes in parallel."""
        cluster, capacities = self._running, processes.scaling.target.capacities
        group_ids = list(capacities)
        router_ids = [f"router-{i}" for i in range(self.config.router.count)]
        clash = set(group_ids) & set(router_ids)
        if clash:
            raise ConfigurationError(
                "experts.groups", "must not use the name of a router", sorted(clash)[0]
            )
        cluster.refuse_taken_names([*group_ids, *router_ids])
        bundles = [processes.group_bundle] * len(group_ids)
        if not processes.are_routers_here:
            bundles += [processes.router_bundle] * len(router_ids)
        if bundles:
            self._wait_notice(bundles)
        places = iter(cluster.reserve(bundles, self._left()))
        for group_id in group_ids:
            group = Group(group_id, capacities[group_id], next(places))
            group.actor = processes.spawn_group(group_id, group.place)
            processes.groups.all[group_id] = group
        for index, router_id in enumerate(router_ids):
            processes.routers.all[router_id] = router = Router(router_id, index)
            router.place = next(places, None)
            router.actor = processes.spawn_router(router_id)

    def _wait_notice(self, bundles: list[dict[str, float]]) -> None:
        """Say early when the cluster as it is cannot hold the service; it may still grow."""
        missing = self._running.missing(bundles)
        if missing:
            self.progress(f"waiting for nodes: the Ray cluster lacks {missing}")

    def _load(self, processes: Processes, where: dict[str, ProcessFacts]) -> None:
        """Load experts and trunk in parallel; learn the groups' addresses."""
        routers, groups = processes.routers.all, processes.groups.all
        placement = processes.scaling.placement
        calls: dict[str, Any] = {}
        for group_id, group in groups.items():
            group.facts = where[group_id]
        for group_id, group in groups.items():
            assert placement is not None
            calls[group_id] = processes.call_load_experts(group, placement)
        for router_id, router in routers.items():
            router.facts = where[router_id]
            calls[router_id] = processes.call_load(router)
        started = time.monotonic()
        results = self._running.gather(
            calls,
            self._left(),
            "load the weights",
            lambda name, _: self.progress(f"{name} loaded in {time.monotonic() - started:.1f} s"),
        )
        for group_id, group in groups.items():
            group.address, group.holds, group.compute = results[group_id]
            group.joined = group.trimmed = group.holds
        kinds = {group.compute for group in groups.values()}
        if len(kinds) > 1:
            self.progress(
                f"warning: expert groups compute in different ways ({', '.join(sorted(kinds))}):"
                " last bits change when experts move; --expert-compute sets one"
            )

    def _open_ports(self, processes: Processes) -> None:
        routers = processes.routers.all
        calls = {router_id: processes.call_start(router) for router_id, router in routers.items()}
        opened = self._running.gather(calls, self._left(), "open the routers' ports")
        for router_id, router in routers.items():
            router.ready = opened[router_id]

    def _gather(
        self, method: str, actors: dict[str, Actor], what: str, *args: Any
    ) -> dict[str, Any]:
        calls = {name: actor.call(method, *args) for name, actor in actors.items()}
        return self._running.gather(calls, self._left(), what)

    @property
    def _made(self) -> Processes:
        assert self._processes is not None  # `start` makes them first
        return self._processes

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
