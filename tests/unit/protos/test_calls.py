"""What the clients ask, without a connection: requests, what is read of answers, the methods."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from protos.calls import Ask, Pages
from protos.client import AsyncClient, Client
from protos.events import Accepted, Delta, events_of
from protos.generation_calls import Generation, GenerationCalls
from protos.session_calls import SessionCalls
from protos.v1 import generation_pb2, session_pb2

GenerateResponse = generation_pb2.GenerateResponse


class Described(GenerationCalls, SessionCalls):
    """A client that returns what it would ask."""

    def _ask(self, ask: Ask[Any]) -> Ask[Any]:
        return ask

    _stream = _pages = _ask


def public(kind: type[object]) -> set[str]:
    return {name for name in dir(kind) if not name.startswith("_")}


def test_both_clients_have_the_same_methods() -> None:
    assert public(Client) == public(AsyncClient)
    for name in public(Client) - {"addresses"}:
        blocking, awaiting = getattr(Client, name), getattr(AsyncClient, name)
        assert list(inspect.signature(blocking).parameters) == list(
            inspect.signature(awaiting).parameters
        )
        assert blocking.__doc__


def test_a_method_shows_its_name_and_arguments() -> None:
    with Client("127.0.0.1:1") as client:
        shown = inspect.signature(client.tokenize)
    assert Client.tokenize.__qualname__ == "GenerationCalls.tokenize"  # type: ignore[attr-defined]
    assert list(shown.parameters) == ["prompt", "add_special_tokens"]


def test_an_ask_says_what_is_sent_and_what_is_read() -> None:
    ask: Ask[Any] = Described().tokenize("hello", add_special_tokens=False)  # type: ignore
    assert ask.request == generation_pb2.TokenizeRequest(text="hello", add_special_tokens=False)
    assert ask.read(generation_pb2.TokenizeResponse(token_ids=[3, 1])) == [3, 1]


def test_pages_are_turned_until_there_is_none() -> None:
    pages: Pages[Any] = Described().list_sessions(page_size=2)  # type: ignore
    first = session_pb2.ListSessionsResponse(
        sessions=[session_pb2.Session(session_id=name) for name in "ab"], next_page_token="c"
    )
    assert pages.page().request == session_pb2.ListSessionsRequest(page_size=2)
    assert [session.session_id for session in pages.read(first)] == ["a", "b"]
    assert pages.turn(first)
    assert pages.page().request == session_pb2.ListSessionsRequest(page_size=2, page_token="c")
    assert not pages.turn(session_pb2.ListSessionsResponse())


def test_a_generation_asks_for_the_rest_and_says_nothing_twice() -> None:
    asked = generation_pb2.GenerateRequest(text="x", request_id="mine")
    stream = Generation(asked, 5.0, events_of)
    request = stream.next_request()
    assert (request.text, request.request_id) == ("x", "mine")
    assert not request.HasField("resume_from")
    accepted = GenerateResponse(sequence=1, accepted=generation_pb2.Accepted(request_id="mine"))
    delta = GenerateResponse(sequence=2, text_delta="ab", token_ids=[7, 8])
    assert [type(event) for event in stream.take(accepted)] == [Accepted]
    assert list(stream.take(delta)) == [Delta(0, "ab", [7, 8], None)]
    request = stream.next_request()
    assert request.resume_from == 2
    assert list(request.resume_tokens.ids) == [7, 8]
    assert list(stream.take(delta)) == []
    assert not asked.HasField("resume_from")


@pytest.mark.parametrize(("n", "can_resume"), [(0, True), (1, True), (2, False)])
def test_only_one_sequence_can_be_resumed(n: int, can_resume: bool) -> None:
    request = generation_pb2.GenerateRequest(sampling=generation_pb2.Sampling(n=n))
    assert Generation(request, None, events_of).can_resume is can_resume
