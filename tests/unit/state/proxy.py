"""A TCP proxy in front of a server: cuts replies short, or leads to another server from now on."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from typing import Self

from router.state.embedded import EmbeddedServer
from router.state.endpoint import Endpoint


class Proxy:
    """A proxy in the event loop of the test.

    Attributes:
        cut_after: Bytes of the next reply after which its connection ends; None: never.
        cuts_always: Cut every reply, not only the next.
        num_cuts: How many replies were cut.
    """

    def __init__(self, target: EmbeddedServer, tls: ssl.SSLContext | None = None) -> None:
        self._target = target
        self._tls = tls
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self.cut_after: int | None = None
        self.cuts_always = False
        self.num_cuts = 0

    @property
    def endpoint(self) -> Endpoint:
        """Where it listens."""
        assert self._server is not None
        return Endpoint(host="127.0.0.1", port=self._server.sockets[0].getsockname()[1])

    def lead_to(self, target: EmbeddedServer) -> None:
        """Lead to another server, as a failover does: all connections end."""
        self._target = target
        for writer in self._writers:
            writer.close()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0, ssl=self._tls)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for writer in self._writers:
            writer.close()

    async def _connected(self, up: asyncio.StreamReader, down: asyncio.StreamWriter) -> None:
        back, out = await asyncio.open_unix_connection(self._target.endpoint.path)
        self._writers |= {down, out}
        await asyncio.gather(self._copy(up, out, False), self._copy(back, down, True))

    async def _copy(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, is_reply: bool
    ) -> None:
        with contextlib.suppress(OSError):
            while part := await source.read(1 << 16):
                if is_reply and self.cut_after is not None:
                    part = part[: self.cut_after]
                    if not self.cuts_always:
                        self.cut_after = None
                    self.num_cuts += 1
                    sink.write(part)
                    break
                sink.write(part)
                await sink.drain()
        sink.close()
