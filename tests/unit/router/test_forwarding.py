"""Streams that another router serves: real servers and channels, faults set on the far one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field

import grpc
import pytest

from protos.errors import (
    ClientStalledError,
    ExpertMeshError,
    InvalidFieldError,
    QueueFullError,
    SessionNotFoundError,
    StateUnavailableError,
    UnreachableError,
    from_rpc_error,
)
from protos.tls import Access
from protos.v1 import generation_pb2, generation_pb2_grpc
from router.gateway import forwarding, interceptor
from router.gateway.forwarding import SHUN_S, Forwarder
from router.gateway.interceptor import ErrorInterceptor
from router.gateway.routing import WARM_BYTES, PeerView, RouterLoad, aligned_hashes
from router.state.session_records import SessionRecord

PROMPT = range(1100)
HASHES: Mapping[int, bytes] = {1024: aligned_hashes("ns", PROMPT)[1024]}
SESSION = SessionRecord(
    tenant="",
    session_id="s",
    num_tokens=1090,
    num_turns=1,
    created_ms=0,
    updated_ms=0,
    ttl_s=60.0,
    quota_tokens=0,
    metadata={},
    namespace="ns",
    nonce=b"",
    holder=None,
    open_turn=None,
    snapshots={1090: bytes(range(32))},
)
NUM_MESSAGES = 5


@dataclass
class Router(generation_pb2_grpc.GenerationServiceServicer):
    """A router that answers `NUM_MESSAGES` messages which name it, or fails as it is told."""

    name: str
    forwarder: Forwarder | None = None
    error: ExpertMeshError | None = None
    fail_after: int = 0
    """Messages before `error`."""
    hangs: bool = False
    read_error: ExpertMeshError | None = None
    """Of the session's record."""
    requests: list[generation_pb2.GenerateRequest] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    async def Generate(
        self, request: generation_pb2.GenerateRequest, context: forwarding.Context
    ) -> None:
        if self.forwarder is not None and await self.forwards(request, context):
            return
        self.requests.append(request)
        self.keys.append(str(dict(context.invocation_metadata() or ()).get("authorization", "")))
        try:
            if self.hangs:
                await asyncio.Event().wait()
            for sequence in range(1, NUM_MESSAGES + 1):
                if self.error is not None and sequence > self.fail_after:
                    raise self.error
                await context.write(
                    generation_pb2.GenerateResponse(sequence=sequence, text_delta=self.name)
                )
        finally:
            self.ended.set()

    async def forwards(
        self, request: generation_pb2.GenerateRequest, context: forwarding.Context
    ) -> bool:
        assert self.forwarder is not None
        if request.session_id:
            return await self.forwarder.forward_turn(request, self.read, context)
        return await self.forwarder.forward(request, PROMPT, context)

    async def read(self) -> SessionRecord:
        if self.read_error is not None:
            raise self.read_error
        return SESSION

    async def CancelRequests(
        self, request: generation_pb2.CancelRequestsRequest, context: forwarding.Context
    ) -> generation_pb2.CancelRequestsResponse:
        self.cancelled.extend(request.request_ids)
        self.keys.append(str(dict(context.invocation_metadata() or ()).get("authorization", "")))
        return generation_pb2.CancelRequestsResponse(cancelled=request.request_ids)


def view(router_id: str, address: str, *, warm: bool = False, queued: int = 0) -> PeerView:
    load = RouterLoad(
        prefill_tokens_per_s=1000.0, queued_tokens=queued, num_running=0, max_running=8
    )
    known = [*HASHES.values(), *SESSION.snapshots.values()]
    keys = frozenset(key[:WARM_BYTES] for key in known) if warm else frozenset()
    return PeerView(router_id=router_id, address=address, load=load, warm=keys)


