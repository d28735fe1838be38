"""The processes of one service: how each is made, what it takes of a node, and what it is told.

What `cluster.groups`, `cluster.routers` and `cluster.scaling` ask to start a process, again or for
the first time. Every call returns at once; when processes start and end is decided there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cluster.autoscaler import Autoscaler
from cluster.config import Config, parse_groups
from cluster.controller import Target
from cluster.groups import Group, Groups
from cluster.members import RouterStart, engine_id, threads_per_group
from cluster.preflight import Facts, metrics_port, router_port
from cluster.ray_api import Actor, RayCluster
from cluster.resources import GROUP_RESOURCE, MEMBER_RESOURCE
from cluster.routers import Router, Routers
from cluster.scaling import Scaling
from cluster.security import config_of_group
from cluster.state_servers import ServiceState
from experts.placement import Placement
from experts.planner import plan_placement

WILDCARDS = ("0.0.0.0", "::", "")


class Processes:
    """Groups and routers of one service.

    Args:
        config: Of the service.
        cluster: Where they run.
        facts: Of the checkpoint.
        state: The servers of sessions and cached KV; None: there are none.
        model_name: That clients use.
        service_id: Tells its routers from those of others.
        progress: Takes a sentence for the user.
    """

    def __init__(
        self,
        config: Config,
        cluster: RayCluster,
        facts: Facts,
        *,
        state: ServiceState | None,
        model_name: str,
        service_id: str,
        progress: Callable[[str], None],
    ) -> None:
        self._config = config
        self._cluster = cluster
        self._facts = facts
        self._state = state
        self._model_name = model_name
        self._service_id = service_id
        capacities = parse_groups(config.experts.groups) if facts.num_experts else {}
        self.autoscaler: Autoscaler | None = None
        """Set when there is one."""
        self.group_bundle, self.router_bundle = self._bundles()
        timeout_s = config.cluster.start_timeout_s
        self.routers = Routers(cluster, self, progress, timeout_s)
        self.groups = Groups(cluster, self, progress, timeout_s)
        self.scaling = Scaling(
            calls=cluster,
            site=self,
            progress=progress,
            groups=self.groups,
            routers=self.routers,
            target=Target(
                groups=len(capacities), routers=config.router.count, capacities=capacities
            ),
            drain_timeout_s=config.cluster.shutdown_timeout_s,
            placement=plan_placement(facts.num_layers, facts.num_experts, capacities)
            if capacities
            else None,
        )

    @property
    def are_routers_here(self) -> bool:
        """Whether the routers run on this node, outside any reservation: they bind its address."""
        return not self._cluster.is_private and self._config.router.host not in WILDCARDS

    @property
    def group_actors(self) -> dict[str, Actor]:
        """The groups that have a process."""
        groups = self.groups.all.values()
        return {group.group_id: group.actor for group in groups if group.actor is not None}

    @property
    def router_actors(self) -> dict[str, Actor]:
        """The routers that have a process."""
        routers = self.routers.all.values()
        return {router.router_id: router.actor for router in routers if router.actor is not None}

    def _bundles(self) -> tuple[dict[str, float], dict[str, float]]:
        """Return what a group and a router take of a node."""
        cluster = self._cluster
        if cluster.is_private:  # this machine is all there is, whatever its CPUs
            return {MEMBER_RESOURCE: 1.0}, {MEMBER_RESOURCE: 1.0}
        resource = self._config.cluster.group_resource
        if resource is None and any(GROUP_RESOURCE in node.resources for node in cluster.nodes()):
            resource = GROUP_RESOURCE
        return {"CPU": 1.0, **({resource: 1.0} if resource else {})}, {"CPU": 1.0}

    def reserve_group(self) -> Any:
        """Ask Ray for a place for one group, on a node that there may not be yet."""
        return self._cluster.ask_for(self.group_bundle)

    def release(self, place: Any) -> None:
        """Give a place back, so that Ray may end its node."""
        self._cluster.release(place)

    def spawn_group(self, group_id: str, place: Any) -> Actor:
        """Create the actor of a group in its place."""
        from cluster.actors import ExpertGroupActor

        config = config_of_group(self._config)
        return self._cluster.spawn(ExpertGroupActor, group_id, group_id, config, place=place)

    def group_died(self, group_id: str) -> None:
        """Let the controller know."""
        self.scaling.group_died(group_id)

    def spawn_router(self, router_id: str) -> Actor:
        """Create the actor of a router, in its place."""
        from cluster.actors import RouterActor

        cluster, router = self._cluster, self.routers.all[router_id]
        here = self.are_routers_here
        if router.place is None and not here:
            router.place = cluster.ask_for(self.router_bundle)
        node_id = cluster.own_node_id() if here else None
        return cluster.spawn(
            RouterActor, router_id, router_id, self._config, place=router.place, node_id=node_id
        )

    def router_leaves(self, router: Router) -> None:
        """Let the controller know that it was asked to."""
        self.scaling.router_left()

    def router_left(self, router: Router) -> None:
        """Give its place back."""
        if router.place is not None:
            self._cluster.release(router.place)
            router.place = None

    def call_load_experts(self, group: Group, placement: Placement) -> Any:
        """Start loading what the placement gives the group; ends with its address."""
        assert group.facts is not None
        if group.address:
            return group.actor.call("take", placement.to_json())
        facts = group.facts
        nodes = {g.group_id: g.facts.node_id for g in self.groups.all.values() if g.facts}
        threads = threads_per_group(
            self._config.experts.threads,
            {g: node for g, node in nodes.items() if node == facts.node_id},
            {facts.node_id: facts.cores},
        )[group.group_id]
        host = "127.0.0.1" if self._cluster.is_private else facts.address
        compute: str = self._config.experts.compute
        chosen = [g.compute for g in self.groups.all.values() if g.compute]
        if compute == "auto" and chosen:
            compute = chosen[0]
        call = group.actor.call
        return call("load", placement.to_json(), self._facts.dtype, threads, host, compute)

    def missing_nodes(self) -> str:
        """Return what the cluster lacks for the groups and routers that there are to be."""
        bundles = [self.group_bundle] * len(self.groups.all)
        if not self.are_routers_here:
            bundles += [self.router_bundle] * len(self.router_actors)
        return self._cluster.missing(bundles)

    def call_load(self, router: Router) -> Any:
        """Start loading a router's trunk."""
        assert router.facts is not None
        threads = self._config.router.threads or router.facts.cores
        return router.actor.call("load", self._facts.dtype, self._facts.max_model_len, threads)

    def can_start(self) -> bool:
        """Return whether a router finds the groups of the placement in force, or needs none."""
        return self.scaling.placement is None or self.scaling.serves

    def call_start(self, router: Router) -> Any:
        """Start opening a router's port: the one it had, or the configured one."""
        assert router.facts is not None
        host = self._config.router.host
        advertised = host
        if host.strip("[]") in WILDCARDS:
            advertised = "127.0.0.1" if self._cluster.is_private else router.facts.address
        here = [r for r in self.routers.all.values() if r.facts is not None]
        placement = self.scaling.placement
        router.follows = router.connected = placement.epoch if placement else 0
        start = RouterStart(
            host=host,
            port=router.port or router_port(self._config, router.index),
            advertised_host=advertised,
            model_name=self._model_name,
            placement_json=placement.to_json() if placement else None,
            groups=tuple(self.scaling.members()),
            num_routers_here=sum(r.facts.node_id == router.facts.node_id for r in here if r.facts),
            num_kv_blocks=router.ready.num_kv_blocks if router.ready else None,
            metrics_port=metrics_port(self._config, router.index),
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
        """Tell them what the autoscaler has decided; the rest the controller tells."""
        if self.autoscaler is not None:
            for router in self.routers.up:
                self.autoscaler.welcome(router.actor)
