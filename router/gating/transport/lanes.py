"""Several lanes in one native call: all frames out, then all answers in, without the interpreter
lock."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Sequence

from protos.errors import GroupLostError
from router.gating.transport.base import FrameBuffer
from router.gating.transport.lane import LaneTransport


class LaneSet:
    """The lanes of one dispatcher, driven together by `experts/native/dispatch.cpp`."""

    def __init__(self, library: ctypes.CDLL, lanes: Sequence[LaneTransport]) -> None:
        self._lanes = lanes
        num = len(lanes)
        self._send = library.em_lane_send
        self._send.restype = ctypes.c_int64
        self._send.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64, ctypes.c_void_p]
        self._receive = library.em_lane_receive
        self._receive.restype = None
        self._receive.argtypes = [ctypes.c_void_p] * 6 + [ctypes.c_int64] * 2
        self._fds = (ctypes.c_int32 * num)()
        self._frames = (ctypes.c_void_p * num)()
        self._lengths = (ctypes.c_int64 * num)()
        self._headers = (ctypes.c_void_p * num)()
        self._payloads = (ctypes.c_void_p * num)()
        self._capacities = (ctypes.c_int64 * num)()
        self._received = (ctypes.c_int64 * num)()
        self._status = (ctypes.c_int32 * num)()
        self._error = ctypes.c_int32()

    def send(
        self, called: Sequence[int], frames: Sequence[FrameBuffer], lengths: Sequence[int]
    ) -> None:
        """Send the first `lengths[g]` bytes of `frames[g]` for every group index in `called`.

        Raises:
            GroupLostError: A lane broke; answers of other lanes may be under way, see `reset`.
        """
        for i, group in enumerate(called):
            self._fds[i] = self._lanes[group].fileno()
            self._frames[i] = frames[group].address
            self._lengths[i] = lengths[group]
        status = self._send(
            self._fds, self._frames, self._lengths, len(called), ctypes.byref(self._error)
        )
        if status < 0:
            raise self.lost(called[-status - 1], self._error.value, "send: ")

    def receive(
        self,
        called: Sequence[int],
        headers: Sequence[FrameBuffer],
        payloads: Sequence[FrameBuffer],
        timeout_s: float,
    ) -> None:
        """Wait for one answer of every group in `called`: header and payload into the group's
        buffers.

        Raises:
            GroupLostError: The first group whose lane broke, was silent, or answered no frame that
                fits; its lane is closed.
        """
        for i, group in enumerate(called):
            self._fds[i] = self._lanes[group].fileno()
            self._headers[i] = headers[group].address
            self._payloads[i] = payloads[group].address
            self._capacities[i] = len(payloads[group].view)
        num = len(called)
        self._receive(
            self._fds,
            self._headers,
            self._payloads,
            self._capacities,
            self._received,
            self._status,
            num,
            int(timeout_s * 1000),
        )
        failure: GroupLostError | None = None
        for i, group in enumerate(called):
            if self._status[i] != 0:
                lost = self.lost(group, self._status[i])
                failure = failure or lost
        if failure is not None:
            raise failure

    def lost(self, group: int, error: int, while_doing: str = "") -> GroupLostError:
        """Close a group's lane after the errno `error` and return the error to raise."""
        detail = _DETAILS.get(error) or os.strerror(error)
        return self._lanes[group].lose(while_doing + detail)


_DETAILS = {
    errno.ETIMEDOUT: "no answer in time",
    errno.ECONNRESET: "closed the lane",
    errno.EPROTO: "answered something that is no frame",
    errno.EMSGSIZE: "answered more bytes than the call can have",
}
