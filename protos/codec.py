"""Tensors and frames as bytes, both ways.

A *frame* is what a router and an expert group exchange for one layer: a header of 64 bytes and a
payload, laid out in `experts.proto`, the same on a gRPC stream and on a lane. Everything here
is pure: bytes in, values out. What is malformed raises `WireFormatError` (frames) or
`InvalidFieldError` (tensors of the public API) and never reaches a kernel. The machine is little
endian, as are the wire formats.
"""

from __future__ import annotations

import math
import struct
from enum import IntEnum
from typing import NamedTuple

import torch
from google.protobuf.message import DecodeError

from protos.errors import InvalidFieldError, MessageTooLargeError, WireFormatError
from protos.v1 import experts_pb2, gating_pb2

MAGIC = b"EMF1"
HEADER_BYTES = 64
FRAME_VERSION = 1
MAX_SMALL_PAYLOAD_BYTES = 64 << 10
"""Bound of the payload of frames that carry no rows: an error's status, a lane token."""
MAX_TENSOR_DIMS = 8

Buffer = bytes | bytearray | memoryview


class DType(IntEnum):
    """Element type on the wire, in tensors (`gating.proto`) and in frames."""

    FLOAT32 = 1
    BFLOAT16 = 2
    INT32 = 3
    INT64 = 4


class FrameKind(IntEnum):
    """What a frame is."""

    FORWARD = 1
    RESULT = 2
    ERROR = 3
    HELLO = 4
    HELLO_ANSWER = 5


class Combine(IntEnum):
    """What a group returns of a forward."""

    SLOTS = 1
    """Each pair's expert output, unweighted: the router weighs and sums."""
    PARTIAL = 2
    """Each row's weighted sum over the pairs that this group computed, in float32."""


class FrameHeader(NamedTuple):
    """The first 64 bytes of a frame. A tuple, because one is made for each layer of each step."""

    kind: FrameKind
    combine: Combine = Combine.SLOTS
    call_id: int = 0
    placement_epoch: int = 0
    layer_id: int = 0
    dtype: DType = DType.FLOAT32
    """Of the rows, and of a `SLOTS` result."""
    version: int = FRAME_VERSION
    num_rows: int = 0
    hidden: int = 0
    num_pairs: int = 0
    deadline_ms: int = 0
    """Of a forward: how long the caller will still wait; 0 means without bound."""
    compute_us: int = 0
    queue_us: int = 0
    payload_bytes: int = 0


_TORCH = {
    DType.FLOAT32: torch.float32,
    DType.BFLOAT16: torch.bfloat16,
    DType.INT32: torch.int32,
    DType.INT64: torch.int64,
}
_WIRE = {dtype: wire for wire, dtype in _TORCH.items()}
_ITEM_BYTES = {1: 4, 2: 2, 3: 4, 4: 8}

_LAYOUT = struct.Struct("<4sHHQQIHHIIIIIIQ")
_PAYLOAD_BYTES = struct.Struct("<Q")
_FRAME_TAG = 0x0A  # field 1, length delimited: `bytes frame = 1` of ForwardRequest, ForwardResponse
_KINDS = (None, *FrameKind)
_COMBINES = (None, *Combine)
_ROW_DTYPES = (None, DType.FLOAT32, DType.BFLOAT16)


def dtype_of(tensor: torch.Tensor) -> DType:
    """Return the tensor's element type on the wire.

    Raises:
        WireFormatError: The wire has no such type.
    """
    return dtype_of_torch(tensor.dtype)


def dtype_of_torch(dtype: torch.dtype) -> DType:
    """Return the wire's name of a torch dtype; see `dtype_of`."""
    wire = _WIRE.get(dtype)
    if wire is None:
        raise WireFormatError(f"dtype {dtype} has no form on the wire")
    return wire


def torch_dtype(dtype: DType) -> torch.dtype:
    """Return the torch dtype of a wire type."""
    return _TORCH[dtype]


