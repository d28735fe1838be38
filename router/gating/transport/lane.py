"""The lane: frames on a plain socket, opened and authenticated through `ExpertService.OpenLane`.

A Unix socket when router and group share a host, TCP otherwise. Neither is encrypted: a group with
TLS refuses lanes to other hosts, and `OpenLane` itself goes over its TLS channel. The dispatcher
may drive several lanes in one native call through `fileno`; `send` and `receive` are the same thing
in Python for one lane.
"""

from __future__ import annotations

import select
import socket
import struct
import time

import grpc

from protos import codec
from protos.errors import DeadlineExceededError, ExpertMeshError, GroupLostError, from_rpc_error
from protos.ids import host_id
from protos.v1 import experts_pb2, experts_pb2_grpc
from router.gating.transport.base import FrameBuffer

SOCKET_BUFFER_BYTES = 4 << 20
REASON_TIMEOUT_S = 1.0
"""A refused connection or certificate is known at once."""


class LaneTransport:
    """A lane to one expert group, reopened on demand.

    Args:
        group_id: For error messages.
        channel: gRPC channel to the group; only `OpenLane` uses it.
        router_id: Who asks.
        connect_timeout_s: Bound on `OpenLane`, connect and greeting together.
    """

    def __init__(
        self, group_id: str, channel: grpc.Channel, router_id: str, connect_timeout_s: float = 10.0
    ) -> None:
        self.group_id = group_id
        self.name = "lane"
        self._stub = experts_pb2_grpc.ExpertServiceStub(channel)
        self._router_id = router_id
        self._connect_timeout_s = connect_timeout_s
        self._socket: socket.socket | None = None

    def fileno(self) -> int:
        """Return the open socket's descriptor, opening the lane when there is none."""
        if self._socket is None:
            self.open()
        assert self._socket is not None
        return self._socket.fileno()

    @property
    def is_open(self) -> bool:
        """Whether there is a connection; its far end may have gone."""
        return self._socket is not None

    def ensure_open(self, timeout_s: float | None = None) -> None:
        """See `Transport.ensure_open`."""
        if self._socket is None:
            self.open(timeout_s)

    def open(self, timeout_s: float | None = None) -> None:
        """Ask for a lane, connect and greet.

        Args:
            timeout_s: Bound on all of it; None: the lane's own.

        Raises:
            GroupLostError: The group cannot be reached in time or refuses.
        """
        timeout_s = timeout_s or self._connect_timeout_s
        end = time.monotonic() + timeout_s
        request = experts_pb2.OpenLaneRequest(
            router_id=self._router_id, version=codec.FRAME_VERSION, host_id=host_id()
        )
        try:
            answer = self._stub.OpenLane(request, timeout=timeout_s, wait_for_ready=True)
        except grpc.RpcError as error:
            refusal = self._refusal(error)
            raise GroupLostError(group_id=self.group_id, detail=f"OpenLane: {refusal}") from refusal
        left_s = max(0.1, end - time.monotonic())
        lane: socket.socket | None = None
        try:
            if answer.WhichOneof("address") == "unix_path":
                self.name = "lane-unix"
                lane = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                lane.settimeout(left_s)
                lane.connect(answer.unix_path)
            else:
                self.name = "lane-tcp"
                host, port = answer.tcp_address.rsplit(":", 1)
                lane = socket.create_connection((host.strip("[]"), int(port)), timeout=left_s)
                lane.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            lane.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
            lane.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER_BYTES)
            self._greet(lane, answer.token)
        except (OSError, ExpertMeshError) as error:
            if lane is not None:
                lane.close()
            raise GroupLostError(group_id=self.group_id, detail=f"lane: {error}") from error
        lane.settimeout(None)
        timeout = struct.pack("ll", int(self._connect_timeout_s) + 1, 0)
        lane.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)
        self._socket = lane

    def _refusal(self, error: grpc.RpcError) -> ExpertMeshError:
        """Return why `OpenLane` failed; where it waited in vain, why nothing connects."""
        first = from_rpc_error(error)
        if isinstance(first, DeadlineExceededError):
            try:
                self._stub.GetState(experts_pb2.GetStateRequest(), timeout=REASON_TIMEOUT_S)
            except grpc.RpcError as now:
                return from_rpc_error(now)
        return first

    @staticmethod
    def _greet(lane: socket.socket, token: bytes) -> None:
        hello = codec.hello_header(codec.FrameKind.HELLO, len(token))
        lane.sendall(codec.pack_header(hello) + token)
        answer = b""
        while len(answer) < codec.HEADER_BYTES:
            part = lane.recv(codec.HEADER_BYTES - len(answer))
            if not part:
                raise ConnectionResetError("closed during the greeting")
            answer += part
        header = codec.unpack_header(answer)
        if header.kind != codec.FrameKind.HELLO_ANSWER:
            raise ConnectionRefusedError(f"the group refused the greeting (kind {header.kind})")

    def lose(self, detail: str) -> GroupLostError:
        """Close the lane and return the error to raise."""
        self.close()
        return GroupLostError(group_id=self.group_id, detail=detail)

    def send(self, frame: memoryview) -> None:
        """See `Transport.send`."""
        self.fileno()
        assert self._socket is not None
        try:
            self._socket.sendall(frame)
        except OSError as error:
            raise self.lose(f"send: {error}") from error

    def receive(self, header: FrameBuffer, payload: FrameBuffer, timeout_s: float) -> int:
        """See `Transport.receive`."""
        end = time.monotonic() + timeout_s
        self._receive_exactly(header.view[: codec.HEADER_BYTES], end)
        num_bytes = codec.payload_bytes_of(header.view)
        if num_bytes is None or num_bytes > len(payload.view):
            raise self.lose("answered something that is no frame or does not fit")
        self._receive_exactly(payload.view[:num_bytes], end)
        return num_bytes

    def _receive_exactly(self, into: memoryview, end: float) -> None:
        if self._socket is None:
            raise self.lose("no open lane")
        poll = select.poll()  # takes descriptors of any number, unlike select()
        poll.register(self._socket, select.POLLIN)
        done = 0
        while done < len(into):
            left_s = end - time.monotonic()
            try:
                ready = left_s > 0 and poll.poll(left_s * 1000)
                got = self._socket.recv_into(into[done:]) if ready else -1
            except OSError as error:
                raise self.lose(f"receive: {error}") from error
            if got == -1:
                raise self.lose("no answer in time")
            if got == 0:
                raise self.lose("closed the lane")
            done += got

    def close(self) -> None:
        """See `Transport.close`."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
