"""Carries out what the controller wants: the thin part between `cluster.controller` and Ray.

Keeps what the controller observes (placement in force, plan, what every group holds and every
router follows), starts what its actions ask for, and takes the results. Nothing here blocks: the
owner waits for `references` and says which one finished. Wishes come from the routers
(`cluster.wishes`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from cluster import controller
from cluster.controller import Observed, RouterView, Target
from cluster.groups import Group, Groups
from cluster.members import (
    GroupMember,
    LeaveWish,
    PlaceWish,
    ScaleWish,
    ServiceView,
    WakeWish,
    Wish,
)
from cluster.routers import Calls, Router, RouterPhase, Routers
from cluster.under_way import under_way
from cluster.wishes import Wishes
from experts.placement import Placement
from protos.errors import (
    DeadlineExceededError,
    ExpertMeshError,
    GroupLostError,
    RouterLostError,
)

log = logging.getLogger(__name__)

RETRY_S = 30.0
"""After a plan or a start that failed; with other groups a plan is tried at once."""
NEED_EXPERTS = (RouterPhase.LOAD, RouterPhase.LOADED, RouterPhase.START, RouterPhase.CHECK)
"""Of routers: they start. One that still waits for its node keeps nobody awake."""
ANSWER_TIMEOUT_S = 180.0
"""How long a router may take to connect, switch, fall asleep or wake; then it is ended, because
nothing can change while one does not answer. Groups get the time of a start, in which they load."""
MAX_STEPS = 20
"""Steps of the controller in a row before the loop looks at Ray again."""


class Site(Protocol):
    """How the service reaches its processes; every method returns at once."""

    def call_load_experts(self, group: Group, placement: Placement) -> Any:
        """Start loading what the placement gives the group; ends with its address."""
        ...

    def missing_nodes(self) -> str:
        """Return what the cluster lacks for another group, in words."""
        ...


@dataclass(slots=True)
class Scaling:
    """Makes the running service the one that is wanted.

    Args:
        calls: The seam to Ray.
        site: The service.
        progress: Takes a sentence for the user.
        groups: The expert groups.
        routers: The routers.
        target: What is wanted; `scale` changes it.
        placement: In force; None in a dense model.
        drain_timeout_s: How long the requests of a router that is to go get.
        clock: Monotonic seconds.
    """

    calls: Calls
    site: Site
    progress: Callable[[str], None]
    groups: Groups
    routers: Routers
    target: Target
    drain_timeout_s: float
    placement: Placement | None = None
    clock: Callable[[], float] = time.monotonic
    plan: Placement | None = None
    _last_epoch: int = 0
    _order: int = 0
    _is_published: bool = False
    """Some router may follow the plan: it cannot be undone any more."""
    _load: npt.NDArray[np.int64] | None = None
    _retry_at: float = 0.0
    _start_at: float = 0.0
    _failed: frozenset[str] = frozenset()
    _trouble: str = ""
    _wishes: Wishes = field(init=False)
    _version: int = 0
    _begun: dict[str, tuple[Any, float]] = field(default_factory=dict)
    """Member -> (reference, since when) of work that was under way at the last look."""
    _told: tuple[ServiceView, tuple[Any, ...]] | None = None
    """What the routers were last told, and which processes."""

    def __post_init__(self) -> None:
        self._wishes = Wishes(self.calls)

    # What others may ask for, all at once answered.

    def scale(self, expert_groups: int | None = None, routers: int | None = None) -> None:
        """Want so many expert groups and routers from now on; returns at once.

        This is the entry for whoever decides the numbers (the command line, the autoscaler). The
        service changes in the background, one change at a time, while requests go on; a later call
        replaces an earlier one at any time. What cannot be had (no node, no memory) leaves the
        service as it is, is said in `view().trouble`, and is tried again.

        Args:
            expert_groups: None leaves their number; 0 lets the service sleep until `wake`, if no
                request runs or waits. Without effect in a dense model.
            routers: 1 or more; None leaves their number.
        """
        self.target = replace(
            self.target,
            groups=self.target.groups if expert_groups is None else expert_groups,
            routers=routers or self.target.routers,
        )
        self._retry_at, self._start_at, self._trouble = 0.0, 0.0, ""
        self.groups.trouble = self.routers.trouble = ""

    def wake(self) -> None:
        """Want the groups back that a service which sleeps had: they held all experts."""
        if self.placement is not None and self.target.groups == 0:
            self.scale(len(self.placement.groups))

    def leave(self, group_id: str) -> None:
        """Want one expert group less, and this one to go; asked again, it changes nothing."""
        leaving = self.target.leaving
        if group_id in leaving or group_id not in self.groups.all or self.target.groups <= 1:
            return
        self.scale(self.target.groups - 1)
        self.target = replace(self.target, leaving=leaving | {group_id})

    def place(self, capacities: Mapping[str, float], load: npt.NDArray[np.int64] | None) -> None:
        """Want a new placement with these shares, balanced by this load."""
        self.target = replace(
            self.target,
            capacities={**self.target.capacities, **capacities},
            order=self.target.order + 1,
        )
        for group_id, capacity in capacities.items():
            if group_id in self.groups.all:
                self.groups.all[group_id].capacity = capacity
        self._load = load
        self._retry_at, self._trouble = 0.0, ""

    def view(self) -> ServiceView:
        """Return what every router says of the whole service."""
        is_settled = controller.is_settled(self._observe(), self.target)
        return ServiceView(
            version=self._version,
            groups=tuple(self.members()),
            routers=self.routers.addresses(),
            target_groups=self.target.groups if self.placement else 0,
            target_routers=self.target.routers,
            change=under_way(
                self.target,
                self.groups.all,
                self.routers.all.values(),
                self.plan,
                self.site.missing_nodes,
            ),
            trouble=self._trouble or self.groups.trouble or self.routers.trouble,
            is_settled=is_settled,
            is_asleep=is_settled and self.placement is not None and self.target.groups == 0,
        )

    @property
    def serves(self) -> bool:
        """Whether every group of the placement in force holds its experts and answers."""
        return controller.serves(self._observe())

    def members(self) -> list[GroupMember]:
        """Return the groups that can be reached."""
        return [group.member() for group in self.groups.all.values() if group.address]

    # The loop.

    def references(self) -> dict[str, Any]:
        """Return name -> what to wait for: work of groups and routers, and wishes."""
        work = {name: group.work for name, group in self.groups.all.items()}
        work |= {name: router.work for name, router in self.routers.all.items()}
        found = {
            f"{name}/work": reference for name, reference in work.items() if reference is not None
        }
        wishes = self._wishes.references(self.routers.up)
        return found | {f"{name}/wish": reference for name, reference in wishes.items()}

    def finished(self, key: str) -> None:
        """Take the result of one of `references`, which has finished or failed."""
        name, _, kind = key.partition("/")
        if kind == "wish":
            self._grant(self._wishes.take(name))
        elif name in self.groups.all:
            self._group_worked(self.groups.all[name])
        elif name in self.routers.all:
            self._router_worked(self.routers.all[name])

    def tick(self) -> None:
        """Start what is due, end who is silent, and tell the routers what has changed."""
        self._end_silent()
        if any(router.phase in NEED_EXPERTS for router in self.routers.all.values()):
            self.wake()
        # The next one of that name is another group.
        self.target = replace(self.target, leaving=self.target.leaving & self.groups.all.keys())
        for _ in range(MAX_STEPS):
            actions = controller.step(self._observe(), self.target, self.clock())
            for action in actions:
                self._do(action)
            if not actions:
                break
        self._tell()

    def group_died(self, group_id: str) -> None:
        """Take note that a group's process has ended."""
        if self.groups.all[group_id].was_up is False:
            self._start_at = self.clock() + RETRY_S
        if self.plan is not None and group_id in self.plan.groups:
            self._abandon()
        if self.placement is not None and group_id in self.placement.groups:
            # One that starts waits for the group's answers, and no plan is told to it meanwhile.
            for router_id in self.routers.all:
                self.routers.begin_again(router_id)

    def router_left(self) -> None:
        """Take note that a router leaves because someone asked the router itself."""
        self.target = replace(self.target, routers=self.target.routers - 1)

    def _end_silent(self) -> None:
        """End who does not come to an end with what it was asked for; it starts again."""
        group_s = self.groups.start_timeout_s
        for group in list(self.groups.all.values()):
            if group.work is not None and self._waited_s(group.group_id, group.work) > group_s:
                self.groups.end(group.group_id, DeadlineExceededError("loading", group_s))
        for router in self.routers.all.values():
            if router.work is None:
                continue
            if self._waited_s(router.router_id, router.work) > ANSWER_TIMEOUT_S:
                error = DeadlineExceededError("a change", ANSWER_TIMEOUT_S)
                self.routers.end(router.router_id, error)

    def _waited_s(self, name: str, work: Any) -> float:
        """Return for how long this work of a member has been seen under way."""
        before, since = self._begun.get(name, (None, 0.0))
        if before is not work:
            self._begun[name] = work, (since := self.clock())
        return self.clock() - since

    def _observe(self) -> Observed:
        gone = (RouterPhase.STOP, RouterPhase.LEFT)
        return Observed(
            placement=self.placement,
            plan=self.plan,
            groups={g.group_id: g.view() for g in self.groups.all.values()},
            routers={
                r.router_id: RouterView(
                    is_up=r.phase in (RouterPhase.UP, RouterPhase.DRAIN),
                    is_leaving=r.phase is RouterPhase.DRAIN,
                    follows=r.follows,
                    connected=r.connected,
                    is_asleep=r.is_asleep,
                    busy=r.work is not None,
                )
                for r in self.routers.all.values()
                if r.phase not in gone
            },
            order=self._order,
            load=self._load,
            retry_at=self._retry_at,
            start_at=self._start_at,
            failed=self._failed,
        )

    def _do(self, action: controller.Action) -> None:
        log.info("scaling action=%s", type(action).__name__)
        match action:
            case controller.StartGroup(group_id):
                self.progress(f"starting {group_id}")
                self.groups.start(group_id, self.target.capacities.get(group_id, 1.0))
            case controller.StopGroup(group_id):
                self.groups.stop(group_id)
            case controller.BeginPlan(placement):
                self._begin(placement)
            case controller.LoadGroup(group_id):
                assert self.plan is not None
                group = self.groups.all[group_id]
                group.trimmed = 0
                group.work = self.site.call_load_experts(group, self.plan)
            case controller.Trim(group_id):
                assert self.placement is not None
                group = self.groups.all[group_id]
                group.work = group.actor.call("trim", self.placement.to_json())
            case controller.Connect(router_id):
                assert self.plan is not None
                router = self.routers.all[router_id]
                router.work = router.actor.call("connect", self.plan.to_json(), self.members())
            case controller.Switch(router_id):
                assert self.plan is not None
                self._is_published = True
                router = self.routers.all[router_id]
                router.work = router.actor.call("switch", self.plan.epoch)
            case controller.Commit():
                self._commit()
            case controller.Abandon():
                self._abandon()
            case controller.AddRouter():
                self.progress(f"starting {self.routers.add()}")
            case controller.Sleep(router_id):
                router = self.routers.all[router_id]
                router.work = router.actor.call("sleep")
            case controller.Wake(router_id):
                router = self.routers.all[router_id]
                router.work = router.actor.call("wake")
            case controller.DrainRouter(router_id):
                self.progress(f"draining {router_id}")
                self.routers.drain(router_id, self.drain_timeout_s)

    def _begin(self, placement: Placement) -> None:
        assert self.placement is not None
        # An abandoned plan had an epoch, too: none is used twice.
        self._last_epoch = max(self._last_epoch, self.placement.epoch) + 1
        self.plan = replace(placement, epoch=self._last_epoch)
        self._is_published = False
        self._order = self.target.order
        self.progress(
            f"placement epoch {self.plan.epoch}: experts move to {', '.join(self.plan.groups)}"
        )

    def _commit(self) -> None:
        assert self.plan is not None
        self.placement, self.plan = self.plan, None
        self._retry_at, self._failed, self._trouble = 0.0, frozenset(), ""
        self.progress(f"placement epoch {self.placement.epoch} is in force")

    def _abandon(self) -> None:
        assert self.plan is not None
        plan, self.plan = self.plan, None
        if self._is_published:
            self.placement = plan
        self.progress(f"placement epoch {plan.epoch} is given up")

    def _fail(self, error: ExpertMeshError, who: str) -> None:
        """Give the plan up for now, unless a router may follow it already; then go on trying."""
        self._trouble = f"{who}: {error.message}"
        log.warning("change_failed member=%s reason=%r", who, error.message)
        if self.plan is None or self._is_published:
            return
        self._failed = frozenset(self.plan.groups)
        self._retry_at = self.clock() + RETRY_S
        self._order = self.target.order
        self._abandon()

    def _group_worked(self, group: Group) -> None:
        reference, group.work = group.work, None
        try:
            done = self.calls.result(group.group_id, reference, GroupLostError)
        except GroupLostError:
            return  # its death is taken note of where the process is watched
        except ExpertMeshError as error:
            self._fail(error, group.group_id)
            return
        if isinstance(done, tuple):
            group.address, group.holds, group.compute = done
            group.joined = group.joined or group.holds
        else:
            group.trimmed = done

    def _router_worked(self, router: Router) -> None:
        reference, router.work = router.work, None
        try:
            method, value = self.calls.result(router.router_id, reference, RouterLostError)
        except RouterLostError:
            return  # likewise
        except ExpertMeshError as error:
            self._fail(error, router.router_id)
            return
        match method:
            case "connect":
                router.connected = value
            case "switch":
                router.follows = value
            case "sleep" if not value:
                self.wake()  # somebody came first
            case _:
                router.is_asleep = method == "sleep"

    def _grant(self, wish: Wish | None) -> None:
        match wish:
            case ScaleWish(expert_groups, routers):
                self.scale(expert_groups, routers)
            case LeaveWish(group_id):
                self.leave(group_id)
            case PlaceWish(capacities, load):
                self.place(capacities, load)
            case WakeWish():
                self.progress("a request waits: the expert groups come back")
                self.wake()

    def _tell(self) -> None:
        """Tell the routers that serve how the service is, when that has changed."""
        view = self.view()
        serving = tuple(router.actor for router in self.routers.up)
        if self._told != (view, serving):
            self._version += 1
            view = replace(view, version=self._version)
            self._told = view, serving
            for actor in serving:
                actor.call("join_group", view)
