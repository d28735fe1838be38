"""Passes a `Generate` stream on to the router that starts it soonest; the client does not notice.

Decides when to pass on (`router.gateway.routing` says where) and what happens when the other router
fails: before its first message this router serves the request itself, after it the client hears
UNAVAILABLE and comes back with `resume_from`. A forwarded request carries `FORWARDED_KEY` and is
never forwarded again, so that two routers with different views cannot play ping-pong.

Runs in the gateway's event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from protos.errors import (
    ClientStalledError,
    SessionNotFoundError,
    StateUnavailableError,
    from_rpc_error,
)
from protos.ids import new_request_id
from protos.tls import API_KEY_HEADER, Access
from protos.v1 import generation_pb2, generation_pb2_grpc
from router.engine.chain import tenant_namespace
from router.gateway.live import STALL_TIMEOUT_S
from router.gateway.request_reader import in_thread_if_large
from router.gateway.routing import Choice, PeerView, aligned_hashes, choose
from router.state.session_records import SessionRecord

logger = logging.getLogger(__name__)

FORWARDED_KEY = "expertmesh-forwarded-by"
FIRST_MESSAGE_S = 1.0
"""How long the other router may take to accept, and 20 us for each token that it has to encode."""
FIRST_MESSAGE_S_PER_TOKEN = 20e-6
BYTES_PER_TOKEN = 4
SHUN_S = 10.0
"""For how long a router that failed is not chosen: a heartbeat's life."""
MAX_MESSAGE_BYTES = 64 << 20

_SERVE_HERE = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNKNOWN,
    }
)
"""Codes that say something of the other router and nothing of the request."""

Context = grpc.aio.ServicerContext[Any, Any]
Metadata = Iterable[tuple[str, str | bytes]]


@dataclass(slots=True)
class ForwardStats:
    """Counts since the start."""

    forwarded: int = 0
    fell_back: int = 0
    """Failed before the first message and were served here."""
    warm_tokens: int = 0
    """Prompt tokens that the chosen routers had."""


