"""Links to expert groups, and who opens them.

A *link* is the connection to one group at one address: its transport, and the gRPC channel below.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import grpc

from experts.calls import MAX_MESSAGE_BYTES
from protos.errors import ConfigurationError, GroupLostError, UnsupportedFeatureError
from protos.tls import Access
from router.gating.transport.base import Transport
from router.gating.transport.grpc_stream import GrpcStreamTransport
from router.gating.transport.lane import LaneTransport

log = logging.getLogger(__name__)

TransportName = Literal["auto", "lane", "grpc"]
GRPC_READY_TIMEOUT_S = 2.0
"""How long a group without a lane gets to show that it answers gRPC."""


@dataclass(frozen=True, slots=True)
class Link:
    """The connection to one group."""

    address: str
    """`host:port` of its gRPC server; empty where there is none."""
    transport: Transport
    channel: grpc.Channel | None = None

    @property
    def group_id(self) -> str:
        """The group."""
        return self.transport.group_id

    def close(self) -> None:
        """Close it for good."""
        self.transport.close()
        if self.channel is not None:
            self.channel.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialer:
    """Opens links.

    Attributes:
        transport: `lane`, `grpc`, or `auto`: a lane, or a gRPC stream to a group that answers gRPC
            only (its lane port is behind a firewall, say, or it demands TLS and is on another host,
            where a lane would carry plain tensors).
    """

    router_id: str
    transport: TransportName
    access: Access
    connect_timeout_s: float = 10.0

    def links(
        self, groups: Sequence[str], addresses: Mapping[str, str], kept: Sequence[Link] = ()
    ) -> list[Link]:
        """Return an open link to every group, in their order.

        Args:
            groups: Group ids.
            addresses: group_id -> `host:port` of the group's gRPC server.
            kept: Used again where group and address are the same; never closed here.

        Raises:
            GroupLostError: A group cannot be reached; what was opened here is closed.
            ConfigurationError: `lane` to a group on another host that demands TLS.
        """
        old = {(link.group_id, link.address): link for link in kept}
        links: list[Link] = []
        try:
            for group_id in groups:
                found = old.get((group_id, addresses[group_id]))
                links.append(found or self._dial(group_id, addresses[group_id]))
        except BaseException:
            for link in links:
                if link not in kept:
                    link.close()
            raise
        return links

    def _dial(self, group_id: str, address: str) -> Link:
        channel = self.access.channel(
            address,
            [
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ],
        )
        if self.transport == "grpc":
            return Link(address, GrpcStreamTransport(group_id, channel), channel)
        lane = LaneTransport(group_id, channel, self.router_id, self.connect_timeout_s)
        try:
            lane.open()
        except GroupLostError as error:
            if self.transport == "auto" and _answers(channel):
                log.warning("event=no_lane group=%s reason=%r", group_id, str(error))
                return Link(address, GrpcStreamTransport(group_id, channel), channel)
            channel.close()
            if isinstance(error.__cause__, UnsupportedFeatureError):
                raise ConfigurationError(
                    "experts.transport",
                    f"must be auto or grpc: group {group_id} demands TLS and is on another"
                    " host, where a lane would carry plain tensors",
                    self.transport,
                ) from error
            raise
        return Link(address, lane, channel)


def _answers(channel: grpc.Channel) -> bool:
    try:
        grpc.channel_ready_future(channel).result(GRPC_READY_TIMEOUT_S)
    except grpc.FutureTimeoutError:
        return False
    return True
