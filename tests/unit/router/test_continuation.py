"""What a turn adds behind tokens that are never rendered again, under several chat templates."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from protos.client import build_request
from protos.errors import InvalidFieldError
from protos.v1 import generation_pb2
from router.gateway.continuation import MIN_JUNCTION_TOKENS, SystemPrefixes, continue_session
from router.gateway.text import TextProcessor
from tests.unit.router.test_text import TEMPLATE, TOKENIZER

DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe good.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRIPS_THINKING = (
    "{% for m in messages %}{% set text = m.content %}"
    "{% if m.role == 'assistant' and '</think>' in text %}"
    "{% set text = text.split('</think>')[-1] %}{% endif %}"
    "<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ text }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
NEXT = "\n<|im_start|>user\nmore?<|im_end|>\n<|im_start|>assistant\n"


def text_of(template: str) -> TextProcessor:
    return TextProcessor(TOKENIZER, template)


def ids(text: str) -> NDArray[np.uint32]:
    return np.array(TOKENIZER.encode(text, add_special_tokens=False).ids, dtype=np.uint32)


def added(template: str, history: str, prompt: Any, **options: Any) -> str:
    request, _ = build_request(prompt, options)  # type: ignore[arg-type]
    found = continue_session(text_of(template), request, ids(history))
    return TOKENIZER.decode(found, skip_special_tokens=False)  # type: ignore[no-any-return]


ASK = [{"role": "user", "content": "more?"}]


@pytest.mark.parametrize(
    ("template", "generation"),
    [(TEMPLATE, ""), (DEFAULT_SYSTEM, ""), (STRIPS_THINKING, "<think>")],
)
def test_an_answer_that_ended_itself_gets_only_the_line_break(
    template: str, generation: str
) -> None:
    history = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>x</think>ok<|im_end|>"
    assert added(template, history, ASK) == NEXT + generation


def test_an_answer_that_was_cut_is_closed_first() -> None:
    assert added(TEMPLATE, "<|im_start|>assistant\nok", ASK) == "<|im_end|>" + NEXT


def test_a_history_that_holds_the_line_break_too_gets_neither() -> None:
    assert added(TEMPLATE, "ok<|im_end|>\n", ASK) == NEXT[1:]


def test_a_stop_string_that_is_the_next_turns_head_is_not_said_twice() -> None:
    assert added(PLAIN, "user: hi\nassistant: ok", ASK) == "\nuser: more?\nassistant:"
    assert added(PLAIN, "user: hi\nassistant: ok\nuser:", ASK) == " more?\nassistant:"


def test_what_the_user_says_is_never_taken_for_a_part_of_the_answer() -> None:
    """The answer ended with the very text of the new message."""
    assert added(PLAIN, "assistant: more?", ASK) == "\nuser: more?\nassistant:"
    assert added(PLAIN, "ok\nuser: more", ASK) == "\nuser: more?\nassistant:"


def test_several_messages_and_an_answer_to_go_on_with() -> None:
    prompt = [
        {"role": "tool", "content": "42"},
        {"role": "user", "content": "so?"},
        {"role": "assistant", "content": "It is"},
    ]
    assert added(TEMPLATE, "ok<|im_end|>", prompt, add_generation_prompt=False) == (
        "\n<|im_start|>tool\n42<|im_end|>\n<|im_start|>user\nso?<|im_end|>\n"
        "<|im_start|>assistant\nIt is"
    )


def test_template_variables_count() -> None:
    text = added(TEMPLATE, "ok<|im_end|>", ASK, template_kwargs={"think": False})
    assert text == NEXT + "<think></think>"


def test_text_and_tokens_are_taken_as_they_are() -> None:
    assert added(TEMPLATE, "ok", " more") == " more"
    request, _ = build_request([7, 8], {})
    assert continue_session(text_of(TEMPLATE), request, ids("ok")) == [7, 8]
    empty = generation_pb2.GenerateRequest(tokens=generation_pb2.TokenIds())
    with pytest.raises(InvalidFieldError, match="must add at least one token"):
        continue_session(text_of(TEMPLATE), empty, ids("ok"))


def test_a_template_that_hides_earlier_turns_is_refused() -> None:
    last_only = "{{ messages[-1].content }}"
    with pytest.raises(InvalidFieldError, match="which the chat template does not show"):
        added(last_only, "ok", ASK)


# Junctions


def chat_of(system: str, user: str) -> generation_pb2.GenerateRequest:
    messages = [{"role": "system", "content": system}] if system else []
    request, _ = build_request([*messages, {"role": "user", "content": user}], {})
    return request


def prompt_of(text: TextProcessor, request: generation_pb2.GenerateRequest) -> list[int]:
    messages = [{"role": m.role, "content": m.content} for m in request.chat.messages]
    return text.encode(text.render_chat(messages), add_special_tokens=False)


def test_the_end_of_the_system_messages_is_a_junction() -> None:
    text = text_of(TEMPLATE)
    prefixes = SystemPrefixes(text)
    found = set()
    for user in ("hi", "0", "ab", "b"):
        request = chat_of("x" * 200, user)
        prompt = prompt_of(text, request)
        (junction,) = prefixes.junctions(request, prompt)
        found.add(tuple(prompt[:junction]))
    (common,) = found
    assert TOKENIZER.decode(list(common), skip_special_tokens=False) == (
        f"<|im_start|>system\n{'x' * 200}<|im_end|>\n<|im_start|>user\n"
    )


def test_a_junction_is_only_where_the_tokens_say_so() -> None:
    """`a` at the system prompt's end and `b` at the user's beginning are one token together."""
    text = text_of("{% for m in messages %}{{ m.content }}{% endfor %}")
    prefixes = SystemPrefixes(text)
    system = "x" * 199 + "a"
    for user, shared in (("c", 200), ("b", 199)):
        request = chat_of(system, user)
        assert prefixes.junctions(request, prompt_of(text, request)) == (shared,)


def test_short_prompts_and_other_inputs_have_no_junction() -> None:
    text = text_of(TEMPLATE)
    prefixes = SystemPrefixes(text)
    request = chat_of("short", "y" * 300)
    assert prefixes.junctions(request, prompt_of(text, request)) == ()
    tokens, _ = build_request([1] * 2 * MIN_JUNCTION_TOKENS, {})
    assert prefixes.junctions(tokens, list(tokens.tokens.ids)) == ()


def test_a_default_system_prompt_is_one_too() -> None:
    template = DEFAULT_SYSTEM.replace("Be good.", "z" * 150)
    text = text_of(template)
    request = chat_of("", "hi")
    (junction,) = SystemPrefixes(text).junctions(request, prompt_of(text, request))
    assert junction > 150
