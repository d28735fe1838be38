"""Checkpoints, oracles and kernels of the parity tests."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from router.model.ops import Ops, choose_ops
from tests.parity.checkpoints import make_checkpoint


def available_ops() -> list[str]:
    """The kernels that this machine can run: torch always, native where they were built."""
    from experts.native.kernels import load_kernels

    return ["torch"] if load_kernels() is None else ["torch", "native"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run every test that takes `make_ops` once per kind of kernels."""
    if "make_ops" in metafunc.fixturenames:
        metafunc.parametrize("make_ops", available_ops(), indirect=True)


@pytest.fixture
def make_ops(request: pytest.FixtureRequest) -> Callable[[torch.dtype], Ops]:
    """`make_ops(dtype)`: one kind of kernels on the CPU."""
    return functools.partial(choose_ops, device=torch.device("cpu"), name=request.param)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`checkpoint(**overrides)`: a checkpoint folder, made once per distinct overrides."""
    made: dict[str, Path] = {}

    def make(**overrides: Any) -> Path:
        key = repr(sorted(overrides.items()))
        if key not in made:
            made[key] = make_checkpoint(tmp_path_factory.mktemp("checkpoint"), **overrides)
        return made[key]

    return make
