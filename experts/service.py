"""`ExpertService` over gRPC, and the server that a group's process runs.

The server has an event loop and a thread of its own, so a Ray actor, a test or a script starts it
with one call. Large forwards are computed in worker threads, small ones on the loop; their frames
cross as raw bytes (`codec.decode_frame_field`), which any protobuf client speaks too. What fails in
one forward is answered on the stream, which goes on; what fails in another RPC is its status.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

import grpc
import numpy as np
from grpc_health.v1 import (  # type: ignore[import-untyped]
    health,
    health_pb2,
    health_pb2_grpc,
)

from experts.calls import MAX_MESSAGE_BYTES
from experts.group_state import GroupState
from experts.lane import LaneServer
from experts.runtime import ExpertRuntime
from protos.codec import (
    FrameHeader,
    FrameKind,
    decode_frame_field,
    encode_frame_field,
    pack_header,
    split_frame,
)
from protos.errors import (
    DrainingError,
    ExpertMeshError,
    InternalError,
    InvalidFieldError,
    MessageTooLargeError,
    NotReadyError,
    ResourceError,
)
from protos.ids import check_id, host_id
from protos.v1 import experts_pb2

log = logging.getLogger(__name__)

SERVICE_NAME = "expertmesh.v1.ExpertService"
MAX_STREAMS = 64
MIN_INTERVAL_S = 0.1
INLINE_BYTES = 64 * 1024
"""Frames up to this size are answered on the event loop when nobody computes: a thread hop costs
more than they do."""
START_TIMEOUT_S = 30.0

Context = grpc.aio.ServicerContext[Any, Any]


class ExpertServicer:
    """The RPCs of one group; every one is a thin shell around `ExpertRuntime`."""

    def __init__(
        self, runtime: ExpertRuntime, lanes: LaneServer, workers: ThreadPoolExecutor
    ) -> None:
        self._runtime = runtime
        self._lanes = lanes
        self._workers = workers
        self._num_streams = 0

    async def forward(
        self, requests: AsyncIterator[bytes], context: Context
    ) -> AsyncIterator[bytes]:
        """Answer each frame of a stream, in order."""
        self._require_open()
        loop = asyncio.get_running_loop()
        self._num_streams += 1
        try:
            async for message in requests:
                if len(message) <= INLINE_BYTES and self._runtime.is_idle:
                    yield self._answer(message)
                else:
                    yield await loop.run_in_executor(self._workers, self._answer, message)
        finally:
            self._num_streams -= 1

    async def open_lane(
        self, request: experts_pb2.OpenLaneRequest, context: Context
    ) -> experts_pb2.OpenLaneResponse:
        """Hand out the address and the token of one connection."""
        self._require_open()
        check_id(request.router_id, field="router_id")
        offer = self._lanes.offer(version=request.version, host_id=request.host_id)
        return experts_pb2.OpenLaneResponse(
            unix_path=offer.unix_path,
            tcp_address=offer.tcp_address,
            token=offer.token,
            version=request.version,
            max_frame_bytes=self._lanes.max_frame_bytes,
        )

    async def load_experts(
        self, request: experts_pb2.LoadExpertsRequest, context: Context
    ) -> experts_pb2.LoadExpertsResponse:
        """Make experts resident, or say what it would take."""
        keys = [(key.layer_id, key.expert_id) for key in request.experts]
        num_loaded, needed, free = await asyncio.to_thread(
            self._runtime.load_experts, keys, request.placement_epoch, dry_run=request.dry_run
        )
        return experts_pb2.LoadExpertsResponse(
            num_loaded=num_loaded, bytes_needed=needed, bytes_free=free
        )

    async def drop_experts(
        self, request: experts_pb2.DropExpertsRequest, context: Context
    ) -> experts_pb2.DropExpertsResponse:
        """Forget experts."""
        keys = [(key.layer_id, key.expert_id) for key in request.experts]
        num_dropped = await asyncio.to_thread(
            self._runtime.drop_experts, keys, request.placement_epoch
        )
        return experts_pb2.DropExpertsResponse(num_dropped=num_dropped)

    async def get_state(
        self, request: experts_pb2.GetStateRequest, context: Context
    ) -> experts_pb2.GetStateResponse:
        """Say what the group is doing and holds."""
        status = await asyncio.to_thread(self._runtime.status)
        return experts_pb2.GetStateResponse(
            group_id=status.group_id,
            state=str(status.state),
            placement_epoch=status.placement_epoch,
            layers=[
                experts_pb2.LayerExperts(layer_id=layer_id, expert_ids=expert_ids)
                for layer_id, expert_ids in status.layers.items()
            ],
            compute=status.compute,
            num_threads=status.num_threads,
            resident_bytes=status.resident_bytes,
            capacity_bytes=status.capacity_bytes,
            num_calls=status.num_calls,
            num_rows=status.num_rows,
            num_pairs=status.num_pairs,
            busy_s=status.busy_s,
            open_lanes=self._lanes.num_open,
            open_streams=self._num_streams,
            host_id=host_id(),
            dtype=status.dtype,
        )

    async def watch_load(
        self, request: experts_pb2.WatchLoadRequest, context: Context
    ) -> AsyncIterator[experts_pb2.WatchLoadResponse]:
        """Send the counters at once and then every interval, until the caller leaves."""
        interval_s = request.interval_s or 1.0
        if not interval_s >= MIN_INTERVAL_S:
            raise InvalidFieldError("interval_s", f"must be {MIN_INTERVAL_S} or more", interval_s)
        while True:
            counts = await asyncio.to_thread(self._runtime.load_counts)
            yield experts_pb2.WatchLoadResponse(
                placement_epoch=self._runtime.epoch,
                first_layer=0,
                num_layers=counts.shape[0],
                num_experts=counts.shape[1],
                counts_u64le=counts.astype(np.dtype("<u8")).tobytes(),
            )
            await asyncio.sleep(interval_s)

    def _answer(self, message: bytes) -> bytes:
        """Return the serialised answer to one serialised forward."""
        call_id = 0
        try:
            # One copy: kernels want aligned, writable memory.
            header, payload = split_frame(bytearray(decode_frame_field(message)))
            call_id = header.call_id
            answer, result = self._runtime.forward(header, payload)
        except ExpertMeshError as error:
            return _error_message(call_id, error)
        except Exception as error:  # the RPC boundary
            log.exception("event=forward_failed group=%s", self._runtime.group_id)
            return _error_message(call_id, InternalError(type(error).__name__))
        message = encode_frame_field(pack_header(answer), result)
        if len(message) > MAX_MESSAGE_BYTES:
            return _error_message(call_id, MessageTooLargeError(len(message), MAX_MESSAGE_BYTES))
        return message

    def _require_open(self) -> None:
        state = self._runtime.state
        if state is GroupState.DRAINING:
            raise DrainingError(f"group {self._runtime.group_id}")
        if state is not GroupState.READY:
            raise NotReadyError(f"group {self._runtime.group_id} is {state}")


class ExpertServer:
    """A running gRPC server with its lanes; `address` is `host:port`."""

    def __init__(self, runtime: ExpertRuntime, host: str, port: int) -> None:
        self._runtime = runtime
        self._host = host
        self._port = port
        try:
            self._lanes = LaneServer(runtime, host=host, host_id=host_id())
        except OSError as error:
            raise ResourceError("addresses", host, "none", f"cannot bind: {error}") from error
        self._loop = asyncio.new_event_loop()
        self._workers = ThreadPoolExecutor(MAX_STREAMS, thread_name_prefix="forward")
        self._server: grpc.aio.Server | None = None
        self._thread = threading.Thread(target=self._run_loop, name="expert-server", daemon=True)
        self._thread.start()
        try:
            self.address = self._call(self._start(), START_TIMEOUT_S)
        except BaseException:
            self.stop(0)
            raise

    @property
    def lanes(self) -> LaneServer:
        """The server of the fast lanes."""
        return self._lanes

    def stop(self, grace_s: float = 1.0) -> None:
        """Let calls finish for `grace_s`, then end everything that the server started."""
        if self._loop.is_closed():
            return
        if self._server is not None:
            self._call(self._server.stop(grace_s), grace_s + START_TIMEOUT_S)
        self._lanes.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._workers.shutdown(cancel_futures=True)

    async def _start(self) -> str:
        server = grpc.aio.server(
            maximum_concurrent_rpcs=4 * MAX_STREAMS,
            options=[
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
                ("grpc.so_reuseport", 0),
            ],
        )
        servicer = ExpertServicer(self._runtime, self._lanes, self._workers)
        server.add_generic_rpc_handlers((_handlers(servicer),))
        health_servicer = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
        bound_host = f"[{self._host}]" if ":" in self._host else self._host
        try:
            port = server.add_insecure_port(f"{bound_host}:{self._port}")
        except RuntimeError as error:
            raise ResourceError(
                "addresses", f"{bound_host}:{self._port}", "none", f"cannot bind: {error}"
            ) from error
        await server.start()
        self._server = server
        self._runtime.on_state(lambda state: self._on_state(health_servicer, state))
        return f"{bound_host}:{port}"

    def _on_state(self, servicer: health.aio.HealthServicer, state: GroupState) -> None:
        """Follow the group's state in the health service, from any thread."""
        serving = health_pb2.HealthCheckResponse.ServingStatus
        answer = serving.SERVING if state is GroupState.READY else serving.NOT_SERVING

        async def publish() -> None:
            for name in ("", SERVICE_NAME):
                await servicer.set(name, answer)

        if not self._loop.is_closed():
            asyncio.run_coroutine_threadsafe(publish(), self._loop)

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        pending = asyncio.all_tasks(self._loop)
        for task in pending:
            task.cancel()
        if pending:
            self._loop.run_until_complete(asyncio.gather(*pending, return_exceptions=True))
        self._loop.run_until_complete(self._loop.shutdown_default_executor())

    def _call(self, awaitable: Any, timeout_s: float) -> Any:
        return asyncio.run_coroutine_threadsafe(awaitable, self._loop).result(timeout_s)


