"""SLOTS or PARTIAL: what each way of answering costs in bytes and milliseconds.

Regime: one layer of bench-large's shape (H 1024, I 384, 128 experts, top-8, bfloat16), 1, 8, 64 and
512 rows, the experts spread over 2 or 4 groups, all in this process, one thread; the routing is
uniform and seeded. A repetition asks every group in turn (`ExpertRuntime.forward`, frames included)
and merges; sum over the groups, so no overlap is counted.

Meaning: `group_ms` is the groups' side, `merge_ms` the router's (SLOTS: weigh and sum P rows in
float32; PARTIAL: add the groups' R float32 rows), `answer_mib` what comes back over the wire.
Ceiling: SLOTS sends 2 bytes for each of R * 8 pairs,
PARTIAL 4 bytes for each row that a group was sent: a quarter with 1 group, half with 2, and as much
with 4 and more.

    python -m tests.benchmarks.combine_modes [--repeats 9]
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch

from experts.compute import ExpertShape
from experts.compute_choice import choose_compute
from experts.planner import plan_placement
from experts.runtime import ExpertRuntime
from protos.codec import Combine, DType, FrameHeader, FrameKind
from tests.benchmarks.harness import report

SHAPE = ExpertShape(
    num_layers=1, num_experts=128, hidden_size=1024, intermediate_size=384, dtype=torch.bfloat16
)
TOP_K = 8
ROWS = (1, 8, 64, 512)
GROUPS = (2, 4)


def make_groups(num_groups: int) -> tuple[list[ExpertRuntime], torch.Tensor]:
    """Return READY groups with random experts, and each expert's group."""
    placement = plan_placement(
        SHAPE.num_layers, SHAPE.num_experts, {f"g{i}": 1.0 for i in range(num_groups)}
    )
    generator = torch.Generator().manual_seed(0)
    hidden, inter = SHAPE.hidden_size, SHAPE.intermediate_size
    gate_up = (torch.randn(2 * inter, hidden, generator=generator) / hidden**0.5).bfloat16()
    down = (torch.randn(hidden, inter, generator=generator) / inter**0.5).bfloat16()
    groups = []
    for group_id in placement.groups:
        compute = choose_compute(SHAPE)
        experts = placement.experts_of(group_id)[0]
        compute.reserve(0, len(experts))
        for expert_id in experts:
            compute.load(0, expert_id, gate_up, down)
        group = ExpertRuntime(group_id=group_id, checkpoint="")
        group.adopt(SHAPE, compute, placement.epoch)
        groups.append(group)
    return groups, torch.from_numpy(placement.expert_to_group[0, :, 0].copy())


def calls_for(
    rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, group_of: torch.Tensor, num: int
) -> list[tuple[FrameHeader, bytearray, torch.Tensor, torch.Tensor]]:
    """Return header, payload, sent tokens and pair positions for each group that has work."""
    calls = []
    for group in range(num):
        token, k = (group_of[ids] == group).nonzero(as_tuple=True)
        if not len(token):
            continue
        sent, pair_row = token.unique(return_inverse=True)
        parts = (pair_row.int(), ids[token, k].int(), weights[token, k], rows[sent])
        raw = (t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for t in parts)
        payload = bytearray(b"".join(raw))
        header = FrameHeader(
            kind=FrameKind.FORWARD,
            placement_epoch=1,
            dtype=DType.BFLOAT16,
            num_rows=len(sent),
            hidden=SHAPE.hidden_size,
            num_pairs=len(token),
            payload_bytes=len(payload),
            call_id=group,
        )
        calls.append((header, payload, sent, token * TOP_K + k))
    return calls


def one_repetition(
    groups: list[ExpertRuntime],
    calls: list[tuple[FrameHeader, bytearray, torch.Tensor, torch.Tensor]],
    weights: torch.Tensor,
    combine: Combine,
) -> tuple[float, float, int]:
    """Return seconds in the groups, seconds of the merge, and bytes that came back."""
    started_s = time.perf_counter()
    answers = [
        groups[header.call_id].forward(header._replace(combine=combine), payload)[1]
        for header, payload, _, _ in calls
    ]
    answered_s = time.perf_counter()
    num_tokens, hidden = weights.shape[0], SHAPE.hidden_size
    if combine is Combine.SLOTS:
        slots = torch.empty(num_tokens * TOP_K, hidden, dtype=torch.bfloat16)
        for answer, (_, _, _, position) in zip(answers, calls, strict=True):
            slots[position] = torch.frombuffer(answer, dtype=torch.bfloat16).view(-1, hidden)
        torch.bmm(weights[:, None], slots.view(num_tokens, TOP_K, hidden).float())
    else:
        out = torch.zeros(num_tokens, hidden)
        for answer, (_, _, sent, _) in zip(answers, calls, strict=True):
            out[sent] += torch.frombuffer(answer, dtype=torch.float32).view(-1, hidden)
    merged_s = time.perf_counter()
    return answered_s - started_s, merged_s - answered_s, sum(map(len, answers))


def main() -> None:
    """Measure and print; the last line is one JSON document."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    figures: dict[str, object] = {}
    compute = ""
    for num_groups in GROUPS:
        groups, group_of = make_groups(num_groups)
        compute = groups[0].status().compute
        for num_rows in ROWS:
            generator = torch.Generator().manual_seed(num_rows)
            rows = torch.randn(num_rows, SHAPE.hidden_size, generator=generator).bfloat16()
            ids = torch.rand(num_rows, SHAPE.num_experts, generator=generator).topk(TOP_K).indices
            weights = torch.rand(num_rows, TOP_K, generator=generator)
            calls = calls_for(rows, ids, weights, group_of, num_groups)
            seen: dict[Combine, list[tuple[float, float, int]]] = {c: [] for c in Combine}
            for _ in range(2 + repeats):
                for combine in Combine:
                    seen[combine].append(one_repetition(groups, calls, weights, combine))
            for combine, samples in seen.items():
                group_s, merge_s, num_bytes = np.array(samples[2:]).T
                row = {
                    "group_ms": round(statistics.median(group_s.tolist()) * 1e3, 3),
                    "group_min_ms": round(float(group_s.min()) * 1e3, 3),
                    "merge_ms": round(statistics.median(merge_s.tolist()) * 1e3, 3),
                    "merge_min_ms": round(float(merge_s.min()) * 1e3, 3),
                    "answer_mib": round(float(num_bytes[0]) / 2**20, 4),
                }
                figures[f"{combine.name.lower()}_{num_rows}rows_{num_groups}groups"] = row
                print(f"{num_groups} groups {num_rows:4} rows {combine.name:8} {row}")
    report("combine_modes", {"repeats": repeats, "compute": compute, "top_k": TOP_K}, figures)


if __name__ == "__main__":
    main()
