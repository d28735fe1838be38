"""Checkpoints behind a URI: what is read from afar, what is kept, and what is read again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem

from experts import range_cache
from experts.placement import Placement
from experts.planner import plan_placement
from experts.range_cache import RANGES, fetched_bytes
from experts.remote_checkpoint import local_folder
from experts.runtime import ExpertRuntime
from experts.weights import SafetensorsCheckpoint
from protos.errors import CheckpointError
from tests.parity.checkpoints import make_checkpoint

NUM_LAYERS, NUM_EXPERTS = 2, 8


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards or more, tokenizer files beside them."""
    path = tmp_path_factory.mktemp("remote") / "model"
    return make_checkpoint(
        path, tokenizer=True, num_layers=NUM_LAYERS, num_experts=NUM_EXPERTS, max_shard_size="300KB"
    )


class CountedFile:
    """Counts what is read of a file."""

    def __init__(self, file: Any, counter: CountedFileSystem) -> None:
        self._file, self._counter = file, counter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def read(self, *arguments: Any) -> bytes:
        content: bytes = self._file.read(*arguments)
        self._counter.read[Path(self._counter.last).suffix] += len(content)
        return content


class CountedFileSystem(LocalFileSystem):  # type: ignore[misc]
    """An object store: files of this machine under a scheme that only fsspec knows."""

    protocol = "counted"
    cachable = False
    read: dict[str, int]
    last = ""

    def _open(self, path: str, *arguments: Any, **options: Any) -> Any:
        CountedFileSystem.last = path
        return CountedFile(super()._open(path, *arguments, **options), self)


@pytest.fixture
def remote(checkpoint: Path) -> Iterator[str]:
    """The checkpoint's URI; `read_bytes` tells what of its weights was read."""
    from collections import Counter

    fsspec.register_implementation("counted", CountedFileSystem, clobber=True)
    CountedFileSystem.read = Counter()
    return f"counted://{checkpoint}"


def read_bytes() -> int:
    return CountedFileSystem.read[".safetensors"]


def header_bytes(checkpoint: Path) -> int:
    """Bytes before the data of all shards."""
    total = 0
    for path in checkpoint.glob("*.safetensors"):
        total += 8 + int.from_bytes(path.read_bytes()[:8], "little")
    return total


def placement() -> Placement:
    return plan_placement(NUM_LAYERS, NUM_EXPERTS, {"group-0": 3.0, "group-1": 1.0})


def load_group(uri: str, group_id: str, cache: Path) -> ExpertRuntime:
    """As one node does."""
    runtime = ExpertRuntime(
        group_id=group_id,
        checkpoint=local_folder(uri, cache),
        dtype="float32",
        compute="torch",
        num_threads=1,
    )
    runtime.load(placement())
    return runtime


def test_a_node_reads_and_keeps_only_the_slices_of_its_own_experts(
    checkpoint: Path, remote: str, tmp_path: Path
) -> None:
    with SafetensorsCheckpoint(checkpoint) as whole:
        expert = whole.expert_bytes
    for group_id, experts in (("group-0", 6), ("group-1", 2)):
        before = read_bytes()
        cache = tmp_path / group_id
        load_group(remote, group_id, cache)
        expected = NUM_LAYERS * experts * expert + header_bytes(checkpoint)
        assert read_bytes() - before == expected
        (folder,) = cache.iterdir()
        assert fetched_bytes(folder) == expected
        assert (folder / "tokenizer.json").read_bytes() == (
            checkpoint / "tokenizer.json"
        ).read_bytes()


def test_the_next_start_reads_nothing_from_afar(remote: str, tmp_path: Path) -> None:
    load_group(remote, "group-0", tmp_path)
    before = read_bytes()
    assert before > 0
    load_group(remote, "group-0", tmp_path)
    assert read_bytes() == before


@pytest.mark.parametrize("scheme", ["counted", "file"])
def test_what_is_read_through_the_cache_is_what_is_there(
    checkpoint: Path, remote: str, tmp_path: Path, scheme: str
) -> None:
    uri = remote.replace("counted", scheme)
    with (
        SafetensorsCheckpoint(checkpoint) as near,
        SafetensorsCheckpoint(local_folder(uri, tmp_path)) as far,
    ):
        assert near.names == far.names
        for name in near.names:
            assert torch.equal(near.get(name), far.get(name)), name
        for ours, theirs in zip(
            near.expert_slices(1, [5, 0]), far.expert_slices(1, [5, 0]), strict=True
        ):
            assert ours[0] == theirs[0]
            assert torch.equal(ours[1], theirs[1])
            assert torch.equal(ours[2], theirs[2])


def test_a_damaged_range_is_fetched_again(checkpoint: Path, remote: str, tmp_path: Path) -> None:
    load_group(remote, "group-1", tmp_path)
    (folder,) = tmp_path.iterdir()
    journal = max(folder.glob(f"*{RANGES}"), key=lambda path: path.stat().st_size)
    start, length, _ = journal.read_text().splitlines()[-1].split()
    shard = journal.with_name(journal.name.removesuffix(RANGES))
    with shard.open("r+b") as file:
        file.seek(int(start))
        file.write(b"\xff" * int(length))
    before = read_bytes()
    load_group(remote, "group-1", tmp_path)
    assert read_bytes() - before == int(length)
    content = (checkpoint / shard.name).read_bytes()
    assert (
        shard.read_bytes()[int(start) : int(start) + int(length)]
        == content[int(start) : int(start) + int(length)]
    )


def test_a_journal_that_was_cut_off_costs_its_last_range(remote: str, tmp_path: Path) -> None:
    load_group(remote, "group-1", tmp_path)
    (folder,) = tmp_path.iterdir()
    journal = max(folder.glob(f"*{RANGES}"), key=lambda path: path.stat().st_size)
    lines = journal.read_text()
    length = int(lines.splitlines()[-1].split()[1])
    journal.write_text(lines[:-3])
    before = read_bytes()
    load_group(remote, "group-1", tmp_path)
    assert read_bytes() - before == length


def test_a_checkpoint_that_changed_is_another_one(checkpoint: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    first = local_folder(f"file://{copy}", tmp_path / "cache")
    assert local_folder(f"file://{copy}/", tmp_path / "cache") == first
    shard = min(copy.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes())
    assert local_folder(f"file://{copy}", tmp_path / "cache") != first


def test_errors_name_the_uri(tmp_path: Path, remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="file:///no/such: cannot be listed"):
        local_folder("file:///no/such", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        local_folder(f"file://{tmp_path}/empty", tmp_path)
    with pytest.raises(CheckpointError, match="nosuch://x: cannot be opened"):
        local_folder("nosuch://x", tmp_path)
    folder = local_folder(remote, tmp_path)

    class Gone:
        def open_input_file(self, path: str) -> Any:
            raise OSError("connection reset")

    monkeypatch.setattr(range_cache, "open_filesystem", lambda uri: (Gone(), uri))
    with pytest.raises(CheckpointError, match=r"counted://.*cannot be read: connection reset"):
        SafetensorsCheckpoint(folder)


def test_a_path_is_left_as_it_is() -> None:
    assert local_folder("/models/m") == Path("/models/m")
