"""Errors of calls to expert groups and of a service that cannot start, and our own faults."""

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
        one = Violation(field, rule, plain_value(value))
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


class BatchChangedError(SetupError):
    """A batch cannot go on: what its finished rows depend on is not what it was."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "BATCH_CHANGED"

    def __init__(self, output: str, changed: tuple[str, ...]) -> None:
        super().__init__(
            f"the batch in {clip(output, 150)} cannot go on with something else"
            f" ({'; '.join(changed)}); give the same again, or another output",
            output=output,
            changed=tuple(changed),
        )


class InternalError(ExpertMeshError):
    """A fault of ours. The log of the answering process has the rest, under the request id."""

    code = grpc.StatusCode.INTERNAL
    reason = "INTERNAL"

    def __init__(self, detail: str = "", request_id: str = "") -> None:
        at = f" (request {clip(request_id, 100)})" if request_id else ""
        super().__init__(f"internal error: {detail}{at}", detail=detail, request_id=request_id)
