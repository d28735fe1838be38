"""What a row of the input asks for: one line of an OpenAI batch, or one row of a table.

A row is a JSON object `{"custom_id", "method", "url", "body"}`; `method` and `url` may be missing.
A table's row has the columns `custom_id` and either `body` or the body's own fields. Knows neither
files nor connections. What is wrong with a row is an `InvalidFieldError`; it costs that row alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from protos.errors import InvalidFieldError
from protos.v1 import generation_pb2

MAX_ID_CHARS = 512
MAX_ID_BITS = 128
"""Of a number."""
URLS = {"messages": "/v1/chat/completions", "prompt": "/v1/completions"}
IGNORED = frozenset({"user", "metadata", "store", "service_tier"})
"""Fields of OpenAI's bodies that change nothing here."""

_WHOLE = frozenset(
    ("max_tokens", "max_completion_tokens", "min_tokens", "seed", "n", "top_k"),
)
"""Fields with whole numbers: JSON's 16.0 is one, and tables whose column has gaps hold such."""

# Field of a body -> part of `GenerateRequest` that has it under the same name.
_FIELDS = {
    **dict.fromkeys(
        (
            *("temperature", "top_p", "top_k", "min_p", "presence_penalty"),
            *("frequency_penalty", "repetition_penalty", "seed", "n"),
        ),
        "sampling",
    ),
    **dict.fromkeys(("max_tokens", "min_tokens", "ignore_eos", "include_stop"), "stopping"),
    "skip_special_tokens": "output",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RowDefaults:
    """What a row's unset fields mean; None: what the service says."""

    max_tokens: int | None = None
    temperature: float | None = None
    seed: int = 0
    """A row without a seed gets one of this and its id, so that it gives the same tokens again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row that can be asked."""

    number: int
    """Position in the input, from 0."""
    custom_id: str
    is_chat: bool
    request: generation_pb2.GenerateRequest
    """Without a request id."""


def id_of(document: Any, id_field: str) -> str:
    """Return the id of a row.

    Raises:
        InvalidFieldError: It has none.
    """
    if not isinstance(document, Mapping):
        raise InvalidFieldError("row", "must be a JSON object", _shown(document))
    return checked_id(document.get(id_field), id_field)


def checked_id(value: Any, id_field: str) -> str:
    """Return an id as text: tables often number their rows.

    Raises:
        InvalidFieldError: It is neither text nor a whole number.
    """
    text = str(value) if type(value) is int and value.bit_length() <= MAX_ID_BITS else value
    if not isinstance(text, str) or not 1 <= len(text) <= MAX_ID_CHARS or not _is_unicode(text):
        rule = f"must be text of 1 to {MAX_ID_CHARS} characters, or a whole number"
        raise InvalidFieldError(id_field, rule, _shown(value))
    return text


def parse_line(line: bytes) -> Any:
    """Return what a line of a JSONL file holds.

    Raises:
        InvalidFieldError: It is no JSON.
    """
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidFieldError("row", f"must be JSON ({error})", _shown(line[:80])) from error


def row_of(number: int, document: Any, *, id_field: str, defaults: RowDefaults) -> Row:
    """Return the request of a row.

    Args:
        number: Its position in the input.
        document: The parsed line, or the table's row by column.
        id_field: Name of the field with the id.
        defaults: Values of unset fields.

    Raises:
        InvalidFieldError: The row cannot be asked.
    """
    custom_id = id_of(document, id_field)
    body = _body(document, id_field)
    if document.get("method") not in (None, "POST"):
        raise InvalidFieldError("method", "must be POST", _shown(document["method"]))
    kinds = [name for name in URLS if body.get(name) is not None]
    if len(kinds) != 1:
        rule = "must have either messages or prompt"
        raise InvalidFieldError("body", rule, ", ".join(kinds) or "neither")
    kind = kinds[0]
    if document.get("url") not in (None, URLS[kind]):
        raise InvalidFieldError("url", f"must be {URLS[kind]} with {kind}", _shown(document["url"]))
    request = generation_pb2.GenerateRequest(priority=generation_pb2.PRIORITY_BATCH)
    request.output.return_token_ids = True
    for name, value in body.items():
        if value is not None:
            _set(request, name, value)
    _set_defaults(request, custom_id, defaults)
    return Row(number=number, custom_id=custom_id, is_chat=kind == "messages", request=request)


def _body(document: Mapping[str, Any], id_field: str) -> Mapping[str, Any]:
    body = document.get("body")
    if body is None:
        outer = (id_field, "method", "url", "body")
        return {name: value for name, value in document.items() if name not in outer}
    if isinstance(body, str):  # a table's column of JSON
        try:
            body = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise InvalidFieldError("body", f"must be JSON ({error})", _shown(body)) from error
    if not isinstance(body, Mapping):
        raise InvalidFieldError("body", "must be a JSON object", _shown(body))
    return body


def _set(request: generation_pb2.GenerateRequest, name: str, value: Any) -> None:
    if name in IGNORED or (name == "stream" and value is False):
        return
    field = f"body.{name}"
    if name in _WHOLE and isinstance(value, float) and value.is_integer():
        value = int(value)
    try:
        if name == "max_completion_tokens":
            request.stopping.max_tokens = value
        elif name in _FIELDS:
            setattr(getattr(request, _FIELDS[name]), name, value)
        elif name == "model":
            request.model = value
        elif name == "messages":
            _set_messages(request.chat, value)
        elif name == "prompt":
            _set_prompt(request, value)
        elif name == "stop":
            request.stopping.stop.extend([value] if isinstance(value, str) else _list(value))
        elif name == "stop_token_ids":
            request.stopping.stop_token_ids.extend(_list(value))
        elif name == "logit_bias":
            request.sampling.logit_bias.update({int(k): v for k, v in value.items()})
        elif name == "chat_template_kwargs":
            request.chat.template_kwargs_json = json.dumps(dict(value))
        elif name == "add_generation_prompt":
            request.chat.add_generation_prompt = value
        else:
            raise InvalidFieldError(field, "is not a field that a batch takes", _shown(value))
    except (TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise InvalidFieldError(field, f"must fit its type ({error})", _shown(value)) from error


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError("no list")
    return value


def _set_messages(chat: generation_pb2.Chat, messages: Any) -> None:
    if not isinstance(messages, list):
        raise InvalidFieldError("body.messages", "must be a list", _shown(messages))
    for position, message in enumerate(messages):
        field = f"body.messages[{position}]"
        if not isinstance(message, Mapping):
            raise InvalidFieldError(field, "must be a JSON object", _shown(message))
        given = {name for name, value in message.items() if value is not None}
        if extra := given - {"role", "content", "name"}:
            rule = "has a field that a batch does not take"
            raise InvalidFieldError(field, rule, min(extra))
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str):
            raise InvalidFieldError(f"{field}.role", "must be text", _shown(role))
        chat.messages.add(role=role, content=_text(f"{field}.content", content))


def _text(field: str, content: Any) -> str:
    """Return a message's text; it may come in parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidFieldError(field, "must be text or a list of text parts", _shown(content))
    for part in content:
        is_text = isinstance(part, Mapping) and part.get("type") == "text"
        if not is_text or not isinstance(part.get("text"), str):
            raise InvalidFieldError(field, "must have text parts only", _shown(part))
    return "".join(part["text"] for part in content)


def _set_prompt(request: generation_pb2.GenerateRequest, prompt: Any) -> None:
    if isinstance(prompt, str):
        request.text = prompt
    elif isinstance(prompt, list) and prompt and all(type(item) is int for item in prompt):
        request.tokens.ids.extend(prompt)
    else:
        raise InvalidFieldError("body.prompt", "must be text or token ids", _shown(prompt))


def _set_defaults(
    request: generation_pb2.GenerateRequest, custom_id: str, defaults: RowDefaults
) -> None:
    sampling, stopping = request.sampling, request.stopping
    if defaults.max_tokens is not None and not stopping.HasField("max_tokens"):
        stopping.max_tokens = defaults.max_tokens
    if defaults.temperature is not None and not sampling.HasField("temperature"):
        sampling.temperature = defaults.temperature
    if not sampling.HasField("seed"):
        named = f"{defaults.seed}:{custom_id}".encode()
        sampling.seed = int.from_bytes(hashlib.sha256(named).digest()[:8], "big") >> 1


def _shown(value: Any) -> str:
    try:
        return value if isinstance(value, str) else repr(value)[:200]
    except RecursionError:
        return "a value that is nested too deeply"


def _is_unicode(text: str) -> bool:
    """Whether text can be written; JSON may hold half of a surrogate pair."""
    return not any("\ud800" <= char <= "\udfff" for char in text)
