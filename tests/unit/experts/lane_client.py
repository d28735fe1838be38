"""A client's end of a lane, for tests: as plain as the protocol allows."""

from __future__ import annotations

import socket

from google.rpc import status_pb2

from experts.lane import LaneOffer
from protos.codec import (
    HEADER_BYTES,
    FrameHeader,
    FrameKind,
    hello_header,
    pack_header,
    unpack_header,
)
from protos.errors import from_status


def connect(offer: LaneOffer) -> socket.socket:
    """Connect without a greeting."""
    if offer.unix_path is not None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(20)
        sock.connect(offer.unix_path)
        return sock
    assert offer.tcp_address is not None
    host, port = offer.tcp_address.rsplit(":", 1)
    return socket.create_connection((host, int(port)), timeout=20)


def greet(sock: socket.socket, token: bytes) -> None:
    """Say hello; the server's error is raised as itself."""
    sock.sendall(pack_header(hello_header(FrameKind.HELLO, len(token))) + token)
    header, _ = receive(sock)
    assert header.kind is FrameKind.HELLO_ANSWER


def open_lane(offer: LaneOffer) -> socket.socket:
    """Connect and greet."""
    sock = connect(offer)
    greet(sock, offer.token)
    return sock


def ask(
    sock: socket.socket, header: FrameHeader, payload: bytes | bytearray
) -> tuple[FrameHeader, bytes]:
    """Send one frame and return the answer."""
    sock.sendall(pack_header(header) + payload)
    return receive(sock)


def receive(sock: socket.socket) -> tuple[FrameHeader, bytes]:
    """Return the next frame; an ERROR frame is raised as the error that it carries."""
    header = unpack_header(exactly(sock, HEADER_BYTES))
    payload = exactly(sock, header.payload_bytes)
    if header.kind is FrameKind.ERROR:
        error = from_status(status_pb2.Status.FromString(payload))
        error.add_note(f"call_id {header.call_id}")
        raise error
    return header, payload


def exactly(sock: socket.socket, size: int) -> bytes:
    """Return the next `size` bytes, or raise EOFError."""
    parts = bytearray()
    while len(parts) < size:
        part = sock.recv(size - len(parts))
        if not part:
            raise EOFError(f"closed after {len(parts)} of {size} bytes")
        parts += part
    return bytes(parts)
