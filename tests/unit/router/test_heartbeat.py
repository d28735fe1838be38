"""Heartbeats of routers over a real server: who sees whom, and for how long."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

import pytest

from protos.errors import StateUnavailableError
from router.gateway.heartbeat import MAX_AGE_S, Heartbeat
from router.gateway.routing import PeerView, RouterLoad
from router.state.embedded import EmbeddedServer, Role
from router.state.session_records import EngineRecord
from router.state.sessions import SessionStore

WARM = frozenset({b"12345678", b"abcdefgh"})


@dataclass
class World:
    """A server, its stores, and time."""

    server: EmbeddedServer
    now: float = 100.0
    stores: list[SessionStore] = field(default_factory=list)

    def router(
        self, name: str, *, namespace: str = "ns", service: str = "svc", address: str = "h:1"
    ) -> Heartbeat:
        store = SessionStore.connect(self.server.endpoint, engine=name)
        self.stores.append(store)
        load = RouterLoad(prefill_tokens_per_s=2.5, queued_tokens=7, num_running=1, max_running=4)
        view = PeerView(router_id=name, address=address, load=load, warm=WARM)
        return Heartbeat(
            store,
            lambda: view,
            boot="b",
            namespace=namespace,
            service=service,
            clock=lambda: self.now,
        )


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer.start(Role.META) as started:
        yield started


@pytest.fixture
async def world(server: EmbeddedServer) -> AsyncIterator[World]:
    made = World(server)
    yield made
    for store in made.stores:
        await store._client.command("FLUSHALL")
        await store.close()


async def test_routers_see_each_other_but_not_themselves(world: World) -> None:
    one, two = world.router("r0.svc", address="h:1"), world.router("r1.svc", address="h:2")
    await one.beat()
    await two.beat()
    await one.beat()
    (seen,) = one.others()
    assert (seen.router_id, seen.address, seen.warm) == ("r1.svc", "h:2", WARM)
    assert seen.load.queued_tokens == 7
    assert [view.router_id for view in two.others()] == ["r0.svc"]


async def test_others_models_and_services_are_not_seen(world: World) -> None:
    one = world.router("r0.svc")
    for other in (
        world.router("r1.svc", namespace="other weights"),
        world.router("r2.elsewhere", service="elsewhere"),
    ):
        await other.beat()
    await one.beat()
    assert one.others() == ()


async def test_a_view_stays_the_same_object_until_the_next_heartbeat(world: World) -> None:
    one, two = world.router("r0.svc"), world.router("r1.svc")
    await two.beat()
    await one.beat()
    assert one.others()[0] is one.others()[0]
    before = one.others()[0]
    await one.beat()
    assert one.others()[0] is not before


async def test_views_that_are_too_old_are_forgotten(world: World) -> None:
    one, two = world.router("r0.svc"), world.router("r1.svc")
    await two.beat()
    await one.beat()
    world.now += MAX_AGE_S
    assert one.others() == ()


async def test_a_heartbeat_of_another_version_is_left_out(world: World) -> None:
    one = world.router("r0.svc")
    foreign = EngineRecord(
        engine="r1.svc", boot="b", address="h:2", namespace="ns", load=0.0, warm=b"short"
    )
    await world.stores[0].heartbeat(foreign)
    await one.beat()
    assert one.others() == ()


async def test_a_server_that_is_gone_costs_the_views_and_no_more() -> None:
    with EmbeddedServer.start(Role.META) as server:
        world = World(server)
        one, two = world.router("r0.svc"), world.router("r1.svc")
        await two.beat()
        await one.beat()
        server.close()
        with pytest.raises(StateUnavailableError):
            await one.beat()
        assert len(one.others()) == 1, "still fresh"
        for store in world.stores:
            await store.close()
