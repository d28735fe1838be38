"""The C++ kernels behind Python: packed weights, banks of experts, and the loader.

This file decides which library is loaded and owns the packed memory; the arithmetic and the layouts
are in the C++ sources (start with `gemm.h`). It knows nothing of models, groups or calls.

Invariance, on which everything else rests: a row's bits depend on that row and on the weights,
never on the other rows, their number, the number of threads or the resident experts. Different
instruction sets give different bits.

Words: a *panel* is 64 columns of a packed weight; a *bank* holds the packed experts of one layer in
*slots*; a *pair* is one (row, slot) for which an expert output is wanted.
"""

from __future__ import annotations

import ctypes
import logging
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experts.native import build
from experts.native.signatures import SIGNATURES

log = logging.getLogger(__name__)

FLOAT32 = 1
BFLOAT16 = 2
SLOTS = 1
PARTIAL = 2
DTYPES = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16}
_ISA_CPU_FLAGS = {
    "avx512bf16": {"avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16"},
    "avx2": {"avx2", "fma"},
}

_SHORT_CALL_WORK = 8_000_000
"""Multiply-adds below which a call is short: at most some 500 us, for one row and cold weights."""


class Library:
    """The functions of one shared object (`em_linear` is `linear`), their argument types set
    once."""

    def __init__(self, cdll: ctypes.CDLL) -> None:
        for name, (result, arguments) in SIGNATURES.items():
            function = getattr(cdll, name)
            function.restype = result
            function.argtypes = arguments
            setattr(self, name.removeprefix("em_"), function)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


class _Memory:
    """Page-aligned memory outside torch, in huge pages where possible; freed with the object."""

    __slots__ = ("__weakref__", "address", "num_bytes")

    def __init__(self, library: Library, num_bytes: int) -> None:
        address = library.alloc(num_bytes)
        if not address:
            raise MemoryError(f"cannot allocate {num_bytes} bytes for packed weights")
        self.address: int = address
        self.num_bytes = num_bytes
        weakref.finalize(self, library.free, address, num_bytes).atexit = False


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A weight `[out_features, in_features]` as `Kernels.linear` reads it."""

    out_features: int
    in_features: int
    dtype: torch.dtype
    code: int
    address: int
    memory: _Memory

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed weight, padding included."""
        return self.memory.num_bytes


@dataclass(frozen=True, slots=True)
class ExpertBank:
    """The packed experts of one layer, `num_slots` of them; a slot is empty until it is filled."""

    num_slots: int
    hidden: int
    intermediate: int
    dtype: torch.dtype
    code: int
    address: int
    slot_bytes: int
    memory: _Memory

    @property
    def num_bytes(self) -> int:
        """Bytes reserved; pages of slots that were never filled are not resident."""
        return self.memory.num_bytes


