"""What a request's fields may be: every check that needs neither tokenizer nor engine.

All violations of a request are collected and raised as one `InvalidFieldError`, with dotted paths
as they stand in the `.proto` files. The same bounds serve the gRPC services and, later, HTTP.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from protos.errors import (
    InvalidFieldError,
    UnknownModelError,
    Violation,
)
from protos.ids import id_rule, is_valid_id, is_valid_session_id, session_id_rule
from protos.v1 import generation_pb2

MAX_N = 128
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKEN_IDS = 1024
MAX_LOGIT_BIAS = 1024
MAX_LOGIT_BIAS_VALUE = 100.0
MAX_TOP_LOGPROBS = 20
MAX_CANCEL_IDS = 1024
ROLES = ("system", "user", "assistant", "tool")
TEMPLATE_VARIABLES = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
"""Variables of a chat template that `template_kwargs_json` may not replace."""

_SAMPLING_RULES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "temperature": ("must be 0 or more", lambda value: value >= 0),
    "top_p": ("must be in (0, 1]", lambda value: 0 < value <= 1),
    "top_k": ("must be 0 or more", lambda value: value >= 0),
    "min_p": ("must be in [0, 1]", lambda value: 0 <= value <= 1),
    "presence_penalty": ("must be in [-2, 2]", lambda value: -2 <= value <= 2),
    "frequency_penalty": ("must be in [-2, 2]", lambda value: -2 <= value <= 2),
    "repetition_penalty": ("must be more than 0", lambda value: value > 0),
    "n": (f"must be in [1, {MAX_N}]", lambda value: 1 <= value <= MAX_N),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLimits:
    """What the served model and the service allow."""

    model: str
    """Name of the served model; a request's empty name means it."""
    vocab_size: int
    """Token ids are below it."""
    max_model_len: int
    """Most tokens of prompt and output together."""


def validate_generate(request: generation_pb2.GenerateRequest, limits: RequestLimits) -> None:
    """Check a `GenerateRequest`.

    Raises:
        UnknownModelError: It names another model.
        InvalidFieldError: With every violation.
    """
    check_model(request.model, limits.model)
    found: list[Violation] = []
    if request.request_id and not is_valid_id(request.request_id):
        found.append(Violation("request_id", id_rule(), request.request_id))
    if request.session_id and not is_valid_session_id(request.session_id):
        found.append(Violation("session_id", session_id_rule(), request.session_id))
    if request.priority not in generation_pb2.Priority.values():
        rule = f"must be one of {', '.join(generation_pb2.Priority.keys())}"
        found.append(Violation("priority", rule, request.priority))
    is_resumed = request.HasField("resume_from")
    if request.session_id or is_resumed or request.HasField("resume_tokens"):
        found += _resumable_violations(request, limits)
    if not (request.session_id and is_resumed and request.WhichOneof("input") is None):
        found += _input_violations(request, limits)
    found += sampling_violations(request.sampling, limits)
    found += stopping_violations(request.stopping, limits)
    found += output_violations(request.output)
    raise_violations(found)


def validate_tokenize(request: generation_pb2.TokenizeRequest, limits: RequestLimits) -> None:
    """Check a `TokenizeRequest`; see `validate_generate`."""
    check_model(request.model, limits.model)
    kind = request.WhichOneof("input")
    if kind is None:
        raise InvalidFieldError("input", "must be one of text, chat", "")
    if kind == "chat":
        raise_violations(chat_violations(request.chat))


def validate_detokenize(request: generation_pb2.DetokenizeRequest, limits: RequestLimits) -> None:
    """Check a `DetokenizeRequest`; see `validate_generate`."""
    check_model(request.model, limits.model)
    raise_violations(token_id_violations("token_ids", request.token_ids, limits.vocab_size))


def validate_cancel(request: generation_pb2.CancelRequestsRequest) -> None:
    """Check a `CancelRequestsRequest`."""
    if len(request.request_ids) > MAX_CANCEL_IDS:
        raise InvalidFieldError(
            "request_ids", f"must be at most {MAX_CANCEL_IDS}", len(request.request_ids)
        )


def check_model(name: str, served: str) -> None:
    """Raise `UnknownModelError` unless `name` is empty or the served model's."""
    if name and name != served:
        raise UnknownModelError(name, served)


def raise_violations(found: Sequence[Violation]) -> None:
    """Raise one `InvalidFieldError` when anything was found."""
    if found:
        raise InvalidFieldError(violations=found)


def _resumable_violations(
    request: generation_pb2.GenerateRequest, limits: RequestLimits
) -> list[Violation]:
    """Return what is wrong with a session's turn, or with a stream that is resumed."""
    found: list[Violation] = []
    if request.sampling.n > 1:
        rule = "must be 1 with session_id or resume_from"
        found.append(Violation("sampling.n", rule, request.sampling.n))
    held = request.resume_tokens.ids
    if not request.HasField("resume_from"):
        if held:
            found.append(Violation("resume_from", "must be set with resume_tokens", ""))
        return found
    if not request.request_id:
        found.append(Violation("request_id", "must be set with resume_from", ""))
    if request.session_id and held and len(held) != request.resume_from - 1:
        rule = "must be resume_from - 1 in a session"
        found.append(Violation("resume_tokens.ids", rule, len(held)))
    # A turn of a session may have said all its tokens and not yet its end.
    most = request.stopping.max_tokens - (not request.session_id)
    if request.stopping.max_tokens and len(held) > most:
        bound = "at most" if request.session_id else "fewer than"
        rule = f"must be {bound} stopping.max_tokens ({request.stopping.max_tokens})"
        found.append(Violation("resume_tokens.ids", rule, len(held)))
    return found + token_id_violations("resume_tokens.ids", held, limits.vocab_size)


