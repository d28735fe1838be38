"""What a router shares with the others: sessions, cached values, heartbeats.

The tier has threads of its own; the rest lives in the gateway's event loop, where `start` and
`close` are coroutines.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from typing import Any

from cluster.config import StateSection
from cluster.figures import BLOB, META, Server
from cluster.members import StateServers
from cluster.router_status import memory_of
from protos.errors import StateUnavailableError
from protos.tls import Access
from router.engine.chain import namespace_digest
from router.gateway.forwarding import Forwarder
from router.gateway.heartbeat import Heartbeat
from router.gateway.routing import PeerView
from router.state.batches import BatchStore
from router.state.cold import BlobCold
from router.state.control import ControlClient, ControlSettings
from router.state.kv_store import KvStore
from router.state.leases import StoreSettings
from router.state.restore import ValueSizes
from router.state.sessions import SessionStore
from router.state.tier import BlobTier, TierSettings
from router.state.writer import WriterSettings

log = logging.getLogger(__name__)

SCHEMA = 1
"""Of cached values; a change of their bytes that no other field shows raises it."""
LOOK_INTERVAL_S = 5.0
"""Between two looks at how full the servers are."""


def cache_namespace(
    weights_digest: str,
    config: Mapping[str, Any],
    layout: Mapping[str, Any],
    tenant_salt: str | None,
) -> str:
    """Return the name of everything that a cached value depends on, but its tokens.

    Args:
        weights_digest: See `experts.weights_digest`.
        config: The checkpoint's config.json with overrides applied: sizes, RoPE and YaRN.
        layout: Of the cached values' bytes, dtypes and kernels included.
        tenant_salt: Sets one service's values apart; never from a request.
    """
    return namespace_digest(
        {
            "schema": SCHEMA,
            "weights": weights_digest,
            "config": dict(config),
            "layout": dict(layout),
            "tenant": tenant_salt or "",
        }
    )


class RouterState:
    """The stores of one router, its tier, its heartbeat, and the ways to other routers.

    Args:
        servers: Where sessions and cached values are.
        section: Budgets.
        sizes: Of the model's cached values.
        engine: This router's name in leases and heartbeats.
        boot: Of this process.
        service: What the names of this service's routers end in.
        namespace: See `cache_namespace`.
        own: Makes this router's view, as it is now.
        access: How the other routers' ports are reached.
    """

    def __init__(
        self,
        servers: StateServers,
        section: StateSection,
        sizes: ValueSizes,
        *,
        engine: str,
        boot: str,
        service: str,
        namespace: str,
        own: Callable[[], PeerView],
        access: Access,
    ) -> None:
        self.namespace = namespace
        control = ControlSettings(wait_replicas=section.wait_replicas)
        self._meta = ControlClient(servers.meta, control)
        settings = StoreSettings(
            commit_interval_tokens=section.commit_interval_tokens,
            commit_interval_s=section.commit_interval_s,
        )
        self.store = SessionStore(self._meta, engine=engine, boot=boot, settings=settings)
        self.batches = BatchStore(self._meta)
        self._blobs = KvStore(servers.blobs, namespace)
        writer = WriterSettings(max_queue_bytes=section.write_queue_mib << 20)
        self.tier = BlobTier(self._blobs, sizes, TierSettings(writer=writer))
        self.cold = BlobCold(self._blobs)
        self.heartbeat = Heartbeat(self.store, own, boot=boot, namespace=namespace, service=service)
        self.forwarder = Forwarder(own, self.heartbeat.others, access, namespace)
        self._memory: dict[str, tuple[int, int]] = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Begin to beat, and to look at the servers."""
        self._tasks = [
            asyncio.create_task(self.heartbeat.run()),
            asyncio.create_task(self._look()),
        ]

    async def close(self) -> None:
        """End what `start` began and close the connections; the tier is closed apart."""
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await self.forwarder.close()
        await self.store.close()

    def servers(self) -> list[Server]:
        """Return every server and how it was when last looked at."""
        found = [(META, str(self._meta.endpoint), self._meta.breaker)]
        names = zip(self._blobs.servers, self._blobs.breakers, strict=True)
        found += [(BLOB, name, breaker) for name, breaker in names]
        return [
            Server(
                role=role,
                address=name,
                breaker=breaker.state.value,
                failures=breaker.num_opened,
                used_bytes=self._memory.get(name, (0, 0))[0],
                limit_bytes=self._memory.get(name, (0, 0))[1],
            )
            for role, name, breaker in found
        ]

    async def _look(self) -> None:
        """Ask the servers how full they are, again and again; what does not answer is left out."""
        meta = str(self._meta.endpoint)
        while True:
            blobs = await asyncio.to_thread(self.tier.server_info)
            memory = {name: memory_of(info) for name, info in blobs.items()}
            if meta not in memory:
                try:
                    memory[meta] = memory_of(await self._meta.command("INFO", "memory"))
                except StateUnavailableError as error:
                    log.info("look_failed server=%s why=%s", meta, error)
            self._memory = memory
            await asyncio.sleep(LOOK_INTERVAL_S)
