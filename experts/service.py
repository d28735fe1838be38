"""`ExpertService` over gRPC, and the server that a group's process runs.

The server runs threads of its own, so a Ray actor, a test or a script starts it with one call. A
stream has a thread for as long as it is open: grpc's event-loop server takes twice as long for a
message (tests/benchmarks/LOG.md). Frames cross as raw bytes (`codec.decode_frame_field`), which any
protobuf client speaks too. What fails in one forward is answered on the stream, which goes on; what
fails in another RPC is its status.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
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
from experts.express import FIRST_BUFFER_BYTES, KEPT_BUFFER_BYTES, FrameBuffers
from experts.group_state import GroupState
from experts.lane import STOP_TIMEOUT_S, LaneServer
from experts.runtime import ExpertRuntime
from protos.codec import (
    Buffer,
    FrameHeader,
    FrameKind,
    decode_frame_field,
    encode_frame_field,
    pack_header,
    split_frame,
    unpack_header,
)
from protos.errors import (
    DeadlineExceededError,
    DrainingError,
    ExpertMeshError,
    InternalError,
    InvalidFieldError,
    MessageTooLargeError,
    NotReadyError,
    ResourceError,
)
from protos.ids import check_id, host_id
from protos.tls import ServerTls
from protos.v1 import experts_pb2

log = logging.getLogger(__name__)

SERVICE_NAME = "expertmesh.v1.ExpertService"
MAX_CONCURRENT_RPCS = 128
"""Streams and calls at one time, a thread each; one more is refused with RESOURCE_EXHAUSTED."""
FIRST_FRAME_S = 10.0
"""A stream without a frame by then is cancelled."""
MIN_INTERVAL_S = 0.1
HANDSHAKE_TIMEOUT_S = 10.0
"""A connection that has not finished TLS and the HTTP/2 greeting by then is closed."""
MAX_CONNECTIONS = 1024
"""Further ones are closed at once; a router has a handful."""

Context = grpc.ServicerContext


class ExpertServicer:
    """The RPCs of one group; every one is a thin shell around `ExpertRuntime`."""

    def __init__(self, runtime: ExpertRuntime, lanes: LaneServer) -> None:
        self._runtime = runtime
        self._lanes = lanes
        self._lock = threading.Lock()
        self._num_streams = 0

    def forward(self, requests: Iterator[bytes], context: Context) -> Iterator[bytes]:
        """Answer each frame of a stream, in order."""
        self._require_open()
        # A router opens its stream with a frame in hand; who is silent must not keep the thread.
        silence = threading.Timer(FIRST_FRAME_S, context.cancel)
        silence.daemon = True
        with self._lock:
            self._num_streams += 1
        try:
            answers = _Answers(self._runtime)
            silence.start()
            for message in requests:
                silence.cancel()
                yield answers.to(message)
        finally:
            silence.cancel()
            with self._lock:
                self._num_streams -= 1

    def open_lane(
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

    def load_experts(
        self, request: experts_pb2.LoadExpertsRequest, context: Context
    ) -> experts_pb2.LoadExpertsResponse:
        """Make experts resident, or say what it would take."""
        keys = [(key.layer_id, key.expert_id) for key in request.experts]
        num_loaded, needed, free = self._runtime.load_experts(
            keys, request.placement_epoch, dry_run=request.dry_run
        )
        return experts_pb2.LoadExpertsResponse(
            num_loaded=num_loaded, bytes_needed=needed, bytes_free=free
        )

    def drop_experts(
        self, request: experts_pb2.DropExpertsRequest, context: Context
    ) -> experts_pb2.DropExpertsResponse:
        """Forget experts."""
        keys = [(key.layer_id, key.expert_id) for key in request.experts]
        num_dropped = self._runtime.drop_experts(keys, request.placement_epoch)
        return experts_pb2.DropExpertsResponse(num_dropped=num_dropped)

    def get_state(
        self, request: experts_pb2.GetStateRequest, context: Context
    ) -> experts_pb2.GetStateResponse:
        """Say what the group is doing and holds."""
        status = self._runtime.status()
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
            layer_pairs=self._runtime.load_counts().sum(axis=1).tolist(),
        )

    def watch_load(
        self, request: experts_pb2.WatchLoadRequest, context: Context
    ) -> Iterator[experts_pb2.WatchLoadResponse]:
        """Send the counters at once and then every interval, until the caller leaves."""
        interval_s = request.interval_s or 1.0
        if not interval_s >= MIN_INTERVAL_S:
            raise InvalidFieldError("interval_s", f"must be {MIN_INTERVAL_S} or more", interval_s)
        ended = threading.Event()
        if not context.add_callback(ended.set):
            return
        while True:
            counts = self._runtime.load_counts()
            yield experts_pb2.WatchLoadResponse(
                placement_epoch=self._runtime.epoch,
                first_layer=0,
                num_layers=counts.shape[0],
                num_experts=counts.shape[1],
                counts_u64le=counts.astype(np.dtype("<u8")).tobytes(),
            )
            if ended.wait(interval_s):
                return

    def _require_open(self) -> None:
        state = self._runtime.state
        if state is GroupState.DRAINING:
            raise DrainingError(f"group {self._runtime.group_id}")
        if state is not GroupState.READY:
            raise NotReadyError(f"group {self._runtime.group_id} is {state}")


class _Answers:
    """The answers of one stream: native where the forward is ordinary, else with care."""

    def __init__(self, runtime: ExpertRuntime) -> None:
        self._runtime = runtime
        self._buffers = FrameBuffers(FIRST_BUFFER_BYTES)

    def to(self, message: bytes) -> bytes:
        """Return the serialised answer to one serialised forward."""
        call_id = 0
        try:
            frame = decode_frame_field(message)
            express = self._runtime.express
            answer = None if express is None else express.answer(frame, self._buffers)
            if answer is not None:
                return _message(answer)
            # One copy: kernels want aligned, writable memory.
            header, payload = split_frame(bytearray(frame))
            call_id = header.call_id
            answer_header, result = self._runtime.forward(header, payload)
        except DeadlineExceededError as error:
            return _error_message(unpack_header(frame).call_id, error)
        except ExpertMeshError as error:
            return _error_message(call_id, error)
        except Exception as error:  # the RPC boundary
            log.exception("event=forward_failed group=%s", self._runtime.group_id)
            return _error_message(call_id, InternalError(type(error).__name__))
        largest = max(len(frame), len(result))
        if self._buffers.capacity < largest <= KEPT_BUFFER_BYTES:
            self._buffers = FrameBuffers(min(2 * largest, KEPT_BUFFER_BYTES))
        return _message(pack_header(answer_header), result)


class ExpertServer:
    """A running gRPC server with its lanes; `address` is `host:port`."""

    def __init__(
        self, runtime: ExpertRuntime, host: str, port: int, tls: ServerTls | None = None
    ) -> None:
        self._runtime = runtime
        self._tls = tls
        self._host = host
        self._port = port
        try:
            self._lanes = LaneServer(runtime, host=host, host_id=host_id(), with_tcp=tls is None)
        except OSError as error:
            raise ResourceError("addresses", host, "none", f"cannot bind: {error}") from error
        self._workers = ThreadPoolExecutor(MAX_CONCURRENT_RPCS, thread_name_prefix="rpc")
        self._server: grpc.Server | None = None
        try:
            self.address = self._start()
        except BaseException:
            self.stop(0)
            raise

    @property
    def lanes(self) -> LaneServer:
        """The server of the fast lanes."""
        return self._lanes

    def stop(self, grace_s: float = 1.0) -> None:
        """Let calls finish for `grace_s`, then end everything that the server started.

        A forward that is being computed then ends by itself; nobody waits for it much longer than
        `STOP_TIMEOUT_S`.
        """
        deadline = time.monotonic() + grace_s + STOP_TIMEOUT_S
        if self._server is not None:
            self._server.stop(grace_s).wait(grace_s + STOP_TIMEOUT_S)
            self._server = None
        self._lanes.stop(max(0.0, deadline - time.monotonic()))
        self._workers.shutdown(wait=False, cancel_futures=True)

    def _start(self) -> str:
        server = grpc.server(
            self._workers,
            maximum_concurrent_rpcs=MAX_CONCURRENT_RPCS,
            options=[
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
                ("grpc.so_reuseport", 0),
                ("grpc.server_handshake_timeout_ms", int(HANDSHAKE_TIMEOUT_S * 1000)),
                ("grpc.max_allowed_incoming_connections", MAX_CONNECTIONS),
            ],
        )
        servicer = ExpertServicer(self._runtime, self._lanes)
        server.add_generic_rpc_handlers((_handlers(servicer),))
        health_servicer = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
        bound_host = f"[{self._host}]" if ":" in self._host else self._host
        try:
            address = f"{bound_host}:{self._port}"
            if self._tls is None:
                port = server.add_insecure_port(address)
            else:
                port = server.add_secure_port(address, self._tls.credentials())
        except RuntimeError as error:
            raise ResourceError(
                "addresses", f"{bound_host}:{self._port}", "none", f"cannot bind: {error}"
            ) from error
        server.start()
        self._server = server
        self._runtime.on_state(lambda state: _publish(health_servicer, state))
        return f"{bound_host}:{port}"


def _publish(servicer: health.HealthServicer, state: GroupState) -> None:
    """Follow the group's state in the health service, from any thread."""
    serving = health_pb2.HealthCheckResponse.ServingStatus
    answer = serving.SERVING if state is GroupState.READY else serving.NOT_SERVING
    for name in ("", SERVICE_NAME):
        servicer.set(name, answer)