def start_expert_server(runtime: ExpertRuntime, host: str, port: int = 0) -> ExpertServer:
    """Serve a group: state and health at once, forwards when it is READY.

    Args:
        runtime: The group; may be loaded before or after.
        host: Address to bind, as routers reach it.
        port: 0 takes a free one, see `ExpertServer.address`.

    Raises:
        ResourceError: The address cannot be bound.
    """
    return ExpertServer(runtime, host, port)


def _handlers(servicer: ExpertServicer) -> grpc.GenericRpcHandler:
    """Map method names to handlers; `Forward` keeps its messages as bytes."""

    def unary(method: Callable[..., Awaitable[Any]], request: Any) -> Any:
        return grpc.unary_unary_rpc_method_handler(
            _unary_boundary(method),
            request_deserializer=request.FromString,
            response_serializer=lambda message: message.SerializeToString(),
        )

    return grpc.method_handlers_generic_handler(
        SERVICE_NAME,
        {
            "Forward": grpc.stream_stream_rpc_method_handler(_stream_boundary(servicer.forward)),
            "OpenLane": unary(servicer.open_lane, experts_pb2.OpenLaneRequest),
            "LoadExperts": unary(servicer.load_experts, experts_pb2.LoadExpertsRequest),
            "DropExperts": unary(servicer.drop_experts, experts_pb2.DropExpertsRequest),
            "GetState": unary(servicer.get_state, experts_pb2.GetStateRequest),
            "WatchLoad": grpc.unary_stream_rpc_method_handler(
                _stream_boundary(servicer.watch_load),
                request_deserializer=experts_pb2.WatchLoadRequest.FromString,
                response_serializer=lambda message: message.SerializeToString(),
            ),
        },
    )