def tensor_to_proto(tensor: torch.Tensor) -> gating_pb2.Tensor:
    """Return the tensor as a message: row-major, little endian, one copy.

    Raises:
        WireFormatError: The wire has no such dtype.
    """
    wire = dtype_of(tensor)
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    payload = flat.view(torch.uint8).numpy().tobytes()
    return gating_pb2.Tensor(dtype=int(wire), shape=tensor.shape, payload=payload)  # type: ignore[arg-type]


def tensor_from_proto(message: gating_pb2.Tensor, *, field: str) -> torch.Tensor:
    """Return the message as a CPU tensor with memory of its own.

    Args:
        message: The tensor as it arrived.
        field: Its dotted path, for the error.

    Raises:
        InvalidFieldError: The dtype is not known, or payload and shape do not agree.
    """
    dtype = _TORCH.get(message.dtype)  # type: ignore[call-overload]  # an IntEnum's key is its int
    if dtype is None:
        raise InvalidFieldError(f"{field}.dtype", "must be a known DType", int(message.dtype))
    shape = tuple(message.shape)
    if len(shape) > MAX_TENSOR_DIMS:
        raise InvalidFieldError(
            f"{field}.shape", f"must have at most {MAX_TENSOR_DIMS} dimensions", len(shape)
        )
    num_bytes = math.prod(shape) * _ITEM_BYTES[message.dtype]
    if len(message.payload) != num_bytes:
        raise InvalidFieldError(
            f"{field}.payload",
            f"must have the {num_bytes} bytes of shape {list(shape)}",
            len(message.payload),
        )
    if num_bytes == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(message.payload), dtype=dtype).reshape(shape)


def forward_payload_bytes(num_rows: int, hidden: int, num_pairs: int, dtype: int) -> int:
    """Return the size of a forward's payload: pair rows, experts and weights, then the rows."""
    return 12 * num_pairs + num_rows * hidden * _ITEM_BYTES[dtype]


def result_payload_bytes(
    num_rows: int, hidden: int, num_pairs: int, dtype: int, combine: int
) -> int:
    """Return the size of a result's payload: `[P, D]` in `dtype`, or `[R, D]` in float32."""
    if combine == Combine.SLOTS:
        return num_pairs * hidden * _ITEM_BYTES[dtype]
    return num_rows * hidden * 4


def hello_header(kind: FrameKind, payload_bytes: int = 0) -> FrameHeader:
    """Return the header of a greeting, of its answer, or of an error outside any call."""
    return FrameHeader(kind=kind, payload_bytes=payload_bytes)


def pack_header(header: FrameHeader) -> bytes:
    """Return the header's 64 bytes.

    Raises:
        WireFormatError: A value does not fit its field.
    """
    kind, combine, call_id, epoch, layer_id, dtype, version, *rest = header
    try:
        return _LAYOUT.pack(MAGIC, kind, combine, call_id, epoch, layer_id, dtype, version, *rest)
    except struct.error as error:
        raise WireFormatError(f"{header}: {error}") from error


def pack_header_into(buffer: bytearray | memoryview, header: FrameHeader) -> None:
    """Write the header to the start of `buffer`; see `pack_header`."""
    if len(buffer) < HEADER_BYTES:
        raise WireFormatError(f"a buffer of {len(buffer)} bytes holds no header")
    kind, combine, call_id, epoch, layer_id, dtype, version, *rest = header
    try:
        _LAYOUT.pack_into(
            buffer, 0, MAGIC, kind, combine, call_id, epoch, layer_id, dtype, version, *rest
        )
    except struct.error as error:
        raise WireFormatError(f"{header}: {error}") from error


