"""Every bad field is named with its path, rule and value, all of them at once."""

from __future__ import annotations

import math
from typing import Any

import pytest
from google.protobuf import json_format

from protos import ids
from protos.errors import InvalidFieldError, UnknownModelError
from protos.v1 import generation_pb2
from protos.validate import (
    RequestLimits,
    validate_cancel,
    validate_detokenize,
    validate_generate,
    validate_tokenize,
)

LIMITS = RequestLimits(model="tiny", vocab_size=100, max_model_len=64)


def request(**fields: Any) -> generation_pb2.GenerateRequest:
    given = fields if {"chat", "tokens"} & fields.keys() else {"text": "hi", **fields}
    return json_format.ParseDict(given, generation_pb2.GenerateRequest())


def violations(message: generation_pb2.GenerateRequest) -> list[tuple[str, str, object]]:
    with pytest.raises(InvalidFieldError) as caught:
        validate_generate(message, LIMITS)
    return [tuple(violation) for violation in caught.value.violations]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"model": "tiny", "request_id": "job-7/row.9"},
        {
            "sampling": {
                "temperature": 0,
                "top_p": 1,
                "top_k": 0,
                "min_p": 0,
                "presence_penalty": -2,
                "frequency_penalty": 2,
                "repetition_penalty": 0.1,
                "seed": 2**64 - 1,
                "n": 128,
                "logit_bias": {"99": -100, "0": 100},
            }
        },
        {"stopping": {"max_tokens": 1, "min_tokens": 1, "stop": ["x"] * 16}},
        {"stopping": {"stop_token_ids": [0, 99], "min_tokens": 64}},
        {"output": {"top_logprobs": 20, "prompt_logprobs": 0}},
        {"chat": {"messages": [{"role": "user", "content": ""}]}},
        {"tokens": {"ids": [0, 99]}},
    ],
)
def test_values_at_their_bounds_are_taken(fields: dict[str, Any]) -> None:
    validate_generate(request(**fields), LIMITS)


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("temperature", -0.1, "must be 0 or more"),
        ("temperature", math.inf, "must be 0 or more"),
        ("top_p", 0.0, "must be in (0, 1]"),
        ("top_p", 1.5, "must be in (0, 1]"),
        ("top_k", -1, "must be 0 or more"),
        ("min_p", 1.1, "must be in [0, 1]"),
        ("presence_penalty", 2.5, "must be in [-2, 2]"),
        ("frequency_penalty", -2.5, "must be in [-2, 2]"),
        ("repetition_penalty", 0.0, "must be more than 0"),
        ("n", 0, "must be in [1, 128]"),
        ("n", 129, "must be in [1, 128]"),
    ],
)
def test_sampling_out_of_range(field: str, value: float, rule: str) -> None:
    message = request()
    setattr(message.sampling, field, value)
    assert violations(message) == [(f"sampling.{field}", rule, value)]


@pytest.mark.parametrize(
    "field",
    [
        "temperature",
        "top_p",
        "min_p",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
    ],
)
def test_nan_is_never_a_value(field: str) -> None:
    message = request()
    setattr(message.sampling, field, math.nan)
    [(path, _, value)] = violations(message)
    assert path == f"sampling.{field}"
    assert isinstance(value, float)
    assert math.isnan(value)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"text": ""}, ("text", "must not be empty", "")),
        ({"request_id": "a b"}, ("request_id", ids.id_rule(), "a b")),
        (
            {"stopping": {"max_tokens": 0}},
            ("stopping.max_tokens", "must be at least 1", 0),
        ),
        (
            {"stopping": {"max_tokens": 3, "min_tokens": 4}},
            ("stopping.min_tokens", "must be at most 3", 4),
        ),
        ({"stopping": {"min_tokens": 65}}, ("stopping.min_tokens", "must be at most 64", 65)),
        (
            {"stopping": {"stop": ["x"] * 17}},
            ("stopping.stop", "must have at most 16 strings", 17),
        ),
        (
            {"stopping": {"stop": ["a", ""]}},
            ("stopping.stop[1]", "must have 1 to 256 characters", 0),
        ),
        (
            {"stopping": {"stop_token_ids": [1, 100]}},
            ("stopping.stop_token_ids[1]", "must be in [0, 100)", 100),
        ),
        (
            {"output": {"top_logprobs": 21}},
            ("output.top_logprobs", "must be at most 20", 21),
        ),
        (
            {"output": {"prompt_logprobs": 99}},
            ("output.prompt_logprobs", "must be at most 20", 99),
        ),
        (
            {"sampling": {"logit_bias": {"100": 1}}},
            ("sampling.logit_bias[100]", "must have token ids in [0, 100)", 100),
        ),
        (
            {"sampling": {"logit_bias": {"7": 101}}},
            ("sampling.logit_bias[7]", "must be in [-100, 100]", 101.0),
        ),
    ],
)
def test_a_bad_field_is_named(fields: dict[str, Any], expected: tuple[str, str, object]) -> None:
    assert violations(request(**fields)) == [expected]


