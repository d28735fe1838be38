"""The sparse half of the training twin: gate, experts, decoder layers, trunk and MTP layer.

It decides how routed experts are computed in training, and what the gate is pushed towards: a weak
balance loss keeps every expert alive, and leaves the load uneven. Letters as in `model.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from model import TRUNK_PREFIX, Attention, DemoConfig, GatedDeltaNet, RMSNorm, linear
from torch import Tensor, nn


class Forward(NamedTuple):
    """What one training forward gives."""

    hidden: Tensor
    """After the final norm, `[B, T, D]`."""
    mtp_hidden: Tensor | None
    """After the MTP norm, `[B, T-1, D]`: position t has seen token t+1 and predicts token t+2."""
    balance: Tensor
    """Mean over layers of the balance loss, 1 at perfect balance."""


class Experts(nn.Module):
    """All routed experts of a layer in the released fused layout."""

    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        E, D, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.randn(E, 2 * inner, D) * D**-0.5)
        self.down_proj = nn.Parameter(torch.randn(E, D, inner) * inner**-0.5)

    def forward(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Compute `[N, D]` with every expert on every row, those not chosen weighted zero.

        Four times the arithmetic of the sparse sum, in two large matmuls instead of a hundred small
        ones: on a CPU with bfloat16 instructions, forward and backward of the whole model took
        about 0.8 times as long as with just the chosen rows (1,024 tokens, one thread).
        """
        E, double, _ = self.gate_up_proj.shape
        dense = x.new_zeros(x.shape[0], E).scatter(1, topk_ids, topk_weights.to(x.dtype))
        gate, up = F.linear(x, self.gate_up_proj.flatten(0, 1)).view(-1, E, double).chunk(2, dim=-1)
        inner = F.silu(gate) * up * dense.unsqueeze(-1)
        return F.linear(inner.flatten(1), self.down_proj.transpose(0, 1).flatten(1))


class SharedExpert(nn.Module):
    """The always-on feed-forward network."""

    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        inner = config.shared_expert_intermediate_size
        self.gate_proj = linear(config.hidden_size, inner)
        self.up_proj = linear(config.hidden_size, inner)
        self.down_proj = linear(inner, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Compute `[N, D]`."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class SparseMoe(nn.Module):
    """Gate, routed experts and shared expert; remembers the balance of the last forward."""

    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.gate = linear(config.hidden_size, config.num_experts)
        self.experts = Experts(config)
        self.shared_expert = SharedExpert(config)
        self.shared_expert_gate = linear(config.hidden_size, 1)
        self.balance = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        """Compute `[B, T, D]` with the active and the shared experts."""
        flat = x.flatten(0, 1)
        probs = self.gate(flat).float().softmax(-1)
        weights, ids = probs.topk(self.top_k, dim=-1)
        share = ids.flatten().bincount(minlength=probs.shape[1]) / ids.numel()
        self.balance = probs.shape[1] * (share * probs.mean(0)).sum()
        out: Tensor = self.experts(flat, ids, weights / weights.sum(-1, keepdim=True))
        out = out + self.shared_expert_gate(flat).sigmoid() * self.shared_expert(flat)
        return out.view_as(x)


class DecoderLayer(nn.Module):
    """Pre-norm residual layer: a token mixer, then the sparse feed-forward."""

    def __init__(self, config: DemoConfig, *, full_attention: bool) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.full_attention = full_attention
        if full_attention:
            self.self_attn = Attention(config)
        else:
            self.linear_attn = GatedDeltaNet(config)
        self.mlp = SparseMoe(config)

    def forward(self, x: Tensor) -> Tensor:
        """Compute `[B, T, D]`."""
        mixer = self.self_attn if self.full_attention else self.linear_attn
        x = x + mixer(self.input_layernorm(x))
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class MtpHead(nn.Module):
    """Multi-token prediction: from hidden state and next token to the token after it."""

    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.pre_fc_norm_embedding = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.pre_fc_norm_hidden = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.fc = linear(2 * config.hidden_size, config.hidden_size)
        self.layers = nn.ModuleList([DecoderLayer(config, full_attention=True)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, next_embedding: Tensor, hidden: Tensor) -> Tensor:
        """Return the normed hidden state for the shared head; the embedding comes first."""
        pair = [self.pre_fc_norm_embedding(next_embedding), self.pre_fc_norm_hidden(hidden)]
        out: Tensor = self.norm(self.layers[0](self.fc(torch.cat(pair, dim=-1))))
        return out


class DemoModel(nn.Module):
    """Trunk, head and MTP layer, with the tensor names of the released checkpoints."""

    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, full_attention=config.is_full_attention(i))
            for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = linear(config.hidden_size, config.vocab_size)
        self.mtp = MtpHead(config)
        self._init_weights()

    @torch.no_grad()
    def _init_weights(self) -> None:
        """Draw projections at unit gain; what writes into the residual stream starts near zero."""
        for name, weight in self.named_parameters():
            if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight", "down_proj")):
                weight.normal_(std=0.2 * weight.shape[-1] ** -0.5)
            elif name == "lm_head.weight":
                weight.normal_(std=0.02)
            elif name == "embed_tokens.weight":
                weight.normal_(std=0.5)
            elif weight.dim() == 2:
                weight.normal_(std=weight.shape[-1] ** -0.5)
        for layer in self.layers:
            if isinstance(layer, DecoderLayer) and not layer.full_attention:
                layer.linear_attn.start_with_induction()

    def forward(self, ids: Tensor, *, with_mtp: bool = True) -> Forward:
        """Run trunk and MTP layer over `ids` `[B, T]`; `T` must be a multiple of `model.CHUNK`."""
        embedded = self.embed_tokens(ids)
        x = embedded
        for layer in self.layers:
            x = layer(x)
        hidden = self.norm(x)
        mtp_hidden = self.mtp(embedded[:, 1:], hidden[:, :-1]) if with_mtp else None
        used = [*self.layers, *(self.mtp.layers if with_mtp else ())]
        return Forward(
            hidden, mtp_hidden, torch.stack([layer.mlp.balance for layer in used]).mean()
        )

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """Return all weights in bfloat16 under their released names."""
        own_prefix = ("lm_head.", "mtp.")
        return {
            name if name.startswith(own_prefix) else TRUNK_PREFIX + name: weight.detach()
            .to(torch.bfloat16)
            .contiguous()
            for name, weight in self.state_dict().items()
        }
