"""The servers of sessions and cached KV that a service uses: given ones, or embedded ones.

Embedded servers are children of `serve` and end with it, whatever ends it. There are two, because
sessions must never be evicted and cached KV must be. On a private cluster they listen on Unix
sockets that only this user may open; on a shared one on this node's address behind a random
password, so that routers on other nodes reach them.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
import threading

import psutil

from cluster.config import StateSection
from cluster.kv_budget import GIB
from cluster.members import StateServers
from cluster.preflight_state import state_urls
from protos.errors import StateUnavailableError
from router.state.embedded import EmbeddedServer, Role
from router.state.endpoint import Endpoint
from router.state.sessions import SessionStore

log = logging.getLogger(__name__)

META_BYTES = 256 << 20
"""Of the embedded server of sessions: sixty million tokens. Beyond, new sessions are refused."""
EMBEDDED_SHARE = 1 / 8
"""Of this machine's memory, for the embedded server of cached KV."""
MAX_TMP_CHARS = 60
"""Of a folder for Unix sockets: the kernel takes 107 characters for the whole path."""


class ServiceState:
    """The servers of one service; `close` ends the embedded ones."""

    def __init__(self, servers: StateServers, embedded: list[EmbeddedServer]) -> None:
        self.servers = servers
        self._embedded = embedded

    @property
    def is_embedded(self) -> bool:
        """Whether sessions end with the service."""
        return bool(self._embedded)

    @classmethod
    def open(cls, section: StateSection, host: str | None) -> ServiceState:
        """Take the servers that are configured, or start embedded ones.

        Args:
            section: The settings.
            host: This node's address where other nodes must reach the servers; None: only this
                machine's processes do.

        Raises:
            ResourceError: An embedded server does not start.
        """
        meta_url, blob_urls = state_urls(section)
        if meta_url is not None:
            meta = Endpoint.parse(meta_url)
            blobs = tuple(Endpoint.parse(url, "state.blob_urls") for url in blob_urls)
            return cls(StateServers(meta=meta, blobs=blobs), [])
        limit = section.embedded_gib
        total = psutil.virtual_memory().total
        blob_bytes = int(limit * GIB if limit is not None else total * EMBEDDED_SHARE)
        is_tcp = host is not None or len(tempfile.gettempdir()) > MAX_TMP_CHARS
        embedded: list[EmbeddedServer] = []
        try:
            for role, num_bytes in ((Role.META, META_BYTES), (Role.BLOB, blob_bytes)):
                embedded.append(
                    EmbeddedServer.start(
                        role, maxmemory_bytes=num_bytes, tcp=is_tcp, host=host or "127.0.0.1"
                    )
                )
        except BaseException:
            for server in embedded:
                server.close()
            raise
        meta_server, blob_server = embedded
        servers = StateServers(meta=meta_server.endpoint, blobs=(blob_server.endpoint,))
        return cls(servers, embedded)

    def report_dead(self, engine: str, boot: str) -> None:
        """Say that a router's process ended, so that its sessions are free at once.

        Returns at once; where the server does not answer in time, the leases run out instead.
        """
        threading.Thread(
            target=lambda: asyncio.run(_report_dead(self.servers.meta, engine, boot)),
            name="report-dead",
            daemon=True,
        ).start()

    def close(self) -> None:
        """End the embedded servers; what they hold is gone."""
        for server in self._embedded:
            server.close()
        self._embedded = []


async def _report_dead(meta: Endpoint, engine: str, boot: str) -> None:
    store = SessionStore.connect(meta, engine="serve")
    try:
        await store.report_dead(engine, boot)
    except StateUnavailableError as error:
        log.warning("report_dead_failed engine=%s why=%s", engine, error)
    finally:
        await store.close()
