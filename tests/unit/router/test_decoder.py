"""The decoder's structure: order of calls, cache sizes, what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from protos.errors import ConfigurationError
from router.engine.batch import Batch, Chunk, build_batch
from router.model.decoder import Decoder
from router.model.moe import HostExperts
from router.model.ops import GdnState
from router.model.torch_ops import TorchKv, TorchOps
from router.model.warm_up import warm_up
from tests.parity.checkpoints import make_checkpoint
from tests.parity.oracle import LoopExperts, make_decoder

OPS = TorchOps(torch.float32, torch.device("cpu"))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), text_only=True)


def one_chunk(num_tokens: int, num_logits: int = 1) -> Batch:
    chunk = Chunk(
        token_ids=list(range(num_tokens)),
        context_len=0,
        block_table=[0, 1],
        state_slot=0,
        num_logits=num_logits,
    )
    return build_batch([chunk])


def test_a_batch_is_flat_and_without_padding() -> None:
    """Two sequences: 3 tokens behind 5 cached ones, then 1 token of a fresh one."""
    batch = build_batch(
        [
            Chunk(token_ids=[7, 8, 9], context_len=5, block_table=[4, 2], state_slot=3),
            Chunk(token_ids=[6], context_len=0, block_table=[1], state_slot=0, num_logits=0),
        ]
    )
    assert batch.token_ids.tolist() == [7, 8, 9, 6]
    assert batch.positions.tolist() == [5, 6, 7, 0]
    assert batch.query_start.tolist() == [0, 3, 4]
    assert batch.context_lens.tolist() == [5, 0]
    assert batch.block_tables.tolist() == [[4, 2], [1, 0]]
    assert batch.state_slots.tolist() == [3, 0]
    assert batch.logit_rows.tolist() == [2]
    assert (batch.max_query_len, batch.max_context_len) == (3, 8)
    assert (batch.num_tokens, batch.num_sequences) == (4, 2)
    assert batch.to(torch.device("cpu")).positions.equal(batch.positions)


class RecordingOps(TorchOps):
    """Writes down when the shared expert runs."""

    def __init__(self, events: list[str]) -> None:
        super().__init__(torch.float32, torch.device("cpu"))
        self.events = events

    def gate_topk(self, logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        self.events.append("gate")
        return super().gate_topk(logits, top_k)

    def swiglu(self, gate_up: Tensor, intermediate_size: int) -> Tensor:
        self.events.append("shared")
        return super().swiglu(gate_up, intermediate_size)

    def add_shared(self, routed: Tensor, shared: Tensor, gate: Tensor) -> Tensor:
        self.events.append("add")
        return super().add_shared(routed, shared, gate)


class RecordingExperts(LoopExperts):
    def __init__(self, path: Path, events: list[str]) -> None:
        super().__init__(path, torch.float32)
        self.events = events
        self.rows: list[int] = []

    def dispatch(self, layer_id: int, rows: Tensor, *topk: Tensor) -> Any:
        self.events.append(f"dispatch {layer_id}")
        self.rows.append(rows.shape[0])
        return super().dispatch(layer_id, rows, *topk)

    def combine(self, handle: Any) -> Tensor:
        self.events.append("combine")
        return super().combine(handle)


def test_the_shared_expert_runs_while_the_rows_are_away(path: Path) -> None:
    events: list[str] = []
    experts = RecordingExperts(path, events)
    decoder = Decoder.from_checkpoint(
        path, dtype=torch.float32, experts=experts, ops=RecordingOps(events)
    )
    decoder.forward(one_chunk(20), decoder.allocate_caches(2, 16, 1))
    expected = []
    for layer_id in range(4):
        expected += ["gate", f"dispatch {layer_id}", "shared", "combine", "add"]
    assert events == expected
    assert experts.rows == [20, 20, 20, 1]  # the last layer's MLP sees the wanted row only


def test_a_prefill_without_logits_skips_the_last_mlp(path: Path) -> None:
    experts = RecordingExperts(path, [])
    decoder = Decoder.from_checkpoint(path, dtype=torch.float32, experts=experts, ops=OPS)
    logits = decoder.forward(one_chunk(20, num_logits=0), decoder.allocate_caches(2, 16, 1))
    assert logits.shape == (0, 512)
    assert experts.rows == [20, 20, 20]


def test_cache_bytes_are_what_is_announced(path: Path) -> None:
    decoder = make_decoder(path, OPS)
    caches = decoder.allocate_caches(5, 16, 3)
    kv = [layer for layer in caches.layers if isinstance(layer, TorchKv)]
    states = [layer for layer in caches.layers if isinstance(layer, GdnState)]
    assert sum(layer.num_bytes for layer in kv) == 5 * decoder.kv_bytes_per_block(16)
    state_bytes = sum(t.numel() * t.itemsize for s in states for t in (s.conv, s.recurrent))
    assert state_bytes == 3 * decoder.state_bytes_per_slot
    assert (caches.num_blocks, caches.block_size, caches.num_state_slots) == (5, 16, 3)


def test_a_mixture_of_experts_needs_experts(path: Path) -> None:
    with pytest.raises(ConfigurationError, match="experts must be given"):
        Decoder.from_checkpoint(path, dtype=torch.float32, experts=None, ops=OPS)


def test_rows_of_an_accelerator_go_through_host_memory(path: Path) -> None:
    inner = LoopExperts(path, torch.float32)
    outer = HostExperts(inner, torch.device("cpu"))
    rows, ids, weights = torch.randn(3, 64), torch.tensor([[0, 3]] * 3).int(), torch.rand(3, 2)
    found = outer.combine(outer.dispatch(1, rows, ids, weights))
    assert torch.equal(found, inner.combine(inner.dispatch(1, rows, ids, weights)))


def test_a_warm_up_meets_every_layer_and_leaves_nothing(path: Path) -> None:
    decoder = make_decoder(path, OPS)
    experts: Any = decoder._experts
    warm_up(decoder, 40)
    assert experts.calls == 2 * decoder.config.num_layers
    caches = decoder.allocate_caches(2, 16, 1)
    expected = make_decoder(path, OPS)
    assert torch.equal(
        decoder.forward(one_chunk(20), caches),
        expected.forward(one_chunk(20), expected.allocate_caches(2, 16, 1)),
    )
