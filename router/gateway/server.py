"""The router's gRPC port: services, health, reflection, limits, and the thread its loop runs in.

Decides which services are there and how the port behaves; knows nothing of what they do. `Gateway`
is the asynchronous server; `GatewayThread` runs one beside an engine thread in a process that has
no loop of its own.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import grpc
from grpc_health.v1 import (  # type: ignore[import-untyped]
    health,
    health_pb2,
    health_pb2_grpc,
)
from grpc_reflection.v1alpha import reflection  # type: ignore[import-untyped]

from protos.errors import ConfigurationError, NotReadyError
from protos.tls import ServerTls
from protos.v1 import (
    batch_pb2,
    batch_pb2_grpc,
    gating_pb2,
    gating_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    session_pb2,
    session_pb2_grpc,
)
from router.gateway.authentication import ApiKey, ApiKeyInterceptor, Callers
from router.gateway.batches import BatchServicer
from router.gateway.delivery import LoopDelivery
from router.gateway.gating import GatingServicer
from router.gateway.generation import GenerationServicer
from router.gateway.interceptor import ErrorInterceptor
from router.gateway.sessions import SessionServicer

logger = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 64 << 20
"""Of one message, either way: more than ten million token ids."""
START_TIMEOUT_S = 30.0
CALL_TIMEOUT_S = 60.0
LIVENESS, READINESS = "liveness", "readiness"

T = TypeVar("T")


class GrpcService(NamedTuple):
    """One servicer to register."""

    name: str
    """Full name, e.g. `expertmesh.v1.ClusterService`."""
    servicer: Any
    add_to_server: Callable[[Any, grpc.aio.Server], None]
    """The generated `add_XServicer_to_server`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayOptions:
    """How the port behaves."""

    host: str = "127.0.0.1"
    port: int = 0
    """0: any free port."""
    max_message_bytes: int = MAX_MESSAGE_BYTES
    max_connection_age_s: float = 1800.0
    """After it a client is told to connect anew, so that it finds new routers; its streams run to
    their end on the old connection."""
    handshake_timeout_s: float = 10.0
    """A connection that has not finished TLS and the HTTP/2 greeting by then is closed."""
    max_connections: int = 4096
    """Further ones are closed at once."""
    tls: ServerTls | None = None
    """None: a plain port."""
    api_keys: tuple[ApiKey, ...] = field(default=(), repr=False)
    """Every call but health must carry one of these; none: calls need no key."""


def generation_service(servicer: GenerationServicer) -> GrpcService:
    """Return the registration of `GenerationService`."""
    name = generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name
    return GrpcService(name, servicer, generation_pb2_grpc.add_GenerationServiceServicer_to_server)


def gating_service(servicer: GatingServicer) -> GrpcService:
    """Return the registration of `GatingService`."""
    name = gating_pb2.DESCRIPTOR.services_by_name["GatingService"].full_name
    return GrpcService(name, servicer, gating_pb2_grpc.add_GatingServiceServicer_to_server)


def session_service(servicer: SessionServicer) -> GrpcService:
    """Return the registration of `SessionService`."""
    name = session_pb2.DESCRIPTOR.services_by_name["SessionService"].full_name
    return GrpcService(name, servicer, session_pb2_grpc.add_SessionServiceServicer_to_server)


def batch_service(servicer: BatchServicer) -> GrpcService:
    """Return the registration of `BatchService`."""
    name = batch_pb2.DESCRIPTOR.services_by_name["BatchService"].full_name
    return GrpcService(name, servicer, batch_pb2_grpc.add_BatchServiceServicer_to_server)


