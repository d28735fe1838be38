"""Turns of sessions over real gRPC, engines and servers: what they continue, and who may write."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from protos.client import build_request
from protos.errors import (
    ContextLengthExceededError,
    InvalidFieldError,
    SessionBusyError,
    SessionNotFoundError,
    SessionQuotaError,
)
from protos.v1 import generation_pb2
from router.state.leases import StoreSettings
from tests.eventually import eventually
from tests.store_servers import StoreServer, running_store, server_binaries
from tests.unit.router.gateway_service import EOS, MAX_MODEL_LEN, TEXT, GatewayService, ScriptModel
from tests.unit.router.session_service import (
    ask,
    create,
    ids_of,
    router,
    run_turn,
    take,
    tokens_of,
    turn_request,
)


@pytest.fixture(scope="module", params=server_binaries(), ids=lambda path: path.split("/")[-1])
def server(request: pytest.FixtureRequest) -> Iterator[StoreServer]:
    with running_store(request.param) as running:
        yield running


@pytest.fixture(scope="module")
def service(server: StoreServer) -> Iterator[GatewayService]:
    with router(server, "a") as running:
        yield running


def fresh_run(service: GatewayService, prompt_ids: list[int], **options: object) -> list[int]:
    request, _ = build_request(prompt_ids, {"temperature": 0, **options})  # type: ignore[typeddict-item]
    return ids_of(list(service.client.messages(request)))


def test_turns_continue_the_tokens_of_turns_before(
    server: StoreServer, service: GatewayService
) -> None:
    """Text, then tokens, then text, on two routers: each equals a fresh run on all the tokens."""
    create(server, "talk")
    history: list[int] = []
    with router(server, "b") as other:
        for number, (prompt, added) in enumerate(
            [("Once", TEXT.encode("Once")), ([5, 6, 7], [5, 6, 7]), (" more", TEXT.encode(" more"))]
        ):
            turn_options = {"max_tokens": 9 + number, "ignore_eos": True}
            messages = run_turn(
                (service, other)[number % 2],
                prompt,
                "talk",
                request_id=f"t{number}",
                **turn_options,
            )
            accepted = messages[0].accepted
            assert (accepted.request_id, accepted.turn) == (f"t{number}", number + 1)
            assert accepted.session_tokens == len(history)
            assert accepted.prompt_tokens == len(history) + len(added)
            tokens = ids_of(messages)
            assert tokens == fresh_run(service, history + added, **turn_options)
            assert [m.sequence for m in messages] == list(range(1, len(tokens) + 2))
            assert all(len(m.token_ids) == 1 for m in messages[1:])
            assert messages[-1].finished.persisted
            assert messages[-1].usage.completion_tokens == len(tokens)
            history += added + tokens
            assert tokens_of(server, "talk") == history
    turns = ask(server, lambda store: store.turns("", "talk"))
    assert [(t.request_id, t.finish_reason) for t in turns] == [
        (f"t{i}", "length") for i in range(3)
    ]
    eventually(service.is_idle)


@pytest.mark.parametrize("ends_itself", [True, False])
def test_a_chat_goes_on_behind_the_answer_that_was_drawn(
    server: StoreServer, ends_itself: bool
) -> None:
    """The engine drew `<|im_end|>` or was cut; the template's line break follows either way."""
    script = [*TEXT.encode("ok"), EOS] if ends_itself else TEXT.encode("okay")
    session = f"chat-{ends_itself}"
    create(server, session)
    with router(server, "c", ScriptModel(script)) as service:
        first = run_turn(
            service,
            [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"}],
            session,
            max_tokens=8 if ends_itself else 3,
        )
        answer = TEXT.decode(ids_of(first), skip_special_tokens=False)
        second = run_turn(service, [{"role": "user", "content": "and?"}], session, max_tokens=1)
    text = TEXT.decode(tokens_of(server, session)[:-1], skip_special_tokens=False)
    closed = answer if ends_itself else answer + "<|im_end|>"
    assert text == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        f"<|im_start|>assistant\n{closed}\n<|im_start|>user\nand?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert second[0].accepted.session_tokens == len(tokens_of(server, session)) - 1 - (
        second[0].accepted.prompt_tokens - second[0].accepted.session_tokens
    )


def test_a_later_system_message_is_refused(server: StoreServer, service: GatewayService) -> None:
    create(server, "sys")
    run_turn(service, "Once", "sys", max_tokens=2)
    with pytest.raises(InvalidFieldError, match=r"chat\.messages\[0\]\.role must not be system"):
        run_turn(service, [{"role": "system", "content": "x"}], "sys")
    run_turn(service, "again", "sys", max_tokens=2)


