"""One safetensors file, its header checked against the file before a tensor is read.

Tensors are read with `preadv` into memory that the caller owns. Nothing is mapped: a file that
shrinks under us is a short read and an error instead of a SIGBUS, and no mapped page is counted to
the process afterwards. A file that is the local copy of a remote one is filled where it is read.

Layout: uint64 little endian N, N bytes of JSON `{name: {dtype, shape, data_offsets}}`, then the
data without holes.
"""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from experts.range_cache import RangeCache
from protos.errors import CheckpointError

MAX_HEADER_BYTES = 100 * 1024 * 1024
DTYPES = {
    "F64": (torch.float64, 8),
    "F32": (torch.float32, 4),
    "F16": (torch.float16, 2),
    "BF16": (torch.bfloat16, 2),
    "F8_E4M3": (torch.float8_e4m3fn, 1),
    "F8_E5M2": (torch.float8_e5m2, 1),
    "I64": (torch.int64, 8),
    "I32": (torch.int32, 4),
    "I16": (torch.int16, 2),
    "I8": (torch.int8, 1),
    "U8": (torch.uint8, 1),
    "BOOL": (torch.bool, 1),
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file."""
    num_bytes: int


class TensorFile:
    """An open safetensors file whose header agrees with its size."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(str(path), f"cannot be opened: {error.strerror}") from None
        self._cache: RangeCache | None = None
        try:
            self._cache = RangeCache.beside(path)
            self.entries = self._read_header()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file; reading afterwards is an error."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if self._cache is not None:
            self._cache.close()

    def read_into(self, entry: TensorEntry, out: torch.Tensor, start_byte: int = 0) -> None:
        """Fill `out` with the entry's bytes from `start_byte` on.

        Args:
            entry: One of `entries`.
            out: Contiguous CPU tensor of the entry's dtype.
            start_byte: Offset inside the tensor.

        Raises:
            CheckpointError: The file ends early or the disk fails.
        """
        if out.numel() == 0:
            return
        view = memoryview(out.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        if start_byte + len(view) > entry.num_bytes:
            raise ValueError(f"{entry.name}: bytes beyond the end of the tensor")
        position = entry.offset + start_byte
        if self._cache is not None:
            self._cache.ensure(position, len(view))
        while view:
            try:
                got = os.preadv(self._fd, [view], position)
            except OSError as error:
                detail = f"cannot be read: {error.strerror}"
                raise CheckpointError(str(self.path), detail, entry.name) from None
            if got == 0:
                detail = f"the file ends {len(view)} bytes early"
                raise CheckpointError(str(self.path), detail, entry.name)
            view = view[got:]
            position += got

    def prefetch(self, entry: TensorEntry, start_byte: int, num_bytes: int) -> None:
        """Let the kernel start reading what `read_into` will want next."""
        if self._cache is not None:
            self._cache.prefetch(entry.offset + start_byte, num_bytes)
            return
        os.posix_fadvise(self._fd, entry.offset + start_byte, num_bytes, os.POSIX_FADV_WILLNEED)

    def _read_header(self) -> dict[str, TensorEntry]:
        file_bytes = os.fstat(self._fd).st_size
        if file_bytes < 8:
            raise self._corrupt(f"truncated: {file_bytes} bytes, a header needs 8")
        if self._cache is not None:
            self._cache.ensure(0, 8)
        (header_bytes,) = struct.unpack("<Q", os.pread(self._fd, 8, 0))
        if header_bytes > min(MAX_HEADER_BYTES, file_bytes - 8):
            raise self._corrupt(
                f"corrupt or truncated: the header claims {header_bytes} bytes,"
                f" the file has {file_bytes - 8} after the length"
            )
        if self._cache is not None:
            self._cache.ensure(8, header_bytes)
        try:
            header = json.loads(
                os.pread(self._fd, header_bytes, 8), object_pairs_hook=self._without_duplicates
            )
        except ValueError as error:
            raise self._corrupt(f"corrupt: the header is not JSON ({error})") from None
        if not isinstance(header, dict):
            raise self._corrupt("corrupt: the header is not a JSON object")
        data_start = 8 + header_bytes
        entries = {
            name: self._entry(name, value, data_start)
            for name, value in header.items()
            if name != "__metadata__"
        }
        self._check_extent(entries, data_start, file_bytes)
        return entries

    def _entry(self, name: str, value: Any, data_start: int) -> TensorEntry:
        try:
            dtype_name, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
            sizes = tuple(int(size) for size in shape)
            begin, end = int(begin), int(end)
        except (KeyError, TypeError, ValueError):
            raise self._corrupt("corrupt: malformed header entry", name) from None
        if dtype_name not in DTYPES:
            raise self._corrupt(f"dtype {dtype_name!r} is not supported", name)
        dtype, item_bytes = DTYPES[dtype_name]
        if begin < 0 or end < begin or min(sizes, default=0) < 0:
            raise self._corrupt(f"corrupt: offsets [{begin}, {end}], shape {list(sizes)}", name)
        num_bytes = math.prod(sizes) * item_bytes
        if num_bytes != end - begin:
            detail = f"corrupt: shape {list(sizes)} of {dtype_name} needs {num_bytes} bytes"
            raise self._corrupt(f"{detail}, the offsets span {end - begin}", name)
        return TensorEntry(name, dtype, sizes, data_start + begin, end - begin)

    def _check_extent(
        self, entries: dict[str, TensorEntry], data_start: int, file_bytes: int
    ) -> None:
        position = data_start
        for entry in sorted(entries.values(), key=lambda e: (e.offset, e.num_bytes)):
            if entry.offset != position:
                kind = "overlap" if entry.offset < position else "leave a hole"
                raise self._corrupt(f"corrupt: its offsets {kind} at byte {position}", entry.name)
            position += entry.num_bytes
            if position > file_bytes:
                raise self._corrupt(
                    f"truncated: the tensor ends at byte {position}, the file at {file_bytes}",
                    entry.name,
                )
        if position != file_bytes:
            raise self._corrupt(f"corrupt: {file_bytes - position} bytes after the last tensor")

    def _without_duplicates(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        unique = dict(pairs)
        if len(unique) != len(pairs):
            raise ValueError("a name occurs twice")
        return unique

    def _corrupt(self, detail: str, tensor: str | None = None) -> CheckpointError:
        return CheckpointError(str(self.path), detail, tensor)
