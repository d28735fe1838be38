"""Joining a Ray cluster that somebody else runs, and leaving it as it was."""

from __future__ import annotations

import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from cluster.status import ask_status
from protos.client import Client
from tests.eventually import eventually
from tests.integration.served import ROOT, Served, clean_environment, is_running, run_cli

pytestmark = pytest.mark.timeout(400)

CPUS = 3


class RayHead(NamedTuple):
    """A cluster of one node."""

    address: str
    process: psutil.Process
    settings: dict[str, str]
    """What a process needs in its environment to join."""

    def actors(self) -> list[psutil.Process]:
        """The actors' processes."""
        return [
            child
            for child in self.process.children(recursive=True)
            if is_running(child) and "Actor" in " ".join(child.cmdline())
        ]


@pytest.fixture(scope="module")
def ray_head() -> Iterator[RayHead]:
    """A Ray head with `CPUS` CPUs and token authentication."""
    folder = tempfile.mkdtemp(prefix="t", dir="/tmp")
    settings = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    process = subprocess.Popen(
        [sys.executable, "-m", "cluster.ray_host", folder, str(CPUS), "somebody", "40"],
        cwd=ROOT,
        env={**clean_environment(), **settings, "RAY_USAGE_STATS_ENABLED": "0"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    address = process.stdout.readline().strip()
    yield RayHead(address, psutil.Process(process.pid), settings)
    process.stdin.close()
    process.wait(30)
    process.stdout.close()
    shutil.rmtree(folder, ignore_errors=True)


def test_a_service_joins_and_leaves_the_cluster_as_it_was(
    ray_head: RayHead, checkpoint: Path
) -> None:
    flags = ("--ray-address", ray_head.address, "--expert-groups", "2")
    with Served(checkpoint, *flags, env=ray_head.settings) as service:
        with Client(service.address) as client:
            assert len(client.complete([1, 2, 3], max_tokens=4, ignore_eos=True).token_ids) == 4
        assert len(ray_head.actors()) == 3
        second = run_cli("serve", str(checkpoint), *flags, "--port", "0", env=ray_head.settings)
        assert second.returncode == 3, second.stderr
        assert "cluster.namespace is in use" in second.stderr
        service.signal(signal.SIGTERM)
        assert service.wait() == 0
    assert eventually(lambda: not ray_head.actors(), 20)
    assert ray_head.process.is_running()


def test_too_few_cpus_say_what_is_missing(ray_head: RayHead, checkpoint: Path) -> None:
    for timeout in ("10", "60"):  # the first ends too early on a busy machine
        answer = run_cli(
            *("serve", str(checkpoint), "--ray-address", ray_head.address, "--port", "0"),
            *("--expert-groups", "4", "--start-timeout", timeout),
            env=ray_head.settings,
        )
        if "not enough nodes" in answer.stderr:
            break
    assert answer.returncode == 3, answer.stderr
    assert "waiting for nodes: the Ray cluster lacks 1 CPU (need 4, have 3)" in answer.stderr
    assert "not enough nodes in the Ray cluster: need 4 CPU, have 3 CPU" in answer.stderr
    assert "lower --expert-groups" in answer.stderr


@pytest.fixture(scope="module")
def service(ray_head: RayHead, checkpoint: Path) -> Iterator[Served]:
    """One group and one router, which leave a CPU free; the last test of this file ends it."""
    with Served(checkpoint, "--ray-address", ray_head.address, env=ray_head.settings) as served:
        yield served


def test_a_number_that_no_node_can_hold_leaves_the_service_as_it_is(
    ray_head: RayHead, service: Served
) -> None:
    answer = run_cli("scale", "--expert-groups", "4", "--url", service.address)
    assert answer.returncode == 0, answer.stderr

    def is_said() -> bool:
        scaling = ask_status(service.address).scaling
        return "the Ray cluster lacks 1 CPU (need 4, have 3)" in scaling.change

    assert eventually(is_said, 90)
    status = ask_status(service.address)
    assert not status.scaling.is_settled
    assert [group.group_id for group in status.groups] == ["group-0"]
    with Client(service.address) as client:
        assert len(client.complete([1, 2, 3], max_tokens=4, ignore_eos=True).token_ids) == 4
    wanted = ("scale", "--expert-groups", "1", "--wait", "--timeout", "80")
    answer = run_cli(*wanted, "--url", service.address)
    assert answer.returncode == 0, answer.stderr
    assert "expert groups 1 of 1" in answer.stdout
    assert eventually(lambda: len(ray_head.actors()) == 2, 20)


def test_a_service_that_is_killed_leaves_the_cluster_too(
    ray_head: RayHead, service: Served
) -> None:
    assert len(ray_head.actors()) == 2
    service.signal(signal.SIGKILL)
    service.wait()
    assert eventually(lambda: not ray_head.actors(), 60)
