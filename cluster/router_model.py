"""What a router reads from a checkpoint before it knows of groups, stores or clients."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cluster.config import ModelSection
from cluster.hf_overrides import parse_hf_overrides
from cluster.preflight import checkpoint_folder
from experts.native.kernels import Kernels, load_kernels
from experts.weights import SafetensorsCheckpoint
from experts.weights_digest import weights_digest
from router.gateway.defaults import SamplingDefaults
from router.gateway.text import TextProcessor
from router.gating.gate import Gate
from router.model.config import ModelConfig
from router.model.memory import MemoryEstimate, estimate_memory
from router.model.ops import Ops, choose_ops
from router.model.weights import TrunkWeights, load_trunk


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterModel:
    """A model without its experts, ready to be run."""

    config: ModelConfig
    max_model_len: int
    """Most tokens of a sequence."""
    dtype: torch.dtype
    """Of matrices and KV cache."""
    ops: Ops
    kernels: Kernels | None
    """Of the trunk; None: its operations are torch's."""
    weights: TrunkWeights
    gate: Gate
    """Its weights once more, unpacked, for `GatingService`."""
    text: TextProcessor
    defaults: SamplingDefaults
    digest: str
    """Of the checkpoint's weights, see `experts.weights_digest`."""

    @property
    def dtype_name(self) -> str:
        """The dtype as users write it."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def ops_name(self) -> str:
        """How the trunk computes: `torch`, or `native-` and the instruction set."""
        return f"native-{self.kernels.isa}" if self.kernels else self.ops.name

    @property
    def memory(self) -> MemoryEstimate:
        """Sizes of the model's parts."""
        return estimate_memory(self.config, self.dtype)


def load_router_model(
    section: ModelSection, *, dtype: str, max_model_len: int, trunk_ops: str
) -> RouterModel:
    """Read a checkpoint's trunk, gate, tokeniser and defaults.

    Args:
        section: Which checkpoint, and what overrides its config.json.
        dtype: Of matrices and KV cache.
        max_model_len: Most tokens of a sequence.
        trunk_ops: As `router.trunk_ops`.

    Raises:
        ExpertMeshError: From the checkpoint or the kernels.
    """
    path = checkpoint_folder(section)
    torch_dtype: torch.dtype = getattr(torch, dtype)
    config = ModelConfig.from_checkpoint(path, parse_hf_overrides(section.hf_overrides))
    ops = choose_ops(torch_dtype, torch.device("cpu"), trunk_ops)
    text = TextProcessor.from_checkpoint(path)
    defaults = SamplingDefaults.from_checkpoint(path)
    kernels = load_kernels() if ops.name == "native" else None
    with SafetensorsCheckpoint(path) as checkpoint:
        return RouterModel(
            config=config,
            max_model_len=max_model_len,
            dtype=torch_dtype,
            ops=ops,
            kernels=kernels,
            weights=load_trunk(checkpoint, config, ops, torch_dtype),
            gate=_read_gate(checkpoint, config, torch_dtype),
            text=text,
            defaults=defaults,
            digest=weights_digest(checkpoint),
        )


def _read_gate(checkpoint: SafetensorsCheckpoint, config: ModelConfig, dtype: torch.dtype) -> Gate:
    layers = range(config.num_layers if config.is_moe else 0)
    weights = {
        layer_id: checkpoint.get(f"layers.{layer_id}.mlp.gate.weight", dtype=dtype)
        for layer_id in layers
    }
    return Gate(weights, config.top_k)