class Forwarder:
    """The other routers, as a place to pass requests on to.

    Args:
        own: Makes the view of this router, as it is now.
        others: The views of the other routers that serve.
        access: How the other routers' ports are reached.
        namespace: Of the hashes of prompts; a tenant's is made of it.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        own: Callable[[], PeerView],
        others: Callable[[], Sequence[PeerView]],
        access: Access,
        namespace: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._namespace = namespace
        self._own = own
        self._others = others
        self._access = access
        self._clock = clock
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._shunned: dict[str, float] = {}
        self._charges: dict[str, tuple[PeerView, int]] = {}
        self._live: dict[tuple[str, str], str] = {}
        self.stats = ForwardStats()

    async def forward(
        self,
        request: generation_pb2.GenerateRequest,
        prompt_ids: Sequence[int],
        context: Context,
        tenant: str = "",
    ) -> bool:
        """Pass a request on if another router is clearly better; return whether it is served.

        The other router learns the tenant as this one did: by the client's own key.

        Args:
            request: As it came; gets a request id, should it have none.
            prompt_ids: What it means.
            context: Of the call that is answered.
            tenant: Whose call it is.

        Raises:
            ExpertMeshError: What the other router answered about the request, or after its first
                message.
        """
        if not self._may_forward(request, context):
            return False
        hashing = (aligned_hashes, tenant_namespace(self._namespace, tenant), prompt_ids)
        hashes = await in_thread_if_large(BYTES_PER_TOKEN * len(prompt_ids), *hashing)
        return await self._forward(request, hashes, len(prompt_ids), context, tenant)

    async def forward_turn(
        self,
        request: generation_pb2.GenerateRequest,
        read: Callable[[], Awaitable[SessionRecord]],
        context: Context,
        tenant: str = "",
    ) -> bool:
        """Pass a session's turn on to the router that holds the session warm; see `forward`.

        Args:
            request: As it came.
            read: Reads the session's record; called only where there are other routers.
            context: Of the call that is answered.
            tenant: Whose call it is.
        """
        if not self._may_forward(request, context):
            return False
        try:
            record = await read()
        except (SessionNotFoundError, StateUnavailableError):
            return False  # the turn itself says it better
        num_tokens = record.num_tokens + max(1, request.ByteSize() // BYTES_PER_TOKEN)
        return await self._forward(request, record.snapshots, num_tokens, context, tenant)

    def _may_forward(self, request: generation_pb2.GenerateRequest, context: Context) -> bool:
        metadata = dict(context.invocation_metadata() or ())
        is_new = FORWARDED_KEY not in metadata and not request.HasField("resume_from")
        return is_new and bool(self._others())

    async def _forward(
        self,
        request: generation_pb2.GenerateRequest,
        hashes: Mapping[int, bytes],
        num_tokens: int,
        context: Context,
        tenant: str,
    ) -> bool:
        choice = self._choose(hashes, num_tokens)
        if choice is None:
            return False
        request.request_id = request.request_id or new_request_id()
        self._charge(choice, num_tokens)
        first_s = FIRST_MESSAGE_S + FIRST_MESSAGE_S_PER_TOKEN * num_tokens
        key = (tenant, request.request_id)
        self._live[key] = choice.view.address
        try:
            return await self._relay(request, choice, first_s, context)
        finally:
            self._live.pop(key, None)

    async def cancel(self, request_id: str, metadata: Metadata = (), tenant: str = "") -> bool:
        """Cancel a request that was passed on; return whether it was live.

        Args:
            request_id: Of the request.
            metadata: Of the call that cancels it; its key is passed on.
            tenant: Whose call that is.
        """
        address = self._live.get((tenant, request_id))
        if address is None:
            return False
        stub = generation_pb2_grpc.GenerationServiceStub(self._channel(address))
        try:
            answer = await stub.CancelRequests(
                generation_pb2.CancelRequestsRequest(request_ids=[request_id]),
                timeout=FIRST_MESSAGE_S,
                metadata=_key_of(metadata),
            )
        except grpc.RpcError:
            return False  # its router is gone, and the stream ends by that
        return request_id in answer.cancelled

    async def close(self) -> None:
        """Close the connections; streams under way end."""
        channels, self._channels = self._channels, {}
        for channel in channels.values():
            await channel.close()

    def _choose(self, hashes: Mapping[int, bytes], num_tokens: int) -> Choice | None:
        """Return another router that is clearly better, or None."""
        now = self._clock()
        others = [
            self._charged(view)
            for view in self._others()
            if self._shunned.get(view.router_id, 0.0) <= now
        ]
        own = self._own()
        if not others:
            return None
        choice = choose([own, *others], own.router_id, hashes, num_tokens)
        return None if choice.view is own else choice

    def _charged(self, view: PeerView) -> PeerView:
        """Return a view with what this router has sent there since its heartbeat."""
        seen, tokens = self._charges.get(view.router_id, (view, 0))
        return view.with_queued(tokens) if seen is view else view

    def _charge(self, choice: Choice, num_tokens: int) -> None:
        view = next(v for v in self._others() if v.router_id == choice.view.router_id)
        seen, tokens = self._charges.get(view.router_id, (view, 0))
        sent = num_tokens - choice.warm_tokens
        self._charges[view.router_id] = (view, sent + (tokens if seen is view else 0))

    async def _relay(
        self,
        request: generation_pb2.GenerateRequest,
        choice: Choice,
        first_s: float,
        context: Context,
    ) -> bool:
        view = choice.view
        stub = generation_pb2_grpc.GenerationServiceStub(self._channel(view.address))
        metadata = [
            (FORWARDED_KEY, self._own().router_id),
            *_key_of(context.invocation_metadata() or ()),
        ]
        call = stub.Generate(request, timeout=context.time_remaining(), metadata=metadata)
        is_open = False
        try:
            async with asyncio.timeout(first_s):
                message = await call.read()
            while message is not grpc.aio.EOF:
                if not is_open:
                    is_open = True
                    self.stats.forwarded += 1
                    self.stats.warm_tokens += choice.warm_tokens
                    logger.info("request.forwarded id=%s to=%s", request.request_id, choice.reason)
                await _write(context, message)
                message = await call.read()
            return True
        except TimeoutError:
            self._fall_back(view, "late")
            return False
        except grpc.aio.AioRpcError as error:
            if is_open or error.code() not in _SERVE_HERE:
                raise from_rpc_error(error) from error
            self._fall_back(view, error.code().name)
            return False
        finally:
            call.cancel()

    def _fall_back(self, view: PeerView, why: str) -> None:
        self._shunned[view.router_id] = self._clock() + SHUN_S
        self.stats.fell_back += 1
        logger.warning("forward.failed router=%s why=%s", view.router_id, why)

    def _channel(self, address: str) -> grpc.aio.Channel:
        if address not in self._channels:
            self._channels[address] = self._access.aio_channel(address, _CHANNEL_OPTIONS)
        return self._channels[address]


def _key_of(metadata: Metadata) -> list[tuple[str, str]]:
    """Return the header with the API key that a client's call came with, if it did."""
    return [(name, str(value)) for name, value in metadata if name == API_KEY_HEADER]


async def _write(context: Context, message: generation_pb2.GenerateResponse) -> None:
    """Send a message to a client that still reads.

    Raises:
        ClientStalledError: It does not.
    """
    try:
        async with asyncio.timeout(STALL_TIMEOUT_S):
            await context.write(message)
    except TimeoutError:
        raise ClientStalledError(STALL_TIMEOUT_S) from None


_CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
]
