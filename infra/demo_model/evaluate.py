#!/usr/bin/env python3
"""Score a demo checkpoint with transformers' own class: loss, answers, MTP, expert load.

    .venv/bin/python infra/demo_model/evaluate.py [CHECKPOINT] [--questions 120] [--show]

Weights are used as stored (bfloat16), arithmetic is float32. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from corpus import (
    CATEGORIES,
    LANGUAGES,
    Author,
    Conversation,
    Exchange,
    Message,
    held_out_conversations,
    render,
)
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3_5MoeForConditionalGeneration
from transformers.modeling_layers import MtpModel

HERE = Path(__file__).parent
QUESTION_SEED, LOSS_SEED, STORY_SEED = 77, 78, 79
LOSS_CONVERSATIONS = 40
"""Held-out conversations per category over which the loss is taken."""
NUM_STORIES = 20


class LoadedWrongError(Exception):
    """The checkpoint's tensors are not exactly those that transformers wants."""


class Scorer:
    """A loaded checkpoint and the questions put to it."""

    def __init__(self, checkpoint: Path) -> None:
        self.tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(checkpoint)
        self.model, loading = Qwen3_5MoeForConditionalGeneration.from_pretrained(
            checkpoint, dtype=torch.float32, output_loading_info=True
        )
        wrong = {kind: sorted(names) for kind, names in loading.items() if names}
        if wrong:
            raise LoadedWrongError(f"{checkpoint}: {wrong}")
        self.model.eval()
        self.im_end = self.tokenizer.convert_tokens_to_ids("<|im_end|>")

    def answer(self, messages: list[Message], max_new_tokens: int = 220) -> tuple[str, bool]:
        """Answer greedily; return the text and whether the model closed its turn itself."""
        prompt = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        if prompt != render(messages, add_generation_prompt=True):
            raise LoadedWrongError(f"chat template and corpus.render differ on {messages!r}")
        ids = self.tokenizer(prompt, return_tensors="pt").input_ids
        out = self.model.generate(input_ids=ids, max_new_tokens=max_new_tokens, do_sample=False)[
            0, ids.shape[1] :
        ]
        return self.tokenizer.decode(out, skip_special_tokens=True), int(out[-1]) == self.im_end

    def exact_match(self, num_questions: int, *, show: bool = False) -> dict[str, float]:
        """Return by category the share of held-out questions with the exact answer."""
        right: Counter[str] = Counter()
        asked: Counter[str] = Counter()
        for conversation in held_out_conversations(num_questions, QUESTION_SEED):
            *question, reference = conversation.messages
            text, closed = self.answer(question)
            is_right = closed and text.strip() == reference["content"]
            asked[conversation.category] += 1
            right[conversation.category] += is_right
            if show or not is_right:
                mark = "right" if is_right else f"WRONG, wanted {reference['content']!r}"
                print(
                    f"[{conversation.category}] {question[-1]['content']!r} -> {text!r} ({mark})",
                    flush=True,
                )
        return {name: round(right[name] / asked[name], 3) for name in CATEGORIES if asked[name]}

    def stories_told(self) -> float:
        """Return the share of story wishes that give a whole story with hero and thing."""
        author, good = Author(STORY_SEED), 0
        wishes: list[Exchange] = []
        while len(wishes) < NUM_STORIES:
            wish = author.story(author.rng.choice(LANGUAGES), named=True)[0]
            wishes += [wish] if wish.is_held_out else []
        for wish in wishes:
            text, closed = self.answer([{"role": "user", "content": wish.user}])
            good += closed and all(word in text.lower() for word in wish.key.lower().split("/"))
        return round(good / NUM_STORIES, 3)

    @torch.no_grad()
    def loss(self, conversation: Conversation, mtp: MtpModel) -> tuple[Tensor, Tensor, Tensor]:
        """Return next-token losses, MTP losses and MTP hits over the tokens of the last answer."""
        prompt = render(conversation.messages[:-1], add_generation_prompt=True)
        ids = self.tokenizer(
            prompt + conversation.messages[-1]["content"] + "<|im_end|>", return_tensors="pt"
        ).input_ids
        start = len(self.tokenizer(prompt).input_ids)
        hidden = self.model.model(input_ids=ids).last_hidden_state
        next_loss = F.cross_entropy(
            self.model.lm_head(hidden)[0, start - 1 : -1], ids[0, start:], reduction="none"
        )
        positions = torch.arange(1, ids.shape[1])[None]
        ahead = mtp.forward_layer(0, hidden[:, :-1], positions, None, input_ids=ids[:, 1:])
        logits = self.model.lm_head(ahead)[0, start - 1 : -1]
        target = ids[0, start + 1 :]
        return (
            next_loss,
            F.cross_entropy(logits, target, reduction="none"),
            logits.argmax(-1) == target,
        )

    def losses(self) -> dict[str, Any]:
        """Return loss by category (nats per answer token), MTP figures and expert load."""
        text_config = self.model.config.text_config
        text_config.num_mtp_layers, text_config.mtp_layer_types = 1, ["full_attention"]
        mtp = MtpModel.from_pretrained(self.model).float()
        loads: dict[int, Tensor] = {}

        def count(layer_id: int, num_experts: int) -> Any:
            def hook(_: nn.Module, __: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
                loads[layer_id] = loads.get(layer_id, 0) + output[2].flatten().bincount(
                    minlength=num_experts
                )

            return hook

        for layer_id, layer in enumerate(self.model.model.language_model.layers):
            layer.mlp.gate.register_forward_hook(count(layer_id, text_config.num_experts))
        next_losses: dict[str, list[Tensor]] = {}
        mtp_losses: list[Tensor] = []
        mtp_hits: list[Tensor] = []
        for category in CATEGORIES:
            for conversation in held_out_conversations(LOSS_CONVERSATIONS, LOSS_SEED, category):
                next_loss, mtp_loss, hits = self.loss(conversation, mtp)
                next_losses.setdefault(category, []).append(next_loss)
                mtp_losses.append(mtp_loss)
                mtp_hits.append(hits)
        return {
            "held_out_loss": {
                name: round(float(torch.cat(parts).mean()), 4)
                for name, parts in next_losses.items()
            },
            "mtp_loss": round(float(torch.cat(mtp_losses).mean()), 4),
            "mtp_hit_rate": round(float(torch.cat(mtp_hits).float().mean()), 3),
            "expert_load_max_over_mean": [
                round(float(v.max() / v.float().mean()), 2) for v in loads.values()
            ],
            "expert_load_min_over_mean": [
                round(float(v.min() / v.float().mean()), 2) for v in loads.values()
            ],
        }


def evaluate(checkpoint: Path, num_questions: int = 120, *, show: bool = False) -> dict[str, Any]:
    """Run every measurement on `checkpoint` and return the figures."""
    scorer = Scorer(checkpoint)
    num_params = sum(weight.numel() for weight in scorer.model.parameters())
    return {
        "params": num_params,
        "exact_match": scorer.exact_match(num_questions, show=show),
        "stories_told": scorer.stories_told(),
        **scorer.losses(),
    }


def main() -> None:
    """Evaluate from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, nargs="?", default=HERE / "checkpoint")
    parser.add_argument("--questions", type=int, default=120)
    parser.add_argument(
        "--show", action="store_true", help="print right answers too, not only wrong ones"
    )
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(json.dumps(evaluate(args.checkpoint, args.questions, show=args.show)))


if __name__ == "__main__":
    main()