class Gateway:
    """The gRPC server of one router; its methods run in the loop that `start` ran in.

    Args:
        services: What to serve, beside health and reflection.
        options: How the port behaves.
    """

    def __init__(self, services: Sequence[GrpcService], options: GatewayOptions) -> None:
        self._services = tuple(services)
        self._options = options
        self._server: grpc.aio.Server | None = None
        self._health = health.aio.HealthServicer()
        self.address = ""

    async def start(self) -> str:
        """Open the port, answer as serving, and return `host:port`.

        Raises:
            ConfigurationError: The port cannot be opened.
        """
        options = self._options
        interceptors: list[grpc.aio.ServerInterceptor] = [ErrorInterceptor()]
        if options.api_keys:
            interceptors.insert(0, ApiKeyInterceptor(Callers(options.api_keys)))
        server = grpc.aio.server(interceptors=interceptors, options=_server_options(options))
        for service in self._services:
            service.add_to_server(service.servicer, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = [service.name for service in self._services]
        names += [health.SERVICE_NAME, reflection.SERVICE_NAME]
        reflection.enable_server_reflection(names, server)
        address = f"{options.host}:{options.port}"
        try:
            if options.tls is None:
                port = server.add_insecure_port(address)
            else:
                port = server.add_secure_port(address, options.tls.credentials())
        except RuntimeError as error:
            raise ConfigurationError(
                "port", "must be free", address, "choose another --port"
            ) from error
        self._server = server
        await server.start()
        await self.set_serving(True)
        self.address = f"{options.host}:{port}"
        logger.info(
            "gateway.started address=%s services=%d tls=%s api_keys=%d",
            self.address,
            len(self._services),
            options.tls is not None,
            len(options.api_keys),
        )
        return self.address

    async def set_serving(self, is_serving: bool) -> None:
        """Set the health of every service, and of none in particular; the process is alive."""
        status = health_pb2.HealthCheckResponse
        state = status.SERVING if is_serving else status.NOT_SERVING
        for name in ("", READINESS, *(service.name for service in self._services)):
            await self._health.set(name, state)
        await self._health.set(LIVENESS, status.SERVING)

    async def stop(self, grace_s: float) -> None:
        """Take no new calls, let running ones end for `grace_s`, then cancel them."""
        if self._server is None:
            return
        await self.set_serving(False)
        await self._server.stop(grace_s)
        self._server = None
        logger.info("gateway.stopped address=%s", self.address)


class GatewayThread:
    """A gateway with a loop and a thread of its own, for the process of a router.

    Args:
        services: As `Gateway`'s.
        options: As `Gateway`'s.
        delivery: Bound to the loop, so that the engine's outputs arrive in it.
    """

    def __init__(
        self,
        services: Sequence[GrpcService],
        options: GatewayOptions,
        delivery: LoopDelivery | None = None,
    ) -> None:
        self.gateway = Gateway(services, options)
        self._delivery = delivery
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="gateway", daemon=True)

    def start(self) -> str:
        """Open the port and return its address; see `Gateway.start`."""
        if self._delivery is not None:
            self._delivery.bind(self._loop)
        self._thread.start()
        try:
            return self.call(self.gateway.start(), START_TIMEOUT_S)
        except BaseException:
            self._end()
            raise

    def set_serving(self, is_serving: bool) -> None:
        """See `Gateway.set_serving`."""
        self.call(self.gateway.set_serving(is_serving))

    def call(self, coroutine: Coroutine[Any, Any, T], timeout_s: float = CALL_TIMEOUT_S) -> T:
        """Run a coroutine in the gateway's loop and return what it returns."""
        if not self._thread.is_alive():
            coroutine.close()
            raise NotReadyError("the gateway does not run")
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout_s)

    def stop(self, grace_s: float = 0.0) -> None:
        """Stop the server and end the thread. Does nothing the second time."""
        if not self._thread.is_alive():
            return
        try:
            self.call(self.gateway.stop(grace_s), grace_s + CALL_TIMEOUT_S)
        finally:
            self._end()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CALL_TIMEOUT_S)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            left = asyncio.all_tasks(self._loop)
            for task in left:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
        finally:
            self._loop.close()


def _server_options(options: GatewayOptions) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", options.max_message_bytes),
        ("grpc.max_send_message_length", options.max_message_bytes),
        # A taken port is an error, not a second server behind the same number.
        ("grpc.so_reuseport", 0),
        # Clients may ping through a long prefill; we find dead ones in 40 s.
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.server_handshake_timeout_ms", int(options.handshake_timeout_s * 1000)),
        ("grpc.max_allowed_incoming_connections", options.max_connections),
        ("grpc.max_connection_age_ms", int(options.max_connection_age_s * 1000)),
    ]
