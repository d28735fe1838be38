"""What killed groups leave behind is removed, and nothing else."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from experts.lane_directory import SOCKET_NAME, YOUNG_S, make_directory


@pytest.fixture
def parent(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = Path(os.path.relpath(tmp_path_factory.mktemp("t")))  # short enough for a socket
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def bind(directory: Path, *, age_s: float) -> socket.socket:
    """Bind a socket in a directory, so long ago."""
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    path = directory / SOCKET_NAME
    bound.bind(str(path))
    then = path.stat().st_mtime - age_s
    os.utime(path, (then, then))
    return bound


def test_the_directory_of_a_killed_process_is_removed(parent: Path) -> None:
    killed = make_directory()
    bind(killed, age_s=2 * YOUNG_S).close()
    new = make_directory()
    assert not killed.exists()
    assert new.exists()
    assert new.stat().st_mode & 0o777 == 0o700


def test_who_listens_or_is_about_to_keeps_its_directory(parent: Path) -> None:
    listening, binding, empty = make_directory(), make_directory(), make_directory()
    with bind(listening, age_s=2 * YOUNG_S) as listener, bind(binding, age_s=0.0):
        listener.listen(1)
        for _ in range(4):  # more than its queue takes
            make_directory()
        assert all(path.exists() for path in (listening, binding, empty))


def test_the_directory_of_another_user_stays(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = make_directory()
    bind(foreign, age_s=2 * YOUNG_S).close()
    someone = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: someone)
    make_directory()
    assert foreign.exists()
