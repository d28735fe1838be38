"""transformers' experts replaced by `GatingService.Route`.

transformers 5 looks the forward of its experts modules up in a registry
(`transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS`). `RouteExperts` registers a function there
that sends the rows over one gRPC stream and returns what the cluster's experts answer; everything
else of the model stays as it is.
"""

from __future__ import annotations

import queue
import re
from collections.abc import Iterator
from typing import Any, Self

import grpc
import torch
from torch import Tensor

from protos.codec import tensor_from_proto, tensor_to_proto
from protos.v1 import gating_pb2, gating_pb2_grpc

NAME = "expertmesh_route"
OPTIONS = [
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", 64 << 20),
]


class RouteExperts:
    """The experts of one transformers model, elsewhere. Use as a context.

    Args:
        model: A Qwen3.5-MoE model; its own expert weights are thrown away.
        address: `host:port` of a router.
        use_gate: Let the router's gate choose; else the model's own choice is sent along.
    """

    def __init__(self, model: Any, address: str, *, use_gate: bool = False) -> None:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        self._layer_of: dict[int, int] = {}
        for name, module in model.named_modules():
            found = re.search(r"layers\.(\d+)\.mlp\.experts$", name)
            if found:
                self._layer_of[id(module)] = int(found.group(1))
                for parameter in module.parameters():
                    parameter.data = torch.empty(0)  # nothing local can answer
        self.use_gate = use_gate
        self.num_calls = 0
        self.num_rows = 0
        self.choices_differ = 0
        """Rows for which the router's gate chose other experts than the model's."""
        self._channel = grpc.insecure_channel(address, options=OPTIONS)
        stub = gating_pb2_grpc.GatingServiceStub(self._channel)
        self._requests: queue.SimpleQueue[gating_pb2.RouteRequest | None] = queue.SimpleQueue()
        self._answers: Iterator[gating_pb2.RouteResponse] = stub.Route(
            iter(self._requests.get, None)
        )
        ALL_EXPERTS_FUNCTIONS.register(NAME, self._forward)
        model.set_experts_implementation(NAME)

    def _forward(
        self, experts: Any, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor
    ) -> Tensor:
        self.num_calls += 1
        self.num_rows += hidden.shape[0]
        request = gating_pb2.RouteRequest(
            call_id=self.num_calls,
            layer_id=self._layer_of[id(experts)],
            hidden=tensor_to_proto(hidden.contiguous()),
            return_topk=True,
        )
        if not self.use_gate:
            request.topk_ids.CopyFrom(tensor_to_proto(topk_ids))
            request.topk_weights.CopyFrom(tensor_to_proto(topk_weights.float()))
        self._requests.put(request)
        answer = next(self._answers)
        assert answer.call_id == self.num_calls
        chosen = tensor_from_proto(answer.topk_ids, field="topk_ids").sort(dim=-1).values
        differs = (chosen != topk_ids.sort(dim=-1).values).any(dim=-1)
        self.choices_differ += int(differs.sum())
        return tensor_from_proto(answer.output, field="output")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._requests.put(None)
        self._channel.close()


@torch.inference_mode()
def generate(model: Any, prompt: list[int], num_new: int) -> list[int]:
    """Return the tokens of transformers' own greedy `generate()`."""
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        do_sample=False,
        max_new_tokens=num_new,
        min_new_tokens=num_new,
    )
    return [int(token) for token in output[0, len(prompt) :]]
