"""The store fails under turns: running streams finish and say so, durable work is refused, the rest
goes on. Real servers that are frozen, killed, or full.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from protos.errors import SessionFencedError, StateUnavailableError
from router.state.leases import StoreSettings
from tests.eventually import eventually
from tests.store_servers import StoreServer, running_store
from tests.unit.router.gateway_service import PROMPT, TEXT, GatewayService
from tests.unit.router.hash_script import HashScript
from tests.unit.router.session_service import (
    Messages,
    ask,
    create,
    ids_of,
    router,
    run_turn,
    take,
    tokens_of,
    turn_request,
)

BOUND_S = 30.0
"""Far below any default of redis-py; nothing waits for a dead store longer than a few seconds."""


@pytest.fixture
def server() -> Iterator[StoreServer]:
    with running_store() as running:
        yield running


@pytest.fixture
def service(server: StoreServer) -> Iterator[GatewayService]:
    with router(server, "a", HashScript()) as running:
        yield running


def turn_with_trouble(
    service: GatewayService, session: str, trouble: Callable[[], object], **options: object
) -> Messages:
    """Run a turn of 12 tokens; the trouble begins after the fourth."""
    service.model.stop_after(4)
    request = turn_request(PROMPT, session, max_tokens=12, ignore_eos=True, **options)
    stream = service.client.messages(request)
    held = take(stream, 4)
    eventually(lambda: service.model.is_stopped)
    trouble()
    service.model.stop_after(None)
    begun = time.monotonic()
    messages = held + list(stream)
    assert time.monotonic() - begun < BOUND_S
    return messages


def test_a_stream_outlives_a_frozen_store_and_is_written_when_it_thaws(
    server: StoreServer, service: GatewayService
) -> None:
    create(server, "frozen")
    messages = turn_with_trouble(service, "frozen", server.freeze)
    assert len(ids_of(messages)) == 12
    assert not messages[-1].finished.persisted
    assert messages[-1].finished.HasField("persisted")
    server.thaw()
    expected = TEXT.encode(PROMPT) + ids_of(messages)
    assert eventually(lambda: tokens_of(server, "frozen") == expected, 15)
    assert len(ids_of(run_turn(service, "more", "frozen", max_tokens=2, ignore_eos=True))) == 2


def test_a_stream_outlives_a_store_that_is_gone(
    server: StoreServer, service: GatewayService
) -> None:
    """What cannot be written is not in the history afterwards; the turn before is."""
    create(server, "gone")
    run_turn(service, "Once", "gone", max_tokens=3, ignore_eos=True)
    before = tokens_of(server, "gone")
    messages = turn_with_trouble(service, "gone", server.kill)
    assert len(ids_of(messages)) == 12
    assert not messages[-1].finished.persisted
    with pytest.raises(StateUnavailableError) as refused:
        run_turn(service, "again", "gone")
    assert (refused.value.retry_after_s or 0) > 0
    server.start()
    assert tokens_of(server, "gone")[: len(before)] == before


def test_durable_work_is_refused_quickly_and_other_work_goes_on(
    server: StoreServer, service: GatewayService
) -> None:
    create(server, "refused")
    plain = service.client.complete(PROMPT, max_tokens=5, temperature=0)
    server.freeze()
    begun = time.monotonic()
    for call in (
        lambda: run_turn(service, "x", "refused"),
        lambda: service.client.create_session("new"),
        lambda: service.client.get_session("refused"),
        lambda: list(service.client.list_sessions()),
        lambda: service.client.delete_session("refused"),
    ):
        with pytest.raises(StateUnavailableError) as caught:
            call()
        assert (caught.value.retry_after_s or 0) > 0
    assert time.monotonic() - begun < BOUND_S
    again = service.client.complete(PROMPT, max_tokens=5, temperature=0)
    assert again.token_ids == plain.token_ids
    server.thaw()

    def serves() -> bool:
        try:
            run_turn(service, "x", "refused", max_tokens=1)
        except StateUnavailableError:
            return False
        return True

    assert eventually(serves, 15)


def test_a_full_store_refuses_turns_and_keeps_what_it_has(
    server: StoreServer, service: GatewayService
) -> None:
    create(server, "full")
    run_turn(service, "Once", "full", max_tokens=3, ignore_eos=True)
    before = tokens_of(server, "full")

    def limit(maxmemory: str) -> None:
        ask(server, lambda store: store._client.command("CONFIG", "SET", "maxmemory", maxmemory))

    limit("1")
    with pytest.raises(StateUnavailableError):
        run_turn(service, "more", "full")
    limit("0")
    assert tokens_of(server, "full") == before
    eventually(lambda: ask(server, lambda store: store.get("", "full")).holder is None, 20)
    assert eventually(
        lambda: len(ids_of(run_turn(service, "more", "full", max_tokens=2, ignore_eos=True))) == 2
    )


def test_a_store_that_is_down_for_longer_than_a_lease_does_not_end_streams(
    server: StoreServer,
) -> None:
    """Nobody else can have taken the session from a store that does not answer."""
    settings = StoreSettings(lease_s=0.8, margin_s=0.2)
    with router(server, "a", HashScript(), settings) as service:
        create(server, "long")

        def outlast() -> None:
            server.freeze()
            pause = threading.Event()
            pause.wait(1.0)

        messages = turn_with_trouble(service, "long", outlast)
        assert len(ids_of(messages)) == 12
        assert not messages[-1].finished.persisted


def test_a_session_that_is_deleted_ends_its_turn(
    server: StoreServer, service: GatewayService
) -> None:
    create(server, "deleted")
    with pytest.raises(Exception, match="session 'deleted' is not there") as caught:
        turn_with_trouble(service, "deleted", lambda: service.client.delete_session("deleted"))
    assert not isinstance(caught.value, SessionFencedError)
    eventually(service.is_idle)
