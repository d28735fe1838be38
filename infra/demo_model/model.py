"""The training twin of a Qwen3.5-MoE: same mathematics and names, fast steps on a CPU.

It decides how a training forward is computed (short chunks, bfloat16 matmuls). It knows
nothing about text, and nothing about serving: the saved weights are scored by transformers' own
class (`evaluate.py`).

Letters: B rows, T positions, N = B*T tokens, D hidden, H heads, E experts, K active experts, dk, dv
head sizes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TRUNK_PREFIX = "model.language_model."
CHUNK = 32
"""Positions that Gated DeltaNet solves at once."""
COMPUTE_DTYPE = torch.bfloat16
"""What norms put out, hence of all matmuls; residual stream and recurrences stay float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoConfig:
    """Shape of the demo model; field names follow the released `text_config`."""

    vocab_size: int = 1536
    hidden_size: int = 128
    num_hidden_layers: int = 8
    full_attention_interval: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    linear_num_key_heads: int = 2
    linear_num_value_heads: int = 4
    linear_key_head_dim: int = 32
    linear_value_head_dim: int = 32
    linear_conv_kernel_dim: int = 4
    num_experts: int = 16
    num_experts_per_tok: int = 4
    moe_intermediate_size: int = 64
    shared_expert_intermediate_size: int = 64
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 32768
    rope_theta: float = 10_000_000.0
    partial_rotary_factor: float = 0.25

    def is_full_attention(self, layer_id: int) -> bool:
        """Every `full_attention_interval`-th layer attends fully, the others are Gated DeltaNet."""
        return (layer_id + 1) % self.full_attention_interval == 0

    def text_config(self) -> dict[str, Any]:
        """Return the `text_config` section of the released layout, special token ids excluded."""
        section = asdict(self)
        theta, factor = section.pop("rope_theta"), section.pop("partial_rotary_factor")
        pairs = int(self.head_dim * factor) // 2
        height = width = pairs // 3
        section["layer_types"] = [
            "full_attention" if self.is_full_attention(i) else "linear_attention"
            for i in range(self.num_hidden_layers)
        ]
        section["rope_parameters"] = {
            "rope_type": "default",
            "rope_theta": theta,
            "partial_rotary_factor": factor,
            "mrope_interleaved": True,
            "mrope_section": [pairs - height - width, height, width],
        }
        return section | {
            "model_type": "qwen3_5_moe_text",
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "attn_output_gate": True,
            "mamba_ssm_dtype": "float32",
            "mtp_num_hidden_layers": 1,
            "mtp_use_dedicated_embeddings": False,
            "router_aux_loss_coef": 0.001,
            "tie_word_embeddings": False,
            "initializer_range": 0.02,
        }


class RMSNorm(nn.Module):
    """Root-mean-square norm whose weight is stored as the difference from one."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` normed over its last dimension."""
        return F.rms_norm(x.float(), (x.shape[-1],), 1.0 + self.weight, self.eps).to(COMPUTE_DTYPE)


def linear(in_features: int, out_features: int) -> nn.Linear:
    """Make a bias-free projection; every projection of the family is one."""
    return nn.Linear(in_features, out_features, bias=False)


