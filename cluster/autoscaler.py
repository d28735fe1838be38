"""What `serve` does with the decisions of `cluster.autoscale_loop`: tells them to user and routers.

Lives in the thread that may call Ray. Routers keep the decisions, so that any of them can explain
(`expertmesh autoscale explain`), and a router that comes back gets all that are kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from cluster.autoscale import Decision, Policy
from cluster.autoscale_log import DecisionLog, decision_message
from cluster.autoscale_loop import AutoscaleLoop, Membership, policy_of
from cluster.config import Config, parse_groups
from cluster.preflight import Facts
from cluster.security import load_security
from cluster.status import ask_status
from protos.errors import ConfigurationError
from protos.v1 import cluster_pb2

ASK_TIMEOUT_S = 4.0
"""A router asks all members at once, and waits 2 s for the silent ones."""


Scale = Callable[[int | None, int | None], None]
"""Takes the wanted numbers of expert groups and routers (None: no change); returns at once."""


class Listener(Protocol):
    """A router that keeps decisions."""

    def call(self, method: str, mode: str, decisions: list[bytes]) -> object:
        """Start `note_decisions`; nobody waits for it."""
        ...


@dataclass(slots=True)
class Autoscaler:
    """Decides while the service runs, and passes the decisions on.

    Args:
        mode: As configured; never `off`.
        loop: Decides.
        membership: How many members there are to be.
        progress: Takes a sentence for the user.
        clock: Unix seconds.
    """

    mode: str
    loop: AutoscaleLoop
    membership: Callable[[], Membership]
    """How many members there are to be: a decision on other numbers is out of date."""
    progress: Callable[[str], None]
    scale: Scale | None = None
    """Makes it so; None: nobody does."""
    clock: Callable[[], float] = time.time
    _log: DecisionLog = field(default_factory=DecisionLog)
    _said: tuple[int, int] | None = None

    @classmethod
    def start(
        cls,
        config: Config,
        membership: Callable[[], Membership],
        facts: Facts,
        progress: Callable[[str], None],
        scale: Scale,
    ) -> Autoscaler | None:
        """Begin to decide; None where that is off.

        Args:
            config: Of the service.
            membership: How many members there are to be; called in another thread.
            facts: Of the checkpoint.
            progress: Takes a sentence for the user.
            scale: Makes it so, where the mode is `apply`.

        Raises:
            ConfigurationError: Bounds that exclude the start, or more groups than experts.
        """
        if config.autoscale.mode == "off":
            return None
        access = load_security(config).to_routers

        def ask(address: str) -> cluster_pb2.ClusterStatus:
            return ask_status(address, access, ASK_TIMEOUT_S)

        loop = AutoscaleLoop(
            config.autoscale,
            policy_at_start(config, membership(), facts),
            membership,
            ask,
            expert_bytes=facts.expert_bytes,
        )
        loop.start()
        mode = config.autoscale.mode
        return cls(
            mode=mode,
            loop=loop,
            progress=progress,
            scale=scale if mode == "apply" else None,
            membership=membership,
        )

    def tick(self, routers: Iterable[Listener]) -> None:
        """Pass on what was decided since the last call. Nothing here waits."""
        decisions = self.loop.take()
        if not decisions:
            return
        now_s, last_s = self.clock(), decisions[-1].at_s
        messages = [decision_message(d, now_s - (last_s - d.at_s)) for d in decisions]
        self._log.add(self.mode, messages)
        for decision in decisions:
            self._say(decision)
        if self.scale is not None:
            self._apply(self.scale, decisions[-1])
        parts = [message.SerializeToString() for message in messages]
        for router in routers:
            router.call("note_decisions", self.mode, parts)

    def welcome(self, router: Listener) -> None:
        """Tell a router that came back what was decided so far."""
        kept = self._log.explain(0).decisions
        router.call("note_decisions", self.mode, [d.SerializeToString() for d in kept])

    def close(self) -> None:
        """End the loop."""
        self.loop.close()

    def _apply(self, scale: Scale, decision: Decision) -> None:
        """Have the numbers changed that are to change, and that nobody has changed meanwhile."""
        now = self.membership()
        groups, routers = (
            pool.wanted if pool.direction != "hold" and pool.count == count else None
            for pool, count in (
                (decision.groups, now.groups),
                (decision.routers, now.num_routers),
            )
        )
        if groups is not None or routers is not None:
            scale(groups, routers)

    def _say(self, decision: Decision) -> None:
        """Tell the user of a change once, not every few seconds until somebody makes it."""
        wanted = (decision.routers.wanted, decision.groups.wanted)
        if decision.is_hold or wanted == self._said:
            return
        self._said = wanted
        verb = "advises" if self.scale is None else "wants"
        for what, pool in (("routers", decision.routers), ("expert groups", decision.groups)):
            if pool.direction != "hold":
                self.progress(
                    f"autoscale {verb} {pool.wanted} {what} instead of {pool.count}: {pool.reason}"
                )


def check_bounds(config: Config, facts: Facts) -> None:
    """Check what `Autoscaler.start` checks when everything is loaded, before anything is.

    Raises:
        ConfigurationError: As `policy_at_start`.
    """
    if config.autoscale.mode != "off":
        groups = len(parse_groups(config.experts.groups)) if facts.num_experts else 0
        there = Membership(groups=groups, num_routers=config.router.count, routers={})
        policy_at_start(config, there, facts)


def policy_at_start(config: Config, membership: Membership, facts: Facts) -> Policy:
    """Return the policy of a service with these members.

    Raises:
        ConfigurationError: Bounds that exclude them, or more groups than a layer has experts.
    """
    most = config.autoscale.max_groups
    if most is not None and facts.num_experts and most > facts.num_experts:
        raise ConfigurationError(
            "autoscale.max_groups",
            f"must be 1 to {facts.num_experts}, the experts of a layer",
            most,
        )
    return policy_of(
        config.autoscale,
        routers=membership.num_routers,
        groups=membership.groups,
        max_num_seqs=config.engine.max_num_seqs,
    )
