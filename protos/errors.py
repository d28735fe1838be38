"""Every error that crosses a process, as a class, a gRPC code and a retry rule.

    class                         gRPC code             reason                    retry
    ----------------------------  --------------------  ------------------------  -----------
    ExpertMeshError               UNKNOWN               UNKNOWN                   never
    +- RequestError
    |  +- InvalidFieldError           INVALID_ARGUMENT      INVALID_FIELD             never
    |  +- ContextLengthExceededError  INVALID_ARGUMENT      CONTEXT_LENGTH_EXCEEDED   never
    |  +- MessageTooLargeError        RESOURCE_EXHAUSTED    MESSAGE_TOO_LARGE         never
    |  +- UnknownModelError           NOT_FOUND             UNKNOWN_MODEL             never
    |  +- DuplicateRequestError       ALREADY_EXISTS        DUPLICATE_REQUEST         never
    |  +- UnsupportedFeatureError     UNIMPLEMENTED         UNSUPPORTED_FEATURE       never
    |  +- DeadlineExceededError       DEADLINE_EXCEEDED     DEADLINE                  never
    |  +- RequestCancelledError       CANCELLED             REQUEST_CANCELLED         never
    |  +- SlowReaderError             RESOURCE_EXHAUSTED    SLOW_READER               never
    |  +- UnauthenticatedError        UNAUTHENTICATED       UNAUTHENTICATED           never
    |  +- PermissionDeniedError       PERMISSION_DENIED     PERMISSION_DENIED         never
    |  +- ClientStalledError          RESOURCE_EXHAUSTED    CLIENT_STALLED            never
    |  +- SessionNotFoundError        NOT_FOUND             SESSION_NOT_FOUND         never
    |  +- SessionExistsError          ALREADY_EXISTS        SESSION_EXISTS            never
    |  +- SessionBusyError            ABORTED               SESSION_BUSY              after delay
    |  +- SessionFencedError          ABORTED               SESSION_FENCED            never
    |  +- SessionQuotaError           RESOURCE_EXHAUSTED    SESSION_QUOTA             never
    |  +- BatchNotFoundError          NOT_FOUND             BATCH_NOT_FOUND           never
    |  +- BatchesOffError             FAILED_PRECONDITION   BATCHES_OFF               never
    |  +- BatchFencedError            ABORTED               BATCH_FENCED              never
    |  +- BatchFailuresError          FAILED_PRECONDITION   BATCH_FAILURES            never
    +- ServiceUnavailableError
    |  +- QueueFullError              RESOURCE_EXHAUSTED    QUEUE_FULL                after delay
    |  +- NotReadyError               UNAVAILABLE           NOT_READY                 after delay
    |  +- DrainingError               UNAVAILABLE           DRAINING                  after delay
    |  +- EngineStoppedError          UNAVAILABLE           ENGINE_STOPPED            after delay
    |  +- StateUnavailableError       UNAVAILABLE           STATE_UNAVAILABLE         after delay
    |  +- ColdKvError                 UNAVAILABLE           COLD_KV                   after delay
    |  +- UnreachableError            UNAVAILABLE           UNREACHABLE               after delay
    |  +- RouterLostError             UNAVAILABLE           ROUTER_LOST               after delay
    +- ExpertCallError
    |  +- StalePlacementError         FAILED_PRECONDITION   STALE_PLACEMENT           other copy
    |  +- WireFormatError             INVALID_ARGUMENT      WIRE_FORMAT               never
    |  +- GroupLostError              UNAVAILABLE           GROUP_LOST                other copy
    |  +- GroupComputeError           INTERNAL              GROUP_COMPUTE             other copy
    |  +- NonFiniteError              INTERNAL              NON_FINITE                never
    +- SetupError
    |  +- CheckpointError             FAILED_PRECONDITION   CHECKPOINT                never
    |  +- UnsupportedArchitectureError FAILED_PRECONDITION  UNSUPPORTED_ARCHITECTURE  never
    |  +- ConfigurationError          INVALID_ARGUMENT      CONFIGURATION             never
    |  +- ResourceError               FAILED_PRECONDITION   RESOURCE                  never
    |  +- BatchChangedError           FAILED_PRECONDITION   BATCH_CHANGED             never
    +- InternalError                  INTERNAL              INTERNAL                  never

On the wire an error is a `google.rpc.Status` in the trailer `grpc-status-details-bin`: one
`ErrorInfo` (reason, domain `expertmesh`, the constructor's arguments as metadata), a `BadRequest`
for field errors, a `RetryInfo` where a retry helps. The receiving side builds the same class with
the same arguments, so a constructor's annotations are its wire schema.

The classes are in `request_errors`, `batch_errors` and `cluster_errors`; import them from here.
"""

