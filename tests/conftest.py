"""What every test shares: quiet libraries, one torch thread, no deadline for an example."""

from __future__ import annotations

import os
import sys

import pytest
from hypothesis import settings

# On a busy machine an example may take any time: no test is about the clock.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True, scope="session")
def one_torch_thread() -> None:
    """Take one thread of the two shared cores; loads no torch of its own."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