class Kernels:
    """One library of kernels and its thread pool. Calls from several threads take turns."""

    def __init__(self, path: Path, isa: str) -> None:
        """Load the library at `path`, which must fit this CPU (see `load_kernels`)."""
        self.isa = isa
        self.path = path
        self.library = ctypes.CDLL(str(path))
        """For users that declare functions of their own; calls give up the interpreter lock."""
        self.long = Library(self.library)
        """For calls that last: they give up the interpreter lock."""
        self.short = Library(ctypes.PyDLL(str(path)))
        """For calls of microseconds: they keep the interpreter lock, because taking it back can
        cost a wait of up to 5 ms for another Python thread."""

    @property
    def num_threads(self) -> int:
        """Threads that work on a call, the caller among them."""
        return int(self.short.threads())

    def set_num_threads(self, n: int) -> None:
        """Set how many threads work on a call; the caller is the first of them."""
        if n < 1:
            raise ValueError(f"num_threads must be at least 1, got {n}")
        self.short.set_threads(n)

    def set_spin_us(self, spin_us: int) -> None:
        """Set how long an idle helper spins before it sleeps (default 30 us)."""
        self.short.set_spin_us(spin_us)

    def park(self) -> None:
        """Send idle helpers to sleep at once: the caller is about to wait for someone else."""
        self.short.park()

    def pack_linear(self, weight: Tensor, dtype: torch.dtype | None = None) -> PackedLinear:
        """Pack a weight for `linear`; the original is not kept.

        Args:
            weight: `[N, K]` float32 or bfloat16, CPU, last dimension contiguous.
            dtype: What it is packed as (bfloat16 rounds to nearest even); default its own dtype.
        """
        n, k = weight.shape
        dtype = dtype or weight.dtype
        code = DTYPES[dtype]
        if weight.stride(1) != 1 and k > 1:
            weight = weight.contiguous()
        memory = _Memory(self.long, self.long.packed_bytes(n, k, code))
        self.long.pack(
            *(memory.address, code, weight.data_ptr(), DTYPES[weight.dtype], n, k),
            weight.stride(0) * weight.element_size(),
        )
        return PackedLinear(n, k, dtype, code, memory.address, memory)

    def linear(
        self,
        x: Tensor,
        w: PackedLinear,
        out: Tensor | None = None,
        out_dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Multiply rows by a packed weight: `x @ weight.T`, sums in float32.

        Args:
            x: `[M, K]` float32 or bfloat16; rows may have a stride. Float32 inputs of a bfloat16
                weight are rounded to bfloat16 first.
            w: The packed weight.
            out: Where to write, `[M, N]` with contiguous rows; a fresh tensor without it.
            out_dtype: Dtype of a fresh `out`.

        Returns:
            `[M, N]`.
        """
        m, k = x.shape
        n = w.out_features
        if k != w.in_features:
            raise ValueError(f"x has {k} columns, the weight {w.in_features}")
        row_elements, step = x.stride()
        if step != 1 and k > 1:
            x, row_elements = x.contiguous(), k
        if out is None:
            out = torch.empty((m, n), dtype=out_dtype)
            out_row_elements = n
        elif out.shape == (m, n) and (out.stride(1) == 1 or n == 1):
            out_dtype, out_row_elements = out.dtype, out.stride(0)
        else:
            raise ValueError(f"out must be [{m}, {n}] with contiguous rows, got {out.shape}")
        x_dtype = x.dtype
        library = self.short if m * n * k < _SHORT_CALL_WORK else self.long
        library.linear(
            *(w.address, w.code, n, k, x.data_ptr(), DTYPES[x_dtype], m),
            *(row_elements * x_dtype.itemsize, out.data_ptr(), DTYPES[out_dtype], out_row_elements),
        )
        return out

    def new_expert_bank(
        self, num_slots: int, hidden: int, intermediate: int, dtype: torch.dtype
    ) -> ExpertBank:
        """Reserve packed storage for the experts of one layer.

        Args:
            num_slots: Experts it can hold.
            hidden: Width of rows and outputs.
            intermediate: Width of gate and of up.
            dtype: float32 or bfloat16; bfloat16 rounds inputs and the SwiGLU output to bfloat16.
        """
        code = DTYPES[dtype]
        slot_bytes = self.long.slot_bytes(code, hidden, intermediate)
        memory = _Memory(self.long, max(1, num_slots) * slot_bytes)
        return ExpertBank(
            num_slots, hidden, intermediate, dtype, code, memory.address, slot_bytes, memory
        )

    def fill_slot(self, bank: ExpertBank, slot: int, gate_up: Tensor, down: Tensor) -> None:
        """Pack one expert into a slot, replacing what was there.

        Args:
            bank: The bank.
            slot: In `[0, bank.num_slots)`.
            gate_up: `[2 * intermediate, hidden]`, gate first; float32 or bfloat16.
            down: `[hidden, intermediate]`, same dtype.
        """
        want = (2 * bank.intermediate, bank.hidden), (bank.hidden, bank.intermediate)
        if (tuple(gate_up.shape), tuple(down.shape)) != want or gate_up.dtype != down.dtype:
            raise ValueError(
                f"an expert of this bank has gate_up {want[0]} and down {want[1]} of one dtype, "
                f"got {tuple(gate_up.shape)} {gate_up.dtype} and {tuple(down.shape)} {down.dtype}"
            )
        if not 0 <= slot < bank.num_slots:
            raise ValueError(f"slot {slot} is not in [0, {bank.num_slots})")
        gate_up, down = gate_up.contiguous(), down.contiguous()
        self.long.fill_slot(
            *(bank.address, bank.code, slot, bank.hidden, bank.intermediate),
            *(gate_up.data_ptr(), down.data_ptr(), DTYPES[gate_up.dtype]),
        )

    def empty_slot(self, bank: ExpertBank, slot: int) -> None:
        """Give a slot's memory back to the system; nobody may compute with it until it is filled.

        Args:
            bank: The bank.
            slot: In `[0, bank.num_slots)`.
        """
        if not 0 <= slot < bank.num_slots:
            raise ValueError(f"slot {slot} is not in [0, {bank.num_slots})")
        self.long.discard(bank.address + slot * bank.slot_bytes, bank.slot_bytes)

    def experts_forward(
        self,
        bank: ExpertBank,
        rows: Tensor,
        pair_row: Tensor,
        pair_slot: Tensor,
        pair_weight: Tensor | None,
        combine: int,
        out: Tensor,
    ) -> None:
        """Run experts over pairs of (row, slot).

        Args:
            bank: The layer's experts; every slot in `pair_slot` must have been filled.
            rows: `[R, hidden]` float32 or bfloat16, contiguous rows.
            pair_row: `[P]` int32, in `[0, R)`.
            pair_slot: `[P]` int32, in `[0, bank.num_slots)`.
            pair_weight: `[P]` float32, used by PARTIAL; None counts as 1.
            combine: SLOTS: `out[p]` is the unweighted output of pair p. PARTIAL: `out[r]` is the
                float32 sum of weight * output over the row's pairs, in pair order.
            out: `[P, hidden]` float32 or bfloat16 for SLOTS, `[R, hidden]` float32 for PARTIAL;
                contiguous.

        Raises:
            IndexError: A pair names a row or slot that does not exist; `out` is untouched.
        """
        num_rows, hidden = rows.shape
        num_pairs = pair_row.shape[0]
        if hidden != bank.hidden or rows.stride(1) != 1:
            raise ValueError(f"rows must be [R, {bank.hidden}], got {tuple(rows.shape)}")
        if pair_slot.shape[0] != num_pairs or pair_row.dtype != torch.int32:
            raise ValueError("pair_row and pair_slot must be int32 of one length")
        if pair_slot.dtype != torch.int32 or not out.is_contiguous():
            raise ValueError("pair_slot must be int32 and out contiguous")
        if out.shape != ((num_pairs if combine == SLOTS else num_rows), hidden):
            raise ValueError(f"out has shape {tuple(out.shape)}")
        if combine == PARTIAL and out.dtype != torch.float32:
            raise ValueError("PARTIAL sums are float32")
        if pair_weight is not None and (
            pair_weight.shape[0] != num_pairs or pair_weight.dtype != torch.float32
        ):
            raise ValueError("pair_weight must be float32, one for each pair")
        x_dtype = rows.dtype
        work = num_pairs * hidden * bank.intermediate * 3
        library = self.short if work < _SHORT_CALL_WORK else self.long
        code = library.experts(
            *(bank.address, bank.code, bank.num_slots, hidden, bank.intermediate),
            *(rows.data_ptr(), DTYPES[x_dtype], num_rows, rows.stride(0) * x_dtype.itemsize),
            *(pair_row.data_ptr(), pair_slot.data_ptr()),
            None if pair_weight is None else pair_weight.data_ptr(),
            *(num_pairs, combine, out.data_ptr(), DTYPES[out.dtype]),
        )
        if code:
            name, bound = ("pair_row", num_rows) if code == 1 else ("pair_slot", bank.num_slots)
            raise IndexError(f"{name} has an entry outside [0, {bound})")


def cpu_flags() -> frozenset[str]:
    """Read this machine's CPU flags; empty where /proc/cpuinfo does not list them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    found = next((line for line in lines if line.startswith("flags")), ":")
    return frozenset(found.split(":", 1)[1].split())


def load_kernels(isa: str = "auto") -> Kernels | None:
    """Load the best kernels that are built and that this CPU runs.

    Args:
        isa: "auto", or one of `build.ISA_FLAGS` to insist on.

    Returns:
        The kernels, with one thread; None when there are none (the caller falls back to torch).
    """
    if isa != "auto" and isa not in _ISA_CPU_FLAGS:
        raise ValueError(f'isa must be "auto" or one of {sorted(_ISA_CPU_FLAGS)}, got {isa!r}')
    flags = cpu_flags()
    reasons = []
    for name in _ISA_CPU_FLAGS if isa == "auto" else [isa]:
        missing = _ISA_CPU_FLAGS[name] - flags
        path = build.library_path(name)
        if missing:
            reasons.append(f"{name}: the CPU lacks {' '.join(sorted(missing))}")
        elif not path.exists():
            reasons.append(f"{name}: not built (python -m experts.native.build)")
        else:
            try:
                kernels = Kernels(path, name)
            except OSError as error:
                reasons.append(f"{name}: {error}")
                continue
            log.info("native_kernels isa=%s library=%s", name, path.name)
            return kernels
    log.warning("native_kernels isa=none fallback=torch reasons=%s", "; ".join(reasons))
    return None
