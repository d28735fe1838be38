from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.state.codec import (
    HEADER_BYTES,
    MANIFEST_BYTES,
    STRIPE_BYTES,
    Fault,
    Label,
    SnapshotStream,
    block_label,
    verify,
)

KEY = bytes(range(32))
PARENT = bytes(range(100, 132))
PAYLOAD = bytes(range(256)) * 4
LABEL = block_label(KEY, PARENT, len(PAYLOAD))
HEADER = LABEL.header([PAYLOAD])


def judge(header: bytes, payload: bytes, label: Label = LABEL) -> Fault | None:
    return verify(header, memoryview(payload), label)


def test_golden_header() -> None:
    """Field by field: a change of format needs another version."""
    assert HEADER.hex() == (
        "514b5631"  # "QKV1"
        "01"  # version
        "01"  # a block
        "0000"  # part 0
        "80000000"  # of 128 tokens
        "01000000"  # in one part
        "0004000000000000"  # 1,024 bytes
        "228d398429f970a8"  # xxh3_64
        "000102030405060708090a0b0c0d0e0f"
        "6465666768696a6b6c6d6e6f70717273"
    )
    assert len(HEADER) == HEADER_BYTES == 64
    assert judge(HEADER, PAYLOAD) is None


def test_every_flipped_bit_is_a_fault() -> None:
    for bit in range(8 * HEADER_BYTES):
        header = bytearray(HEADER)
        header[bit // 8] ^= 1 << bit % 8
        assert judge(bytes(header), PAYLOAD) is not None, f"bit {bit} of the header"
    for bit in range(0, 8 * len(PAYLOAD), 7):
        payload = bytearray(PAYLOAD)
        payload[bit // 8] ^= 1 << bit % 8
        assert judge(HEADER, bytes(payload)) is Fault.CHECKSUM, f"bit {bit} of the payload"


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"key": PARENT}, Fault.KEY),
        ({"parent": KEY}, Fault.KEY),
        ({"part": 1}, Fault.KEY),
        ({"num_parts": 2}, Fault.KEY),
        ({"num_tokens": 127}, Fault.KEY),
        ({"kind": 2}, Fault.FOREIGN),
    ],
)
def test_a_sound_value_of_another_label_is_a_fault(change: dict[str, object], fault: Fault) -> None:
    other = replace(LABEL, **change)  # type: ignore[arg-type]
    assert judge(other.header([PAYLOAD]), PAYLOAD) is fault


def test_a_short_or_long_value_is_a_fault() -> None:
    short = replace(LABEL, nbytes=1023)
    assert judge(short.header([PAYLOAD[:-1]]), PAYLOAD[:-1]) is Fault.LENGTH
    assert judge(HEADER[:-1], PAYLOAD) is Fault.LENGTH
    assert judge(b"", b"") is Fault.LENGTH


@given(header=st.binary(min_size=64, max_size=64))
def test_foreign_bytes_never_pass_and_never_raise(header: bytes) -> None:
    assert judge(header, PAYLOAD) is not None


def test_only_a_value_that_was_there_is_corrupt() -> None:
    assert [fault for fault in Fault if not fault.is_corrupt] == [Fault.MISSING]


@settings(max_examples=40, deadline=None)
@given(
    state_bytes=st.one_of(
        st.integers(0, 2000),
        st.integers(-3, 3).map(lambda d: STRIPE_BYTES - MANIFEST_BYTES + d),
        st.integers(-3, 3).map(lambda d: 2 * STRIPE_BYTES - MANIFEST_BYTES + d),
    ),
    tail_bytes=st.sampled_from([0, 1, 500, STRIPE_BYTES + 1]),
)
def test_stripes_put_together_are_the_stream(state_bytes: int, tail_bytes: int) -> None:
    stream = SnapshotStream(key=KEY, num_tokens=300, state_bytes=state_bytes, tail_bytes=tail_bytes)
    values = bytes(i % 251 for i in range(997)) * ((state_bytes + tail_bytes) // 997 + 1)
    values = values[: state_bytes + tail_bytes]
    stripes = []
    for part in range(stream.num_stripes):
        pieces = stream.stripe(part, values)
        whole = b"".join(pieces)
        label = stream.label(part)
        assert len(whole) == label.nbytes <= STRIPE_BYTES
        assert whole
        assert label.header(pieces) == label.header([whole]), "hashed in pieces or at once"
        assert judge(label.header(pieces), whole, label) is None
        stripes.append(whole)
    joined = b"".join(stripes)
    assert joined == stream.manifest() + values
    opened = stream.open(memoryview(joined))
    assert not isinstance(opened, Fault)
    assert (bytes(opened[0]), bytes(opened[1])) == (values[:state_bytes], values[state_bytes:])


def test_a_full_stripe_stays_just_below_an_allocators_class() -> None:
    assert HEADER_BYTES + STRIPE_BYTES == (4 << 20) - 64


def test_the_manifest_says_what_the_stream_holds() -> None:
    stream = SnapshotStream(
        key=KEY, num_tokens=300, state_bytes=191_000_000, tail_bytes=44 * 30_720
    )
    assert len(stream.manifest()) == MANIFEST_BYTES
    assert json.loads(stream.manifest()) == {
        "num_tokens": 300,
        "hash": KEY.hex(),
        "parts": {"state": 191_000_000, "tail": 1_351_680},
        "tail_tokens": 44,
        "stripe_bytes": 4_194_176,
        "num_stripes": 46,  # (512 + 191,000,000 + 1,351,680) / 4,194,176 = 45.9
    }


def test_a_manifest_of_other_sizes_is_a_fault() -> None:
    stream = SnapshotStream(key=KEY, num_tokens=300, state_bytes=100, tail_bytes=10)
    other = replace(stream, state_bytes=90, tail_bytes=20)
    whole = other.manifest() + bytes(110)
    assert stream.open(memoryview(whole)) is Fault.MANIFEST
