"""Chooses how a group computes, by measuring the candidates on this machine at start-up.

Each candidate runs a few synthetic experts of the real shape at 1, 8 and 64 rows; the least product
of the three times wins, because a group serves decode steps and prefill chunks alike. A candidate
that disagrees with the others is a bug on
this machine: it is logged and refused. Costs 0.1 to 1 s; the losers' memory is gone before the real
experts are loaded.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

import torch

from experts import device
from experts.compute import DeepSpeedCompute, ExpertCompute, ExpertShape, NativeCompute
from experts.native.kernels import Kernels, load_kernels
from experts.reference import ReferenceCompute
from protos.codec import Combine
from protos.errors import ConfigurationError, ResourceError

log = logging.getLogger(__name__)

CHOICES = ("auto", "native", "deepspeed", "torch")
ROW_COUNTS = (1, 8, 64)
NUM_SYNTHETIC = 4
PAIRS_PER_ROW = 2
_REPEATS = 3
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2}
"""Largest difference from the first candidate, relative to the largest output."""

Factory = Callable[[ExpertShape], ExpertCompute]


def choose_compute(shape: ExpertShape, choice: str = "auto", num_threads: int = 1) -> ExpertCompute:
    """Return an empty compute for the shape.

    Args:
        shape: Shape and dtype of the experts.
        choice: `auto` measures; `native`, `deepspeed` or `torch` forces one (deepspeed still
            measures its two ways).
        num_threads: Threads that work on one call.

    Raises:
        ConfigurationError: Unknown choice, unsupported dtype, or deepspeed is not importable.
        ResourceError: `native` is forced and no kernels fit this CPU.
    """
    if choice not in CHOICES:
        raise ConfigurationError("experts.compute", f"must be one of {', '.join(CHOICES)}", choice)
    if shape.dtype not in _TOLERANCE:
        raise ConfigurationError("experts.dtype", "must be float32 or bfloat16", str(shape.dtype))
    device.require_deepspeed()
    torch.set_num_threads(num_threads)
    if choice == "torch":
        return ReferenceCompute(shape.dtype)
    candidates = _candidates(shape, choice, num_threads)
    compute = _fastest(shape, candidates)(shape)
    if isinstance(compute, NativeCompute):
        torch.set_num_threads(1)  # the kernels have a pool of their own
    return compute


def _candidates(shape: ExpertShape, choice: str, num_threads: int) -> dict[str, Factory]:
    candidates: dict[str, Factory] = {}
    on_cpu = device.current_device().type == "cpu"
    if choice in ("auto", "native"):
        kernels = load_kernels() if on_cpu else None
        if kernels is not None:
            kernels.set_num_threads(num_threads)
            candidates["native"] = _native(kernels)
        elif choice == "native":
            raise ResourceError(
                "native kernels",
                need="a built library that fits this CPU",
                have="none" if on_cpu else "an accelerator that is not a CPU",
                hint="run python -m experts.native.build, or set experts.compute to auto",
            )
    if choice in ("auto", "deepspeed"):
        candidates["deepspeed_loop"] = _deepspeed(use_grouped_mm=False)
        # torch's grouped GEMM wants strides that are multiples of 16 bytes.
        row_bytes = (
            size * shape.dtype.itemsize for size in (shape.hidden_size, shape.intermediate_size)
        )
        if all(size % 16 == 0 for size in row_bytes):
            candidates["deepspeed_grouped_mm"] = _deepspeed(use_grouped_mm=True)
    return candidates


def _native(kernels: Kernels) -> Factory:
    return lambda shape: NativeCompute(shape, kernels)


def _deepspeed(*, use_grouped_mm: bool) -> Factory:
    return lambda shape: DeepSpeedCompute(shape, use_grouped_mm=use_grouped_mm)


def _fastest(shape: ExpertShape, candidates: dict[str, Factory]) -> Factory:
    """Measure and compare; log what was seen."""
    if len(candidates) == 1:
        name, factory = next(iter(candidates.items()))
        log.info("event=compute_chosen name=%s forced=true", name)
        return factory
    small = ExpertShape(
        num_layers=1,
        num_experts=NUM_SYNTHETIC,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        dtype=shape.dtype,
    )
    seen = {name: _measure(small, factory) for name, factory in candidates.items()}
    # What deepspeed's loop says is right: it is plain matmuls.
    expected = seen["deepspeed_loop"][1]
    for name in candidates:
        difference = (seen[name][1] - expected).abs().max() / expected.abs().max()
        if not float(difference) <= _TOLERANCE[shape.dtype]:
            log.error("event=compute_rejected name=%s relative_error=%.3g", name, float(difference))
            del seen[name]
    best = min(seen, key=lambda name: math.prod(seen[name][0]))
    log.info(
        "event=compute_chosen name=%s hidden=%d intermediate=%d dtype=%s rows=%s %s",
        best,
        shape.hidden_size,
        shape.intermediate_size,
        str(shape.dtype).removeprefix("torch."),
        "/".join(map(str, ROW_COUNTS)),
        " ".join(
            f"{name}_us={'/'.join(f'{s * 1e6:.0f}' for s in times)}"
            for name, (times, _) in seen.items()
        ),
    )
    return candidates[best]


def _measure(shape: ExpertShape, factory: Factory) -> tuple[list[float], torch.Tensor]:
    """Return the best seconds per call for each row count, and the last outputs in float32."""
    generator = torch.Generator().manual_seed(0)
    compute = factory(shape)
    compute.reserve(0, shape.num_experts)
    hidden, inter = shape.hidden_size, shape.intermediate_size
    for expert_id in range(shape.num_experts):
        gate_up = torch.randn(2 * inter, hidden, generator=generator) / hidden**0.5
        down = torch.randn(hidden, inter, generator=generator) / inter**0.5
        compute.load(0, expert_id, gate_up.to(shape.dtype), down.to(shape.dtype))
    times = []
    out = torch.empty(0)
    for num_rows in ROW_COUNTS:
        rows = torch.randn(num_rows, hidden, generator=generator).to(shape.dtype)
        pair_row = torch.arange(num_rows, dtype=torch.int32).repeat_interleave(PAIRS_PER_ROW)
        pair_expert = torch.arange(len(pair_row), dtype=torch.int32) % shape.num_experts
        best_s = math.inf
        for _ in range(1 + _REPEATS):
            started = time.perf_counter()
            out = compute.forward(0, rows, pair_row, pair_expert, None, Combine.SLOTS)
            best_s = min(best_s, time.perf_counter() - started)
        times.append(best_s)
    return times, out.float()
