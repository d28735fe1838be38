"""Experts in the router's own process: the same frames, no wire.

What remote groups are measured against, and how tests run a dispatcher without processes.
"""

from __future__ import annotations

from experts.runtime import ExpertRuntime
from protos import codec
from protos.errors import ExpertMeshError
from router.gating.transport.base import FrameBuffer


class LocalTransport:
    """Calls a runtime of the same process when the answer is asked for."""

    def __init__(self, runtime: ExpertRuntime) -> None:
        self.group_id = runtime.group_id
        self.name = "local"
        self._runtime = runtime
        self._frame = memoryview(b"")

    def ensure_open(self, timeout_s: float | None = None) -> None:
        """See `Transport.ensure_open`; there is no connection."""

    def send(self, frame: memoryview) -> None:
        """See `Transport.send`."""
        self._frame = frame

    def receive(self, header: FrameBuffer, payload: FrameBuffer, timeout_s: float) -> int:
        """See `Transport.receive`; the bound is the kernel's own time."""
        call = codec.unpack_header(self._frame)
        try:
            answer, result = self._runtime.forward(call, self._frame[codec.HEADER_BYTES :])
        except ExpertMeshError as error:
            status = error.to_status().SerializeToString()
            answer = codec.FrameHeader(
                kind=codec.FrameKind.ERROR, call_id=call.call_id, payload_bytes=len(status)
            )
            result = memoryview(status)
        codec.pack_header_into(header.view, answer)
        payload.view[: len(result)] = result
        return len(result)

    def close(self) -> None:
        """See `Transport.close`."""
