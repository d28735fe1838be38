"""How weights are updated: Muon for the matrices inside layers, AdamW for everything else."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def orthogonalise(update: Tensor, steps: int = 5) -> Tensor:
    """Bring the singular values of each `[..., M, N]` matrix near one, by Newton-Schulz steps.

    Source: Jordan et al., Muon, https://kellerjordan.github.io/posts/muon/ (the coefficients).
    """
    is_tall = update.shape[-2] > update.shape[-1]
    x = (update.mT if is_tall else update).to(torch.bfloat16)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    out: Tensor = (x.mT if is_tall else x).to(update.dtype)
    return out


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised; stacked experts are treated matrix by matrix."""

    def __init__(
        self,
        params: list[nn.Parameter],
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.05,
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                trace = self.state[weight].setdefault("trace", torch.zeros_like(weight))
                trace.lerp_(weight.grad, 1 - group["momentum"])
                update = orthogonalise(weight.grad.lerp(trace, group["momentum"]))
                gain = max(1.0, weight.shape[-2] / weight.shape[-1]) ** 0.5
                weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(
                    update, alpha=-group["lr"] * gain
                )


def make_optimizers(
    model: nn.Module, *, muon_lr: float, adam_lr: float
) -> list[torch.optim.Optimizer]:
    """Give matrices inside layers to Muon; embedding, head, gates and vectors to AdamW."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, weight in model.named_parameters():
        small = weight.dim() < 2 or min(weight.shape[-2:]) < 16
        outer = name.startswith(("embed_tokens", "lm_head")) or name.endswith(
            ("gate.weight", "conv1d.weight")
        )
        (others if small or outer else matrices).append(weight)
    adam = torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    return [Muon(matrices, lr=muon_lr), adam]
