"""Two routers, one session: a turn goes to the router that is warm, and survives its death.

The slow kernels make a prefill long enough for a hop to be worth it.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.status import ask_status
from protos.v1 import generation_pb2
from router.engine.chain import CACHE_BLOCK
from router.state.control import ControlClient
from router.state.directory import engines
from router.state.embedded import EmbeddedServer, Role
from router.state.endpoint import Endpoint
from router.state.redis_keys import ENGINES
from router.state.session_records import EngineRecord
from tests.eventually import eventually
from tests.integration.served import Served
from tests.integration.test_sessions import create, tokens_of, turn

pytestmark = pytest.mark.timeout(400)

SLOW = ("--trunk-ops", "torch", "--expert-compute", "torch", "--router-threads", "1")
LANE = ("--expert-transport", "lane")
PROMPT = random.Random(3).choices(range(500), k=3600)
NEXT = [7, 8, 9]


@pytest.fixture(scope="module")
def redis() -> Iterator[Endpoint]:
    """A server of both roles, as a small set-up has it."""
    with EmbeddedServer.start(Role.META, tcp=True) as server:
        yield server.endpoint


@pytest.fixture(scope="module")
def service(checkpoint: Path, redis: Endpoint) -> Iterator[Served]:
    url = f"redis://:{redis.password}@{redis.host}:{redis.port}"
    with Served(checkpoint, "--routers", "2", "--redis-url", url, *SLOW, *LANE) as started:
        yield started


def heartbeats(redis: Endpoint) -> list[tuple[EngineRecord, float]]:
    """Every router, and when it last said so."""

    async def ask() -> list[tuple[EngineRecord, float]]:
        client = ControlClient(redis)
        try:
            found = await engines(client)
            return [(e, float(await client.command("ZSCORE", ENGINES, e.engine))) for e in found]
        finally:
            await client.close()

    return asyncio.run(ask())


def wait_for_news(redis: Endpoint) -> None:
    """Return when every router has heard what every other one now has."""
    before = {engine.engine: at for engine, at in heartbeats(redis)}
    assert len(before) == 2
    for _ in range(2):  # one beat publishes; a router reads after its own beat
        seen = dict(before)
        eventually(lambda seen=seen: all(at > seen[e.engine] for e, at in heartbeats(redis)), 30)  # type: ignore[misc]
        before = {engine.engine: at for engine, at in heartbeats(redis)}
    eventually(lambda: all(at > before[e.engine] for e, at in heartbeats(redis)), 30)


def served_by(messages: list[generation_pb2.GenerateResponse]) -> str:
    return messages[0].accepted.router_address


def cached(messages: list[generation_pb2.GenerateResponse]) -> int:
    return messages[-1].usage.cached_prompt_tokens


def test_a_turn_finds_the_warm_router_and_survives_its_death(
    service: Served, redis: Endpoint
) -> None:
    status = ask_status(service.address)
    assert [group.transport for group in status.groups] == ["lane-unix"]
    warm, cold = status.routers
    turns = (PROMPT, NEXT, NEXT)
    create(warm.grpc_address, "reference")
    expected = [tokens_of(turn(warm.grpc_address, "reference", ids)) for ids in turns]

    create(warm.grpc_address, "moving")
    first = turn(warm.grpc_address, "moving", PROMPT)
    assert served_by(first) == warm.grpc_address
    wait_for_news(redis)
    second = turn(cold.grpc_address, "moving", NEXT)
    assert served_by(second) == warm.grpc_address
    assert cached(second) >= len(PROMPT)

    os.kill(warm.pid, signal.SIGKILL)
    third = turn(cold.grpc_address, "moving", NEXT)
    assert served_by(third) == cold.grpc_address
    assert cached(third) > len(PROMPT) - CACHE_BLOCK, "restored from Redis"
    assert [tokens_of(messages) for messages in (first, second, third)] == expected
