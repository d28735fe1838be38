"""Names the weights of a checkpoint, cheaply: what is cached under one name fits one model.

Reads no tensor whole. The digest covers, of every tensor in the order of names, its name, dtype and
shape, and of at most `MAX_TENSORS` of them (evenly spaced by name) `SAMPLE_VALUES` values at one
place per `STRIDE_BYTES`, `MAX_SAMPLES` places at most. Another training step, a fine-tune of whole
matrices, a merged adapter and a conversion to another dtype change it. An edit of a few values that
no sample meets does not: whoever patches weights by hand sets another tenant salt.

The folder's path, the split into files and the time stamps do not matter, so all nodes agree.
"""

from __future__ import annotations

import hashlib

import torch

from experts.tensor_file import TensorEntry, TensorFile
from experts.weights import SafetensorsCheckpoint

MAX_TENSORS = 8192
SAMPLE_VALUES = 512
STRIDE_BYTES = 16 << 20
MAX_SAMPLES = 64


def weights_digest(checkpoint: SafetensorsCheckpoint) -> str:
    """Return 64 hex digits that stand for the checkpoint's weights.

    Raises:
        CheckpointError: A file cannot be read.
    """
    digest = hashlib.sha256(b"weights-1")
    entries = sorted(checkpoint.entries(), key=lambda found: found[1].name)
    stride = -(-len(entries) // MAX_TENSORS)
    for index, (file, entry) in enumerate(entries):
        digest.update(f"{entry.name}|{entry.dtype}|{entry.shape}\n".encode())
        if index % stride == 0:
            for start in _sample_starts(entry):
                digest.update(_read(file, entry, start))
    return digest.hexdigest()


def _sample_starts(entry: TensorEntry) -> list[int]:
    """Return the bytes at which the samples begin: the middles of equal parts of the tensor."""
    count = min(MAX_SAMPLES, 1 + entry.num_bytes // STRIDE_BYTES)
    item = entry.dtype.itemsize
    length = min(SAMPLE_VALUES * item, entry.num_bytes)
    middles = [(2 * part + 1) * entry.num_bytes // (2 * count) for part in range(count)]
    return [max(0, (middle - length // 2) // item * item) for middle in middles]


def _read(file: TensorFile, entry: TensorEntry, start: int) -> bytes:
    count = min(SAMPLE_VALUES, (entry.num_bytes - start) // entry.dtype.itemsize)
    values = torch.empty(count, dtype=entry.dtype)
    file.read_into(entry, values, start)
    return values.view(torch.uint8).numpy().tobytes()