def _input_violations(
    request: generation_pb2.GenerateRequest, limits: RequestLimits
) -> list[Violation]:
    kind = request.WhichOneof("input")
    if kind is None:
        return [Violation("input", "must be one of text, tokens, chat", "")]
    if kind == "text":
        return [] if request.text else [Violation("text", "must not be empty", "")]
    if kind == "chat":
        return chat_violations(request.chat)
    if not request.tokens.ids:
        return [Violation("tokens.ids", "must not be empty", 0)]
    return token_id_violations("tokens.ids", request.tokens.ids, limits.vocab_size)


def token_id_violations(field: str, ids: Sequence[int], vocab_size: int) -> list[Violation]:
    """Return the first id that is not in the vocabulary."""
    if not ids or max(ids) < vocab_size:
        return []
    position, value = next((i, v) for i, v in enumerate(ids) if v >= vocab_size)
    return [Violation(f"{field}[{position}]", f"must be in [0, {vocab_size})", value)]


def chat_violations(chat: generation_pb2.Chat) -> list[Violation]:
    """Return what is wrong with a chat before its template sees it."""
    found: list[Violation] = []
    if not chat.messages:
        found.append(Violation("chat.messages", "must not be empty", 0))
    for position, message in enumerate(chat.messages):
        if message.role not in ROLES:
            rule = f"must be one of {', '.join(ROLES)}"
            found.append(Violation(f"chat.messages[{position}].role", rule, message.role))
    if chat.template_kwargs_json:
        field = "chat.template_kwargs_json"
        try:
            variables: Any = json.loads(chat.template_kwargs_json)
        except ValueError as error:
            return [*found, Violation(field, f"must be JSON ({error})", chat.template_kwargs_json)]
        if not isinstance(variables, dict):
            found.append(Violation(field, "must be a JSON object", chat.template_kwargs_json))
        elif taken := TEMPLATE_VARIABLES & variables.keys():
            found.append(Violation(field, "must not replace the chat's own", min(taken)))
    return found


def sampling_violations(
    sampling: generation_pb2.Sampling, limits: RequestLimits
) -> list[Violation]:
    """Return the fields of `sampling` that are out of range or not finite."""
    found: list[Violation] = []
    for descriptor, value in sampling.ListFields():
        rule = _SAMPLING_RULES.get(descriptor.name)
        if rule is not None and not (math.isfinite(value) and rule[1](value)):
            found.append(Violation(f"sampling.{descriptor.name}", rule[0], _shown(value)))
    bias = sampling.logit_bias
    if len(bias) > MAX_LOGIT_BIAS:
        rule_text = f"must have at most {MAX_LOGIT_BIAS} entries"
        found.append(Violation("sampling.logit_bias", rule_text, len(bias)))
    else:
        for token_id in sorted(bias):
            field = f"sampling.logit_bias[{token_id}]"
            if token_id >= limits.vocab_size:
                rule_text = f"must have token ids in [0, {limits.vocab_size})"
                found.append(Violation(field, rule_text, token_id))
            if not abs(bias[token_id]) <= MAX_LOGIT_BIAS_VALUE:
                rule_text = f"must be in [-{MAX_LOGIT_BIAS_VALUE:g}, {MAX_LOGIT_BIAS_VALUE:g}]"
                found.append(Violation(field, rule_text, _shown(bias[token_id])))
    return found


def stopping_violations(
    stopping: generation_pb2.Stopping, limits: RequestLimits
) -> list[Violation]:
    """Return the fields of `stopping` that are out of range."""
    found: list[Violation] = []
    if stopping.HasField("max_tokens") and stopping.max_tokens < 1:
        found.append(Violation("stopping.max_tokens", "must be at least 1", stopping.max_tokens))
    most = stopping.max_tokens if stopping.HasField("max_tokens") else limits.max_model_len
    if stopping.min_tokens > most:
        found.append(
            Violation("stopping.min_tokens", f"must be at most {most}", stopping.min_tokens)
        )
    if len(stopping.stop) > MAX_STOP_STRINGS:
        rule = f"must have at most {MAX_STOP_STRINGS} strings"
        found.append(Violation("stopping.stop", rule, len(stopping.stop)))
    for position, text in enumerate(stopping.stop[:MAX_STOP_STRINGS]):
        if not 1 <= len(text) <= MAX_STOP_CHARS:
            rule = f"must have 1 to {MAX_STOP_CHARS} characters"
            found.append(Violation(f"stopping.stop[{position}]", rule, len(text)))
    if len(stopping.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        rule = f"must have at most {MAX_STOP_TOKEN_IDS} ids"
        found.append(Violation("stopping.stop_token_ids", rule, len(stopping.stop_token_ids)))
    return found + token_id_violations(
        "stopping.stop_token_ids", stopping.stop_token_ids, limits.vocab_size
    )


def output_violations(output: generation_pb2.OutputOptions) -> list[Violation]:
    """Return the fields of `output` that are out of range."""
    rule = f"must be at most {MAX_TOP_LOGPROBS}"
    return [
        Violation(f"output.{name}", rule, getattr(output, name))
        for name in ("top_logprobs", "prompt_logprobs")
        if getattr(output, name) > MAX_TOP_LOGPROBS
    ]


def _shown(value: float) -> float:
    """Show a 32-bit float as its client wrote it: 0.1, not 0.10000000149011612."""
    return float(f"{value:.7g}") if isinstance(value, float) else value
