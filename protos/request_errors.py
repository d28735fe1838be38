"""Errors of a client's request, of a session, and of a service that cannot take it now."""

from __future__ import annotations

from collections.abc import Sequence

import grpc

from protos.error_base import (
    ExpertMeshError,
    FieldError,
    Retry,
    Violation,
    clip,
    plain_value,
)


class RequestError(ExpertMeshError):
    """What a client asked for cannot be done, or was ended on its behalf."""


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
        one = Violation(field, rule, plain_value(value))
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
            f"model {clip(model, 100)!r} is not served; served: {clip(served, 100)!r}",
            model=model,
            served=served,
        )


class DuplicateRequestError(RequestError):
    """A request with this id is queued or running."""

    code = grpc.StatusCode.ALREADY_EXISTS
    reason = "DUPLICATE_REQUEST"

    def __init__(self, request_id: str) -> None:
        super().__init__(
            f"request {clip(request_id, 100)!r} is already queued or running",
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
        text = f"request {clip(request_id, 100)!r} was cancelled"
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


class UnauthenticatedError(RequestError):
    """The call carries no API key, or one that the service does not know."""

    code = grpc.StatusCode.UNAUTHENTICATED
    reason = "UNAUTHENTICATED"

    def __init__(self, detail: str) -> None:
        super().__init__(f"not authenticated: {detail}", detail=detail)


class PermissionDeniedError(RequestError):
    """The API key is known, and not one that may make this call."""

    code = grpc.StatusCode.PERMISSION_DENIED
    reason = "PERMISSION_DENIED"

    def __init__(self, detail: str) -> None:
        super().__init__(f"not allowed: {detail}", detail=detail)


class ClientStalledError(RequestError):
    """The client has taken nothing from its connection for so long that its stream is given up."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "CLIENT_STALLED"

    def __init__(self, stalled_s: float) -> None:
        super().__init__(
            f"the client has read nothing for {stalled_s:.6g} s; the request was cancelled",
            stalled_s=stalled_s,
        )


class SessionNotFoundError(RequestError):
    """There is no session of this id; it never was, was deleted, or has expired."""

    code = grpc.StatusCode.NOT_FOUND
    reason = "SESSION_NOT_FOUND"

    def __init__(self, session_id: str) -> None:
        super().__init__(f"session {clip(session_id, 100)!r} is not there", session_id=session_id)


class SessionExistsError(RequestError):
    """A session of this id is there."""

    code = grpc.StatusCode.ALREADY_EXISTS
    reason = "SESSION_EXISTS"

    def __init__(self, session_id: str) -> None:
        super().__init__(f"session {clip(session_id, 100)!r} is there", session_id=session_id)


class SessionBusyError(RequestError):
    """Another writer holds the session's lease. Its death frees the session at once."""

    code = grpc.StatusCode.ABORTED
    reason = "SESSION_BUSY"
    retry = Retry.AFTER_DELAY

    def __init__(self, session_id: str, holder: str, expires_s: float) -> None:
        super().__init__(
            f"session {clip(session_id, 100)!r} is held by {clip(holder, 100)}, for at least"
            f" {expires_s:.3g} s unless it ends earlier",
            session_id=session_id,
            holder=holder,
            expires_s=expires_s,
        )
        self.retry_after_s = min(max(expires_s, 0.05), 1.0)


class SessionFencedError(RequestError):
    """The session went on elsewhere, or was deleted, while this turn was under way."""

    code = grpc.StatusCode.ABORTED
    reason = "SESSION_FENCED"

    def __init__(self, session_id: str, detail: str) -> None:
        super().__init__(
            f"session {clip(session_id, 100)!r} is not ours any more: {detail}",
            session_id=session_id,
            detail=detail,
        )


class SessionQuotaError(RequestError):
    """The turn could make the session longer than its quota."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "SESSION_QUOTA"

    def __init__(self, session_id: str, num_tokens: int, quota_tokens: int) -> None:
        super().__init__(
            f"session {clip(session_id, 100)!r} would have {num_tokens} tokens, its quota is"
            f" {quota_tokens}",
            session_id=session_id,
            num_tokens=num_tokens,
            quota_tokens=quota_tokens,
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


class StateUnavailableError(ServiceUnavailableError):
    """The session store does not answer; what must be durable is refused."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "STATE_UNAVAILABLE"

    def __init__(self, detail: str = "", retry_after_s: float = 1.0) -> None:
        super().__init__(
            f"the session store is not available: {detail}"
            if detail
            else "the session store is not available",
            detail=detail,
            retry_after_s=retry_after_s,
        )
        self.retry_after_s = retry_after_s


class ColdKvError(ServiceUnavailableError):
    """The older KV of a sequence longer than the pool could not be kept, or was lost."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "COLD_KV"

    def __init__(self, detail: str = "", retry_after_s: float = 5.0) -> None:
        super().__init__(
            f"the sequence does not fit the KV cache, and its older part was lost: {detail}",
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


class RouterLostError(ServiceUnavailableError):
    """The process of a router ended; another router takes over, and it starts again."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "ROUTER_LOST"

    def __init__(self, router_id: str, detail: str = "", retry_after_s: float = 0.2) -> None:
        text = f"router {router_id} is lost"
        super().__init__(
            f"{text}: {detail}" if detail else text,
            router_id=router_id,
            detail=detail,
            retry_after_s=retry_after_s,
        )
        self.retry_after_s = retry_after_s
