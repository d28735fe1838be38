"""Which files a batch may read and write: those below the folders that `serve` was told. Pure.

A root is an absolute path or a URI; a *named* tenant's files lie below `ROOT/TENANT`, so that no
tenant meets another's. A URI keeps to its scheme and authority; it carries no query, which for some
file systems names another server or credentials, and nothing that decodes to a step upwards.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from protos.error_base import Violation

MAX_URI_CHARS = 1024
RULE = "must be an absolute path or a URI without query, user, and . or .. in its path"


@dataclass(frozen=True, slots=True)
class _Location:
    """Where something is: scheme and authority (empty: this machine's files), and its path."""

    origin: str
    path: str

    def holds(self, other: _Location) -> bool:
        """Whether `other` is this folder or lies in it."""
        stem = self.path.rstrip("/")
        is_below = other.path == stem or other.path.startswith(f"{stem}/")
        return self.origin == other.origin and is_below


class BatchRoots:
    """The folders below which batches read and write.

    Args:
        uris: Of the folders; none: there are no batches.

    Raises:
        ValueError: One is neither an absolute path nor a URI.
    """

    def __init__(self, uris: Sequence[str]) -> None:
        self._uris = tuple(uris)
        self._roots = []
        for uri in uris:
            root = _locate(uri)
            if root is None:
                raise ValueError(RULE)
            self._roots.append(root)

    def __bool__(self) -> bool:
        return bool(self._roots)

    def violation(self, field: str, uri: str, tenant: str) -> Violation | None:
        """Return what is wrong with the place of an input or output; None: it may be used.

        Args:
            field: That it stands in.
            uri: Path or URI.
            tenant: Whose batch it is.
        """
        found = _locate(uri)
        if found is None:
            return Violation(field, RULE, uri)
        places = [_Location(root.origin, _below(root.path, tenant)) for root in self._roots]
        if any(place.holds(found) and _stays(place, found) for place in places):
            return None
        allowed = ", ".join(_below(uri, tenant) for uri in self._uris)
        return Violation(field, f"must lie under {allowed}", uri)


def _locate(uri: str) -> _Location | None:
    """Return where a URI leads; None where that cannot be said."""
    if not uri or len(uri) > MAX_URI_CHARS or any(ord(c) < 32 for c in uri):
        return None
    origin, path = "", uri
    if "://" in uri:
        try:
            parts = urlsplit(uri)
        except ValueError:
            return None
        if parts.query or parts.fragment or "?" in uri or "#" in uri or "@" in parts.netloc:
            return None
        origin = f"{parts.scheme}://{parts.netloc}".lower()
        path = parts.path or "/"
        if unquote(path) != path:  # who opens it may decode it, or not
            return None
        if origin == "file://":
            origin = ""
    if not path.startswith("/") or "\\" in path:
        return None
    steps = path.strip("/").split("/")
    if any(step in (".", "..") for step in steps) or "" in steps[:-1]:
        return None
    return _Location(origin, path.rstrip("/") or "/")


def _below(root: str, tenant: str) -> str:
    return posixpath.join(root, tenant) if tenant else root


def _stays(root: _Location, found: _Location) -> bool:
    """Whether links on this machine lead elsewhere; of other file systems nothing is known."""
    if root.origin:
        return True
    real = _Location("", os.path.realpath(root.path))
    return real.holds(_Location("", os.path.realpath(found.path)))
