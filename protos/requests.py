"""From Python values to request messages: what `generate` and the session calls take."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

from protos.v1 import generation_pb2, session_pb2

PAGE_SIZE = 100
"""Sessions or batches asked for at a time."""

ChatMessages = Sequence[Mapping[str, str]]
Prompt = str | Sequence[int] | ChatMessages
"""Text, token ids, or chat messages with `role` and `content`."""


class GenerateOptions(TypedDict, total=False):
    """Fields of `GenerateRequest`, flat; `generation.proto` says what each means."""

    model: str
    request_id: str
    session: str
    """Id of the session that the prompt continues."""
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    seed: int
    n: int
    logit_bias: Mapping[int, float]
    max_tokens: int
    min_tokens: int
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    include_stop: bool
    ignore_eos: bool
    top_logprobs: int
    prompt_logprobs: int
    return_token_ids: bool
    skip_special_tokens: bool
    add_generation_prompt: bool
    template_kwargs: Mapping[str, Any]
    priority: Literal["interactive", "batch"]
    timeout_s: float
    """Deadline of this call instead of the client's."""


def build_request(
    prompt: Prompt, options: GenerateOptions
) -> tuple[generation_pb2.GenerateRequest, float | None]:
    """Return the message of a generation, and its deadline where one was given.

    Raises:
        TypeError: An option that there is not.
        ValueError: A value that its field cannot hold.
    """
    left: dict[str, Any] = dict(options)
    timeout_s = left.pop("timeout_s", None)
    request = generation_pb2.GenerateRequest(
        model=left.pop("model", ""),
        request_id=left.pop("request_id", ""),
        session_id=left.pop("session", ""),
    )
    if priority := left.pop("priority", None):
        value: Any = generation_pb2.Priority.Value(f"PRIORITY_{priority.upper()}")
        request.priority = value
    chat_options = {
        name: left.pop(name)
        for name in ("add_generation_prompt", "template_kwargs")
        if name in left
    }
    if isinstance(prompt, str):
        request.text = prompt
    elif prompt and isinstance(prompt[0], Mapping):
        _fill_chat(request.chat, prompt, **chat_options)  # type: ignore[arg-type]
    else:
        request.tokens.ids.extend(prompt)  # type: ignore[arg-type]
        request.tokens.SetInParent()
    parts: tuple[Any, ...] = (request.sampling, request.stopping, request.output)
    for part in parts:
        names = left.keys() & part.DESCRIPTOR.fields_by_name.keys()
        if names:
            part.MergeFrom(type(part)(**{name: left.pop(name) for name in names}))
    if left:
        raise TypeError(f"generate() has no option {min(left)!r}")
    return request, timeout_s


def build_tokenize(
    prompt: str | ChatMessages, add_special_tokens: bool
) -> generation_pb2.TokenizeRequest:
    """Return the message of `tokenize`."""
    request = generation_pb2.TokenizeRequest(add_special_tokens=add_special_tokens)
    if isinstance(prompt, str):
        request.text = prompt
    else:
        _fill_chat(request.chat, prompt)
    return request


def _fill_chat(
    chat: generation_pb2.Chat,
    messages: ChatMessages,
    add_generation_prompt: bool | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> None:
    for message in messages:
        chat.messages.add(role=message["role"], content=message["content"])
    if add_generation_prompt is not None:
        chat.add_generation_prompt = add_generation_prompt
    if template_kwargs:
        chat.template_kwargs_json = json.dumps(dict(template_kwargs))


def build_create(
    session_id: str,
    ttl_s: float | None,
    quota_tokens: int | None,
    metadata: Mapping[str, str] | None,
) -> session_pb2.CreateSessionRequest:
    """Return the message of `create_session`."""
    request = session_pb2.CreateSessionRequest(
        session_id=session_id, quota_tokens=quota_tokens, metadata=metadata
    )
    if ttl_s is not None:
        request.ttl.FromNanoseconds(round(ttl_s * 1e9))
    return request


def build_fork(
    session_id: str,
    new_session_id: str,
    at_tokens: int | None,
    ttl_s: float | None,
    quota_tokens: int | None,
    metadata: Mapping[str, str] | None,
) -> session_pb2.ForkSessionRequest:
    """Return the message of `fork_session`."""
    request = session_pb2.ForkSessionRequest(
        session_id=session_id,
        new_session_id=new_session_id,
        at_tokens=at_tokens,
        quota_tokens=quota_tokens,
        metadata=metadata,
    )
    if ttl_s is not None:
        request.ttl.FromNanoseconds(round(ttl_s * 1e9))
    return request