from __future__ import annotations

import functools
import inspect
import re
import typing
from collections.abc import Iterable
from typing import Any

import grpc
from google.protobuf import message as protobuf_message
from google.rpc import error_details_pb2, status_pb2

from protos.batch_errors import (
    BatchesOffError,
    BatchFailuresError,
    BatchFencedError,
    BatchNotFoundError,
)
from protos.cluster_errors import (
    BatchChangedError,
    CheckpointError,
    ConfigurationError,
    ExpertCallError,
    GroupComputeError,
    GroupLostError,
    InternalError,
    NonFiniteError,
    ResourceError,
    SetupError,
    StalePlacementError,
    UnsupportedArchitectureError,
    WireFormatError,
)
from protos.error_base import (
    DETAILS_KEY,
    DOMAIN,
    GOT,
    MAX_DETAILS_BYTES,
    MAX_MESSAGE_BYTES,
    MAX_VALUE_BYTES,
    MAX_VIOLATIONS,
    ExpertMeshError,
    FieldError,
    FieldValue,
    Retry,
    Violation,
    from_json,
)
from protos.request_errors import (
    ClientStalledError,
    ColdKvError,
    ContextLengthExceededError,
    DeadlineExceededError,
    DrainingError,
    DuplicateRequestError,
    EngineStoppedError,
    InvalidFieldError,
    MessageTooLargeError,
    NotReadyError,
    PermissionDeniedError,
    QueueFullError,
    RequestCancelledError,
    RequestError,
    RouterLostError,
    ServiceUnavailableError,
    SessionBusyError,
    SessionExistsError,
    SessionFencedError,
    SessionNotFoundError,
    SessionQuotaError,
    SlowReaderError,
    StateUnavailableError,
    UnauthenticatedError,
    UnknownModelError,
    UnreachableError,
    UnsupportedFeatureError,
)

__all__ = [
    "DETAILS_KEY",
    "DOMAIN",
    "MAX_DETAILS_BYTES",
    "MAX_MESSAGE_BYTES",
    "MAX_VALUE_BYTES",
    "MAX_VIOLATIONS",
    "BatchChangedError",
    "BatchFailuresError",
    "BatchFencedError",
    "BatchNotFoundError",
    "BatchesOffError",
    "CheckpointError",
    "ClientStalledError",
    "ColdKvError",
    "ConfigurationError",
    "ContextLengthExceededError",
    "DeadlineExceededError",
    "DrainingError",
    "DuplicateRequestError",
    "EngineStoppedError",
    "ExpertCallError",
    "ExpertMeshError",
    "FieldError",
    "FieldValue",
    "GroupComputeError",
    "GroupLostError",
    "InternalError",
    "InvalidFieldError",
    "MessageTooLargeError",
    "NonFiniteError",
    "NotReadyError",
    "PermissionDeniedError",
    "QueueFullError",
    "RequestCancelledError",
    "RequestError",
    "ResourceError",
    "Retry",
    "RouterLostError",
    "ServiceUnavailableError",
    "SessionBusyError",
    "SessionExistsError",
    "SessionFencedError",
    "SessionNotFoundError",
    "SessionQuotaError",
    "SetupError",
    "SlowReaderError",
    "StalePlacementError",
    "StateUnavailableError",
    "UnauthenticatedError",
    "UnknownModelError",
    "UnreachableError",
    "UnsupportedArchitectureError",
    "UnsupportedFeatureError",
    "Violation",
    "WireFormatError",
    "error_classes",
    "from_rpc_error",
    "from_status",
    "from_status_bytes",
]


def error_classes() -> dict[str, type[ExpertMeshError]]:
    """Return every class of the tree that has a reason of its own, by reason."""
    found: dict[str, type[ExpertMeshError]] = {}
    pending: list[type[ExpertMeshError]] = [ExpertMeshError]
    while pending:
        for cls in pending.pop().__subclasses__():
            if "reason" in vars(cls):
                found[cls.reason] = cls
            pending.append(cls)
    return found


