"""Text and token ids, both ways: chat template, tokeniser, incremental text, stop strings.

Decides how a checkpoint's tokeniser files are read and what text a stream of tokens is. Knows
neither gRPC nor the engine. A checkpoint without tokeniser files serves token ids; whatever needs
text then raises `UnsupportedFeatureError`.

Words: *delta*, text that is final and goes out; *held* text might still become a stop string;
*pending* tokens end inside a character.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from protos.errors import CheckpointError, InvalidFieldError, UnsupportedFeatureError

MAX_PENDING_TOKENS = 16
"""A character has at most four tokens; more pending ones are bytes that are no text."""
_CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
_SPECIAL_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


class TextProcessor:
    """The served checkpoint's tokeniser and chat template.

    Args:
        tokenizer: None where the checkpoint has none.
        chat_template: Jinja source; None where the checkpoint has none.
        special_tokens: `bos_token`, `eos_token`, ... for the template.
        digest: Names what turns a chat into token ids; empty: unknown.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
        digest: str = "",
    ) -> None:
        self.digest = digest
        self._tokenizer = tokenizer
        self._template = None if chat_template is None else compile_template(chat_template)
        self._special_tokens = dict(special_tokens or {})
        self._special_ids: frozenset[int] = frozenset()
        if tokenizer is not None:
            added = tokenizer.get_added_tokens_decoder()
            self._special_ids = frozenset(i for i, token in added.items() if token.special)

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> TextProcessor:
        """Read `tokenizer.json`, `tokenizer_config.json` and the chat template, where they are.

        Raises:
            CheckpointError: A file is there and cannot be read.
        """
        folder = Path(path)
        file = folder / "tokenizer.json"
        tokenizer = None
        if file.exists():
            try:
                tokenizer = Tokenizer.from_file(str(file))
            except Exception as error:  # the binding raises nothing narrower
                raise CheckpointError(str(file), f"no tokeniser: {error}") from error
        config = _read_json(folder / "tokenizer_config.json")
        template = config.get("chat_template")
        if isinstance(template, list):  # the older form: several, by name
            template = {t["name"]: t["template"] for t in template}.get("default")
        template_file = folder / "chat_template.jinja"
        if template_file.exists():
            template = template_file.read_text(encoding="utf-8")
        special = _special_tokens(config)
        digest = hashlib.sha256(file.read_bytes() if tokenizer is not None else b"")
        digest.update(json.dumps([template, special], sort_keys=True).encode())
        try:
            return cls(tokenizer, template, special, digest.hexdigest())
        except jinja2.TemplateError as error:
            raise CheckpointError(str(folder), f"no chat template: {error}") from error

    @property
    def has_tokenizer(self) -> bool:
        """Whether text can be served at all."""
        return self._tokenizer is not None

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokeniser.

        Raises:
            UnsupportedFeatureError: The checkpoint has none.
        """
        if self._tokenizer is None:
            raise UnsupportedFeatureError("text: the checkpoint has no tokenizer.json, send tokens")
        return self._tokenizer

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of a text."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of some ids; ids that the tokeniser lacks have none."""
        text: str = self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def render_chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the prompt of a chat.

        Args:
            messages: role and content of each.
            add_generation_prompt: Open the assistant's turn; otherwise the last message goes on.
            variables: Further variables of the template.

        Raises:
            UnsupportedFeatureError: The checkpoint has no chat template.
            InvalidFieldError: The template refused the chat.
        """
        if self._template is None:
            raise UnsupportedFeatureError("chat: the checkpoint has no chat template, send text")
        turns: list[dict[str, Any]] = [dict(message) for message in messages]
        if not add_generation_prompt:
            turns[-1]["content"] += _CONTINUE_TAG
        try:
            rendered = self._template.render(
                {**self._special_tokens, **(variables or {})},
                messages=turns,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
            raise InvalidFieldError(
                "chat.messages", f"must satisfy the chat template ({error})", len(messages)
            ) from error
        if add_generation_prompt:
            return rendered
        return _cut_at_tag(rendered, messages[-1]["content"])

    def stream(
        self,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
    ) -> TextStream:
        """Return the text of one sequence to come; see `TextStream`."""
        skipped = self._special_ids if skip_special_tokens else frozenset()
        return TextStream(
            IncrementalDecoder(self.tokenizer, skipped),
            stop=tuple(stop),
            include_stop=include_stop,
            min_tokens=min_tokens,
        )


class IncrementalDecoder:
    """Turns tokens into text as they come, never half a character.

    The deltas and `flush`, joined, are the decode of all tokens at once.
    """

    __slots__ = ("_context", "_pending", "_skipped", "_stream", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, skipped_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped_ids
        # Skipping is done here: `DecodeStream` keeps skipped tokens and takes longer with each.
        self._stream = DecodeStream(skip_special_tokens=False)
        self._context: list[int] = []  # tokens of the last delta
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """Take a token and return the text that it completes."""
        if token_id in self._skipped:
            return ""
        delta = self._stream.step(self._tokenizer, token_id)
        self._pending.append(token_id)
        if delta is not None:
            self._context, self._pending = self._pending, []
            return delta
        return self._release() if len(self._pending) % MAX_PENDING_TOKENS == 0 else ""

    def flush(self) -> str:
        """Return what is pending, half characters as U+FFFD; no more tokens may follow."""
        rest = self._text(len(self._pending)) if self._pending else ""
        self._pending = []
        return rest

    def _text(self, count: int) -> str:
        """Return the text of the first `count` pending tokens, behind their context."""
        known = self._decode(self._context)
        return self._decode(self._context + self._pending[:count])[len(known) :]

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=False)
        return text

    def _release(self) -> str:
        """Emit pending tokens that are no text, up to the last clean cut.

        A cut is clean when both sides decode to what they decode to together: then no character
        goes across it, whatever follows.
        """
        whole = self._text(len(self._pending))
        for cut in range(len(self._pending) - 1, 0, -1):
            head, tail = self._text(cut), self._decode(self._pending[cut:])
            if tail and head + tail == whole:
                self._context, self._pending = self._pending[:cut], self._pending[cut:]
                self._stream = DecodeStream(skip_special_tokens=False)
                for token_id in self._pending:
                    self._stream.step(self._tokenizer, token_id)
                return head
        return ""


class TextStream:
    """The text of one sequence, cut at its first stop string.

    The first stop string to be complete wins; of those that end at one character the longest. Text
    that may still become one is held. Stop strings count from the token number `min_tokens` on. The
    result does not depend on how the text is cut into tokens.

    Attributes:
        matched: The stop string that ended the text.
    """

    __slots__ = (
        "_decoder",
        "_held",
        "_include_stop",
        "_min_tokens",
        "_num_tokens",
        "_stop",
        "matched",
    )

    def __init__(
        self,
        decoder: IncrementalDecoder,
        *,
        stop: tuple[str, ...] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self._decoder = decoder
        self._stop = stop
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._held = ""
        self.matched: str | None = None

    def push(self, token_id: int) -> str:
        """Take a token and return the delta; nothing more once a stop string matched."""
        if self.matched is not None:
            return ""
        delta = self._decoder.push(token_id)
        if not self._stop:
            return delta
        self._num_tokens += 1
        if self._num_tokens < self._min_tokens:
            return delta
        return self._search(delta) if delta else ""

    def finish(self) -> str:
        """Return the rest of the text, at the end of the sequence."""
        if self.matched is not None:
            return ""
        rest = self._decoder.flush()
        if self._stop and self._num_tokens >= self._min_tokens:
            rest = self._search(rest)
        held, self._held = self._held, ""
        return rest + held

    def _search(self, delta: str) -> str:
        text = self._held + delta
        found = min(
            (
                (start + len(stop), start, stop)
                for stop in self._stop
                if (start := text.find(stop)) >= 0
            ),
            default=None,
        )
        if found is not None:
            end, start, self.matched = found
            self._held = ""
            return text[: end if self._include_stop else start]
        cut = len(text) - self._held_chars(text)
        self._held = text[cut:]
        return text[:cut]

    def _held_chars(self, text: str) -> int:
        """Return the length of the longest end of `text` with which a stop string begins."""
        longest = min(len(text), max(map(len, self._stop)) - 1)
        for length in range(longest, 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stop):
                return length
        return 0


class TextStop:
    """A sequence's stop checker for the engine thread (`router.engine.request.StopChecker`).

    Reads a stream of its own, so that the engine thread and the event loop share nothing.
    """

    __slots__ = ("_stream",)

    def __init__(self, stream: TextStream) -> None:
        self._stream = stream

    def __call__(self, token_id: int) -> bool:
        """Take the next token; return whether a stop string has matched."""
        self._stream.push(token_id)
        return self._stream.matched is not None


def compile_template(source: str) -> jinja2.Template:
    """Compile a chat template in a sandbox that a template cannot leave.

    Source: `transformers.utils.chat_template_utils`, whose environment the templates are written
    for.
    """

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def strftime_now(pattern: str) -> str:
        return datetime.now().strftime(pattern)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment.from_string(source)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, which marks the assistant's text for training: its body, as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Return the body of the block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _cut_at_tag(rendered: str, last: str) -> str:
    """Cut where the last message's own text ends, as the template spaced it."""
    tag = _CONTINUE_TAG.strip()
    if last.strip() not in rendered or tag not in rendered:
        raise InvalidFieldError(
            "chat.add_generation_prompt",
            "must be true: the chat template changes the last message",
            False,
        )
    cut = rendered.rindex(tag)
    keeps_spaces = rendered[cut : cut + len(_CONTINUE_TAG)] == _CONTINUE_TAG
    return rendered[:cut] if keeps_spaces else rendered[:cut].rstrip()


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Return `bos_token` and the like as text; the file has them as text or as objects."""
    found: dict[str, str] = {}
    for name in _SPECIAL_TOKENS:
        token = config.get(f"{name}_token")
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            found[f"{name}_token"] = token
    return found


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(str(path), f"no JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(str(path), "must be a JSON object")
    return value
