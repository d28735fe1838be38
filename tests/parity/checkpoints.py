"""Random checkpoints of the Qwen3.5 family, small enough for tests, made by transformers itself.

The weights are drawn so that the model behaves like a trained one where a comparison cares: every
block's output has about the size of its input, logits have a standard deviation of a few units (so
greedy tokens differ and the two best logits are far apart), the gate prefers some experts, and the
linear attention remembers for a while. Same arguments, same bytes.
"""

from __future__ import annotations

import functools
import json
import math
import sysconfig
from pathlib import Path
from typing import Any

import torch

SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "conv_kernel": 4,
    "num_experts": 8,
    "top_k": 2,
    "moe_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "intermediate_size": 96,
    "full_attention_interval": 4,
    "max_position_embeddings": 4096,
}
"""Default sizes; every one can be overridden by name."""

EOS_TOKEN_ID = 1
SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_end|>",
    "<|im_start|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_checkpoint(
    path: Path,
    *,
    dense: bool = False,
    text_only: bool = False,
    layout: str = "fused",
    dtype: str = "float32",
    tied: bool = False,
    rope: dict[str, Any] | None = None,
    tokenizer: bool = False,
    seed: int = 0,
    logit_std: float = 3.0,
    max_shard_size: str = "2GB",
    **sizes: int,
) -> Path:
    """Write a checkpoint folder and return it.

    Args:
        path: The folder; made if it is not there.
        dense: `qwen3_5` instead of `qwen3_5_moe`.
        text_only: A flat text config instead of the multimodal one with a (tiny) vision tower.
        layout: Experts `fused` (as released) or `split` (one tensor per expert and projection).
        dtype: Stored dtype.
        tied: Share embedding and head.
        rope: Merged into `rope_parameters` (YaRN, partial_rotary_factor, ...).
        tokenizer: Also write a byte-level BPE tokenizer with a chat template.
        seed: Of the weights.
        logit_std: Standard deviation of the logits.
        max_shard_size: As `save_pretrained` takes it; small values make several shards.
        **sizes: Overrides of `SIZES`.
    """
    import transformers

    unknown = sizes.keys() - SIZES.keys()
    if unknown:
        raise TypeError(f"unknown sizes: {sorted(unknown)}")
    size = {**SIZES, **sizes}
    text = _text_config(size, dense, rope or {}, tied)
    family = "Qwen3_5" if dense else "Qwen3_5Moe"
    if text_only:
        config = getattr(transformers, f"{family}TextConfig")(**text)
        model_class = getattr(transformers, f"{family}ForCausalLM")
    else:
        config = getattr(transformers, f"{family}Config")(
            text_config=text,
            vision_config=_vision_config(size["hidden_size"]),
            tie_word_embeddings=tied,
            vision_start_token_id=3,
            vision_end_token_id=4,
            image_token_id=5,
            video_token_id=6,
        )
        model_class = getattr(transformers, f"{family}ForConditionalGeneration")
    config.dtype = dtype
    path.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = model_class(config)
    model = model.to(getattr(torch, dtype)).to_empty(device="cpu")
    model.tie_weights()
    with torch.no_grad():
        for index, (name, tensor) in enumerate(model.named_parameters()):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
            tensor.copy_(_draw(name, tensor.shape, generator, size["num_layers"], logit_std))
            if name.endswith(("in_proj_qkv.weight", "linear_attn.conv1d.weight")):
                _align_keys(tensor, size["linear_num_key_heads"] * size["linear_key_head_dim"])
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=EOS_TOKEN_ID, pad_token_id=0, do_sample=False
    )
    model.save_pretrained(
        path, max_shard_size=max_shard_size, save_original_format=layout == "split"
    )
    if tokenizer:
        _write_tokenizer(path, size["vocab_size"])
    return path


