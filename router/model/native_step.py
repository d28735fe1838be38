"""A whole step in one native call: embedding to logits, experts included.

`experts/native/step.cpp` calls the same kernels in the same order as the loop in `decoder.py`, so
the bits are the same; what falls away is the interpreter between two kernels, and above all its
lock, which the gateway's thread wants while the model computes. Serves decoders on `NativeOps`
whose experts, if any, are called natively too (`NativeExperts`).
"""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_int64, c_void_p
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor

from experts.native.kernels import DTYPES, Library, PackedLinear
from router.engine.batch import Batch
from router.model.config import ModelConfig
from router.model.native_ops import NativeKv, NativeOps
from router.model.ops import GdnState
from router.model.weights import AttentionWeights, LayerWeights, MoeWeights, TrunkWeights


class NativeExperts(Protocol):
    """Routed experts that a native step calls by itself."""

    @property
    def has_native_calls(self) -> bool:
        """Whether `begin_native` may be called."""
        ...

    def begin_native(self, num_tokens: int) -> int:
        """Return the address of the `em::Dispatch` for one step of up to `num_tokens` rows."""
        ...

    def end_native(self, failed_layer: int) -> None:
        """Take up what the step has done; raise what failed in layer `failed_layer`, if not -1."""
        ...


def calls_natively(experts: Any) -> TypeGuard[NativeExperts]:
    """Return whether these experts can be part of a native step."""
    return bool(getattr(experts, "has_native_calls", False))


class _Linear(ctypes.Structure):
    _fields_ = (("weight", c_void_p), ("code", c_int64), ("n", c_int64), ("k", c_int64))

    @classmethod
    def of(cls, weight: PackedLinear) -> _Linear:
        return cls(weight.address, weight.code, weight.out_features, weight.in_features)