def start_expert_server(
    runtime: ExpertRuntime, host: str, port: int = 0, tls: ServerTls | None = None
) -> ExpertServer:
    """Serve a group: state and health at once, forwards when it is READY.

    Args:
        runtime: The group; may be loaded before or after.
        host: Address to bind, as routers reach it.
        port: 0 takes a free one, see `ExpertServer.address`.
        tls: Demanded of every caller; then lanes are for callers on this host only.

    Raises:
        ResourceError: The address cannot be bound.
    """
    return ExpertServer(runtime, host, port, tls)


def _handlers(servicer: ExpertServicer) -> grpc.GenericRpcHandler:
    """Map method names to handlers; `Forward` keeps its messages as bytes."""

    def unary(method: Callable[..., Any], request: Any) -> Any:
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


def _unary_boundary(method: Callable[..., Any]) -> Callable[..., Any]:
    def call(request: Any, context: Context) -> Any:
        try:
            return method(request, context)
        except Exception as error:  # the RPC boundary
            failure = _failure(error, method)
        _abort(context, failure)

    return call


def _stream_boundary(method: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    def call(request: Any, context: Context) -> Iterator[Any]:
        try:
            yield from method(request, context)
            return
        except grpc.RpcError:  # the caller left
            return
        except Exception as error:  # the RPC boundary
            failure = _failure(error, method)
        _abort(context, failure)

    return call


def _failure(error: Exception, method: Callable[..., Any]) -> ExpertMeshError:
    if isinstance(error, ExpertMeshError):
        return error
    log.error("event=rpc_failed method=%s", method.__name__, exc_info=error)
    return InternalError(type(error).__name__)


def _abort(context: Context, error: ExpertMeshError) -> NoReturn:
    context.set_trailing_metadata(error.trailers())
    context.abort(error.code, error.message)
    raise AssertionError("abort() raises")


def _message(*parts: Buffer) -> bytes:
    """Return the message of an answer, or of the error that it is too large."""
    message = encode_frame_field(*parts)
    if len(message) > MAX_MESSAGE_BYTES:
        call_id = unpack_header(parts[0]).call_id
        return _error_message(call_id, MessageTooLargeError(len(message), MAX_MESSAGE_BYTES))
    return message


def _error_message(call_id: int, error: ExpertMeshError) -> bytes:
    status = error.to_status().SerializeToString()
    header = FrameHeader(kind=FrameKind.ERROR, call_id=call_id, payload_bytes=len(status))
    return encode_frame_field(pack_header(header), status)