def _text_config(
    size: dict[str, int], dense: bool, rope: dict[str, Any], tied: bool
) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25, **rope}
    pairs = int(size["head_dim"] * rope["partial_rotary_factor"]) // 2
    third = pairs // 3
    renamed = {
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "num_key_value_heads": "num_kv_heads",
        "linear_conv_kernel_dim": "conv_kernel",
    }
    same = [
        "vocab_size",
        "hidden_size",
        "head_dim",
        "linear_num_key_heads",
        "linear_num_value_heads",
        "linear_key_head_dim",
        "linear_value_head_dim",
        "full_attention_interval",
        "max_position_embeddings",
    ]
    if dense:
        same.append("intermediate_size")
    else:
        same += ["num_experts", "moe_intermediate_size"]
        renamed["num_experts_per_tok"] = "top_k"
        renamed["shared_expert_intermediate_size"] = "shared_intermediate_size"
    return {
        **{name: size[name] for name in same},
        **{theirs: size[ours] for theirs, ours in renamed.items()},
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": tied,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [pairs - 2 * third, third, third],
            **rope,
        },
        "bos_token_id": None,
        "eos_token_id": EOS_TOKEN_ID,
        "pad_token_id": 0,
    }


def _vision_config(out_hidden_size: int) -> dict[str, Any]:
    return {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "in_channels": 3,
        "out_hidden_size": out_hidden_size,
        "num_position_embeddings": 16,
    }


def _draw(
    name: str, shape: torch.Size, generator: torch.Generator, num_layers: int, logit_std: float
) -> torch.Tensor:
    """Draw one parameter, float32."""

    def normal(std: float) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * std

    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.empty(shape).uniform_(low, high, generator=generator)

    fan_in = 1 / math.sqrt(shape[-1])
    branch = math.sqrt(2 / num_layers)  # the sum of the residual branches stays near the embedding
    if ".visual." in name:
        return normal(0.02)
    if name.endswith("A_log"):
        return uniform(1, 16).log()
    if name.endswith("dt_bias"):
        step = uniform(math.log(1e-3), math.log(1e-1)).exp()
        return step + torch.log(-torch.expm1(-step))  # the inverse of softplus
    if name.endswith("linear_attn.norm.weight"):
        return 1 + normal(0.1)
    if len(shape) == 1:
        return normal(0.1)
    if name.endswith("embed_tokens.weight"):
        return normal(1.0)
    if name.endswith("lm_head.weight"):
        return normal(logit_std * fan_in)
    if name.endswith("mlp.gate.weight"):
        favour = torch.randn((shape[0], 1), generator=generator).mul(0.3).exp()
        return normal(1.5 * fan_in) * favour
    if name.endswith(("down_proj", "down_proj.weight")):
        return normal(2 * branch * fan_in)
    if name.endswith(("o_proj.weight", "out_proj.weight")):
        return normal(branch * fan_in)
    if name.endswith(("gate_up_proj", "gate_proj.weight", "up_proj.weight")):
        return normal(1.5 * fan_in)
    return normal(fan_in)


def _align_keys(qkv: torch.Tensor, key_dim: int) -> None:
    """Make keys resemble queries, as in a trained model.

    Else q . k is sometimes nearly 0 for a sequence's first token, whose output is then all rounding
    error, which the norm behind it blows up.
    """
    keys = qkv[key_dim : 2 * key_dim]
    keys.mul_(0.6).add_(qkv[:key_dim], alpha=0.8)


def _write_tokenizer(path: Path, vocab_size: int) -> None:
    (path / "tokenizer.json").write_text(_trained_tokenizer(vocab_size), encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "bos_token": None,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "chat_template": CHAT_TEMPLATE,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    (path / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


@functools.cache
def _trained_tokenizer(vocab_size: int) -> str:
    """Train a byte-level BPE of exactly `vocab_size` tokens on files of the standard library."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    pattern = (  # how the Qwen family splits text before BPE
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    folder = Path(sysconfig.get_paths()["stdlib"])
    names = ("argparse.py", "dataclasses.py", "heapq.py", "textwrap.py", "this.py")
    texts = [(folder / name).read_text(encoding="utf-8") for name in names]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts, trainer)
    missing = vocab_size - tokenizer.get_vocab_size()
    if missing > 0:
        tokenizer.add_tokens([f"<|extra_{i}|>" for i in range(missing)])
    text: str = tokenizer.to_str()
    return text
