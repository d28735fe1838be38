"""What a stored value looks like: a header that says what it is, and bytes that it vouches for.

Decides the byte format of blob values. Every value is 64 bytes of header and a payload; a reader
knows from its own model and hash chain what both must be, so `verify` compares with that and gives
a `Fault` instead of a value. Damage is a miss: nothing here raises on what a server sent.

    offset 0  magic "QKV1" | 4 version u8 | 5 kind u8 | 6 part u16 | 8 tokens u32 | 12 parts u32
    offset 16 payload bytes u64 | 24 xxh3_64 of the payload u64 | 32 key[16] | 48 parent key[16]

All integers are little-endian. A *block* is the KV of one cache block, in one part. A *snapshot* is
one stream, a manifest of 512 bytes, the state, and the KV of the tail, cut into *stripes*.

Sizes follow the servers' allocator: a stripe with its header is 4 MiB - 64 B, because jemalloc's
classes are 4, 5, 6, 7 x 2^j and a value just above one wastes up to a fifth of the memory. Above
7 MiB - 4 KiB every allocation becomes a fresh mapping (three to five times the CPU), so a larger
value, a block of a large model in float32, lies under several keys of one server, its *parts*. Its
one header and checksum vouch for all of them together.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum

import xxhash

from router.engine.chain import CACHE_BLOCK

HEADER_BYTES = 64
STRIPE_BYTES = (4 << 20) - 128
"""Payload of every stripe but a snapshot's last."""
MAX_VALUE_BYTES = (7 << 20) - 4096
"""Above this, header included, a jemalloc server pays page faults for every value."""
PART_BYTES = (4 << 20) - 64
"""What one key holds of a value that is larger than that; the last one holds the rest."""
MANIFEST_BYTES = 512

_HEADER = struct.Struct("<4sBBHIIQQ16s16s")
_MAGIC = b"QKV1"
_VERSION = 1
_KEY_BYTES = 16
_NO_PARENT = bytes(_KEY_BYTES)

Bytes = bytes | bytearray | memoryview


class Kind(IntEnum):
    """What a value holds."""

    BLOCK = 1
    STRIPE = 2


class Fault(Enum):
    """Why a value is a miss."""

    MISSING = "missing"
    """The server has none: never stored, expired or evicted."""
    LENGTH = "length"
    """Shorter or longer than it must be."""
    FOREIGN = "foreign"
    """Not a header of ours, or of another version or kind."""
    KEY = "key"
    """A sound value of another key, part or position."""
    CHECKSUM = "checksum"
    """The payload is not the one that was stored."""
    MANIFEST = "manifest"
    """The snapshot's manifest names other sizes."""

    @property
    def is_corrupt(self) -> bool:
        """Whether a value was there and was wrong."""
        return self is not Fault.MISSING


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """What a value must be: everything in its header but the checksum."""

    kind: Kind
    key: bytes
    """The block or position hash; the first 16 bytes count."""

    parent: bytes = _NO_PARENT
    """Of blocks the block hash before; the first 16 bytes count."""

    num_tokens: int
    """Of a block 128, of a stripe its snapshot's position."""

    part: int = 0
    num_parts: int = 1
    nbytes: int
    """Of the payload."""

    def header(self, payload: Sequence[Bytes]) -> bytes:
        """Return the 64 bytes that stand before `payload`, given in consecutive pieces."""
        if len(payload) == 1:
            checksum = xxhash.xxh3_64_intdigest(payload[0])
        else:
            hasher = xxhash.xxh3_64()
            for piece in payload:
                hasher.update(piece)
            checksum = hasher.intdigest()
        return _HEADER.pack(
            _MAGIC,
            _VERSION,
            self.kind,
            self.part,
            self.num_tokens,
            self.num_parts,
            self.nbytes,
            checksum,
            self.key[:_KEY_BYTES],
            self.parent[:_KEY_BYTES],
        )


