"""What every error is: a class with a code, a retry rule, fields, and a form on the wire.

The classes themselves are in `request_errors`, `batch_errors` and `cluster_errors`;
`protos.errors` has them all.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import Enum
from typing import Any, ClassVar, NamedTuple

import grpc
from google.rpc import error_details_pb2, status_pb2

DOMAIN = "expertmesh"
DETAILS_KEY = "grpc-status-details-bin"
MAX_DETAILS_BYTES = 4096
"""Bound of a serialised `Status`: trailers are capped at 8 KiB and the details travel as base64."""
MAX_MESSAGE_BYTES = 512
MAX_VALUE_BYTES = 256
"""Bound of one text value inside an error; longer ones are cut where the error is made."""
MAX_VIOLATIONS = 8

GOT = ", got "
"""Between rule and value in a field violation's description."""

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
        return f"{self.field} {self.rule}{GOT}{to_json(self.value)}"


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
        self.message = clip(message, MAX_MESSAGE_BYTES)
        self.fields = {name: bounded(value) for name, value in fields.items()}
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
            name: to_text(value)
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
                    description=f"{violation.rule}{GOT}{to_json(violation.value)}",
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


class FieldError(ExpertMeshError):
    """One or more named fields broke a rule; `violations` lists them."""

    def __init__(self, what: str, violations: Sequence[Violation], **fields: FieldValue) -> None:
        kept = tuple(
            Violation(clip(v.field, 100), clip(v.rule, 200), bounded(v.value))
            for v in violations[:MAX_VIOLATIONS]
        )
        more = f" (and {len(violations) - 3} more)" if len(violations) > 3 else ""
        text = f"{what}: " + "; ".join(clip(str(v), 150) for v in kept[:3]) + more
        first = kept[0]._asdict() if kept else {}
        super().__init__(text, **first, **fields)
        self.violations = kept


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


def to_text(value: FieldValue) -> str:
    """Return a field's value as an `ErrorInfo` carries it."""
    return value if isinstance(value, str) else to_json(value)


def to_json(value: FieldValue) -> str:
    """Return a field's value as text."""
    return json.dumps(value, ensure_ascii=False)


def from_json(text: str) -> FieldValue:
    """Return the value of a text of `to_json`; any other text as it is."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return tuple(value) if isinstance(value, list) else value


def plain_value(value: object) -> FieldValue:
    """Keep plain values as they are; show anything else by its `repr`."""
    if isinstance(value, (str, int, float)) or value is None:
        return value
    return repr(value)


def bounded(value: FieldValue) -> FieldValue:
    """Cut what a field may hold to its bound."""
    if isinstance(value, str):
        return clip(value, MAX_VALUE_BYTES)
    if isinstance(value, tuple):
        return tuple(clip(item, 64) for item in value[:8])
    return value


def clip(text: str, limit_bytes: int) -> str:
    """Cut to at most `limit_bytes` of UTF-8, with an ellipsis where something was cut."""
    raw = text.encode("utf-8", "replace")
    if len(raw) <= limit_bytes:
        return raw.decode()
    return raw[: limit_bytes - 3].decode(errors="ignore") + "…"