class GatedRMSNorm(nn.Module):
    """Norm of the Gated DeltaNet output: plain weight, norm first, then the silu gate."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """Return `norm(x) * silu(gate)`."""
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps) * F.silu(gate)


def gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """Run the recurrence `S_t = exp(g_t) S_{t-1}(I - beta_t k_t k_t') + beta_t k_t v_t'`.

    The updates of `CHUNK` positions depend on each other through a unit lower-triangular system,
    which one solve removes; what is left between chunks is a short scan over their states.

    Args:
        q, k: `[B, H, T, dk]`, not yet normalised; `T` a multiple of `CHUNK`.
        v: `[B, H, T, dv]`.
        g, beta: `[B, H, T]`, log decay and write strength.

    Returns:
        `[B, H, T, dv]`.

    Source: Yang et al., Gated Delta Networks, arXiv 2412.06464, section 3.3.
    """
    B, H, T, dk = q.shape
    num_chunks = T // CHUNK
    q, k = F.normalize(q, dim=-1) * dk**-0.5, F.normalize(k, dim=-1)
    q, k, v = (x.reshape(B * H, num_chunks, CHUNK, -1) for x in (q, k, v))
    beta = beta.reshape(B * H, num_chunks, CHUNK, 1)
    decay = g.reshape(B * H, num_chunks, CHUNK).cumsum(-1)
    future = torch.ones(CHUNK, CHUNK, dtype=torch.bool).triu(1)
    ratio = (decay.unsqueeze(-1) - decay.unsqueeze(-2)).masked_fill(future, float("-inf")).exp()
    from_start = decay.exp().unsqueeze(-1)

    system = (beta * k) @ k.transpose(-1, -2) * ratio
    written = torch.cat([beta * v, beta * k * from_start], dim=-1)
    solved = torch.linalg.solve_triangular(system, written, upper=False, unitriangular=True)
    fresh, stale = solved.split([v.shape[-1], dk], dim=-1)
    inside = (q @ k.transpose(-1, -2)) * ratio
    q = q * from_start
    k_t = (k * (decay[..., -1:] - decay).exp().unsqueeze(-1)).transpose(-1, -2)
    kept = decay[..., -1].exp()[..., None, None]

    state = q.new_zeros(B * H, dk, v.shape[-1])
    news, reads = [], []
    for c in range(num_chunks):
        news.append(fresh[:, c] - stale[:, c] @ state)
        reads.append(q[:, c] @ state)
        state = state * kept[:, c] + k_t[:, c] @ news[-1]
    out = torch.stack(reads, 1) + inside @ torch.stack(news, 1)
    return out.reshape(B, H, T, -1)


class GatedDeltaNet(nn.Module):
    """Linear-attention mixer: short causal convolution, gated delta rule, gated norm."""

    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.config = config
        self.key_dim = config.linear_num_key_heads * config.linear_key_head_dim
        self.value_dim = config.linear_num_value_heads * config.linear_value_head_dim
        channels, kernel = 2 * self.key_dim + self.value_dim, config.linear_conv_kernel_dim
        self.in_proj_qkv = linear(config.hidden_size, channels)
        self.in_proj_z = linear(config.hidden_size, self.value_dim)
        self.in_proj_b = linear(config.hidden_size, config.linear_num_value_heads)
        self.in_proj_a = linear(config.hidden_size, config.linear_num_value_heads)
        self.conv1d = nn.Conv1d(channels, channels, kernel, groups=channels, bias=False)
        self.A_log = nn.Parameter(torch.zeros(config.linear_num_value_heads))
        step = torch.logspace(-3, -1, config.linear_num_value_heads)
        self.dt_bias = nn.Parameter(step.expm1().log())
        self.norm = GatedRMSNorm(config.linear_value_head_dim, config.rms_norm_eps)
        self.out_proj = linear(self.value_dim, config.hidden_size)

    @torch.no_grad()
    def start_with_induction(self) -> None:
        """Make keys what queries were one token earlier: an untrained layer finds repetitions.

        Query and key share a projection, and the key convolution is the query's delayed by one: at
        token t the state is read where it was written by the tokens that followed the same context
        before. Head 0 matches three tokens, the others one. Copying from the context showed after
        100 steps; from random weights (one run, with other settings too) not after 300.

        Source: the pattern is the induction head of Olsson et al., arXiv 2209.11895.
        """
        qkv, taps = self.in_proj_qkv.weight, self.conv1d.weight[:, 0]
        qkv[self.key_dim : 2 * self.key_dim] = qkv[: self.key_dim]
        taps.normal_(std=0.02)
        taps[:, -1] += 1.0
        first = self.config.linear_key_head_dim
        taps[:first, -3:] += torch.tensor([0.3, 0.5, -0.2])
        taps[self.key_dim : 2 * self.key_dim] = taps[: self.key_dim].roll(-1, dims=-1)

    def forward(self, x: Tensor) -> Tensor:
        """Mix `[B, T, D]` along T."""
        B, T, _ = x.shape
        cfg, taps = self.config, self.conv1d.weight[:, 0]
        qkv = F.pad(self.in_proj_qkv(x), (0, 0, taps.shape[1] - 1, 0))
        mixed = sum(
            (qkv[:, i : i + T] * taps[:, i] for i in range(taps.shape[1])), start=x.new_zeros(1)
        )
        q, k, v = torch.split(F.silu(mixed), [self.key_dim, self.key_dim, self.value_dim], dim=-1)
        repeat = cfg.linear_num_value_heads // cfg.linear_num_key_heads
        q, k = (
            y.reshape(B, T, -1, cfg.linear_key_head_dim)
            .repeat_interleave(repeat, 2)
            .transpose(1, 2)
            for y in (q, k)
        )
        v = v.reshape(B, T, -1, cfg.linear_value_head_dim).transpose(1, 2)
        g = -self.A_log.exp() * F.softplus(self.in_proj_a(x).float() + self.dt_bias)
        beta = self.in_proj_b(x).float().sigmoid()
        with torch.autocast("cpu", enabled=False):
            out = gated_delta_rule(
                q.float(), k.float(), v.float(), g.transpose(1, 2), beta.transpose(1, 2)
            )
        out = out.transpose(1, 2)
        z = self.in_proj_z(x).view(B, T, -1, cfg.linear_value_head_dim)
        projected: Tensor = self.out_proj(self.norm(out, z).reshape(B, T, -1))
        return projected


class Attention(nn.Module):
    """Full attention with per-head query/key norms, partial rotary embedding and an output gate."""

    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.config = config
        heads, kv_heads, size = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.q_proj = linear(config.hidden_size, 2 * heads * size)
        self.k_proj = linear(config.hidden_size, kv_heads * size)
        self.v_proj = linear(config.hidden_size, kv_heads * size)
        self.o_proj = linear(heads * size, config.hidden_size)
        self.q_norm = RMSNorm(size, config.rms_norm_eps)
        self.k_norm = RMSNorm(size, config.rms_norm_eps)

    def rotate(self, x: Tensor) -> Tensor:
        """Rotate the first quarter of `x` `[B, H, T, head_dim]`; in text all M-RoPE axes agree."""
        size = int(self.config.head_dim * self.config.partial_rotary_factor)
        inverse_freq = self.config.rope_theta ** (-torch.arange(0, size, 2) / size)
        angle = torch.arange(x.shape[2])[:, None] * inverse_freq
        a, b, rest = torch.split(x, [size // 2, size // 2, x.shape[-1] - size], dim=-1)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        """Mix `[B, T, D]` along T."""
        B, T, _ = x.shape
        size = self.config.head_dim
        q, gate = self.q_proj(x).view(B, T, -1, 2 * size).chunk(2, dim=-1)
        q = self.rotate(self.q_norm(q).transpose(1, 2))
        k = self.rotate(self.k_norm(self.k_proj(x).view(B, T, -1, size)).transpose(1, 2))
        v = self.v_proj(x).view(B, T, -1, size).transpose(1, 2)
        groups = self.config.num_attention_heads // self.config.num_key_value_heads
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        projected: Tensor = self.o_proj((out * gate.sigmoid()).reshape(B, T, -1))
        return projected
