"""Ports of loopback for servers that take no 0, and for clients that are to find nobody."""

from __future__ import annotations

import socket


def free_port() -> int:
    """Return a port that nobody listened on a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
