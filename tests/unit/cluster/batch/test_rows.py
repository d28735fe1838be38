"""Which rows can be asked, what they ask, and why the others cannot."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.batch.rows import Row, RowDefaults, id_of, parse_line, row_of
from protos.errors import InvalidFieldError
from protos.v1 import generation_pb2

CHAT = {"messages": [{"role": "user", "content": "hi"}]}


def read(body: Any, defaults: RowDefaults | None = None, **outer: Any) -> Row:
    document = {"custom_id": "a", "body": body, **outer}
    return row_of(7, document, id_field="custom_id", defaults=defaults or RowDefaults())


def test_a_chat_line_becomes_a_request_of_batch_priority() -> None:
    body = {
        "model": "tiny",
        "messages": [
            {"role": "system", "content": "short"},
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            },
        ],
        "max_completion_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 3,
        "stop": "END",
        "logit_bias": {"5": 1.0},
        "stream": False,
        "user": "u",
        "chat_template_kwargs": {"enable_thinking": False},
    }
    row = read(body, method="POST", url="/v1/chat/completions")
    request = row.request
    assert (row.number, row.custom_id, row.is_chat) == (7, "a", True)
    assert request.priority == generation_pb2.PRIORITY_BATCH
    assert [(m.role, m.content) for m in request.chat.messages] == [
        ("system", "short"),
        ("user", "ab"),
    ]
    assert request.chat.template_kwargs_json == '{"enable_thinking": false}'
    assert (request.model, request.stopping.max_tokens, list(request.stopping.stop)) == (
        "tiny",
        9,
        ["END"],
    )
    assert (request.sampling.temperature, request.sampling.seed) == (0.5, 3)
    assert dict(request.sampling.logit_bias) == {5: 1.0}


def test_a_table_row_is_a_body_without_its_own_column() -> None:
    document = {"name": "a", "prompt": "once", "max_tokens": 4, "temperature": None}
    row = row_of(0, document, id_field="name", defaults=RowDefaults(temperature=0.0))
    assert (row.request.text, row.request.stopping.max_tokens, row.is_chat) == ("once", 4, False)
    assert row.request.sampling.temperature == 0.0
    in_json = row_of(
        0, {"name": "a", "body": '{"prompt": [1, 2]}'}, id_field="name", defaults=RowDefaults()
    )
    assert list(in_json.request.tokens.ids) == [1, 2]


def test_a_row_without_a_seed_gets_one_of_its_id() -> None:
    first, again = read(CHAT), read(CHAT)
    other = read(CHAT, custom_id="b")
    salted = read(CHAT, RowDefaults(seed=1))
    seeds = [row.request.sampling.seed for row in (first, again, other, salted)]
    assert seeds[0] == seeds[1]
    assert len(set(seeds)) == 3


def test_whole_numbers_may_be_written_with_a_fraction_of_zero() -> None:
    row = read({**CHAT, "max_tokens": 16.0, "seed": 3.0})
    assert (row.request.stopping.max_tokens, row.request.sampling.seed) == (16, 3)
    with pytest.raises(InvalidFieldError, match=r"body\.max_tokens must fit its type"):
        read({**CHAT, "max_tokens": 16.5})


def test_defaults_fill_only_what_is_unset() -> None:
    defaults = RowDefaults(max_tokens=5, temperature=0.25)
    row = read({**CHAT, "max_tokens": 2}, defaults)
    assert (row.request.stopping.max_tokens, row.request.sampling.temperature) == (2, 0.25)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([1], "row must be a JSON object, got"),
        ({"body": CHAT}, "custom_id must be text of 1 to 512 characters, or a whole number, got"),
        ({"custom_id": True, "body": CHAT}, 'or a whole number, got "True"'),
        ({"custom_id": 5.5, "body": CHAT}, 'or a whole number, got "5.5"'),
        ({"custom_id": 1 << 200, "body": CHAT}, "or a whole number, got"),
        ({"custom_id": "half \ud800", "body": CHAT}, 'or a whole number, got "half ?"'),
        ({"custom_id": "a", "body": []}, "body must be a JSON object"),
        ({"custom_id": "a", "body": "{"}, "body must be JSON"),
        ({"custom_id": "a", "body": {}}, 'must have either messages or prompt, got "neither"'),
        ({"custom_id": "a", "body": {**CHAT, "prompt": "x"}}, 'got "messages, prompt"'),
        ({"custom_id": "a", "method": "GET", "body": CHAT}, 'method must be POST, got "GET"'),
        ({"custom_id": "a", "url": "/v1/x", "body": CHAT}, "url must be /v1/chat/completions with"),
    ],
)
def test_a_row_that_is_none(document: Any, message: str) -> None:
    with pytest.raises(InvalidFieldError) as caught:
        row_of(0, document, id_field="custom_id", defaults=RowDefaults())
    assert message in caught.value.message


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({**CHAT, "temperature": "hot"}, "body.temperature must fit its type"),
        ({**CHAT, "max_tokens": -1}, "body.max_tokens must fit its type"),
        ({**CHAT, "temperature": 10**400}, "body.temperature must fit its type"),
        ({**CHAT, "logit_bias": {"5": 10**400}}, "body.logit_bias must fit its type"),
        ({**CHAT, "stop": {"a": 1}}, "body.stop must fit its type"),
        ({"prompt": "half \ud800"}, "body.prompt must fit its type"),
        ({**CHAT, "half \ud800": 1}, "body.half ? is not a field"),
        ({**CHAT, "tools": []}, "body.tools is not a field that a batch takes"),
        ({**CHAT, "stream": True}, "body.stream is not a field that a batch takes"),
        ({**CHAT, "logit_bias": {"x": 1}}, "body.logit_bias must fit its type"),
        ({"messages": "hi"}, "body.messages must be a list"),
        ({"messages": ["hi"]}, "body.messages[0] must be a JSON object"),
        ({"messages": [{"role": "user"}]}, "body.messages[0].content must be text or a list"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "body.messages[0].content must have text parts only",
        ),
        (
            {"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]},
            "body.messages[0] has a field that a batch does not take",
        ),
        ({"prompt": []}, "body.prompt must be text or token ids"),
    ],
)
def test_a_body_that_cannot_be_asked_names_its_field(body: Any, message: str) -> None:
    with pytest.raises(InvalidFieldError) as caught:
        read(body)
    assert message in caught.value.message


def test_a_line_that_is_no_json() -> None:
    with pytest.raises(InvalidFieldError, match="row must be JSON"):
        parse_line(b'{"custom_id": ')
    assert id_of(parse_line(b'{"custom_id": "x"}'), "custom_id") == "x"


def test_numbers_are_ids_as_their_digits() -> None:
    assert [id_of({"n": number}, "n") for number in (0, -7, 2**64)] == ["0", "-7", str(2**64)]


def test_nesting_without_end_costs_its_row_alone() -> None:
    deep = b"[" * 100_000
    with pytest.raises(InvalidFieldError, match="row must be JSON"):
        parse_line(deep)
    with pytest.raises(InvalidFieldError, match="body must be JSON"):
        read(deep.decode())
    nested: Any = {}
    for _ in range(5000):
        nested = {"a": nested}
    for body in (
        {"prompt": nested},
        {**CHAT, "x": nested},
        {**CHAT, "chat_template_kwargs": nested},
    ):
        with pytest.raises(InvalidFieldError, match="body"):
            read(body)
