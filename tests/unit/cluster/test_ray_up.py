"""When `expertmesh up` starts nothing: what runs there is not to be ended by a missing flag."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster.cluster_file import ClusterFile
from cluster.front import StatusPort
from cluster.ray_up import END_COMMAND, up, wait_ready
from protos.errors import DeadlineExceededError, UnauthenticatedError, UnreachableError
from protos.tls import Access
from tests.certificates import Authority
from tests.ports import free_port
from tests.unit.cluster.test_front import config_of


@contextmanager
def status_port(**settings: object) -> Iterator[StatusPort]:
    port = StatusPort(config_of(free_port(), **settings))
    port.open()
    try:
        yield port
    finally:
        port.close()


def start(address: str, access: Access, folder: Path) -> None:
    """Run `up` where the head answers at `address`; with Ray it would fail in another way."""
    host, _, port = address.rpartition(":")
    file = ClusterFile(
        path=folder / "no such file.yaml",
        name="c",
        provider="aws",
        head_ip=host,
        worker_ips=(),
        ssh_user="root",
        ssh_key=None,
        is_docker=False,
        token=None,
        checkpoint="/m",
        serve_flags=("--status-port", port),
    )
    up(file, access, lambda sentence: None, restart=False, wait_s=0)


def test_a_service_that_wants_another_key_is_not_started_anew(tmp_path: Path) -> None:
    with status_port(**{"router.api_keys": ("sesame-street-1",)}) as port:
        with pytest.raises(UnauthenticatedError, match="API_KEY"):
            start(port.address, Access(), tmp_path)
        with pytest.raises(UnauthenticatedError, match="API_KEY"):
            wait_ready(port.address, Access(), lambda sentence: None, 60.0)


def test_a_service_behind_tls_is_not_started_anew(tmp_path: Path) -> None:
    issued = Authority(tmp_path).issue("port")
    files = {"router.ssl_keyfile": issued.keyfile, "router.ssl_certfile": issued.certfile}
    with (
        status_port(**{name: str(path) for name, path in files.items()}) as port,
        pytest.raises(UnreachableError, match="is open and does not answer"),
    ):
        start(port.address, Access(), tmp_path)


def test_what_came_instead_of_a_service_is_told() -> None:
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(DeadlineExceededError, match=rf"{address} \(not reachable"):
        wait_ready(address, Access(), lambda sentence: None, 0.0)


@pytest.mark.parametrize("is_left", ["nothing", "the file", "the process"])
def test_a_machine_is_done_when_no_supervisor_runs_there(tmp_path: Path, is_left: str) -> None:
    """A supervisor that was killed leaves the file with its process id behind."""
    folder = tmp_path / ".expertmesh"
    folder.mkdir()
    ray = tmp_path / "expertmesh/.venv/bin/ray"  # instead of the one that ends what runs here
    ray.parent.mkdir(parents=True)
    ray.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    ray.chmod(0o700)
    with subprocess.Popen(
        ["true" if is_left == "the file" else "cat"], stdin=subprocess.PIPE
    ) as process:
        if is_left == "the file":
            process.wait()
        if is_left != "nothing":
            (folder / "service.pid").write_text(str(process.pid))
        command = ["bash", "-c", END_COMMAND]
        environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
        done = subprocess.run(command, env=environment, timeout=20).returncode == 0
    assert done == (is_left != "the process")
    assert (tmp_path / "asked").read_text() == "stop --force\n"
