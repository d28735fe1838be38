"""What the digest of weights notices, and what it must not notice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from experts import weights_digest as module
from experts.weights import SafetensorsCheckpoint
from experts.weights_digest import weights_digest
from tests.parity.checkpoints import make_checkpoint


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("digest") / "original")


def digest(path: Path) -> str:
    with SafetensorsCheckpoint(path) as checkpoint:
        return weights_digest(checkpoint)


def changed(original: Path, folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """Copy a checkpoint with some tensors replaced."""
    shutil.copytree(original, folder)
    (file,) = folder.glob("*.safetensors")
    save_file({**load_file(file), **tensors}, file)
    return folder


def test_a_copy_elsewhere_in_other_files_has_the_same_digest(
    original: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(original, copy)
    (file,) = copy.glob("*.safetensors")
    tensors = load_file(file)
    file.unlink()
    names = sorted(tensors)
    weight_map = {}
    for part, chosen in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in chosen}, copy / f"model-{part}.safetensors")
        weight_map |= dict.fromkeys(chosen, f"model-{part}.safetensors")
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert digest(copy) == digest(original)
    assert len(digest(copy)) == 64


def test_every_changed_matrix_changes_it(original: Path, tmp_path: Path) -> None:
    before = digest(original)
    (file,) = original.glob("*.safetensors")
    tensors = load_file(file)
    seen = {before}
    for index, (name, tensor) in enumerate(sorted(tensors.items())):
        seen.add(digest(changed(original, tmp_path / str(index), {name: tensor * 1.5 + 0.1})))
    assert len(seen) == len(tensors) + 1


def test_a_large_tensor_is_sampled_at_several_places(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STRIDE_BYTES", 4096)
    monkeypatch.setattr(module, "SAMPLE_VALUES", 1024)
    before = digest(original)
    (file,) = original.glob("*.safetensors")
    name, tensor = max(load_file(file).items(), key=lambda item: item[1].numel())
    for place in (0.1, 0.5, 0.9):  # 4 KiB samples every 4 KiB: no gap
        edited = tensor.clone()
        edited.view(-1)[int(place * tensor.numel())] += 1
        assert digest(changed(original, tmp_path / f"{place}", {name: edited})) != before


def test_of_many_tensors_all_headers_but_not_all_values_count(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file,) = original.glob("*.safetensors")
    names = sorted(load_file(file))
    monkeypatch.setattr(module, "MAX_TENSORS", len(names) // 2)
    tensors = load_file(file)
    second = changed(original, tmp_path / "second", {names[1]: tensors[names[1]] + 1})
    first = changed(original, tmp_path / "first", {names[0]: tensors[names[0]] + 1})
    assert digest(second) == digest(original), "between the samples, as the docstring says"
    assert digest(first) != digest(original)
