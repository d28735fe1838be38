"""What is counted of turns: over real gRPC, engines and servers that are frozen or gone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest

from protos.errors import SessionBusyError, SessionNotFoundError
from router.gateway.turn_figures import TurnStats
from router.state.counters import Distribution, Histogram
from tests.eventually import eventually
from tests.store_servers import StoreServer, running_store
from tests.unit.router.gateway_service import PROMPT, GatewayService
from tests.unit.router.session_service import create, router, run_turn, take, turn_request


@pytest.fixture
def server() -> Iterator[StoreServer]:
    with running_store() as running:
        yield running


@pytest.fixture
def service(server: StoreServer) -> Iterator[GatewayService]:
    with router(server, "a") as running:
        yield running


def stats(service: GatewayService) -> TurnStats:
    found = service.servicer.turn_stats()
    assert found is not None
    return found


def test_a_value_is_counted_at_the_first_bound_that_holds_it() -> None:
    histogram = Histogram([1.0, 2.0])
    for value in (0.5, 1.0, 1.5, 2.5, 9.0):
        histogram.add(value)
    found = histogram.distribution()
    # 0.5 and 1.0 | 1.5 | 2.5 and 9.0; 0.5 + 1 + 1.5 + 2.5 + 9 = 14.5
    assert found == Distribution(bounds=(1.0, 2.0), counts=(2, 1, 2), total=14.5)


def test_every_commit_is_timed(server: StoreServer, service: GatewayService) -> None:
    create(server, "timed")
    for number in range(1, 4):
        run_turn(service, PROMPT, "timed", max_tokens=3)
        found = stats(service)
        assert sum(found.commit_s.counts) == number
        assert found.commit_s.total > 0
    eventually(lambda: stats(service).num_unsaved == 0)
    assert (found.fenced, found.conflicts, found.leases_lost, found.not_persisted) == (0, 0, 0, 0)


def test_tokens_that_are_not_saved_are_counted_while_their_turn_runs(
    server: StoreServer, service: GatewayService
) -> None:
    """Four tokens are saved; of the next ones the store hears nothing until it thaws."""
    create(server, "lag")
    service.model.stop_after(4)
    request = turn_request(PROMPT, "lag", max_tokens=12, ignore_eos=True)
    with closing(service.client.messages(request)) as stream:  # type: ignore[type-var]
        take(stream, 4)
        eventually(lambda: service.model.is_stopped and stats(service).num_unsaved == 0)
        assert stats(service).unsaved_s == 0
        server.freeze()
        service.model.go_on(3)
        eventually(lambda: stats(service).num_unsaved == 3)
        before = stats(service).unsaved_s
        eventually(lambda: stats(service).unsaved_s > before > 0)
        server.thaw()
        eventually(lambda: stats(service).num_unsaved == 0, 15)
        service.model.stop_after(None)
        list(stream)
    assert stats(service).unsaved_s == 0


def test_a_turn_that_is_not_persisted_is_counted_and_leaves_nothing(
    server: StoreServer, service: GatewayService
) -> None:
    create(server, "gone")
    service.model.stop_after(2)
    stream = service.client.messages(turn_request(PROMPT, "gone", max_tokens=4, ignore_eos=True))
    take(stream, 2)
    server.kill()
    service.model.stop_after(None)
    assert not list(stream)[-1].finished.persisted
    assert stats(service).not_persisted == 1
    assert sum(stats(service).commit_s.counts) == 0
    server.start()
    eventually(lambda: stats(service).num_unsaved == 0, 20)


def test_a_second_writer_and_a_deleted_session_are_counted(
    server: StoreServer, service: GatewayService
) -> None:
    create(server, "one")
    service.model.stop_after(2)
    stream = service.client.messages(turn_request(PROMPT, "one", max_tokens=9, ignore_eos=True))
    take(stream, 2)
    with pytest.raises(SessionBusyError):
        run_turn(service, PROMPT, "one")
    assert stats(service).conflicts == 1
    service.client.delete_session("one")
    service.model.stop_after(None)
    with pytest.raises(SessionNotFoundError):
        list(stream)
    eventually(lambda: stats(service).leases_lost == 1)
    eventually(lambda: stats(service).num_unsaved == 0)
