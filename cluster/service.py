"""`ClusterService`: what runs where, draining, and what the planner would do.

Every router answers for the whole service: it asks the expert groups and the other routers. A
member that does not answer is listed with state LOST instead of failing the call.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Protocol, cast

import grpc
import numpy as np
import numpy.typing as npt

from cluster.known_service import KnownService
from cluster.members import GroupMember, LeaveWish, PlaceWish, ScaleWish
from experts.moves import replan
from experts.placement import Placement
from experts.planner import balancedness, group_load, num_moves
from protos.errors import (
    DeadlineExceededError,
    InvalidFieldError,
    StalePlacementError,
    UnsupportedFeatureError,
    from_rpc_error,
)
from protos.tls import Access
from protos.v1 import cluster_pb2, cluster_pb2_grpc, experts_pb2, experts_pb2_grpc

ASK_TIMEOUT_S = 2.0
"""How long a member may take to say how it is."""
DEFAULT_INTERVAL_S = 1.0
MIN_INTERVAL_S = 0.1
LOOK_S = 0.1
"""How often a router looks whether a group that is to go has gone."""
MAX_ROUTERS = 64
"""As `router.count`."""
LOST = "LOST"

Context = grpc.aio.ServicerContext[Any, Any]


class OwnRouter(Protocol):
    """What the service asks of the router it runs in."""

    shutdown_timeout_s: float
    """How long running requests get where a drain sets no time."""

    def status(self) -> cluster_pb2.RouterStatus:
        """Return this router's own figures."""
        ...

    def service_status(self) -> cluster_pb2.ClusterStatus:
        """Return the fields that are the same everywhere; routers and groups empty."""
        ...

    async def drain_and_leave(self, timeout_s: float) -> int:
        """Take nothing new, finish what runs, then end the process; return what was left."""
        ...


