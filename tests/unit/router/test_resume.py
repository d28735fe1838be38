"""Streams that go on after a cut, without a session: every token and character once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from protos.client import build_request
from protos.errors import InvalidFieldError, RequestCancelledError
from protos.v1 import generation_pb2
from tests.eventually import eventually
from tests.unit.router.gateway_service import (
    PROMPT,
    TEXT,
    GatewayService,
    ScriptModel,
    running,
)
from tests.unit.router.hash_script import HashScript

STORY = "A 😀 in a stopped stop story: é, ü; stop! here"
Messages = list[generation_pb2.GenerateResponse]


@pytest.fixture(scope="module")
def reciting() -> Iterator[GatewayService]:
    with running(ScriptModel(STORY)) as service:
        yield service


@pytest.fixture(scope="module")
def hashing() -> Iterator[GatewayService]:
    """Every token depends on all before it."""
    with running(HashScript()) as service:
        yield service


def joined(messages: Messages) -> tuple[Any, ...]:
    last = messages[-1]
    return (
        "".join(m.text_delta for m in messages),
        [t for m in messages for t in m.token_ids],
        last.finished,
        (last.usage.prompt_tokens, last.usage.completion_tokens),
    )


def check_every_cut(service: GatewayService, **options: Any) -> int:
    """Resume after every token; what was held and what comes add up to the whole stream."""
    request, _ = build_request(PROMPT, {**options})  # type: ignore[typeddict-item]
    whole = list(service.client.messages(request))
    text, tokens, finished, usage = joined(whole)
    request.sampling.seed = whole[0].accepted.seed
    stopping = request.stopping
    held = TEXT.stream(
        stop=stopping.stop, include_stop=stopping.include_stop, min_tokens=stopping.min_tokens
    )
    held_text = ""
    for cut, token_id in enumerate(tokens):
        request.request_id, request.resume_from = f"cut-{cut}", cut + 1
        rest = list(service.client.messages(request))
        assert held_text + joined(rest)[0] == text, f"cut after {cut} tokens"
        assert joined(rest)[1:] == (tokens[cut:], finished, usage)
        assert [m.sequence for m in rest] == list(range(cut + 2, cut + 2 + len(rest)))
        assert not any(m.HasField("accepted") for m in rest)
        request.resume_tokens.ids.append(token_id)
        held_text += held.push(token_id)
    eventually(service.is_idle)
    return len(tokens)


def test_a_cut_inside_a_character_and_inside_a_held_stop_string(reciting: GatewayService) -> None:
    """The emoji has four tokens, and `stop` begins like the stop string three times before."""
    assert check_every_cut(reciting, stop=["stop!"], max_tokens=60) > 35
    check_every_cut(reciting, stop=["stop!"], include_stop=True, max_tokens=60)


def test_a_cut_with_penalties_and_a_drawn_seed(hashing: GatewayService) -> None:
    check_every_cut(
        hashing,
        temperature=0.8,
        top_p=0.9,
        seed=77,
        repetition_penalty=1.2,
        frequency_penalty=0.3,
        presence_penalty=0.1,
        min_tokens=5,
        max_tokens=24,
    )


def test_the_servers_own_seed_goes_on(hashing: GatewayService) -> None:
    request, _ = build_request(PROMPT, {"temperature": 1.0, "max_tokens": 12})
    whole = list(hashing.client.messages(request))
    tokens = joined(whole)[1]
    request.request_id, request.resume_from = "again", 6
    request.sampling.seed = whole[0].accepted.seed
    request.resume_tokens.ids.extend(tokens[:5])
    rest = list(hashing.client.messages(request))
    assert [t for m in rest for t in m.token_ids] == tokens[5:]


def test_random_tokens_need_their_seed(hashing: GatewayService) -> None:
    request, _ = build_request(PROMPT, {"temperature": 1.0, "request_id": "r"})
    request.resume_from = 2
    request.resume_tokens.ids.append(7)
    with pytest.raises(InvalidFieldError, match=r"sampling\.seed must be the seed of the first"):
        list(hashing.client.messages(request))


def test_a_call_that_resumes_takes_over_from_a_stream_that_still_runs() -> None:
    """The first connection is not known to be dead: its handler is ended, its tokens go on."""
    model = ScriptModel(STORY)
    steps = iter(range(10**9))

    def hold(batch: Any) -> None:
        if next(steps) == 6:
            model.runs.clear()

    model.before_forward = hold
    with running(model) as service:
        request, _ = build_request(PROMPT, {"request_id": "r", "max_tokens": 20})
        first = service.client.messages(request)
        held = [next(first) for _ in range(2)]
        eventually(lambda: not model.runs.is_set())
        request.resume_from = 2
        request.resume_tokens.ids.extend(t for m in held for t in m.token_ids)
        request.sampling.seed = held[0].accepted.seed
        rest: Messages = []
        thread = threading.Thread(target=lambda: rest.extend(service.client.messages(request)))
        thread.start()
        with pytest.raises(RequestCancelledError, match="another call resumes its stream"):
            list(first)
        model.runs.set()
        thread.join(10)
        assert "".join(m.text_delta for m in held + rest) == STORY[:17]
        eventually(service.is_idle)
