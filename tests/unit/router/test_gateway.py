"""The port: health, reflection, limits, the error boundary, retries, and the hop to the loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from protos.client import AsyncClient, Client, ClientConfig
from protos.errors import (
    ConfigurationError,
    InternalError,
    MessageTooLargeError,
    NotReadyError,
    RequestCancelledError,
    SlowReaderError,
    UnreachableError,
    from_rpc_error,
)
from protos.v1 import cluster_pb2, cluster_pb2_grpc, generation_pb2, generation_pb2_grpc
from router.engine.request import FinishReason, Logprobs, PrefillProgress, StepOutput
from router.gateway.delivery import LoopDelivery
from router.gateway.server import GatewayOptions, GatewayThread, GrpcService
from router.gateway.stream import RequestStream, StreamOptions
from tests.unit.router.gateway_service import PROMPT, TEXT, ScriptModel, running

GENERATION = "expertmesh.v1.GenerationService"
CLUSTER = "expertmesh.v1.ClusterService"


class FlakyService(generation_pb2_grpc.GenerationServiceServicer):
    """Fails as it is told to, call by call, then answers."""

    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)
        self.num_calls = 0

    def _fail(self) -> None:
        self.num_calls += 1
        if self.failures:
            raise self.failures.pop(0)

    async def ListModels(self, request: Any, context: Any) -> generation_pb2.ListModelsResponse:
        self._fail()
        return generation_pb2.ListModelsResponse()

    async def Generate(
        self, request: Any, context: Any
    ) -> AsyncIterator[generation_pb2.GenerateResponse]:
        if request.text == "late":
            yield generation_pb2.GenerateResponse(sequence=1, text_delta="a")
        self._fail()
        yield generation_pb2.GenerateResponse(sequence=2, text_delta="b")


def served(servicer: FlakyService, options: GatewayOptions | None = None) -> GatewayThread:
    add = generation_pb2_grpc.add_GenerationServiceServicer_to_server
    return GatewayThread([GrpcService(GENERATION, servicer, add)], options or GatewayOptions())


@pytest.fixture
def serve() -> Any:
    threads = []

    def start(*failures: Exception) -> tuple[FlakyService, str]:
        servicer = FlakyService(*failures)
        threads.append(served(servicer))
        return servicer, threads[-1].start()

    yield start
    for thread in threads:
        thread.stop()


QUICK = ClientConfig(timeout_s=10, short_timeout_s=10, first_backoff_s=0.01, max_backoff_s=0.02)


def test_health_names_every_service_and_flips_on_drain() -> None:
    class Cluster(cluster_pb2_grpc.ClusterServiceServicer):
        async def GetStatus(self, request: Any, context: Any) -> cluster_pb2.ClusterStatus:
            return cluster_pb2.ClusterStatus(model="script")

    extra = GrpcService(CLUSTER, Cluster(), cluster_pb2_grpc.add_ClusterServiceServicer_to_server)
    states = health_pb2.HealthCheckResponse
    with running(services=(extra,)) as service, grpc.insecure_channel(service.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)

        def state(name: str) -> int:
            request = health_pb2.HealthCheckRequest(service=name)
            return int(health.Check(request, timeout=10).status)

        names = ("", GENERATION, CLUSTER, "readiness", "liveness")
        assert [state(name) for name in names] == [states.SERVING] * 5
        with pytest.raises(grpc.RpcError) as caught:
            state("expertmesh.v1.Nothing")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND  # type: ignore[attr-defined]
        assert service.client.status().model == "script"
        service.thread.set_serving(False)
        assert [state(name) for name in names] == [states.NOT_SERVING] * 4 + [states.SERVING]


def test_reflection_lists_the_services() -> None:
    with running() as service, grpc.insecure_channel(service.address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        [answer] = stub.ServerReflectionInfo(iter([request]), timeout=10)
        names = {s.name for s in answer.list_services_response.service}
    assert {GENERATION, "grpc.health.v1.Health"} <= names


def test_a_taken_port_is_an_error() -> None:
    with running() as service:
        port = int(service.address.rsplit(":", 1)[1])
        second = served(FlakyService(), GatewayOptions(port=port))
        with pytest.raises(ConfigurationError, match=f"port must be free, got .*{port}"):
            second.start()
        with pytest.raises(NotReadyError):
            second.set_serving(True)


def test_an_oversize_message_is_refused_with_both_sizes() -> None:
    options = GatewayOptions(max_message_bytes=10_000)
    with running(options=options) as service:
        with pytest.raises(MessageTooLargeError) as caught:
            service.client.complete("x" * 20_000)
        assert caught.value.fields["limit_bytes"] == 10_000
        assert int(caught.value.fields["got_bytes"]) > 20_000  # type: ignore[arg-type]
        assert service.client.complete(PROMPT, max_tokens=1).text == "x"


def test_an_unexpected_error_is_logged_under_the_id_that_the_client_gets(
    serve: Callable[..., tuple[FlakyService, str]], caplog: pytest.LogCaptureFixture
) -> None:
    _, address = serve(KeyError("a secret"), ZeroDivisionError())
    with Client(address, QUICK) as client:
        with pytest.raises(InternalError, match="unexpected KeyError") as caught:
            client.complete("x", request_id="r-1")
        assert "secret" not in str(caught.value)
        assert caught.value.fields["request_id"] == "r-1"
        assert "rpc.failed method=/expertmesh.v1.GenerationService/Generate id=r-1" in caplog.text
        with pytest.raises(InternalError, match="unexpected ZeroDivisionError") as drawn:
            client.list_models()
        assert str(drawn.value.fields["request_id"]) in caplog.text


def test_unavailable_is_retried_before_the_first_message(
    serve: Callable[..., tuple[FlakyService, str]],
) -> None:
    failures = [NotReadyError("loads", retry_after_s=0.01) for _ in range(4)]
    servicer, address = serve(*failures)
    with Client(address, QUICK) as client:
        assert client.complete("x").text == "b"
        assert servicer.num_calls == 5
        assert client.list_models() == []


def test_retries_end(serve: Callable[..., tuple[FlakyService, str]]) -> None:
    servicer, address = serve(*(NotReadyError("loads", retry_after_s=0.01) for _ in range(9)))
    with Client(address, QUICK) as client, pytest.raises(NotReadyError, match="not ready: loads"):
        client.list_models()
    assert servicer.num_calls == 5


def test_a_retry_that_the_deadline_does_not_allow_is_not_waited_for(
    serve: Callable[..., tuple[FlakyService, str]],
) -> None:
    servicer, address = serve(NotReadyError("loads", retry_after_s=3600))
    with Client(address, QUICK) as client, pytest.raises(NotReadyError):
        client.complete("x")
    assert servicer.num_calls == 1


def test_several_sequences_are_not_retried_after_the_first_message(
    serve: Callable[..., tuple[FlakyService, str]],
) -> None:
    servicer, address = serve(NotReadyError("loads", retry_after_s=0.01))
    with Client(address, QUICK) as client, pytest.raises(NotReadyError):
        client.complete("late", n=2)
    assert servicer.num_calls == 1


def test_other_errors_are_not_retried(serve: Callable[..., tuple[FlakyService, str]]) -> None:
    servicer, address = serve(InternalError("x"))
    with Client(address, QUICK) as client, pytest.raises(InternalError):
        client.list_models()
    assert servicer.num_calls == 1


async def test_the_async_client_retries_too(
    serve: Callable[..., tuple[FlakyService, str]],
) -> None:
    servicer, address = serve(*(NotReadyError("loads", retry_after_s=0.01) for _ in range(2)))
    async with AsyncClient(address, QUICK) as client:
        assert (await client.complete("x")).text == "b"
        assert await client.list_models() == []
    assert servicer.num_calls == 4


def test_nobody_there_is_unreachable() -> None:
    config = ClientConfig(max_attempts=2, first_backoff_s=0.01)
    with Client("127.0.0.1:1", config) as client, pytest.raises(UnreachableError):
        client.list_models()


def test_an_unknown_method_is_unimplemented() -> None:
    with running() as service, grpc.insecure_channel(service.address) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary("/expertmesh.v1.GenerationService/Guess")(b"", timeout=10)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED  # type: ignore[attr-defined]
        assert "not supported" in str(from_rpc_error(caught.value))


def test_a_step_wakes_the_loop_once_whatever_it_brings() -> None:
    loop = asyncio.new_event_loop()
    wake_ups = []
    schedule = loop.call_soon_threadsafe

    def count(callback: Callable[..., object], *arguments: Any) -> Any:
        wake_ups.append(callback)
        return schedule(callback, *arguments)

    loop.call_soon_threadsafe = count  # type: ignore[assignment, method-assign]
    delivery = LoopDelivery()
    delivery.bind(loop)
    got: list[tuple[int, int]] = []
    outputs = [StepOutput("r", index, [index]) for index in range(3)]

    def sink(output: StepOutput) -> None:
        got.append((output.index, threading.get_ident()))
        if output.index == 1:
            raise KeyError("one stream's fault")

    engine = threading.Thread(
        target=lambda: [delivery([(sink, output) for output in outputs]) for _ in range(4)]
    )
    engine.start()
    engine.join()
    assert len(wake_ups) == 1  # four steps before the loop came to the first
    loop.call_soon(loop.stop)
    loop.run_forever()
    assert got == [(index, threading.get_ident()) for _ in range(4) for index in range(3)]
    delivery([(sink, outputs[0])])
    assert len(wake_ups) == 2
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()
    delivery([(sink, outputs[0])])  # too late for anyone: no error in the engine thread


def stream_of(count: int = 1, **options: Any) -> tuple[RequestStream, list[str]]:
    calls: list[str] = []
    texts = [TEXT.stream() for _ in range(count)]
    stream = RequestStream(
        list(texts), StreamOptions(num_prompt_tokens=4, **options), lambda: calls.append("cancel")
    )
    return stream, calls


def test_what_waits_is_one_message_a_sequence() -> None:
    stream, _ = stream_of(2)
    ids = TEXT.encode("hello")
    for token_id in ids:
        part = Logprobs([token_id], [-1.0], [([token_id], [-1.0])])
        stream.put(StepOutput("r", 1, [token_id], logprobs=part))
    stream.put(StepOutput("r", 0, [ids[0]], prefill=PrefillProgress(2, 4, 1, None)))
    prompt = Logprobs([5], [-2.0], [])
    stream.put(StepOutput("r", 0, [], prefill=PrefillProgress(4, 4, 1, prompt)))
    stream.put(StepOutput("r", 0, [], prefill=PrefillProgress(4, 4, 1, None)))
    first, second = stream.take()
    assert (first.sequence, first.index, first.text_delta) == (1, 0, "h")
    assert first.prefill.tokens_done == 4
    assert list(first.prefill.prompt_logprobs.token_ids) == [5]
    assert (second.sequence, second.index, second.text_delta) == (2, 1, "hello")
    assert list(second.token_ids) == ids == list(second.logprobs.token_ids)
    assert len(second.logprobs.top) == 5
    assert stream.take() == []
    stream.put(StepOutput("r", 0, [ids[1]], finish_reason=FinishReason.LENGTH))
    [last] = stream.take()
    assert (last.sequence, last.usage.completion_tokens) == (3, 2)
    assert last.usage.cached_prompt_tokens == 1
    assert not stream.is_ended
    stream.put(StepOutput("r", 1, [], finish_reason=FinishReason.CANCELLED))
    assert stream.is_ended


def test_messages_may_wait_for_tokens_but_never_the_last_one() -> None:
    stream, _ = stream_of(min_pending_tokens=3)
    stream.put(StepOutput("r", 0, [1], prefill=PrefillProgress(4, 4, 0, None)))
    stream.put(StepOutput("r", 0, [2]))
    assert not stream.has_news
    stream.put(StepOutput("r", 0, [3]))
    assert stream.has_news
    assert list(stream.take()[0].token_ids) == [1, 2, 3]
    for ended in ({"finish_reason": FinishReason.LENGTH}, {"error": InternalError("x")}):
        stream, _ = stream_of(min_pending_tokens=3)
        stream.put(StepOutput("r", 0, [4], **ended))
        assert stream.has_news


def test_what_waits_is_bounded() -> None:
    stream, calls = stream_of(values_per_token=3, max_pending_tokens=9)
    for _ in range(3):
        stream.put(StepOutput("r", 0, [1]))
    assert stream.error is None
    stream.take()  # the client read: the count starts anew
    for _ in range(3):
        stream.put(StepOutput("r", 0, [1]))
    assert calls == []
    for _ in range(5):
        stream.put(StepOutput("r", 0, [1]))
    assert calls == ["cancel"]
    assert isinstance(stream.error, SlowReaderError)
    assert stream.error.fields == {"pending_tokens": 12, "limit": 9}
    assert stream.take() == []
    stream.put(StepOutput("r", 0, [], finish_reason=FinishReason.CANCELLED))
    assert stream.is_ended


def test_a_gateway_stops_twice_and_ends_its_streams() -> None:
    model = ScriptModel()
    with running(model) as service:
        stream = service.client.generate(PROMPT)
        next(stream)
        service.thread.stop()
        service.thread.stop()
        with pytest.raises((RequestCancelledError, UnreachableError)):
            list(stream)
        assert service.thread.gateway.address
