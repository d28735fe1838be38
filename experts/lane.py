"""The fast lane: frames over a plain socket, one blocking thread for each connection.

A Python gRPC stream costs 0.3 to 0.45 ms a round trip, this 0.05 to 0.1. Callers on this host get a
Unix socket in a directory of mode 0700, others TCP. A connection starts with a HELLO that carries a
token from `OpenLane` (one use, 30 s; the greeting has 10 s altogether); then every FORWARD is
answered by a RESULT or, if only that call failed, by an ERROR with its call id. A frame that cannot
be trusted (wrong magic, version, size; too large) is answered by an ERROR and the connection is
closed, since where the next frame starts is unknown.

A lane is not encrypted. The Unix socket has mode 0600 in its directory of mode 0700, so the kernel
keeps other users off it; a group whose gRPC port demands TLS opens no TCP lane at all, and callers
on other hosts use their gRPC stream. A stranger who connects and is silent holds one of 64 places
until its time is over or a newer connection needs the place.

The thread never copies a payload: it receives into one growing buffer, kernels read views of it,
and header and result go out in one `sendmsg`. Ordinary forwards of a group that computes natively
are answered without the interpreter (`express.py`); the rest comes back here.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import os
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from experts.calls import MAX_FRAME_BYTES
from experts.express import FIRST_BUFFER_BYTES, KEPT_BUFFER_BYTES, Buffers, Event
from experts.lane_directory import SOCKET_NAME, make_directory
from experts.runtime import ExpertRuntime
from protos.codec import (
    FRAME_VERSION,
    HEADER_BYTES,
    FrameHeader,
    FrameKind,
    hello_header,
    pack_header,
    result_payload_bytes,
    unpack_header,
)
from protos.errors import (
    DeadlineExceededError,
    ExpertMeshError,
    InternalError,
    InvalidFieldError,
    MessageTooLargeError,
    UnsupportedFeatureError,
    WireFormatError,
)

log = logging.getLogger(__name__)

TOKEN_BYTES = 32
STOP_TIMEOUT_S = 5.0
"""How long `stop` waits for forwards that are being computed."""
TOKEN_LIFE_S = 30.0
MAX_TOKENS = 1024
"""Tokens that wait for their connection; the oldest makes room."""
HELLO_TIMEOUT_S = 10.0
"""For the whole greeting, however its bytes come."""
MAX_UNGREETED = 64
"""Connections that have not said hello; a valid one takes a millisecond, so the oldest is closed to
make room."""
SOCKET_BUFFER_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class LaneOffer:
    """What a caller needs to open one connection."""

    token: bytes
    unix_path: str | None
    tcp_address: str | None


class LaneServer:
    """Listens for lanes of one group."""

    def __init__(
        self,
        runtime: ExpertRuntime,
        *,
        host: str,
        host_id: str,
        with_tcp: bool = True,
        max_frame_bytes: int = MAX_FRAME_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Bind the sockets and start to accept.

        Args:
            runtime: Answers the forwards.
            host: Address to bind TCP on, as other hosts reach it.
            host_id: Callers with the same one share our file system.
            with_tcp: Whether callers on other hosts get a lane, which is not encrypted.
            max_frame_bytes: Bound of a frame, header included.
            clock: Seconds; for the age of tokens and greetings.
        """
        self.max_frame_bytes = max_frame_bytes
        self._runtime = runtime
        self._host_id = host_id
        self._clock = clock
        self._lock = threading.Lock()
        self._tokens: dict[bytes, float] = {}
        self._lanes: dict[socket.socket, threading.Thread] = {}
        self._ungreeted: dict[socket.socket, None] = {}
        """In the order in which they came."""
        self._num_open = 0
        self._stopping = False
        self._directory = make_directory()
        self.unix_path = str(self._directory / SOCKET_NAME)
        self._listeners: list[socket.socket] = []
        try:
            unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._listeners.append(unix)
            unix.bind(self.unix_path)
            os.chmod(self.unix_path, 0o600)
            unix.listen(64)
            self.tcp_address = self._listen_on_tcp(host) if with_tcp else None
        except BaseException:
            self._close_listeners()
            raise
        self._acceptors = [
            threading.Thread(target=self._accept, args=(listener,), name="lane-accept", daemon=True)
            for listener in self._listeners
        ]
        for acceptor in self._acceptors:
            acceptor.start()

    @property
    def num_open(self) -> int:
        """Connections that have said a valid hello."""
        return self._num_open

    def offer(self, *, version: int, host_id: str) -> LaneOffer:
        """Issue a token and the address that suits the caller.

        Raises:
            InvalidFieldError: The caller speaks another frame version.
            UnsupportedFeatureError: The caller is on another host, and there is no TCP lane.
        """
        if version != FRAME_VERSION:
            raise InvalidFieldError("version", f"must be {FRAME_VERSION}", version)
        is_here = bool(host_id) and host_id == self._host_id
        if not is_here and self.tcp_address is None:
            raise UnsupportedFeatureError(
                "a lane between hosts: this group demands TLS, and lanes are not encrypted"
            )
        token = secrets.token_bytes(TOKEN_BYTES)
        now_s = self._clock()
        with self._lock:
            kept = [(t, until) for t, until in self._tokens.items() if until > now_s]
            self._tokens = dict(kept[-(MAX_TOKENS - 1) :])
            self._tokens[token] = now_s + TOKEN_LIFE_S
        if is_here:
            return LaneOffer(token, self.unix_path, None)
        return LaneOffer(token, None, self.tcp_address)

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """Close listeners and connections, and wait for their threads, but no longer than
        `timeout_s`: a forward under way ends when it ends."""
        with self._lock:
            if self._stopping:
                return
            self._stopping = True
            lanes = dict(self._lanes)
        for sock in [*self._listeners, *lanes]:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self._close_listeners()
        deadline = time.monotonic() + timeout_s
        for thread in [*self._acceptors, *lanes.values()]:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _listen_on_tcp(self, host: str) -> str:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        tcp = socket.create_server((host, 0), family=family, backlog=64)
        self._listeners.append(tcp)
        bound_host = f"[{host}]" if ":" in host else host
        return f"{bound_host}:{tcp.getsockname()[1]}"

    def _close_listeners(self) -> None:
        for listener in self._listeners:
            listener.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                if self._stopping:
                    return
                log.exception("event=lane_accept_failed group=%s", self._runtime.group_id)
                time.sleep(0.1)  # out of descriptors: let some be closed
                continue
            thread = threading.Thread(target=self._serve, args=(sock,), name="lane", daemon=True)
            with self._lock:
                if self._stopping:
                    sock.close()
                    return
                self._lanes[sock] = thread
                if len(self._ungreeted) >= MAX_UNGREETED:
                    self._turn_away(next(iter(self._ungreeted)))
                self._ungreeted[sock] = None
            thread.start()

    def _turn_away(self, sock: socket.socket) -> None:
        """End a connection that has not greeted; its thread notices. Called under the lock."""
        del self._ungreeted[sock]
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        log.warning("event=lane_crowded group=%s", self._runtime.group_id)

    def _serve(self, sock: socket.socket) -> None:
        """Answer one connection until it ends; nothing outlives it."""
        try:
            with sock:
                _tune(sock)
                if self._greet(sock):
                    with self._lock:
                        self._num_open += 1
                    try:
                        self._answer_calls(sock)
                    finally:
                        with self._lock:
                            self._num_open -= 1
        except OSError as error:
            if not self._stopping:
                log.info("event=lane_lost group=%s reason=%r", self._runtime.group_id, str(error))
        except Exception:  # the RPC boundary: one connection never takes the process down
            log.exception("event=lane_failed group=%s", self._runtime.group_id)
        finally:
            with self._lock:
                self._ungreeted.pop(sock, None)
                self._lanes.pop(sock, None)

    def _greet(self, sock: socket.socket) -> bool:
        """Return whether the connection started with a token of ours."""
        end_s = self._clock() + HELLO_TIMEOUT_S
        head = bytearray(HEADER_BYTES)
        if not self._receive_by(sock, memoryview(head), end_s):
            return False
        try:
            header = unpack_header(head, max_payload_bytes=TOKEN_BYTES)
            if header.kind is not FrameKind.HELLO:
                raise WireFormatError("a lane starts with a hello")
            token = bytearray(header.payload_bytes)
            if not self._receive_by(sock, memoryview(token), end_s):
                return False
            if not self._take(bytes(token)):
                raise WireFormatError("the lane token is unknown, used or expired")
        except ExpertMeshError as error:
            _send_error(sock, 0, error)
            return False
        with self._lock:
            self._ungreeted.pop(sock, None)
        sock.sendall(pack_header(hello_header(FrameKind.HELLO_ANSWER)))
        sock.settimeout(None)
        return True

    def _receive_by(self, sock: socket.socket, view: memoryview, end_s: float) -> bool:
        """Fill the view; False if the peer closed first or time was up.

        A timeout of the socket alone would bound each part, and a peer may send byte by byte.
        """
        got = 0
        while got < len(view):
            left_s = end_s - self._clock()
            if left_s <= 0:
                return False
            sock.settimeout(left_s)
            try:
                more = sock.recv_into(view[got:])
            except TimeoutError:
                return False
            if more == 0:
                return False
            got += more
        return True

    def _take(self, token: bytes) -> bool:
        """Use up a token; whether it was valid. The time taken says nothing of other tokens."""
        now_s = self._clock()
        with self._lock:
            found = [known for known in self._tokens if hmac.compare_digest(known, token)]
            ends_s = [self._tokens.pop(known) for known in found]
        return any(end_s > now_s for end_s in ends_s)

    def _answer_calls(self, sock: socket.socket) -> None:
        """Answer forwards until the peer closes or sends what cannot be trusted."""
        buffers = Buffers(FIRST_BUFFER_BYTES)
        while True:
            express = self._runtime.express
            if express is not None:
                event, got = express.serve(sock.fileno(), buffers)
            elif _receive(sock, buffers.head):
                event, got = Event.HEADER_READ, HEADER_BYTES
            else:
                return
            if event is Event.CLOSED:
                if got:
                    log.info("event=lane_cut bytes=%d", got)
                return
            header = self._trusted(sock, buffers.head)
            if header is None:
                return
            num_bytes = max(header.payload_bytes, _result_bytes(header))
            fits = num_bytes <= buffers.capacity
            payload = buffers.payload[: header.payload_bytes]
            if event is Event.HEADER_READ:
                if header.payload_bytes > buffers.capacity:
                    payload = memoryview(bytearray(header.payload_bytes))
                if not _receive(sock, payload):
                    return
            self._answer_with_care(sock, header, payload, expired=event is Event.EXPIRED)
            if not fits and num_bytes <= KEPT_BUFFER_BYTES:
                buffers = Buffers(min(2 * num_bytes, KEPT_BUFFER_BYTES))

    def _trusted(self, sock: socket.socket, head: memoryview) -> FrameHeader | None:
        """Return the header of a forward; None after telling the peer what is wrong with it."""
        try:
            header = unpack_header(head, max_payload_bytes=self.max_frame_bytes - HEADER_BYTES)
            if header.kind is not FrameKind.FORWARD:
                raise WireFormatError(f"a lane takes forwards, got kind {int(header.kind)}")
        except (WireFormatError, MessageTooLargeError) as error:
            group_id = self._runtime.group_id
            log.warning("event=lane_malformed group=%s reason=%r", group_id, str(error))
            _send_error(sock, 0, error)
            return None
        return header

    def _answer_with_care(
        self, sock: socket.socket, header: FrameHeader, payload: memoryview, *, expired: bool
    ) -> None:
        """Answer one forward in Python: whatever is wrong with it gets its own error."""
        try:
            if expired:
                what = f"a forward queued in group {self._runtime.group_id}"
                raise DeadlineExceededError(what, header.deadline_ms / 1e3)
            answer, result = self._runtime.forward(header, payload)
        except ExpertMeshError as error:
            _send_error(sock, header.call_id, error)
        except Exception as error:  # the RPC boundary
            log.exception("event=forward_failed group=%s", self._runtime.group_id)
            _send_error(sock, header.call_id, InternalError(type(error).__name__))
        else:
            _send(sock, pack_header(answer), result)


