"""Errors of batches that the service runs."""

from __future__ import annotations

import grpc

from protos.error_base import clip
from protos.request_errors import RequestError


class BatchNotFoundError(RequestError):
    """There is no batch of this name; it never was, or has expired."""

    code = grpc.StatusCode.NOT_FOUND
    reason = "BATCH_NOT_FOUND"

    def __init__(self, name: str) -> None:
        super().__init__(f"batch {clip(name, 100)!r} is not there", name=name)


class BatchesOffError(RequestError):
    """The service runs no batches, because nobody said where their files may be."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "BATCHES_OFF"

    def __init__(self, option: str) -> None:
        super().__init__(
            f"this service runs no batches: start it with {option}, the folder that their inputs"
            " and outputs lie in",
            option=option,
        )


class BatchFencedError(RequestError):
    """A batch is driven by another process, or has ended, while this one drove it."""

    code = grpc.StatusCode.ABORTED
    reason = "BATCH_FENCED"

    def __init__(self, name: str, detail: str) -> None:
        super().__init__(
            f"batch {clip(name, 100)!r} is not ours any more: {detail}", name=name, detail=detail
        )


class BatchFailuresError(RequestError):
    """Too many rows of a batch have failed; it was stopped."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "BATCH_FAILURES"

    def __init__(self, failed: int, total: int, max_failure_rate: float) -> None:
        super().__init__(
            f"{failed} of {total} rows failed, max_failure_rate is {max_failure_rate:g}",
            failed=failed,
            total=total,
            max_failure_rate=max_failure_rate,
        )