def test_errors_leave_the_session_free(server: StoreServer, service: GatewayService) -> None:
    with pytest.raises(SessionNotFoundError, match="session 'nobody' is not there"):
        run_turn(service, "Once", "nobody")
    create(server, "errors")
    with pytest.raises(ContextLengthExceededError):
        run_turn(service, "Once", "errors", max_tokens=MAX_MODEL_LEN)
    with pytest.raises(InvalidFieldError, match=r"sampling\.n must be 1"):
        run_turn(service, "Once", "errors", n=2)
    assert len(ids_of(run_turn(service, "Once", "errors", max_tokens=2))) == 2


def test_a_quota_bounds_a_session(server: StoreServer, service: GatewayService) -> None:
    create(server, "small", quota_tokens=20)
    with pytest.raises(SessionQuotaError, match="would have 24 tokens, its quota is 20"):
        run_turn(service, "Once", "small", max_tokens=20)
    messages = run_turn(service, "Once", "small", ignore_eos=True)
    assert len(ids_of(messages)) == 16
    assert messages[-1].finished.reason == generation_pb2.FINISH_REASON_LENGTH
    with pytest.raises(SessionQuotaError):
        run_turn(service, "x", "small")


def test_of_two_writers_one_is_told_who_the_other_is(
    server: StoreServer, service: GatewayService
) -> None:
    create(server, "busy")
    service.model.stop_after(2)
    first = service.client.messages(turn_request("Once", "busy", max_tokens=6, ignore_eos=True))
    next(first)
    eventually(lambda: service.model.is_stopped)
    with router(server, "b") as other:
        for writer in (other, service):
            with pytest.raises(SessionBusyError, match="is held by a, for at least") as caught:
                run_turn(writer, "me", "busy")
            assert caught.value.fields["holder"] == "a"
        service.model.stop_after(None)
        assert len(ids_of(list(first))) == 6
        assert len(ids_of(run_turn(other, "me", "busy", max_tokens=3, ignore_eos=True))) == 3


def test_a_cancelled_turn_keeps_what_was_delivered(
    server: StoreServer, service: GatewayService
) -> None:
    create(server, "cancelled")
    service.model.stop_after(4)
    request = turn_request("Once", "cancelled", request_id="stop-me", ignore_eos=True)
    stream = service.client.messages(request)
    held = take(stream, 4)
    eventually(lambda: service.model.is_stopped)
    assert service.client.cancel("stop-me") == ["stop-me"]
    service.model.stop_after(None)
    held += list(stream)
    assert held[-1].finished.reason == generation_pb2.FINISH_REASON_CANCELLED
    assert tokens_of(server, "cancelled") == TEXT.encode("Once") + ids_of(held)
    assert [m.sequence for m in held] == list(range(1, len(held) + 1))
    (turn,) = ask(server, lambda store: store.turns("", "cancelled"))
    assert turn.finish_reason == "cancelled"


@pytest.mark.parametrize(
    "settings",
    [
        StoreSettings(commit_interval_tokens=2, commit_interval_s=100.0),
        StoreSettings(commit_interval_tokens=100, commit_interval_s=0.05),
    ],
    ids=["by_number", "by_time"],
)
def test_a_running_turn_is_saved_as_often_as_is_set(
    server: StoreServer, settings: StoreSettings
) -> None:
    session = f"saved-{settings.commit_interval_tokens}"
    create(server, session)

    def num_saved() -> int:
        opened = ask(server, lambda store: store.get("", session)).open_turn
        return opened.num_tokens - opened.prompt_tokens if opened else 0

    with router(server, "d", settings=settings) as service:
        service.model.stop_after(2)
        stream = service.client.messages(turn_request("Once", session, max_tokens=4))
        take(stream, 2)
        assert eventually(lambda: num_saved() == 2)
        service.model.stop_after(None)
        assert len(ids_of(list(stream))) == 2


def test_a_new_request_drops_a_turn_that_was_left_open(
    server: StoreServer, service: GatewayService
) -> None:
    create(server, "left")
    service.model.stop_after(3)
    stream = service.client.messages(turn_request("Once", "left", request_id="lost"))
    take(stream, 3)
    eventually(lambda: service.model.is_stopped)
    stream.close()  # type: ignore[attr-defined]
    service.model.stop_after(None)

    def open_turn() -> str:
        record = ask(server, lambda store: store.get("", "left"))
        assert record.holder is None
        return record.open_turn.request_id if record.open_turn else ""

    assert eventually(open_turn) == "lost"
    messages = run_turn(service, "Twice", "left", max_tokens=3, ignore_eos=True)
    assert tokens_of(server, "left") == TEXT.encode("Twice") + ids_of(messages)
    assert ask(server, lambda store: store.get("", "left")).open_turn is None
