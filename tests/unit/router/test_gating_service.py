"""`GatingService.Route` over real gRPC: the gate's choice, a choice made elsewhere, and errors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from torch import Tensor

from protos.certificates import CertificateFiles, port_identity
from protos.codec import tensor_from_proto, tensor_to_proto
from protos.errors import (
    ExpertMeshError,
    GroupLostError,
    InvalidFieldError,
    UnauthenticatedError,
    UnknownModelError,
    from_rpc_error,
)
from protos.tls import Access, ClientTls
from protos.v1 import gating_pb2, gating_pb2_grpc
from router.gateway.authentication import ApiKey
from router.gateway.gating import GatingServicer
from router.gateway.server import GatewayOptions, GatewayThread, gating_service
from router.gating.gate import Gate
from tests.certificates import Authority
from tests.eventually import eventually

HIDDEN, EXPERTS, TOP_K, LAYERS = 8, 6, 2, 2


class ScalingDispatcher:
    """Expert `e` of layer `l` multiplies by `(e + 1) * 10**l`; one call in flight, as the real."""

    def __init__(self) -> None:
        self.in_flight = False
        self.is_lost = False

    def dispatch(self, layer_id: int, rows: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Any:
        assert not self.in_flight
        if self.is_lost:
            raise GroupLostError("g1", "closed the lane")
        self.in_flight = True
        assert topk_ids.dtype == torch.int32
        return (topk_ids + 1).float() * topk_weights * 10.0**layer_id, rows

    def combine(self, handle: Any) -> Tensor:
        scale, rows = handle
        self.in_flight = False
        return rows.float() * scale.sum(dim=1, keepdim=True)


GENERATOR = torch.Generator().manual_seed(5)
GATE = Gate(
    {layer: torch.randn(EXPERTS, HIDDEN, generator=GENERATOR) for layer in range(LAYERS)}, TOP_K
)


class Mesh:
    """A running service and a way to call it."""

    def __init__(self, options: GatewayOptions, access: Access | None = None) -> None:
        self.dispatcher = ScalingDispatcher()
        self._access = access or Access()
        self.servicer = GatingServicer(GATE, self.dispatcher, "tiny")
        self.thread = GatewayThread([gating_service(self.servicer)], options)
        self.address = self.thread.start()

    def stop(self) -> None:
        self.thread.stop()
        self.servicer.close()

    @contextmanager
    def open_stream(self) -> Iterator[Iterator[gating_pb2.RouteResponse]]:
        """Hold a stream open behind its first request; yields the answers."""
        ended = threading.Event()

        def requests() -> Iterator[gating_pb2.RouteRequest]:
            yield request_of(hidden_of(), call_id=4)
            ended.wait()

        with self._access.channel(self.address) as channel:
            yield gating_pb2_grpc.GatingServiceStub(channel).Route(requests(), timeout=20)
            ended.set()

    def route(
        self, *requests: gating_pb2.RouteRequest, access: Access | None = None
    ) -> list[gating_pb2.RouteResponse]:
        with (access or self._access).channel(self.address) as channel:
            stub = gating_pb2_grpc.GatingServiceStub(channel)
            try:
                return list(stub.Route(iter(requests), timeout=20))
            except grpc.RpcError as error:
                raise from_rpc_error(error) from error


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    made = Mesh(GatewayOptions())
    yield made
    made.stop()


def hidden_of(num_tokens: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(num_tokens)
    return torch.randn(num_tokens, HIDDEN, generator=generator).to(dtype)


def request_of(hidden: Tensor, **fields: Any) -> gating_pb2.RouteRequest:
    tensors = {k: tensor_to_proto(v) for k, v in fields.items() if isinstance(v, Tensor)}
    plain = {k: v for k, v in fields.items() if not isinstance(v, Tensor)}
    return gating_pb2.RouteRequest(hidden=tensor_to_proto(hidden), **plain, **tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gate_chooses(mesh: Mesh, dtype: torch.dtype) -> None:
    hidden = hidden_of(dtype=dtype)
    [answer] = mesh.route(request_of(hidden, call_id=7, layer_id=1, return_topk=True))
    ids, weights = GATE(1, hidden)
    assert answer.call_id == 7
    assert torch.equal(tensor_from_proto(answer.topk_ids, field="ids"), ids)
    assert torch.equal(tensor_from_proto(answer.topk_weights, field="weights"), weights)
    output = tensor_from_proto(answer.output, field="output")
    scale = ((ids + 1).float() * weights * 10.0).sum(dim=1, keepdim=True)
    assert output.dtype == dtype
    assert torch.equal(output, (hidden.float() * scale).to(dtype))


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_a_choice_made_elsewhere_is_used(mesh: Mesh, ids_dtype: torch.dtype) -> None:
    hidden = hidden_of(2)
    ids = torch.tensor([[0, 5], [2, 1]], dtype=ids_dtype)
    weights = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    [answer] = mesh.route(request_of(hidden, topk_ids=ids, topk_weights=weights))
    # (0+1)*1 + (5+1)*0 = 1; (2+1)*0.5 + (1+1)*0.5 = 2.5
    expected = hidden * torch.tensor([[1.0], [2.5]])
    assert torch.equal(tensor_from_proto(answer.output, field="output"), expected)
    assert not answer.HasField("topk_ids")


def test_answers_come_in_order(mesh: Mesh) -> None:
    requests = [request_of(hidden_of(1 + i % 4), call_id=i, layer_id=i % 2) for i in range(40)]
    answers = mesh.route(*requests)
    assert [a.call_id for a in answers] == list(range(40))
    assert [a.output.shape[0] for a in answers] == [1 + i % 4 for i in range(40)]


def test_calls_wait_while_the_service_sleeps(mesh: Mesh) -> None:
    asked = threading.Event()

    async def sleep() -> bool:
        return mesh.servicer.sleep(asked.set)

    async def wake() -> None:
        mesh.servicer.wake()

    eventually(lambda: mesh.servicer.num_streams == 0)
    assert mesh.thread.call(sleep())
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(mesh.route, request_of(hidden_of(), call_id=3))
        assert asked.wait(20)
        assert mesh.servicer.num_streams == 1
        assert not waiting.done()
        mesh.thread.call(wake())
        assert [answer.call_id for answer in waiting.result(20)] == [3]
        with mesh.open_stream() as answers:
            assert next(answers).call_id == 4
            assert not mesh.thread.call(sleep()), "a stream is open"


def test_tls_and_a_key_change_no_answer(mesh: Mesh, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    issued = authority.issue("port")
    found = port_identity(
        CertificateFiles(
            section="router", keyfile=str(issued.keyfile), certfile=str(issued.certfile)
        )
    )
    assert found is not None
    tls = ClientTls.from_files(authority.certfile)
    guarded = Mesh(
        GatewayOptions(tls=found.server, api_keys=(ApiKey("key"),)), Access(tls=tls, api_key="key")
    )
    requests = [request_of(hidden_of(1 + i), call_id=i, layer_id=i % 2) for i in range(4)]
    assert guarded.route(*requests) == mesh.route(*requests)
    with pytest.raises(UnauthenticatedError):
        guarded.route(*requests, access=Access(tls=tls))
    guarded.stop()


GOOD_IDS = torch.zeros(3, TOP_K, dtype=torch.int32)
GOOD_WEIGHTS = torch.ones(3, TOP_K)


@pytest.mark.parametrize(
    ("make", "cls", "message"),
    [
        (lambda: request_of(hidden_of(), model="gpt"), UnknownModelError, "served: 'tiny'"),
        (
            lambda: request_of(hidden_of(), layer_id=2),
            InvalidFieldError,
            r"layer_id must be a layer with experts \(0 to 1\), got 2",
        ),
        (
            lambda: request_of(torch.zeros(3, 9)),
            InvalidFieldError,
            r'hidden\.shape must be \[T, 8\] with 1 to 8192 tokens T, got "\[3, 9\]"',
        ),
        (lambda: request_of(torch.zeros(0, 8)), InvalidFieldError, r"hidden\.shape"),
        (lambda: request_of(torch.zeros(8)), InvalidFieldError, r"hidden\.shape"),
        (
            lambda: request_of(torch.zeros(3, 8, dtype=torch.int32)),
            InvalidFieldError,
            r"hidden\.dtype must be FLOAT32 or BFLOAT16",
        ),
        (
            lambda: request_of(torch.full((1, 8), float("nan"))),
            InvalidFieldError,
            r"hidden\.payload must be finite",
        ),
        (lambda: gating_pb2.RouteRequest(), InvalidFieldError, r"hidden\.dtype must be a known"),
        (
            lambda: request_of(hidden_of(), topk_ids=GOOD_IDS),
            InvalidFieldError,
            "topk_weights must be set when the other",
        ),
        (
            lambda: request_of(hidden_of(), topk_weights=GOOD_WEIGHTS),
            InvalidFieldError,
            "topk_ids must be set when the other",
        ),
        (
            lambda: request_of(hidden_of(), topk_ids=GOOD_WEIGHTS, topk_weights=GOOD_WEIGHTS),
            InvalidFieldError,
            r"topk_ids\.dtype must be INT32 or INT64",
        ),
        (
            lambda: request_of(hidden_of(), topk_ids=GOOD_IDS, topk_weights=GOOD_IDS),
            InvalidFieldError,
            r"topk_weights\.dtype must be FLOAT32",
        ),
        (
            lambda: request_of(hidden_of(), topk_ids=GOOD_IDS[:2], topk_weights=GOOD_WEIGHTS),
            InvalidFieldError,
            r'topk_ids\.shape must be \[3, 2\], got "\[2, 2\]"',
        ),
        (
            lambda: request_of(hidden_of(), topk_ids=GOOD_IDS + 6, topk_weights=GOOD_WEIGHTS),
            InvalidFieldError,
            r"topk_ids\.payload must have expert ids in \[0, 6\), got 6",
        ),
        (
            lambda: request_of(hidden_of(), topk_ids=GOOD_IDS - 1, topk_weights=GOOD_WEIGHTS),
            InvalidFieldError,
            "got -1",
        ),
        (
            lambda: request_of(hidden_of(), topk_ids=GOOD_IDS, topk_weights=GOOD_WEIGHTS / 0),
            InvalidFieldError,
            r"topk_weights\.payload must be finite",
        ),
    ],
)
def test_a_bad_call_raises_its_class_at_the_client(
    mesh: Mesh,
    make: Callable[[], gating_pb2.RouteRequest],
    cls: type[ExpertMeshError],
    message: str,
) -> None:
    with pytest.raises(cls, match=message):
        mesh.route(make())


def test_a_lost_group_is_told_and_the_next_stream_works(mesh: Mesh) -> None:
    mesh.dispatcher.is_lost = True
    with pytest.raises(GroupLostError, match="expert group g1 is lost: closed the lane"):
        mesh.route(request_of(hidden_of()))
    mesh.dispatcher.is_lost = False
    assert len(mesh.route(request_of(hidden_of()))) == 1
