"""Which routers a client knows, and the connections to them. Any thread may call."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from protos.tls import Access
from protos.v1 import (
    batch_pb2_grpc,
    cluster_pb2,
    cluster_pb2_grpc,
    generation_pb2_grpc,
    session_pb2_grpc,
)

DEFAULT_ADDRESS = "127.0.0.1:50051"
MAX_MESSAGE_BYTES = 64 << 20
LEARN_AFTER_S = 1.0
"""A stream that lasts longer may need to know which other routers there are."""
LEARN_INTERVAL_S = 30.0
LEARN_TIMEOUT_S = 5.0
_TLS = "grpcs://"


class RouterConnection:
    """The connection to one router.

    Args:
        address: Its own.
        channel: Sync or async.
    """

    def __init__(self, address: str, channel: Any) -> None:
        self.address = address
        self.channel = channel
        self.generation = generation_pb2_grpc.GenerationServiceStub(channel)
        self.sessions = session_pb2_grpc.SessionServiceStub(channel)
        self.batches = batch_pb2_grpc.BatchServiceStub(channel)
        self.cluster = cluster_pb2_grpc.ClusterServiceStub(channel)


class KnownRouters:
    """All routers that a client knows, and the one that it uses.

    Args:
        addresses: `host:port` or `grpcs://host:port`, several with commas between them, or a list.
        connect: Makes a channel to an address.

    Raises:
        ValueError: There is no address.
    """

    def __init__(self, addresses: str | Sequence[str], connect: Callable[[str], Any]) -> None:
        given = addresses.split(",") if isinstance(addresses, str) else addresses
        self._addresses = list(dict.fromkeys(a.strip() for a in given if a.strip()))
        if not self._addresses:
            raise ValueError("a client needs the address of a router")
        self._connect = connect
        self._routers: dict[str, RouterConnection] = {}
        self._chosen = 0
        self._learn_at = 0.0
        self._lock = threading.Lock()
        self.current()

    def __len__(self) -> int:
        return len(self._addresses)

    @property
    def addresses(self) -> list[str]:
        """All that are known, the given ones first."""
        with self._lock:
            return list(self._addresses)

    def current(self) -> RouterConnection:
        """Return the router to ask now."""
        with self._lock:
            address = self._addresses[self._chosen]
            if address not in self._routers:
                self._routers[address] = RouterConnection(address, self._connect(address))
            return self._routers[address]

    def failed(self, router: RouterConnection) -> None:
        """Go on to the next router, unless another call has gone on from this one already."""
        with self._lock:
            if self._addresses[self._chosen] == router.address:
                self._chosen = (self._chosen + 1) % len(self._addresses)

    def should_learn(self, now: float) -> bool:
        """Return whether it is time to ask for the others; True once in `LEARN_INTERVAL_S`."""
        with self._lock:
            if now < self._learn_at:
                return False
            self._learn_at = now + LEARN_INTERVAL_S
            return True

    def learn(self, status: cluster_pb2.ClusterStatus, teller: RouterConnection) -> None:
        """Add the routers that one of them names."""
        scheme = _TLS if teller.address.startswith(_TLS) else ""
        with self._lock:
            for told in status.routers:
                address = scheme + told.grpc_address
                is_served = told.grpc_address and told.state in ("READY", "DRAINING")
                if is_served and address not in self._addresses:
                    self._addresses.append(address)

    def close(self) -> list[Any]:
        """Return all channels, for the caller to close."""
        with self._lock:
            routers, self._routers = list(self._routers.values()), {}
            return [router.channel for router in routers]


CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
]
"""Of every client's channel."""


def channels(access: Access) -> Callable[[str], Any]:
    """Return what connects a `Client`."""
    return lambda address: access.channel(address, CHANNEL_OPTIONS)


def aio_channels(access: Access) -> Callable[[str], Any]:
    """Return what connects an `AsyncClient`."""
    return lambda address: access.aio_channel(address, CHANNEL_OPTIONS)