class OwnExperts(Protocol):
    """What the service asks about the experts, as this router reaches them."""

    @property
    def placement(self) -> Placement | None:
        """The placement in force; None in a dense model."""
        ...

    @property
    def num_experts(self) -> int:
        """Experts of a layer; 0 in a dense model."""
        ...

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert."""
        ...

    def transport_of(self, group_id: str) -> str:
        """Return how this router reaches the group: lane-unix, lane-tcp or grpc."""
        ...

    def load_counts(self) -> npt.NDArray[np.int64]:
        """Return `[num_layers, num_experts]` pairs that this router has dispatched."""
        ...


class ClusterServicer(cluster_pb2_grpc.ClusterServiceServicer):
    """The gRPC side; registered in the router's own server, which maps errors to statuses.

    Args:
        router: The router it runs in.
        experts: As that router reaches them.
        members: The service, as that router knows it.
        to_routers: What the other routers' ports demand.
        to_groups: What the expert groups' ports demand.
    """

    def __init__(
        self,
        router: OwnRouter,
        experts: OwnExperts,
        members: KnownService,
        to_routers: Access | None = None,
        to_groups: Access | None = None,
    ) -> None:
        self._router = router
        self._experts = experts
        self._members = members
        self._to_routers = to_routers or Access()
        self._to_groups = to_groups or Access()

    async def GetStatus(
        self, request: cluster_pb2.GetStatusRequest, context: Context
    ) -> cluster_pb2.ClusterStatus:
        """Answer with the status of every member."""
        return await self._status(local_only=request.local_only)

    async def WatchStatus(
        self, request: cluster_pb2.WatchStatusRequest, context: Context
    ) -> AsyncIterator[cluster_pb2.ClusterStatus]:
        """Answer with a status now and every `interval_s`, until the client leaves."""
        interval_s = request.interval_s or DEFAULT_INTERVAL_S
        if not interval_s >= MIN_INTERVAL_S:
            raise InvalidFieldError("interval_s", f"must be {MIN_INTERVAL_S} or more", interval_s)
        while True:
            yield await self._status(local_only=False)
            await asyncio.sleep(interval_s)

    async def Drain(
        self, request: cluster_pb2.DrainRequest, context: Context
    ) -> cluster_pb2.DrainResponse:
        """Drain this router or an expert group, or pass the call on to the router that is named.

        For a group it returns when its experts are elsewhere and it has left, or after `timeout_s`.
        """
        timeout_s = request.timeout_s or self._router.shutdown_timeout_s
        if not timeout_s >= 0:
            raise InvalidFieldError("timeout_s", "must be 0 (the service's own) or more", timeout_s)
        routers = self._members.routers
        target = request.target or self._members.router_id
        if target == self._members.router_id:
            return cluster_pb2.DrainResponse(
                requests_left=await self._router.drain_and_leave(timeout_s)
            )
        if target in routers:
            async with self._to_routers.aio_channel(routers[target]) as channel:
                stub = cluster_pb2_grpc.ClusterServiceStub(channel)
                try:
                    answer = await stub.Drain(request, timeout=timeout_s + ASK_TIMEOUT_S)
                except grpc.RpcError as error:
                    raise from_rpc_error(error) from error
                return cast(cluster_pb2.DrainResponse, answer)
        groups = [member.group_id for member in self._members.groups]
        if target in groups:
            return await self._drain_group(target, timeout_s)
        known = ", ".join([*routers, *groups])
        raise InvalidFieldError("target", f"must be one of {known}", target)

    async def Scale(
        self, request: cluster_pb2.ScaleRequest, context: Context
    ) -> cluster_pb2.ScaleResponse:
        """Want other numbers of groups and routers; the service changes behind this call."""
        groups = request.expert_groups if request.HasField("expert_groups") else None
        routers = request.routers if request.HasField("routers") else None
        num_experts = self._experts.num_experts
        if groups is not None and not num_experts:
            raise UnsupportedFeatureError("expert groups: the model is dense and has no experts")
        if groups is not None and not 1 <= groups <= num_experts:
            rule = f"must be 1 to {num_experts}, the experts of a layer"
            raise InvalidFieldError("expert_groups", rule, groups)
        if routers is not None and not 1 <= routers <= MAX_ROUTERS:
            raise InvalidFieldError("routers", f"must be 1 to {MAX_ROUTERS}", routers)
        self._members.wish(ScaleWish(groups, routers))
        return cluster_pb2.ScaleResponse()

    async def PlanPlacement(
        self, request: cluster_pb2.PlanPlacementRequest, context: Context
    ) -> cluster_pb2.PlanPlacementResponse:
        """Run the planner on these capacities and the load so far; changes nothing."""
        before = self._experts.placement
        if before is None:
            raise UnsupportedFeatureError("a placement: the model is dense and has no experts")
        capacities = {group.group_id: group.capacity for group in request.groups} or {
            member.group_id: member.capacity for member in self._members.groups
        }
        if len(capacities) < len(request.groups):
            raise InvalidFieldError("groups", "must not name a group twice", len(request.groups))
        load = self._experts.load_counts()
        after = replan(before, capacities, load, even=True)
        shares = group_load(after, load).sum(axis=0)
        total = float(shares.sum()) or 1.0
        held = {
            group: sum(len(ids) for ids in after.experts_of(group).values())
            for group in after.groups
        }
        return cluster_pb2.PlanPlacementResponse(
            groups=[
                cluster_pb2.GroupPlan(
                    group_id=group,
                    num_experts=held[group],
                    bytes=held[group] * self._experts.expert_bytes,
                    expected_load=float(share) / total,
                )
                for group, share in zip(after.groups, shares, strict=True)
            ],
            balancedness=balancedness(after, load, capacities),
            num_moves=num_moves(before, after),
        )

    async def ApplyPlacement(
        self, request: cluster_pb2.ApplyPlacementRequest, context: Context
    ) -> cluster_pb2.ApplyPlacementResponse:
        """Want the placement that `PlanPlacement` shows for the groups that run."""
        placement = self._experts.placement
        if placement is None:
            raise UnsupportedFeatureError("a placement: the model is dense and has no experts")
        if request.expected_epoch not in (0, placement.epoch):
            raise StalePlacementError(0, 0, placement.epoch, request.expected_epoch)
        for group in request.groups:
            if not self._members.is_member(group.group_id):
                known = ", ".join(member.group_id for member in self._members.groups)
                raise InvalidFieldError(
                    "groups.group_id", f"must be one of {known}", group.group_id
                )
            if not 0 < group.capacity < float("inf"):
                raise InvalidFieldError("groups.capacity", "must be above 0", group.capacity)
        capacities = {group.group_id: group.capacity for group in request.groups}
        self._members.wish(PlaceWish(capacities, self._experts.load_counts()))
        return cluster_pb2.ApplyPlacementResponse(placement_epoch=placement.epoch)

    async def _drain_group(self, group_id: str, timeout_s: float) -> cluster_pb2.DrainResponse:
        if len(self._members.groups) <= 1:
            raise InvalidFieldError("target", "must not be the only expert group", group_id)
        self._members.wish(LeaveWish(group_id))
        deadline = asyncio.get_running_loop().time() + timeout_s
        while self._members.is_member(group_id):
            left_s = deadline - asyncio.get_running_loop().time()
            if left_s <= 0:
                raise DeadlineExceededError(f"draining {group_id}, which goes on,", timeout_s)
            await asyncio.sleep(min(LOOK_S, left_s))
        return cluster_pb2.DrainResponse()

    async def ExplainAutoscale(
        self, request: cluster_pb2.ExplainAutoscaleRequest, context: Context
    ) -> cluster_pb2.ExplainAutoscaleResponse:
        """Answer with the last decisions on the number of members."""
        return self._members.explain_autoscale(request.limit)

    async def _status(self, *, local_only: bool) -> cluster_pb2.ClusterStatus:
        status = self._router.service_status()
        own = self._router.status()
        if local_only:
            status.routers.append(own)
            return status
        others = {
            router_id: address
            for router_id, address in self._members.routers.items()
            if router_id != own.router_id
        }
        routers, groups = await asyncio.gather(
            asyncio.gather(*(self._ask_router(name, address) for name, address in others.items())),
            asyncio.gather(*(self._ask_group(m) for m in self._members.groups)),
        )
        status.routers.extend(sorted([own, *routers], key=lambda router: router.router_id))
        status.groups.extend(groups)
        return status

    async def _ask_group(self, member: GroupMember) -> cluster_pb2.GroupStatus:
        status = cluster_pb2.GroupStatus(
            group_id=member.group_id,
            state=LOST,
            grpc_address=member.grpc_address,
            transport=self._experts.transport_of(member.group_id),
            node_id=member.node_id,
            pid=member.pid,
        )
        try:
            async with self._to_groups.aio_channel(member.grpc_address) as channel:
                state = await experts_pb2_grpc.ExpertServiceStub(channel).GetState(
                    experts_pb2.GetStateRequest(), timeout=ASK_TIMEOUT_S
                )
        except grpc.RpcError:
            return status
        status.state = state.state
        status.compute = state.compute
        status.num_threads = state.num_threads
        status.num_experts = sum(len(layer.expert_ids) for layer in state.layers)
        status.resident_bytes = state.resident_bytes
        status.num_calls = state.num_calls
        status.num_rows = state.num_rows
        status.num_pairs = state.num_pairs
        status.busy_s = state.busy_s
        status.layer_pairs.extend(state.layer_pairs)
        status.capacity_bytes = state.capacity_bytes
        return status

    async def _ask_router(self, router_id: str, address: str) -> cluster_pb2.RouterStatus:
        try:
            async with self._to_routers.aio_channel(address) as channel:
                answer = await cluster_pb2_grpc.ClusterServiceStub(channel).GetStatus(
                    cluster_pb2.GetStatusRequest(local_only=True), timeout=ASK_TIMEOUT_S
                )
                return cast(cluster_pb2.RouterStatus, answer.routers[0])
        except grpc.RpcError:
            return cluster_pb2.RouterStatus(router_id=router_id, state=LOST, grpc_address=address)
