"""Gated DeltaNet in torch: the causal convolution and the gated delta rule, over ragged batches.

Each value head keeps a matrix S `[dk, dv]`, a memory that is read by query and written by key:

    S <- exp(g) S;   S <- S + k (beta (v - S^T k))^T;   o = S^T q

One token at a time for decode (`recurrent_delta_rule`); for prefill in chunks, where the updates
within a chunk become matrix products (`chunked_delta_rule`). Both are float32 and equal up to
rounding. Padding tokens have beta = 0 and g = 0 and leave the memory as it is.

Legend: N sequences, L tokens of each (padded), H value heads, C channels, k the conv kernel.

Source: Gated Delta Networks (arXiv 2412.06464); the chunked form follows DeltaNet (arXiv
2406.06484), section 3; transformers 5.23 `Qwen3_5MoeGatedDeltaNet`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK_TOKENS = 64


def causal_conv(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    slots: Tensor,
    token_rows: Tensor,
    state_rows: Tensor,
    tail_rows: Tensor,
) -> Tensor:
    """Convolve each sequence's channels with its past, then SiLU; move the state on.

    All sequences go through one buffer, each behind its own k - 1 past inputs, so one pass over the
    buffer serves all of them.

    Args:
        x: `[T, C]`.
        conv_state: `[slots, C, k - 1]`, updated in place.
        weight: float32 `[C, k]`.
        slots: int64 `[S]`.
        token_rows: int64 `[T]`: rows of the tokens in the buffer.
        state_rows: int64 `[S * (k - 1)]`: rows of the past inputs.
        tail_rows: int64 `[S * (k - 1)]`: rows of the last k - 1 inputs after this step.

    Returns:
        float32 `[T, C]`.
    """
    num_taps = weight.shape[1]
    channels = x.shape[1]
    past = conv_state.index_select(0, slots).transpose(1, 2).reshape(-1, channels)
    buffer = x.new_empty(x.shape[0] + past.shape[0], channels)
    buffer.index_copy_(0, token_rows, x)
    buffer.index_copy_(0, state_rows, past)
    tail = buffer.index_select(0, tail_rows).view(slots.shape[0], num_taps - 1, channels)
    conv_state.index_copy_(0, slots, tail.transpose(1, 2))
    taps = weight.t()
    rows = buffer.shape[0] - num_taps + 1
    inputs = buffer.float()
    mixed = inputs[:rows] * taps[0]
    for j in range(1, num_taps):
        mixed.addcmul_(inputs[j : j + rows], taps[j])
    # Row r of `mixed` saw the buffer rows r .. r + k - 1: it belongs to the token at r + k - 1.
    return F.silu(mixed.index_select(0, token_rows - (num_taps - 1)))


def l2_normalize(x: Tensor, eps: float) -> Tensor:
    """Return `x / sqrt(sum(x*x) + eps)` over the last dimension."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


def recurrent_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Advance every memory by one token.

    Args:
        q: float32 `[N, H, dk]`, normalised and scaled.
        k: float32 `[N, H, dk]`, normalised.
        v: float32 `[N, H, dv]`.
        g: float32 `[N, H]`, log decay.
        beta: float32 `[N, H]`, write strength.
        state: float32 `[N, H, dk, dv]`.

    Returns:
        `o [N, H, dv]` and the new state.
    """
    state = state * g.exp()[..., None, None]
    recalled = k.unsqueeze(-2) @ state
    delta = (v.unsqueeze(-2) - recalled) * beta[..., None, None]
    state = state + k.unsqueeze(-1) @ delta
    return (q.unsqueeze(-2) @ state).squeeze(-2), state


def chunked_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Advance every memory by L tokens, `CHUNK_TOKENS` at a time.

    Within a chunk, token i reads what tokens j < i wrote: the values that are really written solve
    `(I + strict_lower(beta_i k_i . k_j decay_ij)) u = beta (v - decay_i S_0^T k)`. Everything but
    the scan over the chunks is done for all chunks at once.

    Args:
        q: float32 `[N, H, L, dk]`, normalised and scaled.
        k: float32 `[N, H, L, dk]`, normalised.
        v: float32 `[N, H, L, dv]`.
        g: float32 `[N, H, L]`, log decay.
        beta: float32 `[N, H, L]`, write strength.
        state: float32 `[N, H, dk, dv]`.

    Returns:
        `o [N, H, L, dv]` and the new state.
    """
    num_tokens = q.shape[2]
    size = min(CHUNK_TOKENS, num_tokens)
    padding = -num_tokens % size
    if padding:
        q, k, v = (F.pad(x, (0, 0, 0, padding)) for x in (q, k, v))
        g, beta = (F.pad(x, (0, padding)) for x in (g, beta))
    shape = (*q.shape[:2], -1, size)
    q, k, v = (x.reshape(*shape, x.shape[-1]) for x in (q, k, v))  # [N, H, chunks, size, d]
    g, beta = g.reshape(shape), beta.reshape(shape)
    since_start = g.cumsum(-1)
    from_start = since_start.exp().unsqueeze(-1)  # decay from the chunk's start to token i
    to_end = (since_start[..., -1:] - since_start).exp().unsqueeze(-1)
    whole_chunk = since_start[..., -1].exp()[..., None, None]
    future = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
    pairs = since_start.unsqueeze(-1) - since_start.unsqueeze(-2)
    # Masked before exp: the log decay of a future pair is positive and could overflow.
    between = pairs.masked_fill_(future, float("-inf")).exp_()
    k_beta = k * beta.unsqueeze(-1)
    system = (k_beta @ k.mT) * between
    right = torch.cat((v * beta.unsqueeze(-1), k_beta * from_start), dim=-1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    values, keys_of_past = torch.split(solved, [v.shape[-1], k.shape[-1]], dim=-1)
    attention = (q @ k.mT) * between
    q = q * from_start
    k = k * to_end
    outputs = []
    for i in range(q.shape[2]):
        written = values[:, :, i] - keys_of_past[:, :, i] @ state
        outputs.append(q[:, :, i] @ state + attention[:, :, i] @ written)
        state = state * whole_chunk[:, :, i] + k[:, :, i].mT @ written
    return torch.cat(outputs, dim=2)[:, :, :num_tokens], state
