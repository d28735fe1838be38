"""What every test shares: quiet libraries and one torch thread."""

from __future__ import annotations

import os
import sys

import pytest

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True, scope="session")
def one_torch_thread() -> None:
    """Take one thread of the two shared cores; loads no torch of its own."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
