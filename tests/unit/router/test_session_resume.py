"""A session's stream that is cut anywhere goes on anywhere: every token and character once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from protos.errors import InvalidFieldError, SessionFencedError
from protos.v1 import generation_pb2
from tests.eventually import eventually
from tests.store_servers import StoreServer, running_store
from tests.unit.router.gateway_service import EOS, TEXT, GatewayService
from tests.unit.router.hash_script import BrakedScript, HashScript
from tests.unit.router.session_service import (
    Messages,
    ask,
    create,
    ids_of,
    router,
    run_turn,
    take,
    text_of,
    tokens_of,
    turn_request,
)

DRAWN: dict[str, Any] = {
    "temperature": 0.8,
    "top_p": 0.95,
    "seed": 5,
    "repetition_penalty": 1.2,
    "frequency_penalty": 0.3,
    "presence_penalty": 0.1,
    "min_tokens": 6,
    "max_tokens": 14,
}


@pytest.fixture(scope="module")
def server() -> Iterator[StoreServer]:
    with running_store() as running:
        yield running


def cut_turn(
    service: GatewayService, request: generation_pb2.GenerateRequest, num_tokens: int
) -> Messages:
    """Take `accepted` and so many tokens of a turn, then lose the stream."""
    service.model.stop_after(num_tokens)
    stream = service.client.messages(request)
    held = take(stream, num_tokens)
    stream.close()  # type: ignore[attr-defined]
    # Released before the gateway knows, the model may bring the turn to its end.
    eventually(lambda: service.servicer._live.get("", request.request_id) is None)
    service.model.stop_after(None)
    eventually(service.is_idle)
    return held


def resumed(
    service: GatewayService, request: generation_pb2.GenerateRequest, held: Messages
) -> Messages:
    """Return all messages: those that were held, and the rest by resuming."""
    again = generation_pb2.GenerateRequest()
    again.CopyFrom(request)
    again.resume_from = len(held)
    return held + list(service.client.messages(again))


def check_equal(messages: Messages, whole: Messages) -> None:
    assert [m.sequence for m in messages] == [m.sequence for m in whole]
    assert ids_of(messages) == ids_of(whole)
    assert text_of(messages) == text_of(whole)
    assert messages[-1].finished == whole[-1].finished
    assert messages[-1].usage.completion_tokens == whole[-1].usage.completion_tokens


def test_a_cut_after_every_token_with_penalties_and_a_seed(server: StoreServer) -> None:
    """The other router has nothing but the store; the history before has a turn of its own."""
    with router(server, "a", HashScript()) as first, router(server, "b", HashScript()) as second:
        create(server, "whole")
        run_turn(first, "Once", "whole", max_tokens=5, ignore_eos=True)
        whole = run_turn(first, " upon", "whole", **DRAWN)
        for cut in range(len(ids_of(whole))):
            session = f"cut-{cut}"
            create(server, session)
            run_turn(first, "Once", session, max_tokens=5, ignore_eos=True)
            request = turn_request(" upon", session, request_id=f"r-{cut}", **DRAWN)
            held = cut_turn(first, request, cut)
            check_equal(resumed((second, first)[cut % 2], request, held), whole)
            assert tokens_of(server, session) == tokens_of(server, "whole")


@pytest.mark.parametrize("include_stop", [False, True])
def test_a_cut_inside_a_character_and_a_held_stop_string(
    server: StoreServer, include_stop: bool
) -> None:
    story = "A 😀 stop stop!"
    options = {"stop": ["stop!"], "include_stop": include_stop, "max_tokens": 40}
    name = f"text-{include_stop}"
    with (
        router(server, "a", BrakedScript(story)) as first,
        router(server, "b", BrakedScript(story)) as second,
    ):
        create(server, name)
        whole = run_turn(first, "Once", name, **options)
        assert text_of(whole) == (story if include_stop else story[:-5])
        for cut in range(len(ids_of(whole))):
            session = f"{name}-{cut}"
            create(server, session)
            request = turn_request("Once", session, request_id=f"r-{cut}", **options)
            held = cut_turn(first, request, cut)
            messages = resumed(second, request, held)
            check_equal(messages, whole)
            assert not any("\ufffd" in m.text_delta for m in messages)


def test_a_committed_turn_is_replayed_from_any_message(server: StoreServer) -> None:
    """The last message was lost on its way: no engine is needed, nor the request's input."""
    create(server, "done")
    script = [*TEXT.encode("so it is"), EOS]
    with router(server, "a", BrakedScript(script)) as first:
        whole = run_turn(first, "Once", "done", request_id="r", stop_token_ids=[7])
        run_turn(first, "And", "done", request_id="later", max_tokens=2)
    with router(server, "b", BrakedScript("x")) as second:
        bare = generation_pb2.GenerateRequest(session_id="done", request_id="r")
        for held in range(len(whole) + 1):
            messages = resumed(second, bare, whole[:held])
            check_equal(messages, whole)
            assert messages[-1].finished.persisted
        first_message = resumed(second, bare, [])[0]
        assert first_message.accepted.seed == whole[0].accepted.seed
        assert second.engine.stats().steps == 0


