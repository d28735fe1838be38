"""A checkpoint behind a URI, as a local folder that fills with what is read from it.

Configuration, tokenizer and index are copied whole; of the weights only the ranges that somebody
reads (`range_cache`): a group its own experts, a router the trunk. A node's cache therefore holds
what its processes need, and the next start finds it there.

The folder's name is a hash of the URI and of every file's size and time: a checkpoint that changed
is another folder.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from experts.range_cache import RangeCache, open_filesystem, write_whole
from protos.errors import CheckpointError

COPIED = (".json", ".jinja", ".txt", ".model")
WEIGHTS = ".safetensors"
MAX_COPIED_BYTES = 256 << 20


def is_uri(checkpoint: str) -> bool:
    """Whether a checkpoint is named by a URI rather than by a path."""
    return "://" in checkpoint


def default_cache() -> Path:
    """Return where this user's caches lie."""
    return Path.home() / ".cache" / "expertmesh"


def local_folder(checkpoint: str, cache: Path | None = None) -> Path:
    """Return the folder to read a checkpoint from: itself, or its cache on this node.

    Args:
        checkpoint: A path, or a URI of a filesystem that pyarrow or fsspec knows.
        cache: Folder of the caches; None: `default_cache()`.

    Raises:
        CheckpointError: Nothing is there, or it cannot be read.
    """
    if not is_uri(checkpoint):
        return Path(checkpoint)
    from pyarrow import fs

    filesystem, root = open_filesystem(checkpoint.rstrip("/"))
    try:
        found = filesystem.get_file_info(fs.FileSelector(root))
    except OSError as error:
        raise CheckpointError(checkpoint, f"cannot be listed: {error}") from None
    files = sorted((i for i in found if i.type == fs.FileType.File), key=lambda i: str(i.path))
    if not any(info.base_name == "config.json" for info in files):
        raise CheckpointError(checkpoint, "holds no config.json, so it is no checkpoint")
    identity = [checkpoint.rstrip("/"), *(f"{i.base_name} {i.size} {i.mtime_ns}" for i in files)]
    name = hashlib.sha256("\n".join(identity).encode()).hexdigest()[:24]
    folder = (cache or default_cache()) / name
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for info in files:
        local = folder / info.base_name
        if info.base_name.endswith(WEIGHTS):
            RangeCache.prepare(local, f"{checkpoint.rstrip('/')}/{info.base_name}", info.size)
        elif info.base_name.endswith(COPIED) and not local.exists():
            if info.size > MAX_COPIED_BYTES:
                raise CheckpointError(checkpoint, f"{info.base_name} has {info.size} bytes")
            try:
                with filesystem.open_input_stream(info.path) as stream:
                    write_whole(local, stream.read())
            except OSError as error:
                raise CheckpointError(f"{checkpoint}/{info.base_name}", str(error)) from None
    return folder
