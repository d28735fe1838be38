"""How a service starts and ends: early failures, draining, and what it may leave behind.

A test that asks another kind of service than the shared one stands before the test that ends it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.config_loading import load_config
from cluster.kv_budget import GIB
from cluster.preflight import examine, quick_checks
from cluster.status import ask_status
from protos.client import Client, ClientConfig
from protos.errors import (
    DrainingError,
    ServiceUnavailableError,
    SetupError,
    UnsupportedFeatureError,
)
from protos.events import Delta, Event, Finished, FinishReason
from tests.eventually import eventually
from tests.integration.conftest import short_folder
from tests.integration.served import Served, run_cli
from tests.integration.test_serving import greedy_tokens

pytestmark = pytest.mark.timeout(400)

LONG = 4000
"""Tokens of a stream that is still running when the signal comes."""


def start_long_stream(client: Client) -> tuple[list[Event], threading.Thread]:
    """Start a generation of `LONG` tokens; returns when its first token is here."""
    events: list[Event] = []
    first = threading.Event()

    def run() -> None:
        for event in client.generate([5, 6, 7], max_tokens=LONG, temperature=0.0, ignore_eos=True):
            events.append(event)
            if isinstance(event, Delta):
                first.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert first.wait(60)
    return events, thread


def test_sigterm_to_the_group_drains_and_leaves_nothing(checkpoint: Path, tmp: str) -> None:
    with Served(checkpoint, "--expert-groups", "2", tmp=tmp) as service:
        impatient = ClientConfig(max_attempts=1)
        with Client(service.address) as client, Client(service.address, impatient) as late:
            events, thread = start_long_stream(client)
            service.signal(signal.SIGTERM, to_group=True)
            eventually(lambda: any("draining" in line for line in service.errors), 30)

            def is_refused() -> bool:
                try:
                    late.complete([1, 2], max_tokens=1)
                except DrainingError:
                    return True
                return False

            assert eventually(is_refused, 20)
            assert thread.is_alive(), "the stream ended before the test looked"
            thread.join(120)
        finished = events[-1]
        assert isinstance(finished, Finished)
        assert finished.reason is FinishReason.LENGTH
        assert finished.usage.completion_tokens == LONG
        assert service.wait() == 0
        assert service.survivors() == []
    assert os.listdir(tmp) == []


@pytest.fixture(scope="module")
def dense(dense_checkpoint: Path) -> Iterator[Served]:
    """A service without groups and without text; the second of its two tests ends it."""
    with Served(dense_checkpoint) as service:
        yield service


def test_a_dense_model_without_tokenizer_needs_no_groups(dense: Served) -> None:
    assert dense.fields["groups"] == "0"
    with Client(dense.address) as client:
        assert len(client.complete([5, 6, 7], max_tokens=8, ignore_eos=True).token_ids) == 8
        with pytest.raises(UnsupportedFeatureError, match="no t"):
            client.complete("text needs a tokenizer", max_tokens=1)
    assert any("no tokenizer.json" in line for line in dense.errors)


def test_a_second_signal_ends_at_once(dense: Served) -> None:
    impatient = ClientConfig(max_attempts=1)
    with Client(dense.address, impatient) as client:
        failure: list[BaseException] = []
        first = threading.Event()

        def run() -> None:
            try:
                for event in client.generate(
                    [5, 6, 7], max_tokens=LONG, temperature=0.0, ignore_eos=True
                ):
                    if isinstance(event, Delta):
                        first.set()
            except ServiceUnavailableError as error:
                failure.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        assert first.wait(60)
        dense.signal(signal.SIGTERM)
        eventually(lambda: any("draining" in line for line in dense.errors), 30)
        dense.signal(signal.SIGINT)
        thread.join(30)
        assert failure, "the stream should have been cut"
        assert dense.wait() == 0
        assert dense.survivors() == []


@pytest.fixture(scope="module")
def over_grpc(checkpoint: Path) -> Iterator[tuple[Served, str]]:
    """A service of three groups over gRPC, and its temporary files; the second test ends it."""
    with short_folder() as tmp:
        flags = ("--expert-groups", "3", "--expert-transport", "grpc")
        with Served(checkpoint, *flags, tmp=tmp) as service:
            yield service, tmp


def test_tokens_do_not_depend_on_groups_or_transport(
    served: Served, over_grpc: tuple[Served, str]
) -> None:
    """Two unequal groups over lanes, and three over gRPC; `chaos/test_scaling.py` has others."""
    other, _ = over_grpc
    expected = greedy_tokens(served.address)
    assert len(set(expected)) > 10, "a degenerate answer proves little"
    assert {group.transport for group in ask_status(served.address).groups} == {"lane-unix"}
    assert greedy_tokens(other.address) == expected
    assert {group.transport for group in ask_status(other.address).groups} == {"grpc"}


def test_sigkill_leaves_nothing(over_grpc: tuple[Served, str]) -> None:
    service, tmp = over_grpc
    assert os.listdir(tmp), "what is to go must be there before"
    service.signal(signal.SIGKILL)
    assert service.wait() == -signal.SIGKILL
    assert service.survivors() == []
    assert eventually(lambda: os.listdir(tmp) == [], 10)


def test_a_sigterm_during_the_start_leaves_nothing(checkpoint: Path, tmp: str) -> None:
    service = Served(checkpoint, "--expert-groups", "2", tmp=tmp)
    try:
        eventually(lambda: any("layers" in line for line in service.errors), 60)
        service.signal(signal.SIGTERM)
        assert service.wait() == 0
    finally:
        service.__exit__(None, None, None)
    assert eventually(lambda: os.listdir(tmp) == [], 10)


def test_a_second_service_on_the_same_port_is_refused(checkpoint: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        answer = run_cli("serve", str(checkpoint), "--port", str(port))
    assert answer.returncode == 3
    assert f"router.port cannot be bound on 127.0.0.1: Address already in use, got {port}" in (
        answer.stderr
    )
    assert answer.stdout == ""


def edited(checkpoint: Path, folder: Path, **values: object) -> Path:
    """Copy a checkpoint with other values in config.json (None removes)."""
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    config.update(values)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def broken_checkpoint(kind: str, checkpoint: Path, folder: Path) -> Path:
    """A checkpoint folder with one fault."""
    if kind == "gone":
        return folder / "gone"
    if kind == "file":
        return checkpoint / "config.json"
    if kind == "empty":
        folder.mkdir(exist_ok=True)
        return folder
    if kind == "gpt2":
        return edited(checkpoint, folder / "gpt2", model_type="gpt2")
    torn = edited(checkpoint, folder / "torn")
    weights = torn / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    return torn


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("gone", "gone: no such folder"),
        ("file", "is a file; give the folder"),
        ("empty", "holds no config.json"),
        ("gpt2", "model_type 'gpt2' is not supported; supported: qwen3_5_moe"),
        ("torn", "model.safetensors"),
    ],
)
def test_a_broken_checkpoint_is_refused(
    kind: str, text: str, checkpoint: Path, tmp_path: Path
) -> None:
    config = load_config(
        {"model.checkpoint": str(broken_checkpoint(kind, checkpoint, tmp_path)), "router.port": 0}
    ).config

    def check() -> None:
        quick_checks(config)
        examine(config, GIB)

    with pytest.raises(SetupError) as caught:
        check()
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value", "text"),
    [
        ("experts.groups", "9", "experts.groups must be at most 8 groups, the experts of a layer"),
        ("model.max_model_len", 5000, "model.max_model_len must be at most 4096"),
        ("engine.num_kv_blocks", 8, "need 128 blocks (2.0 MiB) for 4096 tokens, have 8 blocks"),
        ("engine.num_kv_blocks", 10**6, "not enough memory for the KV cache: need 15.3 GiB, have"),
    ],
)
def test_a_setting_that_the_checkpoint_does_not_allow_is_refused(
    path: str, value: object, text: str, checkpoint: Path
) -> None:
    config = load_config({"model.checkpoint": str(checkpoint), path: value}).config
    with pytest.raises(SetupError) as caught:
        examine(config, 2 * GIB)
    assert text in str(caught.value)


def test_a_refused_start_says_why_and_leaves_nothing(checkpoint: Path, tmp: str) -> None:
    answer = run_cli("serve", str(checkpoint), "--port", "0", "--expert-groups", "9", tmp=tmp)
    assert answer.returncode == 3
    assert "experts.groups must be at most 8 groups" in answer.stderr
    assert "Traceback" not in answer.stderr
    assert answer.stdout == ""
    assert eventually(lambda: os.listdir(tmp) == [], 10)


def test_a_cluster_that_is_not_there_has_exit_code_4(checkpoint: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    address = f"127.0.0.1:{port}"
    answer = run_cli("serve", str(checkpoint), "--port", "0", "--ray-address", address)
    assert answer.returncode == 4, answer.stderr
    assert f"Ray cluster {address}" in answer.stderr
    for command in (("status",), ("complete", "x"), ("chat",)):
        answer = run_cli(*command, "--url", address)
        assert answer.returncode == 4, answer.stderr
        assert "not reachable" in answer.stderr
