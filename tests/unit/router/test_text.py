"""Text of tokens as they come: never half a character, cut exactly at the first stop string."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from protos.errors import CheckpointError, InvalidFieldError, UnsupportedFeatureError
from router.gateway.text import IncrementalDecoder, TextProcessor, TextStop, TextStream

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for m in messages %}\n"
    "    {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if think is defined and not think %}"
    "<think></think>{% endif %}{% endif %}"
)


def make_tokenizer() -> Tokenizer:
    """Byte-level: 256 byte tokens, one merge (`ab`), three special tokens at 257 to 259."""
    vocab = {char: i for i, char in enumerate(ALPHABET)} | {"ab": 256}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    return tokenizer


TOKENIZER = make_tokenizer()
TEXT = TextProcessor(TOKENIZER, TEMPLATE, {"eos_token": "<|im_end|>"})


def decoded(token_ids: list[int], skipped: frozenset[int] = frozenset()) -> tuple[list[str], str]:
    decoder = IncrementalDecoder(TOKENIZER, skipped)
    return [decoder.push(token_id) for token_id in token_ids], decoder.flush()


@given(st.text(max_size=40))
def test_text_comes_in_whole_characters(text: str) -> None:
    ids = TEXT.encode(text)
    deltas, rest = decoded(ids)
    assert "".join(deltas) + rest == TEXT.decode(ids, skip_special_tokens=False) == text
    if "\ufffd" not in text:
        assert "\ufffd" not in "".join(deltas)


@given(st.lists(st.integers(0, 259), max_size=80), st.booleans())
def test_deltas_of_any_tokens_join_to_the_whole_decode(ids: list[int], skip: bool) -> None:
    skipped = frozenset({257, 258, 259}) if skip else frozenset()
    deltas, rest = decoded(ids, skipped)
    assert "".join(deltas) + rest == TOKENIZER.decode(ids, skip_special_tokens=skip)


@given(st.lists(st.sampled_from([0x80, 0xC3, 0xE2, 0xF0, 0x9F, 0x61]), max_size=120))
def test_broken_utf8_joins_to_the_whole_decode_too(raw: list[int]) -> None:
    byte_char = {b: c for c, b in zip(ALPHABET, _bytes_of(ALPHABET), strict=True)}
    ids = [TOKENIZER.token_to_id(byte_char[b]) for b in raw]
    deltas, rest = decoded(ids)
    assert "".join(deltas) + rest == TOKENIZER.decode(ids)


def _bytes_of(chars: list[str]) -> list[int]:
    """Undo the byte-level alphabet: printable bytes stand for themselves, others from U+0100 on."""
    others = [b for b in range(256) if not (33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255)]
    return [ord(c) if ord(c) < 256 else others[ord(c) - 256] for c in chars]


def test_bytes_that_are_no_text_do_not_pile_up() -> None:
    """Endless continuation bytes are emitted as they come, not at the end."""
    continuation = TOKENIZER.token_to_id("Ģ")  # byte 0x80
    deltas, rest = decoded([continuation] * 2000)
    assert "".join(deltas) + rest == "\ufffd" * 2000
    assert len(rest) <= 16


def test_a_character_in_four_tokens_comes_with_its_last() -> None:
    ids = TEXT.encode("😀")
    assert len(ids) == 4
    assert decoded(ids) == (["", "", "", "😀"], "")
    assert decoded(ids[:3]) == (["", "", ""], "\ufffd")


def test_special_tokens_are_skipped_or_shown() -> None:
    ids = TEXT.encode("a<|im_end|>b")
    shown = TEXT.stream(skip_special_tokens=False)
    assert "".join(map(shown.push, ids)) == "a<|im_end|>b"
    hidden = TEXT.stream()
    assert "".join(map(hidden.push, ids)) == "ab"


def streamed(text: str, **options: object) -> tuple[list[str], TextStream]:
    stream = TEXT.stream(**options)  # type: ignore[arg-type]
    deltas = [stream.push(token_id) for token_id in TEXT.encode(text)]
    return [*deltas, stream.finish()], stream


def test_a_stop_string_across_tokens_is_never_shown() -> None:
    deltas, stream = streamed("one\nUser: two", stop=["\nUser:"])
    assert "".join(deltas) == "one"
    assert stream.matched == "\nUser:"


def test_text_that_was_held_for_nothing_comes_out() -> None:
    deltas, stream = streamed("x\nUs.", stop=["\nUser:"])
    # "\n", "U", "s" could begin the stop string; "." shows that they do not.
    assert deltas == ["x", "", "", "", "\nUs.", ""]
    assert stream.matched is None
    assert streamed("x\nUs", stop=["\nUser:"])[0][-1] == "\nUs"


@pytest.mark.parametrize(
    ("text", "stop", "shown", "included", "matched"),
    [
        ("abcabd", ["abd"], "abc", "abcabd", "abd"),
        ("xabcd", ["abcd", "bc"], "xa", "xabc", "bc"),  # "bc" is complete first
        ("xabc", ["bc", "abc"], "x", "xabc", "abc"),  # both end here: the longer one
        ("aaab", ["aab"], "a", "aaab", "aab"),
        ("ab", ["ab"], "", "ab", "ab"),  # one token
        ("xay", ["a", "y"], "x", "xa", "a"),
    ],
)
def test_which_stop_string_wins(
    text: str, stop: list[str], shown: str, included: str, matched: str
) -> None:
    deltas, stream = streamed(text, stop=stop)
    assert ("".join(deltas), stream.matched) == (shown, matched)
    deltas, stream = streamed(text, stop=stop, include_stop=True)
    assert ("".join(deltas), stream.matched) == (included, matched)


@given(
    st.text(alphabet="abü\n", max_size=30),
    st.lists(st.text(alphabet="abü\n", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_stop_strings_equal_a_search_character_by_character(text: str, stop: list[str]) -> None:
    expected, matched = text, None
    for end in range(1, len(text) + 1):
        ending = [s for s in stop if text[:end].endswith(s)]
        if ending:
            matched = max(ending, key=len)
            expected = text[: end - len(matched)]
            break
    deltas, stream = streamed(text, stop=stop)
    assert ("".join(deltas), stream.matched) == (expected, matched)


def test_no_stop_string_before_min_tokens() -> None:
    deltas, stream = streamed("x.y.z", stop=["."], min_tokens=3)
    assert ("".join(deltas), stream.matched) == ("x.y", ".")


def test_the_engines_stop_checker_says_when() -> None:
    checker = TextStop(TEXT.stream(stop=["b."]))
    assert [checker(token_id) for token_id in TEXT.encode("xb.y")] == [False, False, True, True]


def test_a_chat_is_rendered() -> None:
    chat = [{"role": "user", "content": "hi"}]
    assert TEXT.render_chat(chat) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    off = TEXT.render_chat(chat, variables={"think": False})
    assert off.endswith("assistant\n<think></think>")


def test_a_chat_goes_on_with_its_last_message() -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well, "}]
    rendered = TEXT.render_chat(chat, add_generation_prompt=False)
    assert rendered.endswith("<|im_start|>assistant\nWell, ")
    strips = TextProcessor(
        TOKENIZER, "{% for m in messages %}[{{ m.content.strip() }}]{% endfor %}"
    )
    assert strips.render_chat(chat, add_generation_prompt=False) == "[hi][Well,"
    drops = TextProcessor(TOKENIZER, "[{{ messages[0].role }}]")
    with pytest.raises(InvalidFieldError, match="changes the last message"):
        drops.render_chat(chat, add_generation_prompt=False)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ eos_token }}{{ tools is none }}", "<|im_end|>True"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ('{{ {"a": "<ü>"} | tojson }}', '{"a": "<ü>"}'),
        ('{{ {"b": 1, "a": 2} | tojson(indent=2, sort_keys=true) }}', '{\n  "a": 2,\n  "b": 1\n}'),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{% generation %}x{% endgeneration %}", "x"),
        ("  {% if true %}\nx\n  {% endif %}\n", "x\n"),
        ("{% set ns = namespace(n=1) %}{% set ns.n = 2 %}{{ ns.n }}", "2"),
    ],
)
def test_the_template_environment(template: str, expected: str) -> None:
    text = TextProcessor(TOKENIZER, template, {"eos_token": "<|im_end|>"})
    assert text.render_chat([{"role": "user", "content": ""}]) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no system message') }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[5].content }}",
        "{{ 1 + 'a' }}",
    ],
)
def test_what_a_template_refuses_names_the_field(template: str) -> None:
    text = TextProcessor(TOKENIZER, template)
    with pytest.raises(InvalidFieldError, match=r"chat\.messages must satisfy the chat template"):
        text.render_chat([{"role": "user", "content": ""}])


def write_checkpoint(path: Path, **files: object) -> Path:
    TOKENIZER.save(str(path / "tokenizer.json"))
    for name, content in files.items():
        file = path / name.replace("__", ".")
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config__json": {"chat_template": "{{ eos_token }}", "eos_token": "E"}},
        {
            "tokenizer_config__json": {
                "chat_template": [
                    {"name": "tool_use", "template": "no"},
                    {"name": "default", "template": "{{ eos_token }}"},
                ],
                "eos_token": {"content": "E", "special": True},
            }
        },
        {
            "chat_template__jinja": "{{ eos_token }}",
            "tokenizer_config__json": {"chat_template": "older", "eos_token": "E"},
        },
    ],
)
def test_where_a_template_stands(tmp_path: Path, files: dict[str, object]) -> None:
    text = TextProcessor.from_checkpoint(write_checkpoint(tmp_path, **files))
    assert text.render_chat([{"role": "user", "content": ""}]) == "E"


def test_a_checkpoint_without_text(tmp_path: Path) -> None:
    text = TextProcessor.from_checkpoint(tmp_path)
    assert not text.has_tokenizer
    with pytest.raises(UnsupportedFeatureError, match=r"no tokenizer\.json, send tokens"):
        text.encode("a")
    with pytest.raises(UnsupportedFeatureError, match="no chat template"):
        text.render_chat([{"role": "user", "content": ""}])


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer_config.json", "["),
        ("tokenizer_config.json", "[]"),
        ("chat_template.jinja", "{% if %}"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, file: str, content: str) -> None:
    (tmp_path / file).write_text(content)
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        TextProcessor.from_checkpoint(tmp_path)


def test_chats_render_as_transformers_renders_them(tmp_path: Path) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    chats = [
        [{"role": "user", "content": " <b>hi</b>\n"}],
        [{"role": "system", "content": "s"}, {"role": "assistant", "content": "ends \n "}],
    ]
    for chat in chats:
        for add in (True, False):
            [expected], _ = render_jinja_template(
                [chat],
                chat_template=TEMPLATE,
                add_generation_prompt=add,
                continue_final_message=not add,
                think=False,
            )
            ours = TEXT.render_chat(chat, add_generation_prompt=add, variables={"think": False})
            assert ours == expected
