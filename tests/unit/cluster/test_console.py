"""Exit codes, threads, and signals that arrive where it is safe."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from cluster.console import exit_code, fail
from cluster.members import threads_per_group
from cluster.stopping import STOP_SIGNALS, StopRequested, StopSignals
from protos.errors import (
    CheckpointError,
    ConfigurationError,
    DeadlineExceededError,
    ExpertMeshError,
    GroupLostError,
    InvalidFieldError,
    NotReadyError,
    UnauthenticatedError,
    UnreachableError,
)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidFieldError("a", "b", 1), 2),
        (ConfigurationError("a", "b", 1), 3),
        (CheckpointError("a", "b"), 3),
        (UnreachableError("a"), 4),
        (NotReadyError(), 4),
        (DeadlineExceededError("a", 1.0), 4),
        (GroupLostError("a"), 5),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_kind_of_error_has_its_exit_code(error: ExpertMeshError, code: int) -> None:
    assert exit_code(error) == code


def test_a_call_without_its_key_is_told_how_to_send_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        fail(UnauthenticatedError("the API key is not known"))
    assert ended.value.code == 2
    assert "--api-key KEY, or EXPERTMESH_API_KEY" in capsys.readouterr().err


def test_a_nodes_cores_are_shared_among_its_groups() -> None:
    nodes = {"a": "n1", "b": "n1", "c": "n1", "d": "n2"}
    cores = {"n1": 8, "n2": 2}
    assert threads_per_group(None, nodes, cores) == {"a": 2, "b": 2, "c": 2, "d": 2}
    assert threads_per_group(None, nodes, {"n1": 2, "n2": 1}) == {"a": 1, "b": 1, "c": 1, "d": 1}
    assert threads_per_group(3, nodes, cores) == {"a": 3, "b": 3, "c": 3, "d": 3}


@pytest.fixture
def signals() -> Iterator[StopSignals]:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    caught = StopSignals()
    caught.catch()
    yield caught
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_interrupts_python_at_once(signals: StopSignals) -> None:
    with pytest.raises(StopRequested):
        signal.raise_signal(signal.SIGTERM)


def test_a_signal_during_a_held_call_arrives_after_it(signals: StopSignals) -> None:
    seen = []

    def call() -> None:
        with signals.held():
            signal.raise_signal(signal.SIGINT)
            seen.append("the call went on")

    with pytest.raises(StopRequested):
        call()
    assert seen == ["the call went on"]
    with signals.held():
        pass  # only once


def test_ignored_signals_do_nothing(signals: StopSignals) -> None:
    signals.ignore()
    signal.raise_signal(signal.SIGTERM)
