"""`GatingService`: the cluster's experts for a model that runs elsewhere.

One stream is one caller's sequence of layer calls; the answers come in order. Calls of all streams
share one dispatcher, which takes one call at a time, in a thread of its own: neither the event loop
nor the engine waits for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import grpc
import torch
from torch import Tensor

from protos.codec import tensor_from_proto, tensor_to_proto
from protos.errors import InvalidFieldError
from protos.v1 import gating_pb2, gating_pb2_grpc
from protos.validate import check_model
from router.gating.gate import Gate

MAX_TOKENS = 8192
"""Rows of one call."""

Context = grpc.aio.ServicerContext[Any, Any]


class Dispatcher(Protocol):
    """What the service needs of `router.gating.dispatch.ExpertDispatcher`."""

    def dispatch(self, layer_id: int, rows: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Any:
        """Send the rows to the groups."""
        ...

    def combine(self, handle: Any) -> Tensor:
        """Wait for the sum, float32 `[T, hidden]`."""
        ...


class GatingServicer(gating_pb2_grpc.GatingServiceServicer):
    """Serves the experts of one model.

    Args:
        gate: The gate weights of every MoE layer.
        dispatcher: Not shared with the engine.
        model: Name of the served model.
    """

    def __init__(self, gate: Gate, dispatcher: Dispatcher, model: str) -> None:
        self._gate = gate
        self._dispatcher = dispatcher
        self._model = model
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="gating")
        self.num_streams = 0
        """That are open."""
        self._awake = asyncio.Event()
        self._awake.set()
        self._on_request: Callable[[], None] | None = None

    def sleep(self, on_request: Callable[[], None]) -> bool:
        """Let calls wait until `wake`; in the gateway's loop.

        Args:
            on_request: Called when the first call of a stream comes meanwhile.

        Returns:
            False where a stream is open, and so nothing changes.
        """
        if not self.num_streams:
            self._on_request = on_request
            self._awake.clear()
        return not self._awake.is_set()

    def wake(self) -> None:
        """Answer the calls that came meanwhile; in the gateway's loop."""
        self._awake.set()

    def close(self) -> None:
        """Wait for the call in flight and end the thread."""
        self._thread.shutdown()

    async def Route(
        self, request_iterator: AsyncIterator[gating_pb2.RouteRequest], context: Context
    ) -> None:
        """Answer each request in order; see `gating.proto`."""
        loop = asyncio.get_running_loop()
        self.num_streams += 1
        try:
            async for request in request_iterator:
                if self._on_request is not None and not self._awake.is_set():
                    self._on_request()
                    await self._awake.wait()
                answer = await loop.run_in_executor(self._thread, self.route, request)
                await context.write(answer)
        finally:
            self.num_streams -= 1

    def route(self, request: gating_pb2.RouteRequest) -> gating_pb2.RouteResponse:
        """Compute one layer for some rows.

        Raises:
            UnknownModelError: Another model.
            InvalidFieldError: Layer, shape, dtype or values that the layer does not take.
            ExpertMeshError: What the expert groups answered.
        """
        check_model(request.model, self._model)
        hidden = self._hidden(request)
        if request.HasField("topk_ids") != request.HasField("topk_weights"):
            missing = "topk_weights" if request.HasField("topk_ids") else "topk_ids"
            raise InvalidFieldError(missing, "must be set when the other top-k field is", "")
        if request.HasField("topk_ids"):
            topk_ids, topk_weights = self._choice(request, len(hidden))
        else:
            topk_ids, topk_weights = self._gate(request.layer_id, hidden)
        handle = self._dispatcher.dispatch(request.layer_id, hidden, topk_ids, topk_weights)
        output = self._dispatcher.combine(handle).to(hidden.dtype)
        answer = gating_pb2.RouteResponse(call_id=request.call_id, output=tensor_to_proto(output))
        if request.return_topk:
            answer.topk_ids.CopyFrom(tensor_to_proto(topk_ids))
            answer.topk_weights.CopyFrom(tensor_to_proto(topk_weights))
        return answer

    def _hidden(self, request: gating_pb2.RouteRequest) -> Tensor:
        weight = self._gate.weights.get(request.layer_id)
        if weight is None:
            layers = sorted(self._gate.weights)
            rule = "must be a layer with experts" + (
                f" ({layers[0]} to {layers[-1]})" if layers else "; this model has none"
            )
            raise InvalidFieldError("layer_id", rule, request.layer_id)
        hidden = tensor_from_proto(request.hidden, field="hidden")
        if hidden.dtype not in (torch.float32, torch.bfloat16):
            raise InvalidFieldError(
                "hidden.dtype", "must be FLOAT32 or BFLOAT16", str(hidden.dtype)
            )
        width = weight.shape[1]
        if hidden.dim() != 2 or hidden.shape[1] != width or not 1 <= len(hidden) <= MAX_TOKENS:
            rule = f"must be [T, {width}] with 1 to {MAX_TOKENS} tokens T"
            raise InvalidFieldError("hidden.shape", rule, str(list(hidden.shape)))
        if not torch.isfinite(hidden).all():
            raise InvalidFieldError("hidden.payload", "must be finite", "NaN or infinity")
        return hidden

    def _choice(self, request: gating_pb2.RouteRequest, num_tokens: int) -> tuple[Tensor, Tensor]:
        ids = tensor_from_proto(request.topk_ids, field="topk_ids")
        weights = tensor_from_proto(request.topk_weights, field="topk_weights")
        if ids.dtype not in (torch.int32, torch.int64):
            raise InvalidFieldError("topk_ids.dtype", "must be INT32 or INT64", str(ids.dtype))
        if weights.dtype != torch.float32:
            raise InvalidFieldError("topk_weights.dtype", "must be FLOAT32", str(weights.dtype))
        shape = [num_tokens, self._gate.top_k]
        for field, tensor in (("topk_ids", ids), ("topk_weights", weights)):
            if list(tensor.shape) != shape:
                raise InvalidFieldError(f"{field}.shape", f"must be {shape}", str([*tensor.shape]))
        num_experts = self._gate.weights[request.layer_id].shape[0]
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= num_experts:
            rule = f"must have expert ids in [0, {num_experts})"
            raise InvalidFieldError("topk_ids.payload", rule, low if low < 0 else high)
        if not torch.isfinite(weights).all():
            raise InvalidFieldError("topk_weights.payload", "must be finite", "NaN or infinity")
        return ids.to(torch.int32), weights
