"""The C++ kernels beside torch (oneDNN), in one run, in turn: `python -m tests.benchmarks.kernels`.

Regime and ceilings (bench-large dims, bfloat16):
- `cold`: one weight [768, 1024] after another out of 400 MB, so weights come from memory, as in
  decode. GB/s of weights; ceiling: what memory reads give (peers.md section 4: 47 GB/s on two
  threads, 23 on one).
- `warm`: one weight again and again. GFLOP/s; ceiling: vdpbf16ps, 64 operations a cycle and core on
  a 256-bit machine, 128 on a 512-bit one.
- `experts`: one layer of 128 experts, top 8, 1024 x 384, freshly drawn experts each call, against a
  loop over active experts with weights that oneDNN packed once, and with plain F.linear; ms.
- `calls`: microseconds of the smallest calls, Python included.
Other work on the machine slows everything; each repetition notes how many cores it took.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from experts.native.kernels import SLOTS, Kernels, load_kernels
from tests.benchmarks.harness import Samples, alternate, report

N, K = 768, 1024
EXPERTS, TOP_K, HIDDEN, INTER = 128, 8, 1024, 384
BF16 = torch.bfloat16


def seconds(call: Callable[[], object]) -> Callable[[], float]:
    """Return a function that times one call."""

    def timed() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return timed


def row(
    name: str, samples: dict[str, Samples], unit: str, value: Callable[[float], float]
) -> dict[str, Any]:
    """Print one line and return its figures: the median and the best of each side."""
    figures = {}
    for side, s in samples.items():
        best = min(s.values)
        figures[side] = {"median": round(value(s.median), 2), "best": round(value(best), 2)}
    text = "  ".join(f"{side} {f['median']:9.2f} ({f['best']:.2f})" for side, f in figures.items())
    print(f"{name:24} {unit:8} {text}", flush=True)
    return {"unit": unit, **figures}


def linear_rows(kernels: Kernels, repeats: int) -> dict[str, object]:
    """Compare single products, weights cold and warm."""
    figures: dict[str, object] = {}
    weights = [torch.randn(N, K).to(BF16) / 32 for _ in range(256)]
    packed = [kernels.pack_linear(weight) for weight in weights]
    num_bytes = len(weights) * N * K * 2
    for m in (1, 2, 4, 8, 32):
        x = torch.randn(m, K).to(BF16)
        samples = alternate(
            {
                "native": seconds(lambda x=x: [kernels.linear(x, w) for w in packed]),
                "torch": seconds(lambda x=x: [F.linear(x, w) for w in weights]),
            },
            repeats,
        )
        figures[f"cold_m{m}"] = row(f"cold m={m}", samples, "GB/s", lambda s: num_bytes / s / 1e9)
    for m in (1, 8, 32, 64, 512):
        x = torch.randn(m, K).to(BF16)
        calls = max(4, 2048 // m)
        work = 2 * m * N * K * calls
        samples = alternate(
            {
                "native": seconds(
                    lambda x=x, c=calls: [kernels.linear(x, packed[0]) for _ in range(c)]
                ),
                "torch": seconds(lambda x=x, c=calls: [F.linear(x, weights[0]) for _ in range(c)]),
            },
            repeats,
        )
        figures[f"warm_m{m}"] = row(
            f"warm m={m}", samples, "GFLOP/s", lambda s, w=work: w / s / 1e9
        )
    return figures


class TorchExperts:
    """A loop over the active experts, with plain weights or with weights packed for oneDNN."""

    def __init__(self, gate_up: Tensor, down: Tensor, *, onednn: bool) -> None:
        self._onednn = onednn
        if onednn:
            pack = torch.ops.mkldnn._reorder_linear_weight
            self._gate_up = [pack(w, None) for w in gate_up]
            self._down = [pack(w, None) for w in down]
        else:
            self._gate_up, self._down = list(gate_up), list(down)

    def _linear(self, x: Tensor, w: Tensor) -> Tensor:
        if self._onednn:
            return torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
        return F.linear(x, w)

    def __call__(self, x: Tensor, pair_slot: Tensor) -> Tensor:
        order = pair_slot.argsort(stable=True)
        rows = x[order // TOP_K]
        out = torch.empty(len(rows), HIDDEN, dtype=BF16)
        start = 0
        counts = torch.bincount(pair_slot, minlength=EXPERTS)
        for expert, count in enumerate(counts.tolist()):
            if count:
                part = rows[start : start + count]
                gate, up = self._linear(part, self._gate_up[expert]).chunk(2, -1)
                out[start : start + count] = self._linear(F.silu(gate) * up, self._down[expert])
                start += count
        unsorted = torch.empty_like(out)
        unsorted[order] = out
        return unsorted


def expert_rows(kernels: Kernels, repeats: int) -> dict[str, object]:
    """Compare one layer's experts at several numbers of tokens."""
    gate_up = (torch.randn(EXPERTS, 2 * INTER, HIDDEN) / HIDDEN**0.5).to(BF16)
    down = (torch.randn(EXPERTS, HIDDEN, INTER) / INTER**0.5).to(BF16)
    bank = kernels.new_expert_bank(EXPERTS, HIDDEN, INTER, BF16)
    for e in range(EXPERTS):
        kernels.fill_slot(bank, e, gate_up[e], down[e])
    plain = TorchExperts(gate_up, down, onednn=False)
    onednn = TorchExperts(gate_up, down, onednn=True)
    figures: dict[str, object] = {}
    for tokens in (1, 8, 64, 512):
        x = torch.randn(tokens, HIDDEN).to(BF16)
        pair_row = torch.arange(tokens).repeat_interleave(TOP_K).int()
        out = torch.empty(tokens * TOP_K, HIDDEN, dtype=BF16)

        def draw(tokens: int = tokens) -> Tensor:
            return torch.rand(tokens, EXPERTS).topk(TOP_K).indices.flatten()

        def native(x: Tensor = x, rows: Tensor = pair_row, out: Tensor = out) -> Tensor:
            kernels.experts_forward(bank, x, rows, draw().int(), None, SLOTS, out)
            return out

        slots = draw()
        kernels.experts_forward(bank, x, pair_row, slots.int(), None, SLOTS, out)
        want = plain(x, slots).float()
        error = float((out.float() - want).abs().max() / want.abs().max())
        assert error < 0.02, error
        samples = alternate(
            {
                "native": seconds(native),
                "onednn": seconds(lambda x=x: onednn(x, draw())),
                "torch": seconds(lambda x=x: plain(x, draw())),
            },
            repeats * (3 if tokens < 64 else 1),
        )
        figures[f"experts_t{tokens}"] = row(
            f"experts tokens={tokens}", samples, "ms", lambda s: s * 1e3
        )
    return figures


