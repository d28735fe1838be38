"""How machines are held to their host keys; with sshd in `tests/cluster`."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from cluster.remote import Machine, checking_ssh


def stand_in(folder: Path, script: str) -> Path:
    """Put an `ssh` of our own into a folder."""
    program = folder / "ssh"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return folder


def test_a_caller_cannot_turn_the_check_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ssh takes the first of two: ours stand before what Ray says."""
    real = stand_in(tmp_path, r'printf "%s\n" "$@"')
    monkeypatch.setenv("PATH", f"{real}:/usr/bin:/bin")
    known_hosts = tmp_path / "of mine" / "known_hosts"
    rays = ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "h1", "a b"]
    with checking_ssh(known_hosts) as folder:
        answer = subprocess.run(
            [str(folder / "ssh"), *rays], capture_output=True, text=True, check=True, timeout=60
        )
    assert answer.stdout.splitlines() == [
        *("-o", "StrictHostKeyChecking=accept-new"),
        *("-o", f'UserKnownHostsFile="{known_hosts}" ~/.ssh/known_hosts'),
        *rays,
    ]
    assert not folder.exists()


def test_another_host_key_comes_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "echo @@@ >&2; echo Host key verification failed. >&2; exit 255"
    monkeypatch.setenv("PATH", f"{stand_in(tmp_path, said)}:/usr/bin:/bin")
    known_hosts = tmp_path / "known_hosts"
    answer = Machine("10.0.0.12", "ubuntu", None, known_hosts).ask("true")
    assert answer.code == 255
    assert answer.error.startswith(f"another host key than {known_hosts}")
    assert answer.remedy == f"was it installed anew? ssh-keygen -R 10.0.0.12 -f {known_hosts}"
