"""Which routers live, and which processes are known to be dead.

A heartbeat is a hint for choosing a router. A report of death is more: leases of that process are
free at once (`scripts.ACQUIRE`), so it must come from someone who saw the process end.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from router.state.control import ControlClient
from router.state.redis_keys import ENGINES, check_id, dead_key, engine_key
from router.state.session_records import EngineRecord

HEARTBEAT_TTL_S = 10
"""A router that sends none for so long is not listed."""
DEAD_TTL_S = 3600
"""Far longer than any lease."""
_LISTED_MS = 3_600_000


async def heartbeat(
    client: ControlClient, engine: EngineRecord, clock: Callable[[], float] = time.time
) -> None:
    """Publish a router; send it every few seconds.

    Raises:
        StateUnavailableError: The server does not answer in time, or refuses.
    """
    key = engine_key(engine.engine)
    now_ms = round(1000 * clock())
    await client.transaction(
        [
            ["DEL", key],
            [
                *("HSET", key, "boot", engine.boot, "address", engine.address),
                *("ns", engine.namespace, "load", repr(float(engine.load)), "warm", engine.warm),
            ],
            ["EXPIRE", key, HEARTBEAT_TTL_S],
            ["ZADD", ENGINES, now_ms, engine.engine],
            ["ZREMRANGEBYSCORE", ENGINES, 0, now_ms - _LISTED_MS],
            ["EXPIRE", ENGINES, DEAD_TTL_S],
        ]
    )


async def engines(client: ControlClient) -> list[EngineRecord]:
    """Return the routers that sent a heartbeat lately, in the order of their names.

    Raises:
        StateUnavailableError: The server does not answer in time, or refuses.
    """
    names = sorted(await client.command("ZRANGE", ENGINES, 0, -1))
    hashes = [await client.command("HGETALL", engine_key(name.decode())) for name in names]
    return [
        EngineRecord(
            engine=name.decode(),
            boot=fields[b"boot"].decode(),
            address=fields[b"address"].decode(),
            namespace=fields[b"ns"].decode(),
            load=float(fields[b"load"]),
            warm=fields[b"warm"],
        )
        for name, fields in zip(names, hashes, strict=True)
        if fields
    ]


async def report_dead(client: ControlClient, engine: str, boot: str) -> None:
    """Say that a process has ended: whoever asks for one of its sessions gets it at once.

    Raises:
        StateUnavailableError: The server does not answer in time, or refuses.
    """
    check_id(engine, "engine")
    check_id(boot, "boot")
    await client.command("SET", dead_key(engine, boot), b"1", "EX", DEAD_TTL_S)
