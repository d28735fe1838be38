"""Frames and tensors survive the wire, and nothing malformed gets past the codec."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from protos import codec
from protos.codec import Combine, DType, FrameHeader, FrameKind
from protos.errors import InvalidFieldError, MessageTooLargeError, WireFormatError
from protos.v1 import experts_pb2, gating_pb2

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)


@st.composite
def headers(draw: st.DrawFn) -> FrameHeader:
    kind = draw(st.sampled_from(FrameKind))
    combine = draw(st.sampled_from(Combine))
    dtype = draw(st.sampled_from([DType.FLOAT32, DType.BFLOAT16]))
    rows, hidden, pairs = (draw(st.integers(0, 2**12)) for _ in range(3))
    if kind is FrameKind.FORWARD:
        size = codec.forward_payload_bytes(rows, hidden, pairs, dtype)
    elif kind is FrameKind.RESULT:
        size = codec.result_payload_bytes(rows, hidden, pairs, dtype, combine)
    else:
        size = draw(st.integers(0, codec.MAX_SMALL_PAYLOAD_BYTES))
    return FrameHeader(
        kind=kind,
        combine=combine,
        call_id=draw(U64),
        placement_epoch=draw(U64),
        layer_id=draw(U32),
        dtype=dtype,
        num_rows=rows,
        hidden=hidden,
        num_pairs=pairs,
        deadline_ms=draw(U32),
        compute_us=draw(U32),
        queue_us=draw(U32),
        payload_bytes=size,
    )


def forward_header(**changes: int) -> FrameHeader:
    size = codec.forward_payload_bytes(2, 8, 3, DType.FLOAT32)
    header = FrameHeader(
        kind=FrameKind.FORWARD, num_rows=2, hidden=8, num_pairs=3, payload_bytes=size
    )
    return header._replace(**changes)


@given(headers())
def test_a_header_survives_the_wire(header: FrameHeader) -> None:
    packed = codec.pack_header(header)
    assert len(packed) == codec.HEADER_BYTES
    unpacked = codec.unpack_header(packed)
    assert unpacked == header
    assert [type(unpacked.kind), type(unpacked.combine), type(unpacked.dtype)] == [
        FrameKind,
        Combine,
        DType,
    ]
    buffer = bytearray(codec.HEADER_BYTES + 7)
    codec.pack_header_into(buffer, header)
    assert bytes(buffer[: codec.HEADER_BYTES]) == packed
    assert codec.payload_bytes_of(buffer) == header.payload_bytes


def test_the_layout_is_that_of_the_proto_file() -> None:
    """Every offset by hand: a peer in another language reads the same bytes."""
    header = FrameHeader(
        kind=FrameKind.RESULT,
        combine=Combine.PARTIAL,
        call_id=0x0102030405060708,
        placement_epoch=9,
        layer_id=10,
        dtype=DType.BFLOAT16,
        num_rows=2,
        hidden=4,
        num_pairs=5,
        deadline_ms=6,
        compute_us=7,
        queue_us=8,
        payload_bytes=32,  # 2 rows x 4 x 4 bytes: partial sums are float32
    )
    packed = codec.pack_header(header)
    assert packed[:16] == b"EMF1\x02\x00\x02\x00\x08\x07\x06\x05\x04\x03\x02\x01"
    u32 = [int.from_bytes(packed[at : at + 4], "little") for at in (24, 32, 36, 40, 44, 48, 52)]
    assert u32 == [10, 2, 4, 5, 6, 7, 8]
    assert packed[28:32] == b"\x02\x00\x01\x00"
    assert int.from_bytes(packed[16:24], "little") == 9
    assert int.from_bytes(packed[56:64], "little") == 32
    assert codec.unpack_header(packed) == header


def test_payload_sizes() -> None:
    # 3 pairs x (4 + 4 + 4) + 2 rows x 8 x 4 = 100; bfloat16: 36 + 32 = 68
    assert codec.forward_payload_bytes(2, 8, 3, DType.FLOAT32) == 100
    assert codec.forward_payload_bytes(2, 8, 3, DType.BFLOAT16) == 68
    assert codec.result_payload_bytes(2, 8, 3, DType.BFLOAT16, Combine.SLOTS) == 48
    assert codec.result_payload_bytes(2, 8, 3, DType.BFLOAT16, Combine.PARTIAL) == 64


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, b"EMF2", "magic b'EMF2', expected b'EMF1'"),
        (30, b"\x02\x00", "version 2, expected 1"),
        (4, b"\x00\x00", "unknown kind 0"),
        (4, b"\x06\x00", "unknown kind 6"),
        (6, b"\x03\x00", "unknown combine 3"),
        (28, b"\x03\x00", "dtype 3"),
        (28, b"\x00\x00", "dtype 0"),
        (56, b"\x63", "has 100 payload bytes, the header says 99"),
        (28, b"\x02\x00", "has 68 payload bytes, the header says 100"),
        (32, b"\xff\xff\xff\xff", "the header says 100"),
        (40, b"\x04", "has 112 payload bytes, the header says 100"),
    ],
)
def test_a_malformed_header_is_named(position: int, value: bytes, message: str) -> None:
    packed = bytearray(codec.pack_header(forward_header()))
    packed[position : position + len(value)] = value
    with pytest.raises(WireFormatError, match="malformed frame") as caught:
        codec.unpack_header(packed)
    assert message in str(caught.value)


@given(st.binary(max_size=200))
def test_random_bytes_are_a_wire_error(junk: bytes) -> None:
    with pytest.raises(WireFormatError):
        codec.split_frame(junk)


@given(headers(), st.integers(0, 63), st.integers(1, 255))
def test_a_flipped_byte_is_refused_or_harmless(
    header: FrameHeader, position: int, flip: int
) -> None:
    """Whatever a header says, its size follows from its numbers or it is refused."""
    packed = bytearray(codec.pack_header(header))
    packed[position] ^= flip
    try:
        got = codec.unpack_header(packed)
    except WireFormatError:
        return
    if got.kind is FrameKind.FORWARD:
        expected = codec.forward_payload_bytes(got.num_rows, got.hidden, got.num_pairs, got.dtype)
        assert got.payload_bytes == expected
    elif got.kind is not FrameKind.RESULT:
        assert got.payload_bytes <= codec.MAX_SMALL_PAYLOAD_BYTES


def test_a_short_header_names_its_length() -> None:
    with pytest.raises(WireFormatError, match="header of 63 bytes, expected 64"):
        codec.unpack_header(codec.pack_header(forward_header())[:63])
    with pytest.raises(WireFormatError, match="a buffer of 10 bytes"):
        codec.pack_header_into(bytearray(10), forward_header())


@pytest.mark.parametrize("change", [{"call_id": -1}, {"num_rows": 2**32}, {"kind": 2**16}])
def test_a_value_that_does_not_fit_is_a_wire_error(change: dict[str, int]) -> None:
    with pytest.raises(WireFormatError):
        codec.pack_header(forward_header(**change))
    with pytest.raises(WireFormatError):
        codec.pack_header_into(bytearray(64), forward_header(**change))


def test_a_large_payload_is_refused_before_memory_is_taken() -> None:
    packed = codec.pack_header(forward_header())
    with pytest.raises(MessageTooLargeError, match="message of 100 bytes exceeds the limit of 99"):
        codec.unpack_header(packed, max_payload_bytes=99)
    assert codec.unpack_header(packed, max_payload_bytes=100).payload_bytes == 100


def test_a_frame_splits_without_a_copy_and_only_whole() -> None:
    frame = bytearray(codec.pack_header(forward_header()) + bytes(100))
    _, payload = codec.split_frame(frame)
    frame[64] = 7
    assert payload[0] == 7
    payload.release()
    for wrong in (frame[:-1], frame + b"x"):
        with pytest.raises(WireFormatError, match="payload bytes, the frame has"):
            codec.split_frame(wrong)


@given(st.binary(max_size=300))
def test_the_frame_field_is_what_protobuf_makes(frame: bytes) -> None:
    message = experts_pb2.ForwardRequest(frame=frame).SerializeToString()
    if frame:
        assert codec.encode_frame_field(frame) == message
    assert experts_pb2.ForwardResponse.FromString(codec.encode_frame_field(frame)).frame == frame
    assert bytes(codec.decode_frame_field(message)) == frame


@given(st.binary(min_size=1, max_size=50))
def test_a_later_field_behind_the_frame_is_ignored(frame: bytes) -> None:
    message = codec.encode_frame_field(frame) + b"\x10\x05"
    assert bytes(codec.decode_frame_field(message)) == frame


@pytest.mark.parametrize("message", [b"\x0a\xff", b"\x0a\x05ab", b"\x0a" + b"\xff" * 12])
def test_a_broken_frame_field_is_a_wire_error(message: bytes) -> None:
    with pytest.raises(WireFormatError, match="no frame message"):
        codec.decode_frame_field(message)


@given(st.sampled_from(DType), st.lists(st.integers(0, 4), max_size=4), st.integers(0, 2**31))
def test_a_tensor_survives_the_wire(dtype: DType, shape: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensor = (torch.randn(shape, generator=generator) * 100).to(codec.torch_dtype(dtype))
    message = gating_pb2.Tensor.FromString(codec.tensor_to_proto(tensor).SerializeToString())
    back = codec.tensor_from_proto(message, field="hidden")
    assert codec.dtype_of(tensor) is dtype
    assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(back, tensor)


def test_a_view_is_sent_in_row_major_order() -> None:
    tensor = torch.arange(6, dtype=torch.int32).reshape(2, 3).T
    message = codec.tensor_to_proto(tensor)
    assert list(message.shape) == [3, 2]
    assert message.payload == b"".join(v.to_bytes(4, "little") for v in (0, 3, 1, 4, 2, 5))


@pytest.mark.parametrize(
    ("message", "field", "rule"),
    [
        (gating_pb2.Tensor(shape=[1], payload=b"abcd"), "h.dtype", "must be a known DType"),
        (
            gating_pb2.Tensor(dtype=gating_pb2.DTYPE_FLOAT32, shape=[2, 3], payload=b"abcd"),
            "h.payload",
            "must have the 24 bytes of shape [2, 3]",
        ),
        (
            gating_pb2.Tensor(dtype=gating_pb2.DTYPE_INT64, shape=[1] * 9, payload=b"12345678"),
            "h.shape",
            "must have at most 8 dimensions",
        ),
        (
            gating_pb2.Tensor(dtype=gating_pb2.DTYPE_INT64, shape=[2**32 - 1] * 8),
            "h.payload",
            "must have the",
        ),
    ],
)
def test_a_bad_tensor_names_its_field(message: gating_pb2.Tensor, field: str, rule: str) -> None:
    with pytest.raises(InvalidFieldError) as caught:
        codec.tensor_from_proto(message, field="h")
    assert caught.value.violations[0].field == field
    assert rule in caught.value.violations[0].rule


def test_a_dtype_without_a_wire_form_is_refused() -> None:
    with pytest.raises(WireFormatError, match=r"torch\.float64 has no form on the wire"):
        codec.dtype_of(torch.zeros(1, dtype=torch.float64))
