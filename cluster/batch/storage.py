"""Files of a batch, wherever they are: any file system that pyarrow knows, by path or URI.

A file appears whole or not at all: on a local disk it is written beside its place, synced and
renamed, an object store gets it in a single put.
"""

from __future__ import annotations

import contextlib
import json
import os
import posixpath
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs

from protos.errors import ConfigurationError

TEMPORARY = ".tmp-"
"""Prefix of files that are not whole yet; a crash leaves some behind."""
TEMPORARY_S = 3600.0
"""No file takes so long to write."""


@dataclass(frozen=True, slots=True)
class Place:
    """A file or folder in a file system."""

    uri: str
    """As it was given."""
    filesystem: Any
    path: str
    """Within the file system."""

    @classmethod
    def of(cls, uri: str, field: str) -> Place:
        """Return the place of a path or URI.

        Raises:
            ConfigurationError: There is no such file system; `field` names the option.
        """
        try:
            if "://" in uri:
                filesystem, path = fs.FileSystem.from_uri(uri)
            else:
                filesystem, path = fs.LocalFileSystem(), str(Path(uri).resolve())
        except (pa.ArrowException, OSError, ValueError) as error:
            raise ConfigurationError(field, f"must be a path or URI ({error})", uri) from error
        return cls(uri, filesystem, path.rstrip("/"))

    def child(self, name: str) -> str:
        """Return the path of something in this folder."""
        return posixpath.join(self.path, name)

    def read(self, name: str) -> bytes | None:
        """Return a file's content; None: there is no such file."""
        try:
            with self.filesystem.open_input_stream(self.child(name)) as stream:
                content: bytes = stream.read()
        except FileNotFoundError:
            return None
        return content

    def read_json(self, name: str) -> Any:
        """Return a JSON file's content; None: there is no such file."""
        content = self.read(name)
        return None if content is None else json.loads(content)

    def write(self, name: str, content: bytes) -> None:
        """Write a file, whole or not at all, over what is there."""
        path = self.child(name)
        self.filesystem.create_dir(posixpath.dirname(path), recursive=True)
        if self.is_local:
            os.replace(_written_beside(path, content), path)
            return
        with self.filesystem.open_output_stream(path) as stream:
            stream.write(content)

    def create(self, name: str, content: bytes) -> bool:
        """Write a file that is not there yet, whole or not at all; return whether it was not.

        Of several writers one succeeds on a local disk; an object store may let several.
        """
        if not self.is_local:
            if self.read(name) is not None:
                return False
            self.write(name, content)
            return True
        path = self.child(name)
        self.filesystem.create_dir(posixpath.dirname(path), recursive=True)
        temporary = _written_beside(path, content)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            if os.path.lexists(path):
                return False
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
        return True

    def holds(self, other: Place) -> bool:
        """Whether `other` is this place or lies in it; of two file systems it does not."""
        is_below = other.path == self.path or other.path.startswith(f"{self.path}/")
        return bool(self.filesystem.equals(other.filesystem)) and is_below

    @property
    def is_file(self) -> bool:
        """Whether it is there, as a file."""
        return bool(self.filesystem.get_file_info(self.path).type == fs.FileType.File)

    def write_json(self, name: str, document: Any) -> None:
        """Write a JSON file; see `write`."""
        self.write(name, json_bytes(document))

    @property
    def is_local(self) -> bool:
        """Whether a rename is one act here."""
        return bool(self.filesystem.type_name == "local")

    def names(self, folder: str = "") -> Iterator[str]:
        """Yield the names of the whole files in a folder below this one, sorted."""
        selector = fs.FileSelector(
            self.child(folder) if folder else self.path, allow_not_found=True
        )
        for found in sorted(self.filesystem.get_file_info(selector), key=lambda f: f.base_name):
            if found.type == fs.FileType.File and not found.base_name.startswith(TEMPORARY):
                yield found.base_name

    def folders(self) -> Iterator[str]:
        """Yield the names of the folders in this one, sorted."""
        selector = fs.FileSelector(self.path, allow_not_found=True)
        for found in sorted(self.filesystem.get_file_info(selector), key=lambda f: f.base_name):
            if found.type == fs.FileType.Directory:
                yield found.base_name

    def delete_temporary(self, folder: str = "") -> None:
        """Delete what crashed writers left in a folder; what is young may have a live writer."""
        oldest_ns = time.time_ns() - round(1e9 * TEMPORARY_S)
        selector = fs.FileSelector(
            self.child(folder) if folder else self.path, allow_not_found=True
        )
        for found in self.filesystem.get_file_info(selector):
            is_file = found.type == fs.FileType.File
            is_old = found.mtime_ns is None or found.mtime_ns < oldest_ns
            if is_file and is_old and found.base_name.startswith(TEMPORARY):
                self.filesystem.delete_file(found.path)


def absolute_uri(uri: str) -> str:
    """Return a path as it is from here, for processes that run elsewhere; a URI as it is."""
    return uri if "://" in uri else os.path.abspath(uri)


def _written_beside(path: str, content: bytes) -> str:
    """Write a temporary file in the folder of `path`, down to the disk, and return its path."""
    folder, name = posixpath.split(path)
    temporary = posixpath.join(folder, f"{TEMPORARY}{name}-{uuid.uuid4().hex[:8]}")
    with open(temporary, "xb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    return temporary


def json_bytes(document: Any) -> bytes:
    """Return a JSON file's content."""
    return json.dumps(document, indent=1, ensure_ascii=False).encode()


def check_not_there(place: Place, name: str, field: str) -> None:
    """Refuse an output folder with files of somebody else.

    Raises:
        ConfigurationError: There are files, and `name` is not among them.
    """
    names = list(place.names())
    if names and name not in names:
        raise ConfigurationError(field, "must be empty, or the output of this batch", place.uri)
