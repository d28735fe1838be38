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
    +- ServiceUnavailableError
    |  +- QueueFullError              RESOURCE_EXHAUSTED    QUEUE_FULL                after delay
    |  +- NotReadyError               UNAVAILABLE           NOT_READY                 after delay
    |  +- DrainingError               UNAVAILABLE           DRAINING                  after delay
    |  +- EngineStoppedError          UNAVAILABLE           ENGINE_STOPPED            after delay
    |  +- UnreachableError            UNAVAILABLE           UNREACHABLE               after delay
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
    +- InternalError                  INTERNAL              INTERNAL                  never

On the wire an error is a `google.rpc.Status` in the trailer `grpc-status-details-bin`: one
`ErrorInfo` (reason, domain `expertmesh`, the constructor's arguments as metadata), a `BadRequest`
for field errors, a `RetryInfo` where a retry helps. The receiving side builds the same class with
the same arguments, so a constructor's annotations are its wire schema.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
import typing
from collections.abc import Iterable, Sequence
from enum import Enum
from typing import Any, ClassVar, NamedTuple

import grpc
from google.protobuf import message as protobuf_message
from google.rpc import error_details_pb2, status_pb2

DOMAIN = "expertmesh"
DETAILS_KEY = "grpc-status-details-bin"
MAX_DETAILS_BYTES = 4096
"""Bound of a serialised `Status`: trailers are capped at 8 KiB and the details travel as base64."""
MAX_MESSAGE_BYTES = 512
MAX_VALUE_BYTES = 256
"""Bound of one text value inside an error; longer ones are cut where the error is made."""
MAX_VIOLATIONS = 8

FieldValue = str | int | float | bool | tuple[str, ...] | None


class Retry(Enum):
    """What a caller may do with the same call."""

    NEVER = "never"
    AFTER_DELAY = "after delay"
    """The same call may succeed after `retry_after_s`."""
    OTHER_COPY = "other copy"
    """Send the rows to another copy of the expert, with a fresh placement, at once."""


class Violation(NamedTuple):
    """One field that broke a rule."""

    field: str
    """Dotted path, e.g. `sampling.temperature`."""
    rule: str
    """What the field must be, e.g. `must be 0 or more`."""
    value: FieldValue
    """What it was."""

    def __str__(self) -> str:
        return f"{self.field} {self.rule}{_GOT}{_to_json(self.value)}"


class ExpertMeshError(Exception):
    """Anything that ExpertMesh raises on purpose.

    Attributes:
        code: The gRPC status code.
        reason: Stable upper-snake name of the condition.
        retry: What a caller may do with the same call.
        retry_after_s: Seconds to wait before a retry; None where a retry does not help.
        fields: The constructor's arguments by name.
        violations: The fields at fault, of field errors.
    """

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNKNOWN
    reason: ClassVar[str] = "UNKNOWN"
    retry: ClassVar[Retry] = Retry.NEVER
    retry_after_s: float | None = None

    def __init__(self, message: str, /, **fields: FieldValue) -> None:
        self.message = _clip(message, MAX_MESSAGE_BYTES)
        self.fields = {name: _bounded(value) for name, value in fields.items()}
        self.violations: tuple[Violation, ...] = ()
        super().__init__(self.message)

    def __reduce__(self) -> tuple[Any, ...]:
        """Survive pickling (inside Ray's own channel only)."""
        return _rebuild, (type(self), self.message, self.fields, self.violations)

    def to_status(self) -> status_pb2.Status:
        """Return the error as a `google.rpc.Status` of at most `MAX_DETAILS_BYTES`."""
        violations = list(self.violations)
        while True:
            status = self._status(violations)
            if status.ByteSize() <= MAX_DETAILS_BYTES or not violations:
                return status
            violations.pop()

    def _status(self, violations: Sequence[Violation]) -> status_pb2.Status:
        status = status_pb2.Status(code=self.code.value[0], message=self.message)
        metadata = {
            name: _to_text(value)
            for name, value in self.fields.items()
            if value is not None and not (violations and name in Violation._fields)
        }
        status.details.add().Pack(
            error_details_pb2.ErrorInfo(reason=self.reason, domain=DOMAIN, metadata=metadata)
        )
        if violations:
            bad_request = error_details_pb2.BadRequest()
            for violation in violations:
                bad_request.field_violations.add(
                    field=violation.field,
                    description=f"{violation.rule}{_GOT}{_to_json(violation.value)}",
                )
            status.details.add().Pack(bad_request)
        if self.retry_after_s is not None:
            retry_info = error_details_pb2.RetryInfo()
            retry_info.retry_delay.FromNanoseconds(round(self.retry_after_s * 1e9))
            status.details.add().Pack(retry_info)
        return status

    def trailers(self) -> tuple[tuple[str, bytes], ...]:
        """Return the trailing metadata that carries `to_status()`."""
        return ((DETAILS_KEY, self.to_status().SerializeToString()),)


class RequestError(ExpertMeshError):
    """What a client asked for cannot be done, or was ended on its behalf."""


class FieldError(ExpertMeshError):
    """One or more named fields broke a rule; `violations` lists them."""

    def __init__(self, what: str, violations: Sequence[Violation], **fields: FieldValue) -> None:
        kept = tuple(
            Violation(_clip(v.field, 100), _clip(v.rule, 200), _bounded(v.value))
            for v in violations[:MAX_VIOLATIONS]
        )
        more = f" (and {len(violations) - 3} more)" if len(violations) > 3 else ""
        text = f"{what}: " + "; ".join(_clip(str(v), 150) for v in kept[:3]) + more
        first = kept[0]._asdict() if kept else {}
        super().__init__(text, **first, **fields)
        self.violations = kept


class InvalidFieldError(RequestError, FieldError):
    """A request's field has a value that the service does not take."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    reason = "INVALID_FIELD"

    def __init__(
        self,
        field: str = "",
        rule: str = "",
        value: object = None,
        *,
        violations: Sequence[Violation] = (),
    ) -> None:
        one = Violation(field, rule, _field_value(value))
        FieldError.__init__(self, "invalid request", tuple(violations) or (one,))


class ContextLengthExceededError(RequestError):
    """The prompt, or prompt and `max_tokens` together, do not fit the context window."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    reason = "CONTEXT_LENGTH_EXCEEDED"

    def __init__(self, prompt_tokens: int, max_tokens: int, limit: int) -> None:
        super().__init__(
            f"prompt of {prompt_tokens} tokens and max_tokens {max_tokens} exceed the context"
            f" window of {limit} tokens",
            prompt_tokens=prompt_tokens,
            max_tokens=max_tokens,
            limit=limit,
        )


class MessageTooLargeError(RequestError):
    """A message or frame is larger than the receiver takes."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "MESSAGE_TOO_LARGE"

    def __init__(self, got_bytes: int, limit_bytes: int) -> None:
        super().__init__(
            f"message of {got_bytes} bytes exceeds the limit of {limit_bytes} bytes",
            got_bytes=got_bytes,
            limit_bytes=limit_bytes,
        )


class UnknownModelError(RequestError):
    """The request names a model that this service does not serve."""

    code = grpc.StatusCode.NOT_FOUND
    reason = "UNKNOWN_MODEL"

    def __init__(self, model: str, served: str) -> None:
        super().__init__(
            f"model {_clip(model, 100)!r} is not served; served: {_clip(served, 100)!r}",
            model=model,
            served=served,
        )


class DuplicateRequestError(RequestError):
    """A request with this id is queued or running."""

    code = grpc.StatusCode.ALREADY_EXISTS
    reason = "DUPLICATE_REQUEST"

    def __init__(self, request_id: str) -> None:
        super().__init__(
            f"request {_clip(request_id, 100)!r} is already queued or running",
            request_id=request_id,
        )


class UnsupportedFeatureError(RequestError):
    """The contract has this feature and this service does not."""

    code = grpc.StatusCode.UNIMPLEMENTED
    reason = "UNSUPPORTED_FEATURE"

    def __init__(self, feature: str) -> None:
        super().__init__(f"not supported: {feature}", feature=feature)


class DeadlineExceededError(RequestError):
    """Something did not finish in the time that its caller gave it."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED
    reason = "DEADLINE"

    def __init__(self, what: str, timeout_s: float | None = None) -> None:
        bound = "its deadline" if timeout_s is None else f"{timeout_s:.6g} s"
        super().__init__(f"{what} did not finish within {bound}", what=what, timeout_s=timeout_s)


class RequestCancelledError(RequestError):
    """The request was cancelled before it finished."""

    code = grpc.StatusCode.CANCELLED
    reason = "REQUEST_CANCELLED"

    def __init__(self, request_id: str = "", detail: str = "") -> None:
        text = f"request {_clip(request_id, 100)!r} was cancelled"
        super().__init__(
            f"{text}: {detail}" if detail else text, request_id=request_id, detail=detail
        )


class SlowReaderError(RequestError):
    """The client stopped reading its stream and the output that waits for it reached the bound."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "SLOW_READER"

    def __init__(self, pending_tokens: int, limit: int) -> None:
        super().__init__(
            f"{pending_tokens} tokens wait for a client that does not read, limit {limit};"
            " the request was cancelled",
            pending_tokens=pending_tokens,
            limit=limit,
        )


class ServiceUnavailableError(ExpertMeshError):
    """The service cannot take this call now; the same call may succeed later."""

    retry = Retry.AFTER_DELAY


class QueueFullError(ServiceUnavailableError):
    """The queue of waiting requests is at its bound; refused at once instead of late."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "QUEUE_FULL"

    def __init__(self, queued: int, limit: int, retry_after_s: float = 1.0) -> None:
        super().__init__(
            f"{queued} requests are waiting, limit {limit}; retry after {retry_after_s:.6g} s",
            queued=queued,
            limit=limit,
            retry_after_s=retry_after_s,
        )
        self.retry_after_s = retry_after_s


class NotReadyError(ServiceUnavailableError):
    """A part of the cluster is still starting."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "NOT_READY"

    def __init__(self, detail: str = "", retry_after_s: float = 1.0) -> None:
        super().__init__(
            f"not ready: {detail}" if detail else "not ready",
            detail=detail,
            retry_after_s=retry_after_s,
        )
        self.retry_after_s = retry_after_s


class DrainingError(ServiceUnavailableError):
    """The process finishes what runs and takes nothing new."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "DRAINING"

    def __init__(self, detail: str = "", retry_after_s: float = 1.0) -> None:
        super().__init__(
            f"draining: {detail}" if detail else "draining: no new requests are taken",
            detail=detail,
            retry_after_s=retry_after_s,
        )
        self.retry_after_s = retry_after_s


class EngineStoppedError(ServiceUnavailableError):
    """The engine stopped while the request was queued or running."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "ENGINE_STOPPED"

    def __init__(self, detail: str = "", retry_after_s: float = 1.0) -> None:
        super().__init__(
            f"the engine stopped: {detail}" if detail else "the engine stopped",
            detail=detail,
            retry_after_s=retry_after_s,
        )
        self.retry_after_s = retry_after_s


class UnreachableError(ServiceUnavailableError):
    """No connection to the service, or the connection was lost; raised by the caller's side."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "UNREACHABLE"

    def __init__(self, detail: str, retry_after_s: float = 0.2) -> None:
        super().__init__(f"not reachable: {detail}", detail=detail, retry_after_s=retry_after_s)
        self.retry_after_s = retry_after_s


class ExpertCallError(ExpertMeshError):
    """A forward on an expert group failed."""


class StalePlacementError(ExpertCallError):
    """The group does not hold the expert, or holds it under another epoch than the call's."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "STALE_PLACEMENT"
    retry = Retry.OTHER_COPY

    def __init__(self, layer_id: int, expert_id: int, group_epoch: int, call_epoch: int) -> None:
        expert = f"layer {layer_id} expert {expert_id}"
        super().__init__(
            f"{expert} is not resident in the group at placement epoch {group_epoch}"
            if group_epoch == call_epoch
            else f"{expert}: the group is at placement epoch {group_epoch}, the call at"
            f" {call_epoch}",
            layer_id=layer_id,
            expert_id=expert_id,
            group_epoch=group_epoch,
            call_epoch=call_epoch,
        )


class WireFormatError(ExpertCallError):
    """A frame's bytes do not follow the layout in `experts.proto`."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    reason = "WIRE_FORMAT"

    def __init__(self, detail: str) -> None:
        super().__init__(f"malformed frame: {detail}", detail=detail)


class GroupLostError(ExpertCallError):
    """An expert group does not answer any more."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "GROUP_LOST"
    retry = Retry.OTHER_COPY

    def __init__(self, group_id: str, detail: str = "") -> None:
        text = f"expert group {group_id} is lost"
        super().__init__(f"{text}: {detail}" if detail else text, group_id=group_id, detail=detail)


class GroupComputeError(ExpertCallError):
    """An expert group failed while it computed."""

    code = grpc.StatusCode.INTERNAL
    reason = "GROUP_COMPUTE"
    retry = Retry.OTHER_COPY

    def __init__(self, group_id: str, detail: str = "") -> None:
        text = f"expert group {group_id} failed to compute"
        super().__init__(f"{text}: {detail}" if detail else text, group_id=group_id, detail=detail)


class NonFiniteError(ExpertCallError):
    """NaN or infinity in an expert's output or in the logits."""

    code = grpc.StatusCode.INTERNAL
    reason = "NON_FINITE"

    def __init__(self, where: str, layer_id: int | None = None) -> None:
        at = "" if layer_id is None else f" of layer {layer_id}"
        super().__init__(f"NaN or infinity in {where}{at}", where=where, layer_id=layer_id)


class SetupError(ExpertMeshError):
    """The service cannot start as it is configured."""


class CheckpointError(SetupError):
    """The checkpoint's files are missing, malformed, or not of the expected shape."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "CHECKPOINT"

    def __init__(self, path: str, detail: str, tensor: str | None = None) -> None:
        at = f", tensor {tensor}" if tensor else ""
        super().__init__(
            f"checkpoint {path}{at}: {detail}", path=path, detail=detail, tensor=tensor
        )


class UnsupportedArchitectureError(SetupError):
    """The checkpoint's `model_type` is not one of ours."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "UNSUPPORTED_ARCHITECTURE"

    def __init__(self, got: str, supported: tuple[str, ...]) -> None:
        super().__init__(
            f"model_type {got!r} is not supported; supported: {', '.join(supported)}",
            got=got,
            supported=tuple(supported),
        )


class ConfigurationError(SetupError, FieldError):
    """A configuration's field broke a rule."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    reason = "CONFIGURATION"

    def __init__(
        self,
        field: str = "",
        rule: str = "",
        value: object = None,
        hint: str = "",
        *,
        violations: Sequence[Violation] = (),
    ) -> None:
        one = Violation(field, rule, _field_value(value))
        what = f"invalid configuration ({hint})" if hint else "invalid configuration"
        FieldError.__init__(self, what, tuple(violations) or (one,), hint=hint)


class ResourceError(SetupError):
    """Not enough of a resource (memory, CPU, a node) to start."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "RESOURCE"

    def __init__(self, what: str, need: str, have: str, hint: str = "") -> None:
        text = f"not enough {what}: need {need}, have {have}"
        super().__init__(
            f"{text}; {hint}" if hint else text, what=what, need=need, have=have, hint=hint
        )


class InternalError(ExpertMeshError):
    """A fault of ours. The log of the answering process has the rest, under the request id."""

    code = grpc.StatusCode.INTERNAL
    reason = "INTERNAL"

    def __init__(self, detail: str = "", request_id: str = "") -> None:
        at = f" (request {_clip(request_id, 100)})" if request_id else ""
        super().__init__(f"internal error: {detail}{at}", detail=detail, request_id=request_id)


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
    """Build the error of a serialised `google.rpc.Status`, e.g. the payload of an error frame."""
    status = status_pb2.Status()
    try:
        status.ParseFromString(payload)
    except protobuf_message.DecodeError:
        return WireFormatError(f"{len(payload)} bytes that are no google.rpc.Status")
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


_GOT = ", got "
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


def _rebuild(
    cls: Any, message: str, fields: dict[str, Any], violations: tuple[Violation, ...]
) -> ExpertMeshError:
    error: ExpertMeshError
    if "reason" not in vars(cls):
        error = cls(message, **fields)
    elif issubclass(cls, FieldError):
        own = {name: value for name, value in fields.items() if name not in Violation._fields}
        error = cls(violations=violations, **own)
    else:
        error = cls(**fields)
    error.message, error.args = message, (message,)
    return error


def _violation(field: str, description: str) -> Violation:
    rule, _, value = description.partition(_GOT)
    return Violation(field, rule, _from_json(value))


def _to_text(value: FieldValue) -> str:
    return value if isinstance(value, str) else _to_json(value)


def _from_text(text: str, kind: Any) -> FieldValue:
    is_text = kind is str or kind == str | None
    return text if is_text else _from_json(text)


def _to_json(value: FieldValue) -> str:
    return json.dumps(value, ensure_ascii=False)


def _from_json(text: str) -> FieldValue:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return tuple(value) if isinstance(value, list) else value


def _field_value(value: object) -> FieldValue:
    """Keep plain values as they are; show anything else by its `repr`."""
    if isinstance(value, (str, int, float)) or value is None:
        return value
    return repr(value)


def _bounded(value: FieldValue) -> FieldValue:
    if isinstance(value, str):
        return _clip(value, MAX_VALUE_BYTES)
    if isinstance(value, tuple):
        return tuple(_clip(item, 64) for item in value[:8])
    return value


def _clip(text: str, limit_bytes: int) -> str:
    """Cut to at most `limit_bytes` of UTF-8, with an ellipsis where something was cut."""
    raw = text.encode("utf-8", "replace")
    if len(raw) <= limit_bytes:
        return raw.decode()
    return raw[: limit_bytes - 3].decode(errors="ignore") + "…"
