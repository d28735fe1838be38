"""Thin Ray shells around plain classes: they pass calls on and hold no logic.

Constructors are cheap, so that Ray knows at once whether a process runs; `prepare` imports what is
slow, `load` reads weights. Calls carry ids, addresses and plans, never tensors. Heavy modules are
imported inside the methods: `serve` imports this file and must stay light.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import ray

from cluster.config import Config
from cluster.logs import configure_logging
from cluster.members import (
    GroupMember,
    ProcessFacts,
    RouterReady,
    RouterStart,
    ServiceView,
    Wish,
)

if TYPE_CHECKING:
    from cluster.group_process import GroupProcess
    from cluster.router_process import RouterProcess

CONCURRENT_CALLS = 8
"""Three wait (for the end of the process, for a wish, for requests to end), the others work."""


@ray.remote(max_concurrency=CONCURRENT_CALLS)
class ExpertGroupActor:
    """The process of one expert group."""

    def __init__(self, group_id: str, config: Config) -> None:
        configure_logging(group_id, verbose=config.cluster.verbose)
        self._group_id = group_id
        self._config = config
        self._process: GroupProcess | None = None

    def prepare(self) -> ProcessFacts:
        """Import torch and deepspeed; say where this process runs."""
        from cluster.group_process import GroupProcess

        self._process = GroupProcess(self._group_id, self._config)
        return self._process.facts(*_where())

    def load(
        self, placement_json: str, dtype: str, threads: int, host: str, compute: str
    ) -> tuple[str, int, str]:
        """Load what the placement gives this group; return gRPC address, epoch, and compute."""
        return self._running.load(placement_json, dtype, threads, host, compute)

    def take(self, placement_json: str) -> tuple[str, int, str]:
        """Load what the placement gives this group, beside what it holds; returns likewise."""
        return self._running.take(placement_json)

    def trim(self, placement_json: str) -> int:
        """Forget what the placement does not give this group; return its epoch."""
        return self._running.trim(placement_json)

    def wait(self) -> None:
        """Return when the process was told to stop."""
        self._running.stopped.wait()

    def stop(self) -> None:
        """Close the server and free the experts."""
        if self._process is not None:
            self._process.stop()

    @property
    def _running(self) -> GroupProcess:
        assert self._process is not None  # the caller's order: prepare comes first
        return self._process


@ray.remote(max_concurrency=CONCURRENT_CALLS)
class RouterActor:
    """The process of one router."""

    def __init__(self, router_id: str, config: Config) -> None:
        configure_logging(router_id, verbose=config.cluster.verbose)
        self._router_id = router_id
        self._config = config
        self._process: RouterProcess | None = None

    def prepare(self) -> ProcessFacts:
        """Import torch; say where this process runs."""
        from cluster.router_process import RouterProcess

        self._process = RouterProcess(self._router_id, self._config)
        return self._process.facts(*_where())

    def load(self, dtype: str, max_model_len: int, threads: int) -> int:
        """Load the trunk; return its bytes."""
        return self._running.load(dtype, max_model_len, threads)

    def start(self, start: RouterStart) -> RouterReady:
        """Connect to the expert groups and open the gRPC port."""
        return self._running.start(start)

    def check(self) -> None:
        """Generate a token over the gRPC port."""
        self._running.check()

    def join_group(self, view: ServiceView) -> None:
        """Learn how the whole service is, for status questions."""
        self._running.set_view(view)

    def connect(self, placement_json: str, members: list[GroupMember]) -> tuple[str, int]:
        """Connect to the groups of a placement to come; return "connect" and its epoch."""
        return self._running.connect(placement_json, members)

    def switch(self, epoch: int) -> tuple[str, int]:
        """Follow that placement from the next call on; return "switch" and the epoch."""
        return self._running.switch(epoch)

    def sleep(self) -> tuple[str, bool]:
        """Let requests wait from now on; return "sleep" and False where there are any."""
        return self._running.sleep()

    def wake(self) -> tuple[str, bool]:
        """Answer requests again; return "wake" and True."""
        return self._running.wake()

    def next_wish(self) -> Wish | None:
        """Wait until someone asks this router for a change of the service, and return it."""
        return self._running.next_wish()

    def wait(self) -> None:
        """Return when the process was told to stop; raise when its engine died."""
        self._running.wait()

    def note_decisions(self, mode: str, decisions: list[bytes]) -> None:
        """Keep decisions of the autoscaler, to explain them."""
        self._running.note_decisions(mode, decisions)

    def drain(self, timeout_s: float) -> int:
        """Take nothing new, finish what runs; return what is left after `timeout_s`."""
        return self._running.drain(timeout_s)

    def stop(self) -> None:
        """Close the port, stop the engine, end what still runs."""
        if self._process is not None:
            self._process.stop()

    @property
    def _running(self) -> RouterProcess:
        assert self._process is not None  # the caller's order: prepare comes first
        return self._process


def _where() -> tuple[str, str]:
    """Return node id and address of this process."""
    return ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address()