def call_rows(kernels: Kernels, repeats: int) -> dict[str, object]:
    """Time the smallest product: what a call costs beside its work."""
    packed = kernels.pack_linear(torch.randn(16, 16).to(BF16))
    weight, x = torch.randn(16, 16), torch.randn(1, 16)
    out = torch.empty(1, 16)
    samples = alternate(
        {
            "native": seconds(lambda: [kernels.linear(x, packed) for _ in range(2000)]),
            "native_out": seconds(lambda: [kernels.linear(x, packed, out) for _ in range(2000)]),
            "torch": seconds(lambda: [F.linear(x, weight) for _ in range(2000)]),
        },
        repeats,
    )
    return {"call": row("call 16x16", samples, "us", lambda s: s * 1e6 / 2000)}


def main() -> None:
    """Run all rows and print the closing JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--isa", default="auto")
    parser.add_argument("--only", default="calls,linear,experts", help="comma list")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    kernels = load_kernels(args.isa)
    assert kernels is not None, "python -m experts.native.build"
    kernels.set_num_threads(args.threads)
    figures: dict[str, object] = {}
    parts = {"calls": call_rows, "linear": linear_rows, "experts": expert_rows}
    for name in args.only.split(","):
        figures |= parts[name](kernels, args.repeats)
    report("kernels", {"isa": kernels.isa, "threads": args.threads, "seed": 0}, figures)


if __name__ == "__main__":
    main()