def part_lengths(nbytes: int) -> list[int]:
    """Return how many bytes each key of a value holds, of one with `nbytes` bytes, header
    included."""
    if nbytes <= MAX_VALUE_BYTES:
        return [nbytes]
    num_full, rest = divmod(nbytes, PART_BYTES)
    return [PART_BYTES] * num_full + [rest] * bool(rest)


def block_label(key: bytes, parent: bytes, nbytes: int) -> Label:
    """Return the label of a cache block."""
    return Label(kind=Kind.BLOCK, key=key, parent=parent, num_tokens=CACHE_BLOCK, nbytes=nbytes)


def verify(header: Bytes, payload: memoryview, label: Label) -> Fault | None:
    """Return why a value of the right length is not the one wanted; None when it is.

    Args:
        header: The value's first 64 bytes.
        payload: The rest.
        label: What it must be; `payload` has `label.nbytes` bytes.
    """
    wanted = label.header([payload])
    if header == wanted:
        return None
    if len(header) != HEADER_BYTES or len(payload) != label.nbytes:
        return Fault.LENGTH
    magic, version, kind, part, tokens, parts, nbytes, _, key, parent = _HEADER.unpack(header)
    if (magic, version, kind) != (_MAGIC, _VERSION, label.kind):
        return Fault.FOREIGN
    if (part, tokens, parts, nbytes, key, parent) != (
        label.part,
        label.num_tokens,
        label.num_parts,
        label.nbytes,
        label.key[:_KEY_BYTES],
        label.parent[:_KEY_BYTES],
    ):
        return Fault.KEY
    return Fault.CHECKSUM


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotStream:
    """How the snapshot of one position is laid out: manifest, state, tail."""

    key: bytes
    """The position hash."""

    num_tokens: int
    state_bytes: int
    tail_bytes: int

    @property
    def nbytes(self) -> int:
        """Of the whole stream."""
        return MANIFEST_BYTES + self.state_bytes + self.tail_bytes

    @property
    def num_stripes(self) -> int:
        """At least 1."""
        return -(-self.nbytes // STRIPE_BYTES)

    def span(self, part: int) -> tuple[int, int]:
        """Return where stripe `part` begins and ends in the stream."""
        start = part * STRIPE_BYTES
        return start, min(start + STRIPE_BYTES, self.nbytes)

    def label(self, part: int) -> Label:
        """Return the label of stripe `part`."""
        start, stop = self.span(part)
        return Label(
            kind=Kind.STRIPE,
            key=self.key,
            num_tokens=self.num_tokens,
            part=part,
            num_parts=self.num_stripes,
            nbytes=stop - start,
        )

    def manifest(self) -> bytes:
        """Return the stream's first 512 bytes: JSON for people and other readers, then spaces."""
        text = json.dumps(
            {
                "num_tokens": self.num_tokens,
                "hash": self.key.hex(),
                "parts": {"state": self.state_bytes, "tail": self.tail_bytes},
                "tail_tokens": self.num_tokens % CACHE_BLOCK,
                "stripe_bytes": STRIPE_BYTES,
                "num_stripes": self.num_stripes,
            }
        )
        return text.encode().ljust(MANIFEST_BYTES)

    def stripe(self, part: int, values: Bytes) -> list[memoryview]:
        """Return the payload of stripe `part` as consecutive pieces, nothing copied but the
        manifest.

        Args:
            part: Which.
            values: State, then tail.
        """
        start, stop = self.span(part)
        pieces = []
        offset = 0
        for source in (self.manifest(), values):
            view = memoryview(source).cast("B")
            piece = view[max(0, start - offset) : max(0, stop - offset)]
            if len(piece):
                pieces.append(piece)
            offset += len(view)
        return pieces

    def open(self, stream: memoryview) -> tuple[memoryview, memoryview] | Fault:
        """Return state and tail of a stream whose stripes have all been verified."""
        if stream[:MANIFEST_BYTES] != self.manifest():
            return Fault.MANIFEST
        stop = MANIFEST_BYTES + self.state_bytes
        return stream[MANIFEST_BYTES:stop], stream[stop : stop + self.tail_bytes]
