"""The native step against its slow twin, the loop over layers: the same bits, the same failures."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from experts.native.kernels import load_kernels
from experts.planner import plan_placement
from experts.runtime import ExpertRuntime
from experts.service import start_expert_server
from protos import codec
from protos.errors import GroupLostError, NonFiniteError, StalePlacementError
from router.engine.batch import Batch, Chunk, build_batch
from router.gating.dispatch import ExpertDispatcher
from router.model.config import ModelConfig
from router.model.decoder import Caches, Decoder
from tests.parity.checkpoints import make_checkpoint

KERNELS = load_kernels()
assert KERNELS is not None, "this machine builds the kernels"

BLOCK, NUM_BLOCKS, NUM_SLOTS = 16, 64, 8


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("moe"))


class Service:
    """Two groups behind lanes, and a decoder that calls them."""

    def __init__(
        self,
        path: Path,
        dtype: torch.dtype,
        *,
        called: dict[str, float] | None = None,
        epoch: int = 1,
        patience_s: float = 0.0,
    ) -> None:
        config = ModelConfig.from_checkpoint(path)
        name = str(dtype).removeprefix("torch.")
        shares = {"a": 2.0, "b": 1.0}
        placement = plan_placement(config.num_layers, config.num_experts, shares)
        self.servers = []
        self.addresses = addresses = {}
        self.runtimes = []
        for group_id in placement.groups:
            runtime = ExpertRuntime(
                group_id=group_id, checkpoint=path, dtype=name, compute="native"
            )
            runtime.load(placement)
            self.runtimes.append(runtime)
            self.servers.append(start_expert_server(runtime, "127.0.0.1"))
            addresses[group_id] = self.servers[-1].address
        self.dispatcher = ExpertDispatcher.connect(
            plan_placement(config.num_layers, config.num_experts, called or shares, epoch=epoch),
            addresses,
            router_id="router-test",
            hidden=config.hidden_size,
            top_k=config.top_k,
            dtype=dtype,
            transport="lane",
            kernels=KERNELS,
            timeout_s=20.0,
            patience_s=patience_s,
        )
        self.decoder = Decoder.from_checkpoint(path, dtype=dtype, experts=self.dispatcher)

    def caches(self) -> Caches:
        return self.decoder.allocate_caches(NUM_BLOCKS, BLOCK, NUM_SLOTS)

    def close(self) -> None:
        self.dispatcher.close()
        for server in self.servers:
            server.stop()


@pytest.fixture
def service(path: Path) -> Iterator[Service]:
    made = Service(path, torch.float32)
    yield made
    made.close()


def steps() -> list[Batch]:
    """Prefill in chunks, several sequences at once, decode, and rows without logits."""
    generator = torch.Generator().manual_seed(7)

    def chunk(sequence: int, context: int, length: int, num_logits: int = 1) -> Chunk:
        return Chunk(
            token_ids=torch.randint(0, 64, (length,), generator=generator).tolist(),
            context_len=context,
            block_table=list(range(8 * sequence, 8 * sequence + 8)),
            state_slot=sequence,
            num_logits=num_logits,
        )

    return [
        build_batch([chunk(0, 0, 40, 0)]),
        build_batch([chunk(0, 40, 1), chunk(1, 0, 33), chunk(2, 0, 5, 0)]),
        build_batch([chunk(0, 41, 1), chunk(1, 33, 1), chunk(2, 5, 20, 3)]),
        build_batch([chunk(s, c, 1) for s, c in ((0, 42), (1, 34), (2, 25))]),
    ]


def both_ways(decoder: Decoder, native: Caches, slow: Caches) -> Iterator[tuple[Tensor, Tensor]]:
    with torch.inference_mode():
        for batch in steps():
            yield decoder.forward(batch, native), decoder._forward_by_layer(batch, slow)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_has_the_bits_of_the_loop_over_layers(path: Path, dtype: torch.dtype) -> None:
    service = Service(path, dtype)
    try:
        native, slow = service.caches(), service.caches()
        counts = [service.dispatcher.load.counts.copy()]
        for ours, twin in both_ways(service.decoder, native, slow):
            assert torch.equal(ours, twin)
        assert service.decoder._native is not None
        assert service.decoder._native[0] is native
        counts.append(service.dispatcher.load.counts.copy())
        assert (counts[1] % 2 == 0).all()  # every pair once natively and once in the loop
        assert counts[1].sum() > 0
        assert service.dispatcher.dispatch_s > 0
    finally:
        service.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dense_step_needs_no_experts(tmp_path: Path, dtype: torch.dtype) -> None:
    decoder = Decoder.from_checkpoint(
        make_checkpoint(tmp_path, dense=True), dtype=dtype, experts=None
    )
    caches = [decoder.allocate_caches(NUM_BLOCKS, BLOCK, NUM_SLOTS) for _ in range(2)]
    for ours, twin in both_ways(decoder, *caches):
        assert torch.equal(ours, twin)
    assert decoder._native is not None


def test_a_call_for_an_absent_expert_is_refused_and_the_lanes_survive(path: Path) -> None:
    service = Service(path, torch.float32, called={"b": 1.0, "a": 2.0}, epoch=5)
    lanes = [lane.fileno() for lane in service.dispatcher.transports]  # type: ignore[attr-defined]
    caches = service.caches()
    try:
        for _ in range(2):
            with pytest.raises(StalePlacementError) as caught:
                service.decoder.forward(steps()[0], caches)
            assert caught.value.fields["call_epoch"] == 5
        assert lanes == [lane.fileno() for lane in service.dispatcher.transports]  # type: ignore[attr-defined]
    finally:
        service.close()


def test_a_group_that_leaves_is_lost_and_named(service: Service) -> None:
    caches = service.caches()
    service.decoder.forward(steps()[0], caches)
    service.servers[1].stop()
    with pytest.raises(GroupLostError) as caught:
        service.decoder.forward(steps()[0], caches)
    assert caught.value.fields["group_id"] == "b"


def test_a_group_that_answers_garbage_is_lost(service: Service) -> None:
    lane: Any = service.dispatcher.transports[0]
    ours, theirs = socket.socketpair()
    lane.close()
    lane._socket = ours

    def answer() -> None:
        theirs.recv(64)
        theirs.sendall(codec.pack_header(codec.FrameHeader(kind=codec.FrameKind.RESULT)))

    thread = threading.Thread(target=answer)
    thread.start()
    caches = service.caches()
    with pytest.raises(GroupLostError, match="instead of"):
        service.decoder.forward(steps()[0], caches)
    thread.join()
    theirs.close()
    native, slow = service.caches(), service.caches()  # it was opened anew
    for mine, twin in both_ways(service.decoder, native, slow):
        assert torch.equal(mine, twin)


def test_an_error_of_a_group_is_raised_as_its_class(service: Service) -> None:
    with torch.no_grad():
        service.decoder._weights.layers[0].post_norm[3] = float("nan")
    with pytest.raises(NonFiniteError):
        service.decoder.forward(steps()[0], service.caches())
