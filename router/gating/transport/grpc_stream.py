"""gRPC stream transport: any network, TLS, any language on the other side.

One `ExpertService.Forward` stream, frames as the `bytes frame` field encoded by hand (no protobuf
copy of the payload). The engine thread reads the stream itself, so no thread hop is added; a
watchdog thread cancels a call whose answer is overdue.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator

import grpc

from protos import codec
from protos.errors import GroupLostError, from_rpc_error
from router.gating.transport.base import FrameBuffer

WATCHDOG_INTERVAL_S = 0.5


class GrpcStreamTransport:
    """One persistent forward stream to one expert group, reopened on demand."""

    def __init__(self, group_id: str, channel: grpc.Channel) -> None:
        self.group_id = group_id
        self.name = "grpc"
        self._open: grpc.StreamStreamMultiCallable[bytes, memoryview] = channel.stream_stream(
            "/expertmesh.v1.ExpertService/Forward",
            request_serializer=None,
            response_deserializer=codec.decode_frame_field,
        )
        self._frames: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._call: grpc.Call | None = None
        self._answers: Iterator[memoryview] | None = None
        self._overdue_at = float("inf")
        self._closed = threading.Event()
        self._watchdog: threading.Thread | None = None

    def ensure_open(self, timeout_s: float | None = None) -> None:
        """See `Transport.ensure_open`; `send` opens the stream, and `receive` hears of failures."""

    def send(self, frame: memoryview) -> None:
        """See `Transport.send`."""
        if self._call is None:
            self._start()
        self._frames.put(codec.encode_frame_field(frame))

    def _start(self) -> None:
        self._frames = queue.SimpleQueue()
        self._closed = threading.Event()
        call = self._open(iter(self._frames.get, None), wait_for_ready=False)
        self._call, self._answers = call, call
        self._watchdog = threading.Thread(
            target=self._watch,
            args=(call, self._closed),
            name=f"watch-{self.group_id}",
            daemon=True,
        )
        self._watchdog.start()

    def _watch(self, call: grpc.Call, closed: threading.Event) -> None:
        while not closed.wait(WATCHDOG_INTERVAL_S):
            if time.monotonic() > self._overdue_at:
                call.cancel()
                return

    def receive(self, header: FrameBuffer, payload: FrameBuffer, timeout_s: float) -> int:
        """See `Transport.receive`."""
        if self._answers is None:
            raise GroupLostError(group_id=self.group_id, detail="no open stream")
        self._overdue_at = time.monotonic() + timeout_s
        try:
            frame = next(self._answers)
        except StopIteration:
            raise self._lose("closed the stream") from None
        except grpc.RpcError as error:
            overdue = time.monotonic() > self._overdue_at
            detail = "no answer in time" if overdue else str(from_rpc_error(error))
            raise self._lose(detail) from error
        finally:
            self._overdue_at = float("inf")
        num_bytes = codec.payload_bytes_of(frame)
        if num_bytes is None or len(frame) != codec.HEADER_BYTES + num_bytes:
            raise self._lose("answered something that is no frame")
        if num_bytes > len(payload.view):
            raise self._lose(f"answered {num_bytes} bytes, expected at most {len(payload.view)}")
        header.view[: codec.HEADER_BYTES] = frame[: codec.HEADER_BYTES]
        payload.view[:num_bytes] = frame[codec.HEADER_BYTES :]
        return num_bytes

    def _lose(self, detail: str) -> GroupLostError:
        self.close()
        return GroupLostError(group_id=self.group_id, detail=detail)

    def close(self) -> None:
        """See `Transport.close`."""
        self._closed.set()
        if self._call is not None:
            self._frames.put(None)
            self._call.cancel()
            self._call = self._answers = None