def test_a_cancelled_turn_is_replayed_too(server: StoreServer) -> None:
    create(server, "cancelled")
    with router(server, "a", HashScript()) as service:
        service.model.stop_after(2)
        request = turn_request("Once", "cancelled", request_id="r", ignore_eos=True)
        stream = service.client.messages(request)
        whole = take(stream, 2)
        eventually(lambda: service.model.is_stopped)
        service.client.cancel("r")
        service.model.stop_after(None)
        whole += list(stream)
        for held in range(len(whole) + 1):
            check_equal(resumed(service, request, whole[:held]), whole)


def test_what_the_client_holds_counts_even_where_it_was_not_saved(server: StoreServer) -> None:
    """The router died before its first checkpoint: the client's tokens are the longer list."""
    create(server, "unsaved")
    with router(server, "a", HashScript()) as first, router(server, "b", HashScript()) as second:
        request = turn_request("Once", "unsaved", request_id="r", **DRAWN, top_logprobs=0)
        held = cut_turn(first, request, 5)
        opened = ask(server, lambda store: store.get("", "unsaved")).open_turn
        assert opened is not None
        assert opened.num_tokens == opened.prompt_tokens == 4
        request.resume_tokens.ids.extend(ids_of(held))
        steps = second.engine.stats().steps
        messages = resumed(second, request, held)
        assert all(len(m.logprobs.token_ids) == 1 for m in messages[1:])
        assert second.engine.stats().steps - steps == len(ids_of(messages)) - 5
        assert tokens_of(server, "unsaved") == TEXT.encode("Once") + ids_of(messages)


def test_other_tokens_than_were_sent_are_refused(server: StoreServer) -> None:
    create(server, "forged")
    with router(server, "a", HashScript()) as service:
        request = turn_request("Once", "forged", request_id="r", **DRAWN)
        held = cut_turn(service, request, 4)
        request.resume_tokens.ids.extend(ids_of(held))
        request.resume_tokens.ids[2] ^= 1
        with pytest.raises(InvalidFieldError, match=r"ids\[2\] must be the token that was sent"):
            resumed(service, request, held)
        request.ClearField("resume_tokens")
        assert resumed(service, request, held)[-1].finished.persisted


def test_a_turn_that_another_request_replaced_cannot_be_resumed(server: StoreServer) -> None:
    create(server, "replaced")
    with router(server, "a", HashScript()) as service:
        request = turn_request("Once", "replaced", request_id="r", **DRAWN)
        held = cut_turn(service, request, 4)
        run_turn(service, "Twice", "replaced", max_tokens=2, ignore_eos=True)
        with pytest.raises(SessionFencedError, match="the turn of request r is not open"):
            resumed(service, request, held)


def test_a_first_call_whose_answer_was_lost_may_be_sent_again(server: StoreServer) -> None:
    """`resume_from` 0: nothing arrived. Whether the turn runs, is done or never came, it is one."""
    create(server, "retried")
    with router(server, "a", HashScript()) as service:
        request = turn_request("Once", "retried", request_id="r", max_tokens=5, ignore_eos=True)
        whole = resumed(service, request, [])
        check_equal(resumed(service, request, []), whole)
        assert tokens_of(server, "retried") == TEXT.encode("Once") + ids_of(whole)