def test_inputs() -> None:
    empty = generation_pb2.GenerateRequest()
    assert violations(empty)[0][:2] == ("input", "must be one of text, tokens, chat")
    empty.tokens.SetInParent()
    assert violations(empty) == [("tokens.ids", "must not be empty", 0)]
    empty.tokens.ids.extend([5, 100])
    assert violations(empty) == [("tokens.ids[1]", "must be in [0, 100)", 100)]
    empty.chat.SetInParent()
    assert violations(empty) == [("chat.messages", "must not be empty", 0)]
    empty.chat.messages.add(role="narrator")
    assert violations(empty) == [
        ("chat.messages[0].role", "must be one of system, user, assistant, tool", "narrator")
    ]


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("{", "must be JSON"),
        ("[1]", "must be a JSON object"),
        ('{"messages": []}', "must not replace the chat's own"),
    ],
)
def test_template_variables(text: str, rule: str) -> None:
    message = request(chat={"messages": [{"role": "user"}], "template_kwargs_json": text})
    [(path, found, _)] = violations(message)
    assert path == "chat.template_kwargs_json"
    assert found.startswith(rule)


def test_all_violations_come_at_once() -> None:
    message = request(
        request_id="a b",
        sampling={"temperature": -1, "n": 0},
        stopping={"max_tokens": 0, "stop": [""]},
        output={"top_logprobs": 21},
    )
    assert [path for path, _, _ in violations(message)] == [
        "request_id",
        "sampling.temperature",
        "sampling.n",
        "stopping.max_tokens",
        "stopping.stop[0]",
        "output.top_logprobs",
    ]


def test_another_model_is_not_found() -> None:
    with pytest.raises(UnknownModelError, match="model 'gpt' is not served; served: 'tiny'"):
        validate_generate(request(model="gpt"), LIMITS)


def test_a_turn_may_have_no_input_only_when_it_is_resumed() -> None:
    bare = generation_pb2.GenerateRequest(session_id="s", request_id="r", resume_from=3)
    validate_generate(bare, LIMITS)
    bare.ClearField("resume_from")
    assert violations(bare) == [("input", "must be one of text, tokens, chat", "")]
    validate_generate(request(session_id="chat-7", request_id="r"), LIMITS)
    validate_generate(request(request_id="r", resume_from=0), LIMITS)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"session_id": "a/b"}, ("session_id", ids.session_id_rule(), "a/b")),
        (
            {"session_id": "s", "sampling": {"n": 2}},
            ("sampling.n", "must be 1 with session_id or resume_from", 2),
        ),
        ({"resume_from": 1}, ("request_id", "must be set with resume_from", "")),
        ({"resume_tokens": {"ids": [1]}}, ("resume_from", "must be set with resume_tokens", "")),
        (
            {"session_id": "s", "resume_from": 3, "resume_tokens": {"ids": [1]}},
            ("resume_tokens.ids", "must be resume_from - 1 in a session", 1),
        ),
        (
            {"resume_from": 3, "resume_tokens": {"ids": [1, 2]}, "stopping": {"max_tokens": 2}},
            ("resume_tokens.ids", "must be fewer than stopping.max_tokens (2)", 2),
        ),
        (
            {"resume_from": 3, "resume_tokens": {"ids": [1, 100]}},
            ("resume_tokens.ids[1]", "must be in [0, 100)", 100),
        ),
    ],
)
def test_what_a_resumed_stream_must_say(
    fields: dict[str, Any], expected: tuple[str, str, object]
) -> None:
    if "resume_tokens" in fields and "resume_from" in fields:
        fields = {"request_id": "r", **fields}
    assert violations(request(**fields)) == [expected]


def test_the_other_calls() -> None:
    with pytest.raises(InvalidFieldError, match="input must be one of text, chat"):
        validate_tokenize(generation_pb2.TokenizeRequest(), LIMITS)
    with pytest.raises(InvalidFieldError, match=r"chat\.messages must not be empty"):
        validate_tokenize(generation_pb2.TokenizeRequest(chat=generation_pb2.Chat()), LIMITS)
    with pytest.raises(InvalidFieldError, match=r"token_ids\[1\] must be in \[0, 100\), got 100"):
        validate_detokenize(generation_pb2.DetokenizeRequest(token_ids=[1, 100]), LIMITS)
    with pytest.raises(InvalidFieldError, match="request_ids must be at most 1024, got 1025"):
        validate_cancel(generation_pb2.CancelRequestsRequest(request_ids=["a"] * 1025))


def test_ids() -> None:
    made = [ids.new_request_id(), ids.new_request_id(), ids.new_session_id()]
    assert len(set(made)) == 3
    for text in made:
        assert ids.check_id(text, field="x") == text
    assert ids.host_id() == ids.host_id()
    for wrong in ("", "a" * 129, "a\n", "ü", "a b"):
        with pytest.raises(InvalidFieldError, match="request_id must be 1 to 128 characters"):
            ids.check_id(wrong, field="request_id")


def test_a_priority_of_a_later_version_is_refused() -> None:
    message = request()
    message.priority = generation_pb2.PRIORITY_BATCH
    validate_generate(message, LIMITS)
    message.priority = 7  # type: ignore[assignment]
    names = "PRIORITY_UNSPECIFIED, PRIORITY_INTERACTIVE, PRIORITY_BATCH"
    assert violations(message) == [("priority", f"must be one of {names}", 7)]


def test_a_turn_of_a_session_may_have_said_all_its_tokens_but_not_its_end() -> None:
    request = generation_pb2.GenerateRequest(request_id="r", session_id="s", resume_from=3)
    request.resume_tokens.ids.extend((1, 2))
    request.stopping.max_tokens = 2
    validate_generate(request, LIMITS)
    request.stopping.max_tokens = 1
    with pytest.raises(InvalidFieldError, match=r"at most stopping.max_tokens \(1\), got 2"):
        validate_generate(request, LIMITS)
