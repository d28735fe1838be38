"""The one seam to Ray: start or join a cluster, place, spawn, wait, kill.

Everything above this file speaks of processes and nodes and can be tested without Ray. Ray's errors
become ours here. Imports Ray late, because Ray reads its settings from the environment when it is
imported.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import psutil

from cluster.resources import MEMBER_RESOURCE, Node, lacking, total
from protos.errors import (
    ConfigurationError,
    DeadlineExceededError,
    ExpertMeshError,
    GroupLostError,
    InternalError,
    ResourceError,
    UnreachableError,
)

if TYPE_CHECKING:
    from ray.actor import ActorHandle
    from ray.util.placement_group import PlacementGroup

log = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 80 << 20
"""The smallest that Ray takes without a warning; no tensor ever travels through it."""
Guard = Callable[[], contextlib.AbstractContextManager[None]]
Lost = Callable[[str, str], ExpertMeshError]
WAIT_S = 0.2
FIRST_WAIT_S = 0.01
"""Where there is room, Ray gives a place within a hundredth of a second."""
NAMES_TIMEOUT_S = 5.0
MAX_MEMBERS = 4096


@dataclass(slots=True)
class Actor:
    """A process that Ray runs for us."""

    name: str
    handle: ActorHandle[Any]

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Start a method; returns the reference that `RayCluster.gather` waits for."""
        return getattr(self.handle, method).remote(*args, **kwargs)


def start_local_ray(folder: str, num_cpus: int, namespace: str, log_level: int) -> str:
    """Start Ray below this process and return `host:port`; called by `cluster.ray_host`."""
    import ray

    context = ray.init(
        address="local",
        namespace=namespace,
        num_cpus=num_cpus,
        resources={MEMBER_RESOURCE: MAX_MEMBERS},
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        logging_level=log_level,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
        _temp_dir=folder,
    )
    return str(context.address_info["gcs_address"])


def import_ray() -> None:
    """Import Ray before it is needed, half a second that passes while something else starts.

    Its settings must be in the environment by now.
    """
    import ray  # noqa: F401


