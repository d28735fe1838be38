"""What a session's turn adds to the tokens that are there, and where prompts are alike.

The tokens of earlier turns are what they are: nothing of them is rendered or tokenised again, even
where a chat template would write them differently now (drop thinking, trim spaces). A chat's new
messages are rendered behind a stand-in for all that came before; what follows it is the
continuation. It begins by closing the earlier answer, and the history may hold a part of that: the
end-of-turn token that the engine drew, but not the line break that templates put behind it. What
both have is left out.

Junction: a position up to which many prompts are equal, here the end of the system messages.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from protos.errors import ExpertMeshError, InvalidFieldError
from protos.v1 import generation_pb2
from router.gateway.request_reader import chat_messages, opens_answer
from router.gateway.text import TextProcessor

MIN_JUNCTION_TOKENS = 128
"""Shorter common prompts are not worth a snapshot."""
MAX_PREFIXES = 256
"""System prompts whose tokens are remembered."""
MAX_OVERLAP_TOKENS = 64

_STAND_IN = "earlier-turns-e9a1c6d0"


def continue_session(
    text: TextProcessor, request: generation_pb2.GenerateRequest, history: NDArray[np.uint32]
) -> list[int]:
    """Return the token ids that a request's input adds to a session.

    Args:
        text: The checkpoint's.
        request: Checked; with an input.
        history: The session's tokens, at least one. Only the last ones are looked at.

    Raises:
        InvalidFieldError: The input adds nothing, or the template cannot go on with it.
    """
    kind = request.WhichOneof("input")
    if kind == "tokens":
        ids = list(request.tokens.ids)
    elif kind == "text":
        ids = text.encode(request.text, add_special_tokens=False)
    else:
        ids = _continue_chat(text, request.chat, history)
    if not ids:
        raise InvalidFieldError(str(kind), "must add at least one token to the session", 0)
    return ids


def _continue_chat(
    text: TextProcessor, chat: generation_pb2.Chat, history: NDArray[np.uint32]
) -> list[int]:
    messages = chat_messages(chat)
    for number, message in enumerate(messages):
        if message["role"] == "system":
            rule = "must not be system after a session's first turn"
            raise InvalidFieldError(f"chat.messages[{number}].role", rule, "system")
    rendered = text.render_chat(
        [
            {"role": "user", "content": "-"},
            {"role": "assistant", "content": _STAND_IN},
            *messages,
        ],
        add_generation_prompt=opens_answer(chat),
        variables=json.loads(chat.template_kwargs_json or "{}"),
    )
    _, found, added = rendered.partition(_STAND_IN)
    if not found:
        rule = "must follow earlier turns, which the chat template does not show"
        raise InvalidFieldError("chat.messages", rule, len(messages))
    ids = text.encode(added, add_special_tokens=False)
    # Only the frame around the messages can be there already, never a message.
    first = messages[0]["content"].strip()
    frame = added[: added.index(first)] if first and first in added else ""
    most = min(len(text.encode(frame, add_special_tokens=False)), MAX_OVERLAP_TOKENS)
    return ids[_overlap(history, ids, most) :]


def _overlap(history: NDArray[np.uint32], ids: Sequence[int], most: int) -> int:
    """Return the length of the longest end of `history` with which `ids` begins."""
    tail: list[int] = history[max(0, len(history) - most) :].tolist()
    for length in range(min(most, len(tail), len(ids)), 0, -1):
        if tail[len(tail) - length :] == list(ids[:length]):
            return length
    return 0


class SystemPrefixes:
    """Remembers what the system messages of chats are in tokens. Any thread may call.

    Args:
        text: The checkpoint's.
    """

    def __init__(self, text: TextProcessor) -> None:
        self._text = text
        self._prefixes: OrderedDict[tuple[str, ...], NDArray[np.uint32]] = OrderedDict()
        self._lock = threading.Lock()

    def junctions(
        self, request: generation_pb2.GenerateRequest, prompt_ids: Sequence[int], tenant: str = ""
    ) -> tuple[int, ...]:
        """Return the positions in a whole prompt up to which others will be equal: none or one.

        What is remembered is a tenant's own: nobody can tell by the time what others have sent.
        """
        if request.WhichOneof("input") != "chat" or len(prompt_ids) < MIN_JUNCTION_TOKENS:
            return ()
        prefix = self._prefix_of(request.chat, tenant)
        shared = _common_length(prefix, prompt_ids)
        return (shared,) if shared >= MIN_JUNCTION_TOKENS else ()

    def _prefix_of(self, chat: generation_pb2.Chat, tenant: str) -> NDArray[np.uint32]:
        messages = chat_messages(chat)
        leading = 0
        while leading < len(messages) and messages[leading]["role"] == "system":
            leading += 1
        key = (tenant, chat.template_kwargs_json, *(m["content"] for m in messages[:leading]))
        with self._lock:
            prefix = self._prefixes.get(key)
        if prefix is None:
            prefix = self._compute(messages[:leading], chat.template_kwargs_json)
        with self._lock:
            self._prefixes[key] = prefix
            self._prefixes.move_to_end(key)
            if len(self._prefixes) > MAX_PREFIXES:
                self._prefixes.popitem(last=False)
        return prefix

    def _compute(
        self, system: list[dict[str, str]], template_kwargs_json: str
    ) -> NDArray[np.uint32]:
        """Return what two chats that differ in their first user message begin with."""
        variables = json.loads(template_kwargs_json or "{}")
        try:
            rendered = [
                self._text.render_chat(
                    [*system, {"role": "user", "content": content}], variables=variables
                )
                for content in ("0", "1")
            ]
        except ExpertMeshError:  # a template that takes no such chat: no hint
            return np.empty(0, dtype=np.uint32)
        first, second = rendered
        shared = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), 0)
        ids = self._text.encode(first[:shared], add_special_tokens=False)
        return np.array(ids, dtype=np.uint32)


def _common_length(first: NDArray[np.uint32], second: Sequence[int]) -> int:
    """Return how many leading ids two sequences share."""
    length = min(len(first), len(second))
    differs = first[:length] != np.array(second[:length])
    return int(differs.argmax()) if differs.any() else length
