"""Connections that say nothing, as scanners and attackers make them."""

from __future__ import annotations

import socket


def connect_silently(address: str) -> socket.socket:
    """Connect to `host:port` and say nothing."""
    host, port = address.rsplit(":", 1)
    return socket.create_connection((host, int(port)), timeout=20)


def is_closed_by_peer(sock: socket.socket) -> bool:
    """Wait until the peer has closed it, whatever it says before; False: it did not."""
    try:
        while sock.recv(4096):
            pass
    except TimeoutError:
        return False
    except ConnectionResetError:
        pass
    sock.close()
    return True