@dataclass(slots=True)
class RayCluster:
    """A connection to a Ray cluster; `close` ends our actors and reservations, and no more."""

    namespace: str
    is_private: bool
    guard: Guard = contextlib.nullcontext
    """Held around every wait in Ray's code, which lasts `WAIT_S` at most."""
    actors: list[Actor] = field(default_factory=list)
    groups: list[PlacementGroup] = field(default_factory=list)

    @classmethod
    def connect_private(cls, address: str, *, namespace: str, verbose: bool) -> RayCluster:
        """Connect to the head that `PrivateRay` started."""
        import ray

        ray.init(
            address=address,
            namespace=namespace,
            logging_level=ray_log_level(verbose),
            log_to_driver=True,
        )
        return cls(namespace=namespace, is_private=True)

    @classmethod
    def join(cls, address: str, *, namespace: str, verbose: bool) -> RayCluster:
        """Connect to a running cluster.

        Raises:
            UnreachableError: Nothing answers at `address`.
            ConfigurationError: This machine is not one of the cluster's nodes.
        """
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Else the driver takes the lines of an autoscaler's log for events, and complains of each.
        os.environ.setdefault("RAY_SCHEDULER_EVENTS", "0")
        if address != "auto":
            _check_reachable(address)
        import ray

        try:
            ray.init(
                address=address,
                namespace=namespace,
                logging_level=ray_log_level(verbose),
                log_to_driver=True,
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UnreachableError(f"Ray cluster {address}: {error}") from error
        return cls(namespace=namespace, is_private=False)

    def nodes(self) -> list[Node]:
        """Return the nodes that are alive."""
        import ray

        with self.guard():
            found = ray.nodes()
        return [
            Node(
                node_id=node["NodeID"],
                address=node["NodeManagerAddress"],
                resources=node["Resources"],
            )
            for node in found
            if node["Alive"]
        ]

    def own_node_id(self) -> str:
        """Return the node that this process runs on."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def own_address(self) -> str:
        """Return this node's address, as other nodes reach it."""
        import ray

        return str(ray.util.get_node_ip_address())

    def missing(self, bundles: Sequence[Mapping[str, float]]) -> str:
        """Return what the cluster's nodes lack for these bundles, in words; empty: nothing."""
        return lacking(bundles, self.nodes())

    def ask_for(self, bundle: Mapping[str, float]) -> PlacementGroup:
        """Ask for a place for one actor; returns at once, and Ray may start a node for it."""
        from ray.util.placement_group import placement_group

        with self.guard():
            group = placement_group([dict(bundle)], strategy="SPREAD")
            self.groups.append(group)
        return group

    def release(self, place: PlacementGroup) -> None:
        """Give a place back; an actor that is still there ends."""
        from ray.util.placement_group import remove_placement_group

        with self.guard():
            remove_placement_group(place)
        self.groups.remove(place)

    def reserve(
        self, bundles: Sequence[Mapping[str, float]], timeout_s: float
    ) -> list[PlacementGroup]:
        """Reserve a place of its own for each actor, so that each can be given back.

        Raises:
            ResourceError: Not granted within `timeout_s`; says what is asked for and what exists.
        """
        places = [self.ask_for(bundle) for bundle in bundles]
        missing = list(places)
        deadline = time.monotonic() + timeout_s
        pause_s = FIRST_WAIT_S
        while missing:
            with self.guard():
                # Whole seconds only: less would be 0 as well.
                if missing[0].wait(timeout_seconds=0):
                    missing.pop(0)
                    continue
            if time.monotonic() < deadline:
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, WAIT_S)
                continue
            raise ResourceError(
                what="nodes in the Ray cluster",
                need=total(bundles),
                have=total([node.resources for node in self.nodes()], only=bundles)
                + f" in all on {len(self.nodes())} nodes, part of it in use",
                hint="add nodes, or lower --expert-groups or --routers",
            )
        return places

    def refuse_taken_names(self, names: Sequence[str]) -> None:
        """Check that no other service uses these names in the namespace.

        One that was killed a moment ago leaves them when Ray has noticed.

        Raises:
            ConfigurationError: One does, and still after `NAMES_TIMEOUT_S`.
        """
        import ray

        deadline = time.monotonic() + NAMES_TIMEOUT_S
        while True:
            with self.guard():
                taken = sorted(set(ray.util.list_named_actors()) & set(names))
            if not taken:
                return
            if time.monotonic() >= deadline:
                raise self._name_taken(taken[0])
            time.sleep(WAIT_S)

    def _name_taken(self, name: str) -> ConfigurationError:
        return ConfigurationError(
            "cluster.namespace",
            f"is in use: another service has the actor {name} in it",
            self.namespace,
            hint="stop that service, or give this one another --namespace",
        )

    def spawn(
        self,
        actor_class: Any,
        name: str,
        *args: Any,
        place: PlacementGroup | None = None,
        node_id: str | None = None,
    ) -> Actor:
        """Create a named actor that ends with this process; returns before it runs.

        Args:
            actor_class: A Ray actor class of `cluster.actors`.
            name: Unique in the namespace.
            *args: For the constructor.
            place: Of `reserve` or `ask_for`; or
            node_id: The node to run on, outside any reservation.

        Raises:
            ConfigurationError: The name is taken: another service has this namespace.
        """
        from ray.util.scheduling_strategies import (
            NodeAffinitySchedulingStrategy,
            PlacementGroupSchedulingStrategy,
        )

        strategy: Any
        num_cpus = 0.0
        if place is not None:
            strategy = PlacementGroupSchedulingStrategy(place, 0)
            num_cpus = place.bundle_specs[0].get("CPU", 0.0)
        else:
            strategy = NodeAffinitySchedulingStrategy(node_id, soft=False)
        try:
            with self.guard():
                handle = actor_class.options(
                    name=name,
                    num_cpus=num_cpus,
                    max_restarts=0,
                    max_task_retries=0,
                    scheduling_strategy=strategy,
                ).remote(*args)
        except ValueError as error:
            raise self._name_taken(name) from error
        actor = Actor(name, handle)
        self.actors.append(actor)
        return actor

    def gather(
        self,
        references: Mapping[str, Any],
        timeout_s: float,
        what: str,
        on_done: Callable[[str, Any], None] | None = None,
    ) -> dict[str, Any]:
        """Wait for all of these calls; the first failure ends the wait.

        Args:
            references: Name -> what `Actor.call` returned.
            timeout_s: Bound on the whole.
            what: Words for the error, e.g. `load the experts`.
            on_done: Called with name and result, in the order of completion.

        Raises:
            ExpertMeshError: What the call raised.
            GroupLostError: The process died.
            DeadlineExceededError: Some did not finish in time.
        """
        import ray

        pending = {reference: name for name, reference in references.items()}
        results = {}
        deadline = time.monotonic() + timeout_s
        while pending:
            left = deadline - time.monotonic()
            with self.guard():
                done, _ = ray.wait(list(pending), num_returns=1, timeout=WAIT_S)
            if not done and left > 0:
                continue
            if not done:
                raise DeadlineExceededError(f"{what} ({', '.join(pending.values())})", timeout_s)
            name = pending.pop(done[0])
            results[name] = self.result(name, done[0])
            if on_done is not None:
                on_done(name, results[name])
        return results

    def result(self, name: str, reference: Any, lost: Lost = GroupLostError) -> Any:
        """Return a finished call's value, or raise its error as ours.

        Raises:
            ExpertMeshError: What the call raised.
            GroupLostError: The process ended; or `lost`, made with name and detail.
        """
        import ray

        try:
            return ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, ExpertMeshError):
                raise error.cause from error
            raise InternalError(f"{name}: {error}") from error
        except ray.exceptions.RayActorError as error:
            raise lost(name, f"its process ended: {_first_line(str(error))}") from error
        except ray.exceptions.RayError as error:  # its node or its place has gone, or the answer
            raise lost(name, f"{type(error).__name__}: {_first_line(str(error))}") from error

    def settle(self, references: Mapping[str, Any], timeout_s: float) -> None:
        """Wait until these calls ended, well or not, but no longer than `timeout_s`."""
        import ray

        if references:
            ray.wait(list(references.values()), num_returns=len(references), timeout=timeout_s)

    def first_finished(self, references: Mapping[str, Any]) -> str | None:
        """Return the name of a call that finished or failed, or None after `WAIT_S`."""
        import ray

        if not references:
            time.sleep(WAIT_S)
            return None
        names = {reference: name for name, reference in references.items()}
        with self.guard():
            done, _ = ray.wait(list(names), num_returns=1, timeout=WAIT_S)
        return names[done[0]] if done else None

    def kill(self, actor: Actor) -> None:
        """End one of our processes; the others stay."""
        import ray

        with self.guard():
            self.actors.remove(actor)
            ray.kill(actor.handle)

    def close(self) -> None:
        """End our actors and reservations and disconnect. Never raises."""
        import ray
        from ray.util.placement_group import remove_placement_group

        if not ray.is_initialized():
            return
        for actor in self.actors:
            with contextlib.suppress(Exception):
                ray.kill(actor.handle)
        if not self.is_private:
            for group in self.groups:
                with contextlib.suppress(Exception):
                    remove_placement_group(group)
        ray.shutdown()


def ray_log_level(verbose: bool) -> int:
    """Return the level of Ray's own log."""
    return logging.INFO if verbose else logging.ERROR


def _check_reachable(address: str) -> None:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=5):
            pass
    except ValueError:
        raise ConfigurationError(
            "cluster.ray_address", "must be host:port or auto", address
        ) from None
    except OSError as error:
        raise UnreachableError(f"Ray cluster {address}: {error}") from error
    if not any("raylet" in (process.info["name"] or "") for process in _all_processes()):
        raise ConfigurationError(
            "cluster.ray_address",
            "needs a Ray node on this machine, and none runs here",
            address,
            hint=f"run `ray start --address={address}` first, or run serve on a node",
        )


def _all_processes() -> list[psutil.Process]:
    return list(psutil.process_iter(["name"]))


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")