def _result_bytes(header: FrameHeader) -> int:
    return result_payload_bytes(
        header.num_rows, header.hidden, header.num_pairs, header.dtype, header.combine
    )


def _receive(sock: socket.socket, view: memoryview) -> bool:
    """Fill the view; return False if the peer closed first."""
    size = len(view)
    got = sock.recv_into(view, size, socket.MSG_WAITALL) if size else 0
    while got < size:
        more = sock.recv_into(view[got:], size - got, socket.MSG_WAITALL)
        if more == 0:
            if got:
                log.info("event=lane_cut bytes=%d of=%d", got, size)
            return False
        got += more
    return True


def _send(sock: socket.socket, head: bytearray | bytes, payload: memoryview | bytes) -> None:
    """Send header and payload as one frame without joining them."""
    sent = sock.sendmsg((head, payload))
    if sent == len(head) + len(payload):
        return
    if sent < len(head):
        sock.sendall(memoryview(head)[sent:])
        sent = len(head)
    sock.sendall(memoryview(payload)[sent - len(head) :])


def _send_error(sock: socket.socket, call_id: int, error: ExpertMeshError) -> None:
    status = error.to_status().SerializeToString()
    header = FrameHeader(kind=FrameKind.ERROR, call_id=call_id, payload_bytes=len(status))
    _send(sock, pack_header(header), status)


def _tune(sock: socket.socket) -> None:
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)
    if sock.family == socket.AF_UNIX:
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # A host that vanished without a word is noticed in half a minute.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000)
