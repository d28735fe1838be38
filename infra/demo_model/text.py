"""From chats to training rows: the tokenizer, its files, and the packing of conversations.

It decides the token ids and which tokens count how much in the loss. It knows nothing of the model.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from corpus import Conversation, render, training_conversations
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>",
    "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
END_OF_TEXT, IM_START, IM_END = 0, 1, 2
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The pre-tokenisation of the Qwen family: words with their leading space, and single digits."""
TOKENIZER_CONVERSATIONS = 12_000
USER_WEIGHT = 0.1
"""Loss weight of what the assistant does not write; its own tokens weigh 1."""
CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string %}{{- message.content }}
{%- else %}{%- for part in message.content %}{{- part.text }}{%- endfor %}{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}"""


def train_tokenizer(vocab_size: int, seed: int) -> Tokenizer:
    """Train a byte-level BPE of exactly `vocab_size` tokens on freshly generated chats."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    chats = itertools.islice(training_conversations(seed), TOKENIZER_CONVERSATIONS)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((m["content"] for chat in chats for m in chat.messages), trainer)
    missing = vocab_size - tokenizer.get_vocab_size()
    tokenizer.add_tokens([f"<|unused_{i}|>" for i in range(missing)])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "clean_up_tokenization_spaces": False,
        "model_max_length": 32768,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config, indent=2) + "\n", encoding="utf-8"
    )
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def encode(tokenizer: Tokenizer, conversation: Conversation) -> tuple[list[int], list[float]]:
    """Return ids and loss weights of one conversation, closed by `<|endoftext|>`."""
    ids: list[int] = []
    weights: list[float] = []
    for message in conversation.messages:
        turn = tokenizer.encode(render([message])).ids
        header = len(tokenizer.encode(f"<|im_start|>{message['role']}\n").ids)
        own = 1.0 if message["role"] == "assistant" else USER_WEIGHT
        ids += turn
        weights += [USER_WEIGHT] * header + [own] * (len(turn) - header - 1) + [USER_WEIGHT]
    return [*ids, END_OF_TEXT], [*weights, USER_WEIGHT]


def rows(
    tokenizer: Tokenizer, seed: int, length: int, *, max_turns: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield `(ids, weights)` rows of `length` tokens, each starting with a conversation.

    A row is filled with whole conversations from a short waiting list, the longest that fits first;
    the rest is padding of weight 0. A conversation longer than a row is cut.
    """
    source = training_conversations(seed, max_turns=max_turns)
    waiting: list[tuple[list[int], list[float]]] = []
    while True:
        ids: list[int] = []
        weights: list[float] = []
        while True:
            while len(waiting) < 16:
                waiting.append(encode(tokenizer, next(source)))
            fitting = [chat for chat in waiting if len(ids) + len(chat[0]) <= length]
            # The first chat of a row is the oldest, whatever its size: no chat waits forever.
            chosen = (
                max(fitting, key=lambda chat: len(chat[0]), default=None) if ids else waiting[0]
            )
            if chosen is None:
                break
            waiting.remove(chosen)
            ids += chosen[0][:length]
            weights += [0.0, *chosen[1][1:length]]
        padding = length - len(ids)
        yield torch.tensor(ids + [END_OF_TEXT] * padding), torch.tensor(weights + [0.0] * padding)