def _fields(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


class _Layer(ctypes.Structure):
    """`em::LayerPlan`."""

    _fields_ = (
        _fields(c_int64, "is_attention is_moe")
        + _fields(c_void_p, "input_norm post_norm")
        + _fields(_Linear, "in_proj out_proj")
        + _fields(c_void_p, "conv_weight decay dt_bias gdn_norm")
        + _fields(c_int64, "key_heads value_heads dk dv taps")
        + _fields(c_double, "gdn_eps")
        + _fields(c_void_p, "conv_state recurrent_state")
        + _fields(c_void_p, "q_norm k_norm")
        + _fields(c_int64, "heads kv_heads head_dim rotary_dim")
        + _fields(c_double, "scale attention_eps")
        + _fields(c_void_p, "kv")
        + _fields(c_int64, "kv_code block_size")
        + _fields(_Linear, "gate wide down")
        + _fields(c_int64, "size top_k")
    )


class _Model(ctypes.Structure):
    """`em::ModelPlan`."""

    _fields_ = (
        _fields(c_void_p, "layers")
        + _fields(c_int64, "num_layers hidden")
        + _fields(c_double, "eps")
        + _fields(c_void_p, "embedding")
        + _fields(c_int64, "embedding_code")
        + _fields(c_void_p, "final_norm")
        + _fields(_Linear, "head")
    )


class _Step(ctypes.Structure):
    """`em::StepPlan`."""

    _fields_ = (
        _fields(c_int64, "tokens sequences max_blocks num_logits")
        + _fields(c_void_p, "token_ids query_start context_lens block_tables state_slots")
        + _fields(c_void_p, "cos_sin logit_rows logits")
    )


class NativeStep:
    """The steps of one decoder over one set of caches.

    Args:
        config: The model's sizes.
        weights: Packed by `ops`.
        ops: The kernels.
        caches: Per layer, as `ops` allocated them.
        experts: None in a dense model.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: TrunkWeights,
        ops: NativeOps,
        caches: tuple[Any, ...],
        experts: NativeExperts | None,
    ) -> None:
        self._kept = weights, caches, ops  # native code points into them
        self._library: Library = ops.long
        self._experts = experts
        self._vocab_size = weights.head.out_features
        self._layers = (_Layer * len(caches))(
            *(
                _plan(layer, ops, cache, config.top_k)
                for layer, cache in zip(weights.layers, caches, strict=True)
            )
        )
        head: Any = weights.head
        self._model = _Model(
            layers=ctypes.addressof(self._layers),
            num_layers=len(caches),
            hidden=config.hidden_size,
            eps=config.rms_norm_eps,
            embedding=weights.embedding.data_ptr(),
            embedding_code=DTYPES[weights.embedding.dtype],
            final_norm=weights.final_norm.data_ptr(),
            head=_Linear.of(head),
        )
        self._model_address = ctypes.addressof(self._model)

    def run(self, batch: Batch, cos_sin: Tensor) -> Tensor:
        """See `Decoder.forward`.

        Args:
            batch: At least one token.
            cos_sin: Rotary rows of the batch's positions.
        """
        num_logits = batch.logit_rows.shape[0]
        logits = torch.empty(num_logits, self._vocab_size)
        step = _Step(
            tokens=batch.num_tokens,
            sequences=batch.num_sequences,
            max_blocks=batch.block_tables.shape[1],
            num_logits=num_logits,
            token_ids=batch.token_ids.data_ptr(),
            query_start=batch.query_start.data_ptr(),
            context_lens=batch.context_lens.data_ptr(),
            block_tables=batch.block_tables.data_ptr(),
            state_slots=batch.state_slots.data_ptr(),
            cos_sin=cos_sin.data_ptr(),
            logit_rows=batch.logit_rows.data_ptr(),
            logits=logits.data_ptr(),
        )
        experts = self._experts
        dispatch = None if experts is None else experts.begin_native(batch.num_tokens)
        failed_layer = self._library.step(self._model_address, ctypes.byref(step), dispatch)
        if experts is not None:
            experts.end_native(failed_layer)
        return logits


def _plan(layer: LayerWeights, ops: NativeOps, cache: Any, top_k: int) -> _Layer:
    mixer: Any = layer.mixer
    plan = _Layer(
        is_attention=isinstance(mixer, AttentionWeights),
        input_norm=layer.input_norm.data_ptr(),
        post_norm=layer.post_norm.data_ptr(),
        in_proj=_Linear.of(mixer.in_proj),
        out_proj=_Linear.of(mixer.out_proj),
    )
    (_plan_attention if plan.is_attention else _plan_gdn)(plan, mixer.params, ops, cache)
    mlp: Any = layer.mlp
    if isinstance(layer.mlp, MoeWeights):
        plan.is_moe, plan.top_k = 1, top_k
        plan.gate = _Linear.of(mlp.gate)
        plan.wide, plan.down = _Linear.of(mlp.shared_in), _Linear.of(mlp.shared_out)
        plan.size = (mlp.shared_in.out_features - 1) // 2
    else:
        plan.wide, plan.down = _Linear.of(mlp.gate_up), _Linear.of(mlp.down)
        plan.size = mlp.gate_up.out_features // 2
    return plan


def _plan_attention(plan: _Layer, params: Any, ops: NativeOps, kv: NativeKv) -> None:
    plan.q_norm, plan.k_norm = params.q_norm.data_ptr(), params.k_norm.data_ptr()
    plan.heads, plan.kv_heads = params.num_heads, params.num_kv_heads
    plan.head_dim, plan.rotary_dim = params.head_dim, params.rotary_dim
    plan.scale, plan.attention_eps = params.scale, params.eps
    plan.kv, plan.kv_code, plan.block_size = kv.address, kv.code, kv.block_size


def _plan_gdn(plan: _Layer, params: Any, ops: NativeOps, state: GdnState) -> None:
    plan.conv_weight = ops.conv_weight(params).data_ptr()
    plan.decay, plan.dt_bias = params.decay.data_ptr(), params.dt_bias.data_ptr()
    plan.gdn_norm = params.norm_weight.data_ptr()
    plan.key_heads, plan.value_heads = params.num_key_heads, params.num_value_heads
    plan.dk, plan.dv = params.key_head_dim, params.value_head_dim
    plan.taps, plan.gdn_eps = params.conv_kernel, params.eps
    plan.conv_state, plan.recurrent_state = state.conv.data_ptr(), state.recurrent.data_ptr()
