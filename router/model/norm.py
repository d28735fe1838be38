"""RMS norms in torch, computed in float32.

Qwen3.5 has two: zero-centred weights everywhere (`x / rms(x) * (1 + w)`), and the Gated DeltaNet's
output norm with a plain weight and a gate (`x / rms(x) * w * silu(z)`).

Source: RMSNorm (arXiv 1910.07467); transformers 5.23 `Qwen3_5MoeRMSNorm`, `...RMSNormGated`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return `x / rms(x) * (1 + weight)` over the last dimension, in the dtype of `x`.

    Args:
        x: `[..., D]`.
        weight: float32 `[D]`, zero-centred.
        eps: Added to the mean square.
    """
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return (normed * (1.0 + weight)).to(x.dtype)


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return `x / rms(x) * weight * silu(gate)` over the last dimension, float32.

    Args:
        x: float32 `[..., D]`.
        gate: `[..., D]`.
        weight: float32 `[D]`, plain.
        eps: Added to the mean square.
    """
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return normed * weight * torch.nn.functional.silu(gate.float())
