"""One checkpoint and one service for all tests that only ask."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.integration.served import Served
from tests.parity.checkpoints import make_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny mixture of experts in float32, with a tokenizer and a chat template."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", tokenizer=True)


@pytest.fixture(scope="session")
def dense_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny dense model without a tokenizer."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "dense", dense=True)


@pytest.fixture(scope="session")
def batch_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the files of batches lie that are submitted to `served`."""
    return tmp_path_factory.mktemp("batches")


@pytest.fixture(scope="session")
def served(checkpoint: Path, batch_root: Path) -> Iterator[Served]:
    """The checkpoint on two unequal groups and two routers."""
    flags = ("--expert-groups", "big:3,small:1", "--routers", "2", "--served-model-name", "tiny")
    flags += ("--autoscale", "advise", "--max-expert-groups", "4")
    flags += ("--batch-root", str(batch_root), "--batch-metrics-port", "0")
    with Served(checkpoint, *flags) as service:
        yield service


@contextmanager
def short_folder() -> Iterator[str]:
    """Make a folder for temporary files with a short path: Ray makes sockets in it."""
    folder = tempfile.mkdtemp(prefix="t", dir="/tmp")
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def tmp() -> Iterator[str]:
    """A folder for the temporary files of one test."""
    with short_folder() as folder:
        yield folder