def _unary_boundary(method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    async def call(request: Any, context: Context) -> Any:
        try:
            return await method(request, context)
        except ExpertMeshError as error:
            await _abort(context, error)
        except Exception as error:  # the RPC boundary
            log.exception("event=rpc_failed method=%s", method.__name__)
            await _abort(context, InternalError(type(error).__name__))

    return call


def _stream_boundary(
    method: Callable[..., AsyncIterator[Any]],
) -> Callable[..., AsyncIterator[Any]]:
    async def call(request: Any, context: Context) -> AsyncIterator[Any]:
        try:
            async for message in method(request, context):
                yield message
        except ExpertMeshError as error:
            await _abort(context, error)
        except grpc.aio.AbortError:
            raise
        except Exception as error:  # the RPC boundary
            log.exception("event=rpc_failed method=%s", method.__name__)
            await _abort(context, InternalError(type(error).__name__))

    return call


async def _abort(context: Context, error: ExpertMeshError) -> NoReturn:
    await context.abort(error.code, error.message, error.trailers())
    raise AssertionError("abort() raises")


def _error_message(call_id: int, error: ExpertMeshError) -> bytes:
    status = error.to_status().SerializeToString()
    header = FrameHeader(kind=FrameKind.ERROR, call_id=call_id, payload_bytes=len(status))
    return encode_frame_field(pack_header(header), status)
