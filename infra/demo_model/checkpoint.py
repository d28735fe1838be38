"""Write the trained weights in the released multimodal layout, with config and tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from model import TRUNK_PREFIX, DemoConfig
from moe import DemoModel
from safetensors.torch import load_file, save_file
from text import END_OF_TEXT, IM_END, SPECIAL_TOKENS, save_tokenizer
from tokenizers import Tokenizer
from torch import Tensor

VISION = {
    "model_type": "qwen3_5_moe_vision",
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "patch_size": 8,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
    "num_position_embeddings": 16,
}
"""The layout has a vision tower, so the checkpoint has one: as small as it gets, and untrained."""


def checkpoint_config(config: DemoConfig) -> dict[str, object]:
    """Return `config.json`."""
    text = config.text_config() | {
        "dtype": "bfloat16",
        "eos_token_id": IM_END,
        "pad_token_id": END_OF_TEXT,
    }
    return {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "model_type": "qwen3_5_moe",
        "dtype": "bfloat16",
        "tie_word_embeddings": False,
        "vision_start_token_id": SPECIAL_TOKENS.index("<|vision_start|>"),
        "vision_end_token_id": SPECIAL_TOKENS.index("<|vision_end|>"),
        "image_token_id": SPECIAL_TOKENS.index("<|image_pad|>"),
        "video_token_id": SPECIAL_TOKENS.index("<|video_pad|>"),
        "text_config": text,
        "vision_config": VISION | {"out_hidden_size": config.hidden_size},
    }


def vision_tensors(folder: Path, seed: int) -> dict[str, Tensor]:
    """Draw the vision tower that transformers builds from the `config.json` in `folder`."""
    from transformers import AutoConfig, Qwen3_5MoeForConditionalGeneration

    torch.manual_seed(seed)
    full = Qwen3_5MoeForConditionalGeneration(AutoConfig.from_pretrained(folder))
    names = {
        name: weight
        for name, weight in full.state_dict().items()
        if name.startswith("model.visual.")
    }
    return {name: weight.to(torch.bfloat16).contiguous() for name, weight in names.items()}


def load_model(folder: Path, config: DemoConfig) -> DemoModel:
    """Return the training twin with the weights of the checkpoint in `folder`."""
    tensors = load_file(folder / "model.safetensors")
    own = {
        name.removeprefix(TRUNK_PREFIX): weight.float()
        for name, weight in tensors.items()
        if not name.startswith("model.visual.")
    }
    model = DemoModel(config)
    model.load_state_dict(own)
    return model


def save_checkpoint(model: DemoModel, tokenizer: Tokenizer, folder: Path, *, seed: int) -> None:
    """Write all files of the checkpoint into `folder`; existing files are replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    config = checkpoint_config(model.config)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {
        "do_sample": False,
        "eos_token_id": [IM_END, END_OF_TEXT],
        "pad_token_id": END_OF_TEXT,
    }
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    save_tokenizer(tokenizer, folder)
    tensors = model.checkpoint_tensors() | vision_tensors(folder, seed)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