def unpack_header(buffer: Buffer, *, max_payload_bytes: int | None = None) -> FrameHeader:
    """Read and check the header at the start of `buffer`.

    Args:
        buffer: 64 bytes or more.
        max_payload_bytes: The most that the receiver takes; None for no bound.

    Raises:
        WireFormatError: Not a header of ours, or a size that does not follow from its numbers.
        MessageTooLargeError: The payload is larger than `max_payload_bytes`.
    """
    if len(buffer) < HEADER_BYTES:
        raise WireFormatError(f"header of {len(buffer)} bytes, expected {HEADER_BYTES}")
    (
        magic,
        kind,
        combine,
        call_id,
        placement_epoch,
        layer_id,
        dtype,
        version,
        num_rows,
        hidden,
        num_pairs,
        deadline_ms,
        compute_us,
        queue_us,
        payload_bytes,
    ) = _LAYOUT.unpack_from(buffer)
    if magic != MAGIC:
        raise WireFormatError(f"magic {magic!r}, expected {MAGIC!r}")
    if version != FRAME_VERSION:
        raise WireFormatError(f"version {version}, expected {FRAME_VERSION}")
    if not 1 <= kind <= 5:
        raise WireFormatError(f"unknown kind {kind}")
    if not 1 <= combine <= 2:
        raise WireFormatError(f"unknown combine {combine}")
    if not 1 <= dtype <= 2:
        raise WireFormatError(f"rows of dtype {dtype}; only float32 (1) and bfloat16 (2) travel")
    if kind == 1:
        expected = forward_payload_bytes(num_rows, hidden, num_pairs, dtype)
    elif kind == 2:
        expected = result_payload_bytes(num_rows, hidden, num_pairs, dtype, combine)
    else:
        expected = min(payload_bytes, MAX_SMALL_PAYLOAD_BYTES)
    if payload_bytes != expected:
        raise WireFormatError(
            f"kind {kind} with {num_rows} rows of {hidden}, {num_pairs} pairs, dtype {dtype} has"
            f" {expected} payload bytes, the header says {payload_bytes}"
        )
    if max_payload_bytes is not None and payload_bytes > max_payload_bytes:
        raise MessageTooLargeError(payload_bytes, max_payload_bytes)
    return FrameHeader(
        _KINDS[kind],
        _COMBINES[combine],
        call_id,
        placement_epoch,
        layer_id,
        _ROW_DTYPES[dtype],  # type: ignore[arg-type]
        version,
        num_rows,
        hidden,
        num_pairs,
        deadline_ms,
        compute_us,
        queue_us,
        payload_bytes,
    )


def split_frame(frame: Buffer) -> tuple[FrameHeader, memoryview]:
    """Return header and payload of one whole frame; the payload shares the frame's memory.

    Raises:
        WireFormatError: As `unpack_header`, or the frame is cut or has bytes behind its payload.
    """
    header = unpack_header(frame)
    payload = memoryview(frame)[HEADER_BYTES:]
    if len(payload) != header.payload_bytes:
        raise WireFormatError(
            f"the header says {header.payload_bytes} payload bytes, the frame has {len(payload)}"
        )
    return header, payload


def payload_bytes_of(buffer: Buffer) -> int | None:
    """Return the payload size that a header states, or None where it is no header of ours.

    For a transport that only has to know how much to read; `unpack_header` checks the rest.
    """
    if len(buffer) < HEADER_BYTES or bytes(buffer[:4]) != MAGIC:
        return None
    (num_bytes,) = _PAYLOAD_BYTES.unpack_from(buffer, 56)
    return int(num_bytes)


def encode_frame_field(*parts: Buffer) -> bytes:
    """Return the serialised `ForwardRequest` or `ForwardResponse` whose frame is `parts` joined:
    one copy."""
    size, prefix = sum(map(len, parts)), bytearray((_FRAME_TAG,))
    while size >= 0x80:
        prefix.append(size & 0x7F | 0x80)
        size >>= 7
    prefix.append(size)
    return b"".join((prefix, *parts))


def decode_frame_field(message: bytes) -> memoryview:
    """Return the frame inside a serialised `ForwardRequest` or `ForwardResponse`, without a copy.

    Raises:
        WireFormatError: Not such a message.
    """
    size = shift = 0
    for position in range(1, min(len(message), 11)):
        byte = message[position]
        size |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            if message[0] == _FRAME_TAG and position + 1 + size == len(message):
                return memoryview(message)[position + 1 :]
            break
    try:  # a legal message in another form, e.g. with fields of a later version
        return memoryview(experts_pb2.ForwardRequest.FromString(message).frame)
    except DecodeError as error:
        raise WireFormatError(f"no frame message: {error}") from error
