"""The whole error table over a real channel, sync and async: same class, fields and text."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from concurrent import futures

import grpc
import pytest
from google.protobuf import duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2

from protos import errors
from protos.errors import (
    ExpertMeshError,
    InvalidFieldError,
    Retry,
    Violation,
    error_classes,
    from_rpc_error,
    from_status,
    from_status_bytes,
)

MANY = [Violation(f"sampling.f{i}", "must be 0 or more", -i) for i in range(6)]
EXAMPLES: list[ExpertMeshError] = [
    errors.InvalidFieldError("sampling.temperature", "must be 0 or more", -0.5),
    errors.InvalidFieldError(violations=MANY),
    errors.InvalidFieldError("stopping.stop[0]", "must be plain, and short", 'a", got \nü'),
    errors.ContextLengthExceededError(prompt_tokens=4000, max_tokens=200, limit=4096),
    errors.MessageTooLargeError(got_bytes=70_000_000, limit_bytes=64 << 20),
    errors.UnknownModelError("gpt-0", "tiny"),
    errors.DuplicateRequestError("r-1"),
    errors.UnsupportedFeatureError("session_id"),
    errors.DeadlineExceededError("the queue", 1.5),
    errors.DeadlineExceededError("the queue"),
    errors.RequestCancelledError("r-1", "by its client"),
    errors.SlowReaderError(20_000, 16_384),
    errors.UnauthenticatedError("the API key is not known"),
    errors.PermissionDeniedError("a key without a tenant is needed"),
    errors.ClientStalledError(30.0),
    errors.SessionNotFoundError("chat-7"),
    errors.SessionExistsError("chat-7"),
    errors.SessionBusyError("chat-7", "router-a#1f", 12.5),
    errors.SessionFencedError("chat-7", "epoch 4, ours was 3"),
    errors.SessionQuotaError("chat-7", num_tokens=5000, quota_tokens=4096),
    errors.BatchNotFoundError("batch-7"),
    errors.BatchesOffError("--batch-root URI"),
    errors.BatchFencedError("batch-7", "epoch 4, ours was 3"),
    errors.BatchFailuresError(failed=30, total=1000, max_failure_rate=0.02),
    errors.QueueFullError(queued=7, limit=6, retry_after_s=0.25),
    errors.NotReadyError("group g1 loads", 2.0),
    errors.DrainingError(),
    errors.EngineStoppedError("shutdown"),
    errors.StateUnavailableError("connection refused", 2.0),
    errors.ColdKvError("the cold tier did not take a cache block", 2.0),
    errors.UnreachableError("connection refused"),
    errors.RouterLostError("router-1", "its process ended"),
    errors.StalePlacementError(layer_id=3, expert_id=17, group_epoch=4, call_epoch=5),
    errors.WireFormatError("magic b'HTTP'"),
    errors.GroupLostError("g2", "closed the lane"),
    errors.GroupComputeError("g2", "out of memory"),
    errors.NonFiniteError("expert output", 11),
    errors.NonFiniteError("logits"),
    errors.CheckpointError("/models/x", "missing", "lm_head.weight"),
    errors.CheckpointError("/models/x", "missing"),
    errors.BatchChangedError("/out", ("model.weights: begun with 1, now 2",)),
    errors.UnsupportedArchitectureError("llama", ("qwen3_5", "qwen3_5_moe")),
    errors.ConfigurationError("cluster.port", "must be in [0, 65535]", 70_000, "try 50051"),
    errors.ResourceError("memory", "12 GiB", "4 GiB", "use bfloat16"),
    errors.InternalError("KeyError", "r-9"),
]


def described(error: ExpertMeshError) -> tuple[object, ...]:
    return type(error), error.fields, error.violations, error.message, error.retry_after_s


class Raiser(grpc.GenericRpcHandler):
    """Answers a call with the example whose number is the request."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        def unary(request: bytes, context: grpc.ServicerContext) -> bytes:
            error = EXAMPLES[int(request)]
            context.set_trailing_metadata(error.trailers())
            context.abort(error.code, error.message)
            return b""

        def stream(request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
            yield b"first"
            unary(request, context)

        if handler_call_details.method.endswith("Stream"):
            return grpc.unary_stream_rpc_method_handler(stream)
        return grpc.unary_unary_rpc_method_handler(unary)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=2), handlers=[Raiser()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


def test_the_examples_cover_the_table() -> None:
    assert {type(example) for example in EXAMPLES} == set(error_classes().values())


def test_the_docstring_prints_the_table() -> None:
    lines = {
        line.replace("|", " ").replace("+-", " ").split()[0]: line
        for line in (errors.__doc__ or "").splitlines()
        if "Error " in line
    }
    for cls in error_classes().values():
        expected = [cls.__name__, cls.code.name, cls.reason, *cls.retry.value.split()]
        assert lines[cls.__name__].replace("|", " ").replace("+-", " ").split() == expected


@pytest.mark.parametrize("number", range(len(EXAMPLES)), ids=lambda n: repr(EXAMPLES[n])[:40])
def test_a_sync_client_gets_what_the_server_raised(number: int, address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        with pytest.raises(grpc.RpcError) as unary:
            channel.unary_unary("/x/Unary")(str(number).encode(), timeout=10)
        with pytest.raises(grpc.RpcError) as stream:
            list(channel.unary_stream("/x/Stream")(str(number).encode(), timeout=10))
    for caught in (unary, stream):
        assert caught.value.code() is EXAMPLES[number].code  # type: ignore[attr-defined]
        assert described(from_rpc_error(caught.value)) == described(EXAMPLES[number])


async def test_an_async_client_gets_what_the_server_raised(address: str) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        for number, example in enumerate(EXAMPLES):
            with pytest.raises(grpc.aio.AioRpcError) as unary:
                await channel.unary_unary("/x/Unary")(str(number).encode(), timeout=10)
            assert described(from_rpc_error(unary.value)) == described(example)


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda e: repr(e)[:40])
def test_a_copy_is_equal(error: ExpertMeshError) -> None:
    """Ray's channel rebuilds errors the way `copy` does."""
    assert described(copy.copy(error)) == described(error)


def test_numbers_stay_numbers() -> None:
    error = from_status(errors.QueueFullError(7, 6, 0.25).to_status())
    assert error.fields == {"queued": 7, "limit": 6, "retry_after_s": 0.25}
    assert str(error) == "7 requests are waiting, limit 6; retry after 0.25 s"


def test_a_retryable_error_says_when() -> None:
    status = errors.QueueFullError(7, 6, 0.25).to_status()
    info = error_details_pb2.RetryInfo()
    assert [d.Unpack(info) for d in status.details][-1]
    assert info.retry_delay == duration_pb2.Duration(nanos=250_000_000)
    assert errors.QueueFullError.retry is Retry.AFTER_DELAY


def test_violations_are_bad_request_details() -> None:
    status = InvalidFieldError("sampling.top_p", "must be in (0, 1]", 1.5).to_status()
    bad = error_details_pb2.BadRequest()
    assert any(detail.Unpack(bad) for detail in status.details)
    assert bad.field_violations[0].field == "sampling.top_p"
    assert bad.field_violations[0].description == "must be in (0, 1], got 1.5"


@pytest.mark.parametrize("char", ["x", "ü", "\n", "\x00", "😀"])
def test_details_stay_under_their_bound(char: str) -> None:
    long = char * 100_000
    for error in (
        InvalidFieldError(violations=[Violation(long, long, long)] * 500),
        errors.CheckpointError(long, long, long),
        errors.UnsupportedArchitectureError(long, (long,) * 50),
        errors.InternalError(long, long),
    ):
        assert len(error.to_status().SerializeToString()) <= errors.MAX_DETAILS_BYTES
        assert len(error.message.encode()) <= errors.MAX_MESSAGE_BYTES
        restored = from_status(error.to_status())
        assert (type(restored), restored.message) == (type(error), error.message)


@pytest.mark.parametrize(
    ("code", "text", "cls"),
    [
        (code_pb2.UNAVAILABLE, "failed to connect", errors.UnreachableError),
        (code_pb2.DEADLINE_EXCEEDED, "Deadline Exceeded", errors.DeadlineExceededError),
        (code_pb2.CANCELLED, "Locally cancelled", errors.RequestCancelledError),
        (code_pb2.UNIMPLEMENTED, "Method not found!", errors.UnsupportedFeatureError),
        (code_pb2.UNKNOWN, "boom", errors.InternalError),
        (code_pb2.RESOURCE_EXHAUSTED, "quota", errors.InternalError),
    ],
)
def test_a_foreign_status_becomes_the_nearest_class(
    code: int, text: str, cls: type[ExpertMeshError]
) -> None:
    error = from_status(status_pb2.Status(code=code, message=text))
    assert type(error) is cls


def test_grpcs_own_size_limit_becomes_ours_with_both_numbers() -> None:
    text = "CLIENT: Received message larger than max (5000000 vs. 4194304)"
    error = from_status(status_pb2.Status(code=code_pb2.RESOURCE_EXHAUSTED, message=text))
    assert isinstance(error, errors.MessageTooLargeError)
    assert error.fields == {"got_bytes": 5_000_000, "limit_bytes": 4_194_304}


def test_a_later_versions_reason_keeps_code_and_text() -> None:
    status = status_pb2.Status(code=code_pb2.UNAVAILABLE, message="moon phase")
    info = error_details_pb2.ErrorInfo(reason="MOON", domain="expertmesh")
    status.details.add().Pack(info)
    assert "moon phase" in str(from_status(status))


@pytest.mark.parametrize("payload", [b"", b"\xff\xff", b"\x12\x03why"])
def test_bytes_that_are_no_status_are_the_senders_fault(payload: bytes) -> None:
    error = from_status_bytes(payload)
    assert type(error) is errors.InternalError
    assert str(len(payload)) in str(error)
