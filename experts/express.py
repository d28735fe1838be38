"""The express: ordinary forwards answered by native code alone.

On a lane, `experts/native/serve.cpp` reads, computes and answers frame after frame without the
interpreter (about 40 us less a call); a gRPC stream hands it one frame at a time. A frame that is
out of the ordinary is left to `ExpertRuntime`, where every case has its typed error. Only a group
that computes natively has an express.

The express owns the innermost lock of the group: whoever changes residency, or reads counters,
holds it (`ComputeLock`).
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from enum import IntEnum
from types import TracebackType
from typing import NamedTuple

import torch

from experts.compute import ExpertShape, NativeCompute
from experts.load import LoadCounters
from protos.codec import HEADER_BYTES, Buffer, dtype_of_torch, unpack_header
from protos.errors import DeadlineExceededError


class Event(IntEnum):
    """Why the express stopped."""

    CLOSED = 0
    """The peer closed the lane."""
    HEADER_READ = 1
    """A header is read that is no ordinary forward, or a payload larger than the buffer."""
    FRAME_READ = 2
    """A whole forward is read that has to be answered with care."""
    EXPIRED = 3
    """As `FRAME_READ`, but its caller has stopped waiting."""


class Totals(NamedTuple):
    """What the express has done."""

    calls: int
    rows: int
    pairs: int
    busy_s: float


FIRST_BUFFER_BYTES = 256 * 1024
KEPT_BUFFER_BYTES = 64 * 1024 * 1024
"""The buffers of a connection grow up to this size; a larger frame is answered with care, in memory
of its own."""


class Buffers:
    """What one lane receives into and answers from; `capacity` bytes for a payload or a result."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._head = torch.empty(HEADER_BYTES, dtype=torch.uint8)
        self._payload = torch.empty(capacity, dtype=torch.uint8)
        self._result = torch.empty(capacity, dtype=torch.uint8)
        self.head = memoryview(self._head.numpy())  # type: ignore[arg-type]
        self.payload = memoryview(self._payload.numpy())  # type: ignore[arg-type]
        self.addresses = (
            self._head.data_ptr(),
            self._payload.data_ptr(),
            self._result.data_ptr(),
            capacity,
        )


class FrameBuffers:
    """A frame and its answer, `capacity` bytes of payload each; of one gRPC stream."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._frame = torch.empty(capacity, dtype=torch.uint8)
        self._answer = torch.empty(HEADER_BYTES + capacity, dtype=torch.uint8)
        self.frame = memoryview(self._frame.numpy())  # type: ignore[arg-type]
        self.answer = memoryview(self._answer.numpy())  # type: ignore[arg-type]
        self.frame_address = self._frame.data_ptr()
        self.answer_room = self._answer.data_ptr(), capacity


class Express:
    """The native answers of one group.

    Args:
        shape: Of the group's experts.
        compute: Holds them.
        counters: Counted in place.
    """

    def __init__(self, shape: ExpertShape, compute: NativeCompute, counters: LoadCounters) -> None:
        self._native = compute.kernels.long
        self._compute, self._counters = compute, counters  # native code points into both
        self._address = self._native.express_new(
            shape.num_layers,
            shape.num_experts,
            shape.hidden_size,
            shape.intermediate_size,
            int(dtype_of_torch(shape.dtype)),
        )
        if not self._address:
            raise MemoryError("cannot allocate the express")
        weakref.finalize(self, self._native.express_free, self._address).atexit = False
        self.refresh()

    def refresh(self) -> None:
        """Adopt the layers that the compute holds now; under the lock."""
        for layer_id, bank, table in self._compute.layers():
            self._native.express_set_layer(
                *(self._address, layer_id, bank.address, bank.num_slots),
                *(table.ctypes.data, self._counters.counts[layer_id].ctypes.data),
            )

    def lock(self) -> None:
        """Wait for the forward under way and hold off the next."""
        self._native.express_lock(self._address)

    def unlock(self) -> None:
        """Let forwards go on."""
        self._native.express_unlock(self._address)

    def totals(self) -> Totals:
        """Return what was done so far; under the lock."""
        found = (ctypes.c_int64 * 4)()
        self._native.express_totals(self._address, found)
        return Totals(found[0], found[1], found[2], found[3] / 1e9)

    def serve(self, fd: int, buffers: Buffers) -> tuple[Event, int]:
        """Answer forwards on a blocking socket until one is out of the ordinary.

        Returns:
            Why it stopped, and how many bytes of the last part were read.

        Raises:
            OSError: The socket broke.
        """
        got = ctypes.c_int64()
        event = self._native.express_serve(self._address, fd, *buffers.addresses, ctypes.byref(got))
        if event < 0:
            raise OSError(-event, "lane")
        return Event(event), got.value

    def answer(self, frame: Buffer, buffers: FrameBuffers) -> memoryview | None:
        """Answer one forward that came as a whole frame.

        Returns:
            Header and result, in `buffers`; None where `ExpertRuntime` must answer.

        Raises:
            DeadlineExceededError: The caller has stopped waiting.
        """
        num_bytes = len(frame)
        if num_bytes > buffers.capacity:
            return None
        buffers.frame[:num_bytes] = frame
        answered = self._native.express_answer(
            self._address, buffers.frame_address, num_bytes, *buffers.answer_room
        )
        if answered < 0:
            bound_s = unpack_header(frame).deadline_ms / 1e3
            raise DeadlineExceededError("a forward queued in this group", bound_s)
        return buffers.answer[:answered] if answered else None


class ComputeLock:
    """The group's compute lock, which native lanes share once there is an express."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._express: Express | None = None
        self._held: Express | None = None

    def share_with(self, express: Express | None) -> None:
        """Also lock this express from now on; called with the lock held."""
        self._express = express

    def __enter__(self) -> None:
        self._lock.acquire()
        self._held = self._express
        if self._held is not None:
            self._held.lock()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        held, self._held = self._held, None
        if held is not None:
            held.unlock()
        self._lock.release()
