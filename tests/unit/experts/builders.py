"""Tiny checkpoints, groups and calls for the tests of `experts`; no transformers, no processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from experts.checkpoint_names import FUSED_EXPERTS, split_expert_names, trunk_names
from experts.planner import plan_placement
from experts.runtime import ExpertRuntime
from protos.codec import Combine, FrameHeader, FrameKind, dtype_of_torch

LAYERS, EXPERTS, HIDDEN, INTER = 3, 5, 16, 8
TEXT_CONFIG: dict[str, Any] = {
    "model_type": "qwen3_5_moe_text",
    "num_hidden_layers": LAYERS,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "hidden_size": HIDDEN,
    "moe_intermediate_size": INTER,
    "full_attention_interval": 2,
}
PREFIX = "model.language_model."


def expert_tensors(dtype: torch.dtype = torch.float32) -> dict[tuple[int, int], Any]:
    """`(gate_up, down)` of every `(layer_id, expert_id)`; the same values on every call."""
    generator = torch.Generator().manual_seed(7)
    return {
        (layer_id, expert_id): (
            torch.randn(2 * INTER, HIDDEN, generator=generator).div(HIDDEN**0.5).to(dtype),
            torch.randn(HIDDEN, INTER, generator=generator).div(INTER**0.5).to(dtype),
        )
        for layer_id in range(LAYERS)
        for expert_id in range(EXPERTS)
    }


def tensors(
    *, fused: bool = True, prefix: str = PREFIX, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint; the trunk's have a shape of their own choosing."""
    made = {prefix + name: torch.ones(2, dtype=dtype) for name in trunk_names(TEXT_CONFIG)}
    made["lm_head.weight"] = torch.ones(3, 2, dtype=dtype)
    experts = expert_tensors(dtype)
    for layer_id in range(LAYERS):
        layer = f"{prefix}layers.{layer_id}."
        if fused:
            for part, leaf in enumerate(FUSED_EXPERTS):
                stack = [experts[layer_id, expert_id][part] for expert_id in range(EXPERTS)]
                made[layer + leaf] = torch.stack(stack)
            continue
        for expert_id in range(EXPERTS):
            gate_up, down = experts[layer_id, expert_id]
            values = (gate_up[:INTER].clone(), gate_up[INTER:].clone(), down)
            for leaf, value in zip(split_expert_names(expert_id), values, strict=True):
                made[layer + leaf] = value
    return made


def write(
    path: Path, content: dict[str, torch.Tensor], *, num_shards: int = 1, **config: Any
) -> Path:
    """Write a checkpoint folder and return it."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(
        json.dumps({"model_type": "qwen3_5_moe", "text_config": TEXT_CONFIG | config})
    )
    if num_shards == 1:
        save_file(content, path / "model.safetensors")
        return path
    weight_map = {}
    for shard in range(num_shards):
        name = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        part = dict(list(content.items())[shard::num_shards])
        save_file(part, path / name)
        weight_map.update(dict.fromkeys(part, name))
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def loaded_runtime(path: Path, *, share: float = 1.0, **options: Any) -> ExpertRuntime:
    """A READY group `a` that holds `share` of the experts of the checkpoint at `path`."""
    runtime = ExpertRuntime(group_id="a", checkpoint=path, **{"dtype": "float32"} | options)
    capacities = {"a": share, "b": 1 - share} if share < 1 else {"a": 1.0}
    runtime.load(plan_placement(LAYERS, EXPERTS, capacities))
    return runtime


def forward_call(
    num_rows: int = 3,
    expert_ids: tuple[int, ...] = (0, 1),
    *,
    rows: torch.Tensor | None = None,
    combine: Combine = Combine.SLOTS,
    **header: Any,
) -> tuple[FrameHeader, bytearray]:
    """A forward in which every row goes to every one of `expert_ids`."""
    if rows is None:
        rows = torch.randn(num_rows, HIDDEN, generator=torch.Generator().manual_seed(3))
    num_rows = len(rows)
    pair_row = np.repeat(np.arange(num_rows, dtype=np.int32), len(expert_ids))
    pair_expert = np.tile(np.array(expert_ids, np.int32), num_rows)
    pair_weight = np.linspace(0.1, 1, len(pair_row), dtype=np.float32)
    values = rows.contiguous().view(torch.uint8).numpy().tobytes()
    payload = pair_row.tobytes() + pair_expert.tobytes() + pair_weight.tobytes() + values
    fields: dict[str, Any] = {
        "kind": FrameKind.FORWARD,
        "combine": combine,
        "call_id": 11,
        "placement_epoch": 1,
        "layer_id": 0,
        "dtype": dtype_of_torch(rows.dtype),
        "num_rows": num_rows,
        "hidden": rows.shape[1],
        "num_pairs": len(pair_row),
        "payload_bytes": len(payload),
    }
    return FrameHeader(**fields | header), bytearray(payload)


def as_tensors(
    header: FrameHeader, payload: bytearray
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, pair rows, experts and weights of a call that `forward_call` made."""
    pairs = header.num_pairs
    ints = torch.frombuffer(payload, dtype=torch.int32, count=2 * pairs)
    weight = torch.frombuffer(payload, dtype=torch.float32, count=pairs, offset=8 * pairs)
    rows = torch.frombuffer(payload, dtype=torch.float32, offset=12 * pairs)
    return rows.view(header.num_rows, header.hidden), ints[:pairs], ints[pairs:], weight
