"""Clusters for the tests of this folder, where the machine allows hosts."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.fake_nodes import FakeNodes
from tests.cluster.hosts import obstacle, running_hosts
from tests.cluster.launched import Launched, start_valkey
from tests.integration.served import ROOT
from tests.parity.checkpoints import make_checkpoint


@pytest.fixture(scope="session")
def launched() -> Iterator[Launched]:
    """`ray up` on three hosts, with a Valkey on a fourth; a fifth waits to join.

    Not ready yet when it is handed out: the first test watches the service start.
    """
    reason = obstacle()
    if reason is not None:
        pytest.skip(f"no cluster of hosts here: {reason}")
    folder = Path(tempfile.mkdtemp(prefix="c", dir="/tmp"))
    try:
        checkpoint = make_checkpoint(folder / "tiny", tokenizer=True)
        with running_hosts(5, seen=[folder]) as hosts:
            *machines, store, spare = hosts.hosts.values()
            cluster = Launched(
                folder=folder,
                hosts=hosts,
                machines=machines,
                spares=[spare],
                checkpoint=checkpoint,
                flags=f"--redis-url {start_valkey(store)}",
            )
            cluster.up()
            yield cluster
        assert hosts.leftovers() == []
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def fake_nodes() -> Iterator[FakeNodes]:
    """A Ray head on a host of its own; its autoscaler runs, and there is no other node yet.

    In `folder` lies a tiny checkpoint in float32, `tiny`.
    """
    reason = obstacle()
    if reason is not None:
        pytest.skip(f"no host with fake nodes here: {reason}")
    folder = Path(tempfile.mkdtemp(prefix="f", dir="/tmp"))
    try:
        make_checkpoint(folder / "tiny", tokenizer=True)
        with running_hosts(1, seen=[folder, ROOT]) as hosts:
            nodes = FakeNodes(hosts.hosts["h1"], folder, most=2)
            nodes.start()
            yield nodes
        nodes.join()
        assert hosts.leftovers() == []
    finally:
        shutil.rmtree(folder)
