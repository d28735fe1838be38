"""An expert group that answers nonsense, another epoch, or dies, seen from the front door.

Gateway, engine, trunk, dispatcher and expert group are real; the fault is a far end of the lane
that answers what it should not. The request fails with its typed error over gRPC, blocks, slots and
streams are free afterwards, and the next request is served by the real group again.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from experts.native.kernels import load_kernels
from experts.planner import plan_placement
from experts.runtime import ExpertRuntime
from experts.service import start_expert_server
from protos import codec
from protos.client import Client, ClientConfig
from protos.errors import GroupLostError, StalePlacementError
from router.engine.config import EngineConfig
from router.engine.engine import Engine
from router.gateway.delivery import LoopDelivery
from router.gateway.generation import GenerationServicer
from router.gateway.request_reader import ServedModel
from router.gateway.server import GatewayOptions, GatewayThread, generation_service
from router.gateway.text import TextProcessor
from router.gating.dispatch import ExpertDispatcher
from router.gating.transport.lane import LaneTransport
from router.model.config import ModelConfig
from router.model.decoder import Decoder
from tests.eventually import eventually
from tests.parity.checkpoints import make_checkpoint


def result_of(call: codec.FrameHeader, **changes: int) -> bytes:
    size = codec.result_payload_bytes(
        call.num_rows, call.hidden, call.num_pairs, call.dtype, call.combine
    )
    header = call._replace(kind=codec.FrameKind.RESULT, payload_bytes=size, **changes)
    return codec.pack_header(header) + bytes(size)


FAULTS: dict[str, tuple[Callable[[codec.FrameHeader], bytes], type[Exception]]] = {
    "nonsense": (lambda call: b"\xff" * 4096, GroupLostError),
    "another call": (lambda call: result_of(call, call_id=call.call_id + 1), GroupLostError),
    "another epoch": (lambda call: result_of(call, placement_epoch=9), StalePlacementError),
    "half an answer": (lambda call: result_of(call)[:100], GroupLostError),
    "nothing, and leaves": (lambda call: b"", GroupLostError),
}


class System:
    """One router over one group, in this process, on a real port."""

    def __init__(self, path: Path) -> None:
        config = ModelConfig.from_checkpoint(path)
        placement = plan_placement(config.num_layers, config.num_experts, {"a": 1.0})
        self.runtime = ExpertRuntime(group_id="a", checkpoint=path, dtype="float32")
        self.runtime.load(placement)
        self.group = start_expert_server(self.runtime, "127.0.0.1")
        self.dispatcher = ExpertDispatcher.connect(
            placement,
            {"a": self.group.address},
            router_id="router-chaos",
            hidden=config.hidden_size,
            top_k=config.top_k,
            dtype=torch.float32,
            transport="lane",
            kernels=load_kernels(),
        )
        decoder = Decoder.from_checkpoint(path, dtype=torch.float32, experts=self.dispatcher)
        engine_config = EngineConfig(
            vocab_size=config.vocab_size, max_model_len=256, num_blocks=64, num_state_slots=8
        )
        delivery = LoopDelivery()
        self.engine = Engine(decoder, engine_config, deliver=delivery)
        model = ServedModel(
            name="tiny",
            model_type=config.model_type,
            max_model_len=256,
            vocab_size=config.vocab_size,
            dtype="float32",
        )
        servicer = GenerationServicer(self.engine, TextProcessor.from_checkpoint(path), model)
        options = GatewayOptions(host="127.0.0.1", port=0)
        self.gateway = GatewayThread([generation_service(servicer)], options, delivery)
        self.address = self.gateway.start()
        self.engine.start()

    def break_lane(self, answer: Callable[[codec.FrameHeader], bytes]) -> threading.Thread:
        """Let the next frame meet a far end that answers `answer(header)` and leaves."""
        (lane,) = self.dispatcher.transports
        assert isinstance(lane, LaneTransport)
        ours, theirs = socket.socketpair()
        lane.close()
        lane._socket = ours

        def far_end() -> None:
            with theirs:
                header = codec.unpack_header(theirs.recv(codec.HEADER_BYTES, socket.MSG_WAITALL))
                theirs.recv(header.payload_bytes, socket.MSG_WAITALL)
                theirs.sendall(answer(header))

        thread = threading.Thread(target=far_end)
        thread.start()
        return thread

    def is_clean(self) -> bool:
        stats = self.engine.stats()
        held = (stats.num_blocks_used, stats.num_state_slots_used, stats.num_running)
        return held == (0, 0, 0) and stats.num_waiting == 0 and self.engine.num_live == 0

    def stop(self) -> None:
        self.engine.stop(drain=False)
        self.gateway.stop()
        self.dispatcher.close()
        self.group.stop()


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    made = System(make_checkpoint(tmp_path_factory.mktemp("chaos"), tokenizer=True))
    yield made
    made.stop()


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_group_fails_the_request_and_leaks_nothing(system: System, name: str) -> None:
    answer, error = FAULTS[name]
    with Client(system.address, ClientConfig(max_attempts=1)) as client:
        expected = client.complete([7, 8, 9], max_tokens=8, temperature=0).token_ids
        thread = system.break_lane(answer)
        with pytest.raises(error):
            client.complete([7, 8, 9], max_tokens=8, temperature=0)
        thread.join()
        eventually(system.is_clean)
        assert client.complete([7, 8, 9], max_tokens=8, temperature=0).token_ids == expected
    eventually(lambda: system.is_clean() and system.group.lanes.num_open == 1)


def test_a_group_that_dies_fails_the_request_and_serves_again_when_it_is_back(
    system: System,
) -> None:
    with Client(system.address, ClientConfig(max_attempts=1)) as client:
        expected = client.complete([5, 6], max_tokens=8, temperature=0).token_ids
        port = int(system.group.address.rsplit(":", 1)[1])
        system.group.stop()
        with pytest.raises(GroupLostError) as caught:
            client.complete([5, 6], max_tokens=8, temperature=0)
        assert caught.value.fields["group_id"] == "a"
        eventually(system.is_clean)
        system.group = start_expert_server(system.runtime, "127.0.0.1", port)
        assert client.complete([5, 6], max_tokens=8, temperature=0).token_ids == expected
