"""The port of `serve` itself: answers `GetStatus` from the first second on.

While the service starts, nothing else of it can be asked: the routers open their ports last, and
where they will be is Ray's choice. This port is where the user put it. Its answers say what the
start has come to; once the service is ready, a router gives them. It asks for the same certificate
and key as the routers' ports, and its health is SERVING when the service is ready.

Imports no torch: `serve` is light. The server runs in a thread with a loop of its own.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Collection, Coroutine
from typing import Any, TypeVar, cast

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

from cluster.config import Config
from cluster.security import Security, load_security
from protos.errors import ConfigurationError, NotReadyError, UnsupportedFeatureError
from protos.v1 import cluster_pb2, cluster_pb2_grpc
from router.gateway.authentication import ApiKeyInterceptor, Callers
from router.gateway.interceptor import ErrorInterceptor

STARTING, READY, STOPPING = "STARTING", "READY", "STOPPING"
ASK_TIMEOUT_S = 5.0
CALL_TIMEOUT_S = 30.0
MAX_PROGRESS = 200
"""Sentences that are kept; the oldest go first."""

Context = grpc.aio.ServicerContext[Any, Any]
T = TypeVar("T")


class StatusPort:
    """Answers for a service that starts, runs and stops.

    Args:
        config: Of the service; without `cluster.status_port` nothing is opened.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._servicer: _StatusServicer | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="status", daemon=True)
        self._server: grpc.aio.Server | None = None
        self._health = health.aio.HealthServicer()
        self.address = ""

    def open(self) -> None:
        """Open the port.

        Raises:
            ConfigurationError: It is taken, or a certificate cannot be used.
        """
        if self._config.cluster.status_port is not None:
            self._thread.start()
            self._call(self._open(load_security(self._config)))

    def close(self) -> None:
        """Close it."""
        if self._thread.is_alive():
            if self._server is not None:
                self._call(self._server.stop(0))
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(CALL_TIMEOUT_S)
        self._loop.close()

    def tell(self, sentence: str) -> None:
        """Note what the service does now."""
        if self._servicer is not None:
            self._servicer.progress.append(sentence)

    def ready(self, routers: Callable[[], Collection[str]]) -> None:
        """Let the routers answer from now on.

        Args:
            routers: Returns their addresses as they are now; called in another thread.
        """
        self._turn(READY, routers, health_pb2.HealthCheckResponse.SERVING)

    def stopping(self) -> None:
        """Say that the service takes nothing new."""
        self._turn(STOPPING, tuple, health_pb2.HealthCheckResponse.NOT_SERVING)

    def _turn(self, state: str, routers: Callable[[], Collection[str]], served: int) -> None:
        if self._servicer is not None:
            self._servicer.state, self._servicer.routers = state, routers
            self._call(self._health.set("", served))

    async def _open(self, security: Security) -> None:
        interceptors: list[grpc.aio.ServerInterceptor] = [ErrorInterceptor()]
        if security.api_keys:
            interceptors.insert(0, ApiKeyInterceptor(Callers(security.api_keys)))
        server = grpc.aio.server(interceptors=interceptors, options=[("grpc.so_reuseport", 0)])
        servicer = _StatusServicer(self._config, security)
        cluster_pb2_grpc.add_ClusterServiceServicer_to_server(servicer, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        await self._health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
        host, port = self._config.router.host, self._config.cluster.status_port
        try:
            if security.port is None:
                bound = server.add_insecure_port(f"{host}:{port}")
            else:
                bound = server.add_secure_port(f"{host}:{port}", security.port.server.credentials())
        except RuntimeError as error:
            raise ConfigurationError(
                "cluster.status_port", "must be free", port, "choose another --status-port"
            ) from error
        await server.start()
        self.address = f"{host}:{bound}"
        self._server, self._servicer = server, servicer

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(CALL_TIMEOUT_S)


class _StatusServicer(cluster_pb2_grpc.ClusterServiceServicer):
    """`GetStatus` alone; whoever wants to change something asks a router."""

    def __init__(self, config: Config, security: Security) -> None:
        self._model = config.model.served_model_name or _last_part(config.model.checkpoint)
        self._to_routers = security.to_routers
        self.state = STARTING
        self.progress: deque[str] = deque(maxlen=MAX_PROGRESS)
        self.routers: Callable[[], Collection[str]] = tuple
        self._doubted: set[str] = set()
        """Addresses that have been asked and have not answered since."""

    async def GetStatus(
        self, request: cluster_pb2.GetStatusRequest, context: Context
    ) -> cluster_pb2.ClusterStatus:
        """Answer with what a router says, or with how far the start is."""
        # One whose host is gone takes all the time that a caller has; so it is asked last.
        addresses = sorted(self.routers(), key=lambda address: address in self._doubted)
        self._doubted &= set(addresses)
        for address in addresses:
            self._doubted.add(address)
            async with self._to_routers.aio_channel(address) as channel:
                try:
                    answer = await cluster_pb2_grpc.ClusterServiceStub(channel).GetStatus(
                        cluster_pb2.GetStatusRequest(), timeout=ASK_TIMEOUT_S
                    )
                except grpc.RpcError:
                    continue
                self._doubted.discard(address)
                return cast(cluster_pb2.ClusterStatus, answer)
        if addresses:
            raise NotReadyError("no router answers; the dead ones are being started again")
        return cluster_pb2.ClusterStatus(
            model=self._model, state=self.state, progress=list(self.progress)
        )

    async def refuse(self, request: Any, context: Context) -> Any:
        """Name who answers all other questions.

        Raises:
            UnsupportedFeatureError: Always.
        """
        routers = self.routers()
        who = f"a router, e.g. {next(iter(routers))}" if routers else "a router, once there is one"
        raise UnsupportedFeatureError(f"anything but the status on this port: ask {who}")

    Drain = Scale = PlanPlacement = ApplyPlacement = ExplainAutoscale = WatchStatus = refuse


def _last_part(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]
