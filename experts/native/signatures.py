"""Result and argument types of the C functions, in the order of their parameters.

Pointers are plain addresses (`Tensor.data_ptr()`); who calls keeps the tensors alive.
"""

from __future__ import annotations

from ctypes import c_float, c_int, c_int64, c_void_p
from typing import Any

_INT, _LONG, _PTR, _FLOAT = c_int, c_int64, c_void_p, c_float

SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    # pool.cpp
    "em_set_threads": (None, [_INT]),
    "em_threads": (_INT, []),
    "em_set_spin_us": (None, [_INT]),
    "em_park": (None, []),
    "em_alloc": (_PTR, [_LONG]),
    "em_free": (None, [_PTR, _LONG]),
    "em_discard": (None, [_PTR, _LONG]),
    # linear.cpp
    "em_packed_bytes": (_LONG, [_LONG, _LONG, _INT]),
    "em_pack": (None, [_PTR, _INT, _PTR, _INT, _LONG, _LONG, _LONG]),
    "em_linear": (
        None,
        [_PTR, _INT, _LONG, _LONG, _PTR, _INT, _LONG, _LONG, _PTR, _INT, _LONG],
    ),
    # experts.cpp
    "em_slot_bytes": (_LONG, [_INT, _LONG, _LONG]),
    "em_fill_slot": (None, [_PTR, _INT, _LONG, _LONG, _LONG, _PTR, _PTR, _INT]),
    "em_experts": (
        _INT,
        [
            *(_PTR, _INT, _LONG, _LONG, _LONG, _PTR, _INT, _LONG, _LONG),
            *(_PTR, _PTR, _PTR, _LONG, _INT, _PTR, _INT),
        ],
    ),
    # trunk.cpp
    "em_embed": (None, [_PTR, _LONG, _PTR, _INT, _LONG, _PTR]),
    "em_rms_norm": (None, [_PTR, _LONG, _LONG, _PTR, _FLOAT, _PTR]),
    "em_add_rms_norm": (None, [_PTR, _PTR, _LONG, _LONG, _PTR, _FLOAT, _PTR]),
    "em_swiglu": (None, [_PTR, _LONG, _LONG, _LONG, _PTR]),
    "em_gate_topk": (None, [_PTR, _LONG, _LONG, _LONG, _PTR, _PTR]),
    "em_add_shared": (None, [_PTR, _PTR, _PTR, _LONG, _LONG, _LONG]),
    # gated_delta_net.cpp
    "em_gated_delta_net": (
        None,
        [_PTR] * 4 + [_LONG] + [_PTR] * 4 + [_LONG] * 5 + [_FLOAT] + [_PTR] * 3,
    ),
    # attention.cpp
    "em_kv_block_bytes": (_LONG, [_INT, _LONG, _LONG, _LONG]),
    "em_attention": (
        None,
        [
            *(_PTR, _PTR, _PTR, _INT, _LONG, _PTR, _PTR, _PTR),
            *([_LONG] * 6),
            *(_FLOAT, _FLOAT, _PTR, _PTR, _PTR),
        ],
    ),
    "em_attention_work": (_LONG, [_INT, _LONG, _LONG]),
    "em_attention_section": (
        None,
        [
            *(_INT, _PTR, _PTR, _PTR, _INT, _LONG, _LONG, _LONG, _PTR, _LONG),
            *([_LONG] * 4),
            *(_FLOAT, _FLOAT, _PTR, _PTR, _PTR, _PTR),
        ],
    ),
    # kv_blocks.cpp
    "em_kv_read": (None, [_PTR, _LONG, _INT, _LONG, _LONG, _LONG, _PTR, _LONG, _PTR]),
    "em_kv_write": (None, [_PTR, _LONG, _INT, _LONG, _LONG, _LONG, _PTR, _LONG, _PTR]),
    # step.cpp
    "em_step": (_LONG, [_PTR, _PTR, _PTR]),
    # serve.cpp
    "em_express_new": (_PTR, [_LONG] * 4 + [_INT]),
    "em_express_free": (None, [_PTR]),
    "em_express_lock": (None, [_PTR]),
    "em_express_unlock": (None, [_PTR]),
    "em_express_set_layer": (None, [_PTR, _LONG, _PTR, _LONG, _PTR, _PTR]),
    "em_express_totals": (None, [_PTR, _PTR]),
    "em_express_serve": (_LONG, [_PTR, _INT, _PTR, _PTR, _PTR, _LONG, _PTR]),
    "em_express_answer": (_LONG, [_PTR, _PTR, _LONG, _PTR, _LONG]),
}
