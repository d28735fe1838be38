"""transformers with its experts behind `GatingService.Route`: the tokens are the local ones."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import torch

from experts.native.kernels import load_kernels
from experts.planner import plan_placement
from experts.runtime import ExpertRuntime
from experts.service import start_expert_server
from experts.weights import SafetensorsCheckpoint
from router.gateway.gating import GatingServicer
from router.gateway.server import GatewayOptions, GatewayThread, gating_service
from router.gating.dispatch import ExpertDispatcher
from router.gating.gate import Gate
from router.model.config import ModelConfig
from tests.benchmarks.route_experts import RouteExperts, generate
from tests.parity.checkpoints import make_checkpoint
from tests.parity.oracle import Oracle

NUM_NEW = 24


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("route")
    return make_checkpoint(folder, num_experts=9, top_k=3, moe_intermediate_size=24)


@pytest.fixture(scope="module")
def router_address(checkpoint: Path) -> Iterator[str]:
    """A gateway with `GatingService` in front of two expert groups, over real sockets."""
    torch.set_num_threads(1)
    config = ModelConfig.from_checkpoint(checkpoint)
    placement = plan_placement(config.num_layers, config.num_experts, {"a": 1.0, "b": 2.0})
    servers = {}
    for group_id in placement.groups:
        runtime = ExpertRuntime(
            group_id=group_id,
            checkpoint=checkpoint,
            dtype="float32",
            compute="torch" if load_kernels() is None else "native",
        )
        runtime.load(placement)
        servers[group_id] = start_expert_server(runtime, "127.0.0.1", 0)
    dispatcher = ExpertDispatcher.connect(
        placement,
        {group_id: server.address for group_id, server in servers.items()},
        router_id="router-0",
        hidden=config.hidden_size,
        top_k=config.top_k,
        dtype=torch.float32,
    )
    with SafetensorsCheckpoint(checkpoint) as weights:
        gates = {
            layer_id: weights.get(f"layers.{layer_id}.mlp.gate.weight", dtype=torch.float32)
            for layer_id in range(config.num_layers)
        }
    servicer = GatingServicer(Gate(gates, config.top_k), dispatcher, "model")
    gateway = GatewayThread([gating_service(servicer)], GatewayOptions())
    yield gateway.start()
    gateway.stop()
    servicer.close()
    dispatcher.close()
    for server in servers.values():
        server.stop(0)


@pytest.mark.parametrize("use_gate", [False, True], ids=["models_choice", "routers_gate"])
def test_generate_gives_the_tokens_of_the_local_model(
    checkpoint: Path, router_address: str, use_gate: bool
) -> None:
    rng = random.Random(11)
    prompts = [[rng.randrange(512) for _ in range(length)] for length in (1, 5, 64, 150)]
    model = Oracle(checkpoint, torch.float32).model
    expected = [generate(model, prompt, NUM_NEW) for prompt in prompts]
    with RouteExperts(model, router_address, use_gate=use_gate) as experts:
        assert [generate(model, prompt, NUM_NEW) for prompt in prompts] == expected
        layers = ModelConfig.from_checkpoint(checkpoint).num_layers
        assert experts.num_calls == len(prompts) * NUM_NEW * layers
        assert experts.choices_differ == 0


def test_a_router_that_is_gone_fails_the_model_instead_of_answering_zeros(checkpoint: Path) -> None:
    model = Oracle(checkpoint, torch.float32).model
    with (
        RouteExperts(model, "127.0.0.1:1"),
        pytest.raises(grpc.RpcError) as caught,
    ):
        generate(model, [1, 2, 3], 1)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
