"""What a router shares with the others: sessions, heartbeats, and the name of its cached values.

Lives in the gateway's event loop: `start` and `close` are its coroutines.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from cluster.members import StateServers
from protos.tls import Access
from router.engine.chain import namespace_digest
from router.gateway.forwarding import Forwarder
from router.gateway.heartbeat import Heartbeat
from router.gateway.routing import RouterView
from router.state.sessions import SessionStore

SCHEMA = 1
"""Of cached values; a change of their bytes that no other field shows raises it."""


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
    """The session store of one router, its heartbeat, and the ways to the other routers.

    Args:
        servers: Where sessions and cached values are.
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
        *,
        engine: str,
        boot: str,
        service: str,
        namespace: str,
        own: Callable[[], RouterView],
        access: Access,
    ) -> None:
        self.namespace = namespace
        self.store = SessionStore.connect(servers.meta, engine=engine, boot=boot)
        self.heartbeat = Heartbeat(self.store, own, boot=boot, namespace=namespace, service=service)
        self.forwarder = Forwarder(own, self.heartbeat.others, access)
        self._beating: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to beat."""
        self._beating = asyncio.create_task(self.heartbeat.run())

    async def close(self) -> None:
        """End the heartbeat and close the connections."""
        if self._beating is not None:
            self._beating.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._beating
        await self.forwarder.close()
        await self.store.close()