@dataclass
class Pair:
    """A cold router `near` that clients call, and a warm one, `far`."""

    near: Router
    far: Router
    stub: generation_pb2_grpc.GenerationServiceStub
    forwarder: Forwarder
    views: list[PeerView]
    now: float = 100.0

    async def ask(self, **fields: object) -> list[str]:
        request = generation_pb2.GenerateRequest(**fields)  # type: ignore[arg-type]
        try:
            return [message.text_delta async for message in self.stub.Generate(request, timeout=20)]
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error


async def serve(router: Router) -> tuple[grpc.aio.Server, str]:
    server = grpc.aio.server(interceptors=(ErrorInterceptor(),))
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(router, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, f"127.0.0.1:{port}"


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    near, far = Router("near"), Router("far")
    near_server, near_address = await serve(near)
    far_server, far_address = await serve(far)
    async with grpc.aio.insecure_channel(near_address) as channel:
        made = Pair(
            near,
            far,
            generation_pb2_grpc.GenerationServiceStub(channel),
            Forwarder(
                lambda: view("near", near_address),
                lambda: made.views,
                Access(),
                "ns",
                clock=lambda: made.now,
            ),
            [view("far", far_address, warm=True)],
        )
        near.forwarder = made.forwarder
        # The far one would send everything straight back, if it were asked to.
        far.forwarder = Forwarder(
            lambda: view("far", far_address, queued=10**6),
            lambda: [view("near", near_address)],
            Access(),
        )
        yield made
        await made.forwarder.close()
        await far.forwarder.close()
    await near_server.stop(None)
    await far_server.stop(None)


async def test_the_warm_router_serves_and_the_client_sees_one_stream(pair: Pair) -> None:
    assert await pair.ask() == ["far"] * NUM_MESSAGES
    assert not pair.near.requests
    assert pair.far.requests[0].request_id, "one id for both"
    assert pair.forwarder.stats.forwarded == 1
    assert pair.forwarder.stats.warm_tokens == 1024


async def test_a_sessions_turn_goes_where_the_session_is_warm(pair: Pair) -> None:
    assert await pair.ask(session_id="s") == ["far"] * NUM_MESSAGES
    assert pair.forwarder.stats.warm_tokens == 1090
    assert pair.far.requests[0].session_id == "s"


@pytest.mark.parametrize(
    "error", [SessionNotFoundError("s"), StateUnavailableError("gone", 1.0)], ids=["no", "down"]
)
async def test_a_session_that_cannot_be_read_is_this_routers_to_answer(
    pair: Pair, error: ExpertMeshError
) -> None:
    pair.near.read_error = error
    assert await pair.ask(session_id="s") == ["near"] * NUM_MESSAGES


async def test_a_forwarded_request_stays_where_it_is(pair: Pair) -> None:
    assert pair.far.forwarder is not None
    await pair.ask()
    assert pair.far.forwarder.stats.forwarded == 0
    assert len(pair.far.requests) == 1


async def test_a_resumed_stream_is_served_where_the_client_came(pair: Pair) -> None:
    assert await pair.ask(request_id="r", resume_from=0) == ["near"] * NUM_MESSAGES


async def test_without_a_clear_gain_nothing_is_passed_on(pair: Pair) -> None:
    pair.views = [view("far", "nowhere:1")]
    assert await pair.ask() == ["near"] * NUM_MESSAGES
    pair.views = []
    assert await pair.ask() == ["near"] * NUM_MESSAGES


async def test_the_clients_key_is_passed_on(pair: Pair) -> None:
    request = generation_pb2.GenerateRequest()
    call = pair.stub.Generate(request, metadata=(("authorization", "Bearer k"),), timeout=20)
    assert len([message async for message in call]) == NUM_MESSAGES
    assert pair.far.keys == ["Bearer k"]


@pytest.mark.parametrize(
    "error", [QueueFullError(9, 8, 0.1), UnreachableError("gone")], ids=["full", "gone"]
)
async def test_before_the_first_message_this_router_steps_in(
    pair: Pair, error: ExpertMeshError
) -> None:
    pair.far.error = error
    assert await pair.ask(request_id="r") == ["near"] * NUM_MESSAGES
    assert pair.forwarder.stats.fell_back == 1
    assert [request.request_id for request in pair.near.requests] == ["r"]
    await pair.ask()
    assert len(pair.far.requests) == 1, "left alone for a while"
    pair.far.error = None
    pair.now += SHUN_S
    assert await pair.ask() == ["far"] * NUM_MESSAGES


async def test_a_router_that_does_not_listen_is_passed_over(pair: Pair) -> None:
    pair.views = [view("far", "127.0.0.1:1", warm=True)]
    assert await pair.ask() == ["near"] * NUM_MESSAGES


async def test_a_router_that_hangs_is_passed_over(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forwarding, "FIRST_MESSAGE_S", 0.05)
    pair.far.hangs = True
    assert await pair.ask() == ["near"] * NUM_MESSAGES
    async with asyncio.timeout(10):
        await pair.far.ended.wait()  # and it is told to stop


async def test_what_the_other_says_of_the_request_is_the_answer(pair: Pair) -> None:
    pair.far.error = InvalidFieldError("sampling.temperature", "must be 0 or more", -1.0)
    with pytest.raises(InvalidFieldError):
        await pair.ask()
    assert not pair.near.requests


async def test_after_the_first_message_the_client_hears_unavailable(pair: Pair) -> None:
    pair.far.error, pair.far.fail_after = UnreachableError("gone"), 2
    call = pair.stub.Generate(generation_pb2.GenerateRequest(), timeout=20)
    assert [(await call.read()).sequence for _ in range(2)] == [1, 2]
    with pytest.raises(grpc.RpcError) as caught:
        await call.read()
    assert isinstance(from_rpc_error(caught.value), UnreachableError)
    assert not pair.near.requests


async def test_a_client_that_leaves_ends_the_far_stream(pair: Pair) -> None:
    pair.far.hangs = True
    call = pair.stub.Generate(generation_pb2.GenerateRequest(request_id="r"), timeout=20)
    reading = asyncio.create_task(call.read())
    async with asyncio.timeout(10):
        while not pair.far.requests:
            await asyncio.sleep(0)
    assert not await pair.forwarder.cancel("r", tenant="other")
    assert await pair.forwarder.cancel("r", [("authorization", "Bearer k"), ("x", "y")])
    assert pair.far.cancelled == ["r"]
    assert pair.far.keys[-1] == "Bearer k"
    assert not await pair.forwarder.cancel("unknown")
    call.cancel()
    async with asyncio.timeout(10):
        await pair.far.ended.wait()
    with pytest.raises(asyncio.CancelledError):
        await reading


async def read_all(call: grpc.aio.UnaryStreamCall) -> None:  # type: ignore[type-arg]
    while await call.read() is not grpc.aio.EOF:
        pass


async def test_a_client_that_reads_nothing_any_more_ends_the_relay(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forwarding, "STALL_TIMEOUT_S", 0.3)
    monkeypatch.setattr(interceptor, "ABORT_TIMEOUT_S", 0.3)
    pair.far.name = "x" * 3_000_000
    small_window = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65535)]
    address = pair.forwarder._own().address
    async with grpc.aio.insecure_channel(address, options=small_window) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        call = stub.Generate(generation_pb2.GenerateRequest(), timeout=60)
        await call.read()
        async with asyncio.timeout(20):
            while pair.forwarder._live:
                await asyncio.sleep(0.01)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read_all(call)
    assert isinstance(from_rpc_error(caught.value), ClientStalledError)


async def test_what_was_sent_counts_until_the_next_heartbeat(pair: Pair) -> None:
    # Own cost 1.1 s. The far one: 0.076 s, and 76 tokens more with every request sent.
    busy = pair.views[0].with_queued(650)  # 0.726 s; then 0.802 s: no clear gain any more
    pair.views = [busy]
    assert await pair.ask() == ["far"] * NUM_MESSAGES
    assert await pair.ask() == ["near"] * NUM_MESSAGES
    pair.views = [pair.views[0].with_queued(0)]
    assert await pair.ask() == ["far"] * NUM_MESSAGES
