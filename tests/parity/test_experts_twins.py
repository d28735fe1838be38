"""A group's answers against two implementations that are not ours: transformers and AutoEP."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from experts.native.kernels import load_kernels
from experts.planner import plan_placement
from experts.runtime import ExpertRuntime
from experts.weights import SafetensorsCheckpoint
from protos.codec import Combine, FrameHeader, FrameKind, dtype_of_torch

COMPUTES = ["deepspeed", "torch", *(["native"] if load_kernels() else [])]
SIZES = {"num_experts": 8, "top_k": 3, "num_layers": 4}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def path(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint(**SIZES)


@pytest.fixture(scope="module")
def autoep(path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What AutoEP says of every layer."""
    out = tmp_path_factory.mktemp("autoep") / "answers.safetensors"
    command = [sys.executable, "-m", "tests.parity.autoep_twin", str(path), str(out)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return load_file(out)


def groups_of(path: Path, compute: str, dtype: torch.dtype, num_groups: int) -> list[ExpertRuntime]:
    with SafetensorsCheckpoint(path) as checkpoint:
        shape = checkpoint.num_layers, checkpoint.num_experts
    placement = plan_placement(*shape, {f"g{index}": 1.0 + index for index in range(num_groups)})
    groups = []
    for group_id in placement.groups:
        group = ExpertRuntime(
            group_id=group_id,
            checkpoint=path,
            dtype=str(dtype).removeprefix("torch."),
            compute=compute,
        )
        group.load(placement)
        groups.append(group)
    return groups


def routed(
    groups: list[ExpertRuntime],
    layer_id: int,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """Send every pair to its group and sum in top-k order, as a router does: float32 `[T, D]`."""
    slots = torch.zeros(*ids.shape, hidden.shape[1])
    for group in groups:
        mine = torch.isin(ids, torch.tensor(group.status().layers[layer_id], dtype=torch.int32))
        token, k = mine.nonzero(as_tuple=True)
        parts = (token.int(), ids[mine].int(), weights[mine].float(), hidden)
        raw = (t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for t in parts)
        payload = bytearray(b"".join(raw))
        header = FrameHeader(
            kind=FrameKind.FORWARD,
            combine=Combine.SLOTS,
            placement_epoch=1,
            layer_id=layer_id,
            dtype=dtype_of_torch(hidden.dtype),
            num_rows=len(hidden),
            hidden=hidden.shape[1],
            num_pairs=len(token),
            payload_bytes=len(payload),
        )
        _, result = group.forward(header, payload)
        if len(token):
            answer = torch.frombuffer(bytearray(result), dtype=hidden.dtype)
            slots[token, k] = answer.view(len(token), -1).float()
    out = torch.zeros_like(slots[:, 0])
    for k in range(ids.shape[1]):
        out += weights[:, k, None].float() * slots[:, k]
    return out


def moe_blocks(path: Path, dtype: torch.dtype) -> list[torch.nn.Module]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    return [m for m in model.modules() if type(m).__name__ == "Qwen3_5MoeSparseMoeBlock"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compute", COMPUTES)
def test_the_groups_together_are_the_experts_of_transformers(
    path: Path, compute: str, dtype: torch.dtype
) -> None:
    blocks = moe_blocks(path, dtype)
    exact = moe_blocks(path, torch.float32)
    groups = groups_of(path, compute, dtype, num_groups=3)
    generator = torch.Generator().manual_seed(2)
    ours = theirs = 0.0
    with torch.inference_mode():
        for layer_id, (block, block32) in enumerate(zip(blocks, exact, strict=True)):
            for num_tokens in (1, 5, 40):
                hidden = torch.randn(num_tokens, 64, generator=generator).to(dtype)
                _, weights, ids = block.gate(hidden)
                want = block.experts(hidden, ids, weights).float()
                got = routed(groups, layer_id, hidden, ids.int(), weights)
                if dtype == torch.float32:
                    torch.testing.assert_close(
                        got, want, rtol=0, atol=1e-5 * float(want.abs().max())
                    )
                    continue
                truth = block32.experts(hidden.float(), ids, weights.float())
                ours += float((got - truth).square().sum())
                theirs += float((want - truth).square().sum())
    # Over all tokens no further from the float32 truth than transformers' own bfloat16.
    assert ours <= theirs


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("num_groups", [1, 3])
def test_the_groups_together_are_the_layer_of_autoep(
    path: Path, autoep: dict[str, torch.Tensor], compute: str, num_groups: int
) -> None:
    groups = groups_of(path, compute, torch.float32, num_groups)
    with SafetensorsCheckpoint(path) as checkpoint:
        for layer_id in range(checkpoint.num_layers):
            hidden = autoep[f"{layer_id}.hidden"]

            def weight(name: str, layer_id: int = layer_id) -> torch.Tensor:
                full = f"layers.{layer_id}.mlp.{name}.weight"
                return checkpoint.get(full, dtype=torch.float32)

            # The gate's twin: DeepSpeed does not sort its choice, so compare as dense weights.
            probabilities = F.linear(hidden, weight("gate")).softmax(-1)
            weights, ids = probabilities.topk(SIZES["top_k"])
            weights /= weights.sum(-1, keepdim=True)
            dense = torch.zeros_like(probabilities).scatter(1, ids, weights)
            twin = torch.zeros_like(dense).scatter(
                1, autoep[f"{layer_id}.ids"].long(), autoep[f"{layer_id}.weights"]
            )
            torch.testing.assert_close(dense, twin, rtol=0, atol=1e-6)

            gate = F.linear(hidden, weight("shared_expert.gate_proj"))
            up = F.linear(hidden, weight("shared_expert.up_proj"))
            shared = F.linear(F.silu(gate) * up, weight("shared_expert.down_proj"))
            shared *= F.linear(hidden, weight("shared_expert_gate")).sigmoid()
            got = routed(groups, layer_id, hidden, ids.int(), weights) + shared
            want = autoep[f"{layer_id}.output"]
            torch.testing.assert_close(got, want, rtol=0, atol=2e-6 * float(want.abs().max()))
