"""Lets one router wait while the service has no expert groups, and ask for them when someone comes.

Asleep, a router takes requests and streams of `GatingService`, and answers none. The first one asks
the process of `serve` for groups (`WakeWish`); all are answered when `wake` says that there are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from cluster.members import WakeWish
from router.engine.engine import Engine
from router.gateway.gating import GatingServicer
from router.gateway.server import GatewayThread


class RouterSleep:
    """Sleep of one router; any thread but the gateway's may call.

    Args:
        engine: Runs the requests.
        gating: Answers the streams.
        gateway: Its loop is where `gating` lives.
        ask: Takes a wish for the process of `serve`; called by whoever brings a request.
    """

    def __init__(
        self,
        engine: Engine,
        gating: GatingServicer,
        gateway: GatewayThread,
        ask: Callable[[WakeWish], None],
    ) -> None:
        self._engine = engine
        self._gating = gating
        self._gateway = gateway
        self._ask = ask
        self._has_asked = threading.Event()

    def sleep(self) -> bool:
        """Answer nothing until `wake`; False where something runs or waits: nothing has changed."""
        self._has_asked.clear()
        if not self._gateway.call(self._sleep_gating()):
            return False
        if self._engine.sleep(self._on_request):
            return True
        self._gateway.call(self._wake_gating())
        return False

    def wake(self) -> None:
        """Answer everything again."""
        self._engine.wake()
        self._gateway.call(self._wake_gating())

    async def _sleep_gating(self) -> bool:
        return self._gating.sleep(self._on_request)

    async def _wake_gating(self) -> None:
        self._gating.wake()

    def _on_request(self) -> None:
        if not self._has_asked.is_set():
            self._has_asked.set()
            self._ask(WakeWish())