def from_status(status: status_pb2.Status) -> ExpertMeshError:
    """Build the error that `to_status` described; of a foreign status, the nearest class."""
    info = error_details_pb2.ErrorInfo()
    bad_request = error_details_pb2.BadRequest()
    for detail in status.details:
        for target in (info, bad_request):
            if detail.Is(target.DESCRIPTOR):
                detail.Unpack(target)
    cls: Any = error_classes().get(info.reason) if info.domain == DOMAIN else None
    if cls is None:
        return _foreign(status.code, status.message)
    schema = _wire_schema(info.reason)
    try:
        fields: dict[str, Any] = {
            name: _from_text(text, schema.get(name, str)) for name, text in info.metadata.items()
        }
        if issubclass(cls, FieldError):
            fields["violations"] = [
                _violation(v.field, v.description) for v in bad_request.field_violations
            ]
        error: ExpertMeshError = cls(**fields)
    except (TypeError, ValueError):  # another version's fields: keep code and text
        return _foreign(status.code, status.message)
    error.message = status.message  # made from the uncut arguments
    error.args = (status.message,)
    return error


def from_status_bytes(payload: bytes) -> ExpertMeshError:
    """Build the error of a serialised `google.rpc.Status`, e.g. the payload of an error frame.

    Other bytes are a fault of the process that sent them, never of the request.
    """
    status = status_pb2.Status()
    try:
        status.ParseFromString(payload)
    except protobuf_message.DecodeError:
        status.Clear()
    if status.code == 0:
        return InternalError(f"an error of {len(payload)} bytes without a google.rpc.Status")
    return from_status(status)


def from_rpc_error(error: grpc.RpcError) -> ExpertMeshError:
    """Build our error from what a sync or async stub raised."""
    for key, value in _trailers(error):
        if key == DETAILS_KEY:
            status = status_pb2.Status()
            try:
                status.ParseFromString(value if isinstance(value, bytes) else value.encode())
            except protobuf_message.DecodeError:
                break
            return from_status(status)
    code = error.code() if isinstance(error, (grpc.Call, grpc.aio.AioRpcError)) else None
    text = error.details() if isinstance(error, (grpc.Call, grpc.aio.AioRpcError)) else str(error)
    return _foreign((code or grpc.StatusCode.UNKNOWN).value[0], text or "")


_OVERSIZE = re.compile(r"larger than max \((\d+) vs\. (\d+)\)")


def _trailers(error: grpc.RpcError) -> Iterable[tuple[str, str | bytes]]:
    if isinstance(error, (grpc.Call, grpc.aio.AioRpcError)):
        return error.trailing_metadata() or ()
    return ()


def _foreign(code: int, text: str) -> ExpertMeshError:
    """Return the nearest class for a status that carries none of our details."""
    status = grpc.StatusCode
    if code == status.UNAVAILABLE.value[0]:
        return UnreachableError(text)
    if code == status.DEADLINE_EXCEEDED.value[0]:
        return DeadlineExceededError("the call")
    if code == status.UNAUTHENTICATED.value[0]:
        return UnauthenticatedError(text)
    if code == status.CANCELLED.value[0]:
        return RequestCancelledError(detail=text)
    if code == status.UNIMPLEMENTED.value[0]:
        return UnsupportedFeatureError(text)
    if code == status.RESOURCE_EXHAUSTED.value[0] and (sizes := _OVERSIZE.search(text)):
        return MessageTooLargeError(int(sizes[1]), int(sizes[2]))
    return InternalError(text)


@functools.cache
def _wire_schema(reason: str) -> dict[str, Any]:
    """Return the constructor's argument types, which are the types of the fields on the wire."""
    constructor = vars(error_classes()[reason])["__init__"]
    hints = typing.get_type_hints(constructor)
    return {name: hints.get(name, str) for name in inspect.signature(constructor).parameters}


def _violation(field: str, description: str) -> Violation:
    rule, _, value = description.partition(GOT)
    return Violation(field, rule, from_json(value))


def _from_text(text: str, kind: Any) -> FieldValue:
    is_text = kind is str or kind == str | None
    return text if is_text else from_json(text)
