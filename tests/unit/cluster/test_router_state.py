"""What a router's configuration means for the store that it shares, on a real server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator

import pytest

from cluster.config import StateSection
from cluster.members import StateServers
from cluster.router_state import RouterState
from protos.errors import StateUnavailableError
from protos.tls import Access
from router.gateway.routing import PeerView, RouterLoad
from router.state.restore import ValueSizes
from tests.store_servers import StoreServer, running_store

Make = Callable[..., RouterState]


@pytest.fixture(scope="module")
def server() -> Iterator[StoreServer]:
    with running_store() as running:
        yield running


@pytest.fixture
async def make(server: StoreServer) -> AsyncIterator[Make]:
    made: list[RouterState] = []

    def view() -> PeerView:
        load = RouterLoad(prefill_tokens_per_s=0.0, queued_tokens=0, num_running=0, max_running=1)
        return PeerView(router_id="r", address="h:1", load=load, warm=frozenset())

    def state(**section: object) -> RouterState:
        made.append(
            RouterState(
                StateServers(meta=server.endpoint, blobs=(server.endpoint,)),
                StateSection(**section),  # type: ignore[arg-type]
                ValueSizes(block_bytes=256, state_bytes=256),
                engine="r",
                boot="b",
                service="",
                namespace="n",
                own=view,
                access=Access(),
            )
        )
        return made[-1]

    yield state
    for one in made:
        await one.close()
        one.tier.close()
        one.cold.close()


async def test_durable_writes_wait_for_the_replicas_that_are_set(make: Make) -> None:
    assert (await make().store.create("", "alone", ttl_s=60)).session_id == "alone"
    with pytest.raises(StateUnavailableError, match="0 of 2 replicas have the write"):
        await make(wait_replicas=2).store.create("", "waits", ttl_s=60)


async def test_turns_are_saved_as_often_as_is_set(make: Make) -> None:
    settings = make(commit_interval_tokens=7, commit_interval_s=0.25).store.settings
    assert (settings.commit_interval_tokens, settings.commit_interval_s) == (7, 0.25)
