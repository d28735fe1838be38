"""A checkpoint: both layouts read the same, and every way to be broken is an error with a name."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
import torch

from experts.weights import SafetensorsCheckpoint
from protos.errors import CheckpointError
from tests.unit.experts.builders import (
    EXPERTS,
    HIDDEN,
    INTER,
    LAYERS,
    PREFIX,
    expert_tensors,
    tensors,
    write,
)

FUSED_GATE_UP = f"{PREFIX}layers.1.mlp.experts.gate_up_proj"


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("prefix", [PREFIX, "model."])
@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_the_experts_asked_for_come_back_in_order(
    tmp_path: Path, fused: bool, prefix: str, num_shards: int, stored: torch.dtype
) -> None:
    content = tensors(fused=fused, prefix=prefix, dtype=stored)
    path = write(tmp_path, content, num_shards=num_shards)
    expected = expert_tensors(stored)
    with SafetensorsCheckpoint(path) as checkpoint:
        assert checkpoint.dtype == stored
        assert checkpoint.expert_bytes == 3 * HIDDEN * INTER * stored.itemsize
        for layer_id in range(LAYERS):
            seen = []
            for expert_id, gate_up, down in checkpoint.expert_slices(layer_id, [4, 0, 2]):
                assert torch.equal(gate_up, expected[layer_id, expert_id][0])
                assert torch.equal(down, expected[layer_id, expert_id][1])
                seen.append(expert_id)
            assert seen == [4, 0, 2]


def test_slices_are_converted_when_asked(tmp_path: Path) -> None:
    path = write(tmp_path, tensors(dtype=torch.bfloat16))
    with SafetensorsCheckpoint(path) as checkpoint:
        for _, gate_up, down in checkpoint.expert_slices(0, [1], torch.float32):
            assert gate_up.dtype == down.dtype == torch.float32
            assert torch.equal(gate_up, expert_tensors(torch.bfloat16)[0, 1][0].float())


def test_get_takes_full_and_short_names(tmp_path: Path) -> None:
    with SafetensorsCheckpoint(write(tmp_path, tensors())) as checkpoint:
        short = checkpoint.get("norm.weight", shape=(2,), dtype=torch.bfloat16)
        assert short.dtype == torch.bfloat16
        assert torch.equal(checkpoint.get(PREFIX + "norm.weight"), short.float())
        assert checkpoint.get("lm_head.weight").shape == (3, 2)
        assert checkpoint.has("norm.weight")
        assert not checkpoint.has("mtp.norm.weight")


def test_known_extras_are_ignored(tmp_path: Path) -> None:
    extras = {"mtp.fc.weight": torch.ones(1), "model.visual.patch_embed.weight": torch.ones(1)}
    with SafetensorsCheckpoint(write(tmp_path, tensors() | extras)) as checkpoint:
        assert checkpoint.num_experts == EXPERTS


def test_reading_leaves_nothing_mapped(tmp_path: Path) -> None:
    with SafetensorsCheckpoint(write(tmp_path, tensors())) as checkpoint:
        list(checkpoint.expert_slices(0, range(EXPERTS)))
        assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def without(name: str) -> dict[str, torch.Tensor]:
    content = tensors()
    del content[name]
    return content


@pytest.mark.parametrize(
    ("content", "tensor", "detail"),
    [
        (without(FUSED_GATE_UP), FUSED_GATE_UP, "is missing"),
        (without(PREFIX + "norm.weight"), PREFIX + "norm.weight", "is missing"),
        (without("lm_head.weight"), "lm_head.weight", "is missing"),
        (
            tensors() | {PREFIX + "layers.3.mlp.gate.weight": torch.ones(1)},
            PREFIX + "layers.3.mlp.gate.weight",
            "is unexpected",
        ),
        (
            tensors() | {PREFIX + "layers.0.mlp.gate.weight_scale_inv": torch.ones(1)},
            PREFIX + "layers.0.mlp.gate.weight_scale_inv",
            "is unexpected",
        ),
        (
            tensors() | {FUSED_GATE_UP: torch.ones(EXPERTS, 2 * INTER, HIDDEN + 1)},
            FUSED_GATE_UP,
            f"{2 * INTER}, {HIDDEN + 1}], expected [{EXPERTS}, {2 * INTER}, {HIDDEN}]",
        ),
        (
            tensors() | {FUSED_GATE_UP: torch.ones(EXPERTS, 2 * INTER, HIDDEN, dtype=torch.int8)},
            FUSED_GATE_UP,
            "has dtype int8, expected one of float32, bfloat16, float16",
        ),
        (
            tensors() | {FUSED_GATE_UP: torch.ones(EXPERTS, 2 * INTER, HIDDEN).bfloat16()},
            FUSED_GATE_UP,
            "has dtype torch.bfloat16, the experts before it torch.float32",
        ),
    ],
    ids=["expert", "trunk", "head", "layer", "quantised", "shape", "dtype", "mixed"],
)
def test_a_wrong_tensor_is_named(
    tmp_path: Path, content: dict[str, torch.Tensor], tensor: str, detail: str
) -> None:
    with pytest.raises(CheckpointError) as raised:
        SafetensorsCheckpoint(write(tmp_path, content))
    assert raised.value.fields["tensor"] == tensor
    assert detail in str(raised.value)


def test_a_missing_expert_of_the_split_layout_is_named(tmp_path: Path) -> None:
    content = tensors(fused=False)
    name = f"{PREFIX}layers.2.mlp.experts.3.up_proj.weight"
    del content[name]
    with pytest.raises(CheckpointError, match="is missing") as raised:
        SafetensorsCheckpoint(write(tmp_path, content))
    assert raised.value.fields["tensor"] == name


def test_get_names_missing_misshapen_and_inconvertible(tmp_path: Path) -> None:
    content = tensors() | {PREFIX + "norm.weight": torch.ones(2, dtype=torch.int32)}
    with SafetensorsCheckpoint(write(tmp_path, content)) as checkpoint:
        with pytest.raises(CheckpointError, match=r"layers\.9\.x: is missing"):
            checkpoint.get("layers.9.x")
        with pytest.raises(CheckpointError, match=r"has shape \[3, 2\], expected \[4, 2\]"):
            checkpoint.get("lm_head.weight", shape=(4, 2))
        with pytest.raises(CheckpointError, match="has dtype int32"):
            checkpoint.get("norm.weight", dtype=torch.float32)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("fused", [True, False])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, bad: float, fused: bool) -> None:
    content = tensors(fused=fused)
    name = FUSED_GATE_UP if fused else f"{PREFIX}layers.1.mlp.experts.3.gate_proj.weight"
    content[name].view(EXPERTS if fused else 1, -1)[3 if fused else 0, 5] = bad
    content["lm_head.weight"][1, 1] = bad
    with SafetensorsCheckpoint(write(tmp_path, content)) as checkpoint:
        assert len(list(checkpoint.expert_slices(1, [0, 1, 2, 4]))) == 4
        with pytest.raises(CheckpointError, match="expert 3 holds NaN or infinity") as raised:
            list(checkpoint.expert_slices(1, [3]))
        assert raised.value.fields["tensor"] == name
        with pytest.raises(CheckpointError, match=r"lm_head\.weight: holds NaN"):
            checkpoint.get("lm_head.weight")


def edit(path: Path, change: object) -> None:
    """Rewrite the header of a single-file checkpoint by `change(header)`."""
    assert callable(change)
    raw = (path / "model.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    text = json.dumps(change(header) or header).encode()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])


@pytest.mark.parametrize("keep_bytes", [0, 7, 8, 100, -1, -1000])
def test_a_truncated_file_is_an_error(tmp_path: Path, keep_bytes: int) -> None:
    file = write(tmp_path, tensors()) / "model.safetensors"
    size = file.stat().st_size
    os.truncate(file, keep_bytes if keep_bytes >= 0 else size + keep_bytes)
    with pytest.raises(CheckpointError, match="truncated"):
        SafetensorsCheckpoint(tmp_path)


def test_a_file_that_shrinks_later_is_an_error_and_no_crash(tmp_path: Path) -> None:
    file = write(tmp_path, tensors()) / "model.safetensors"
    with SafetensorsCheckpoint(tmp_path) as checkpoint:
        os.truncate(file, file.stat().st_size // 2)
        with pytest.raises(CheckpointError, match="the file ends"):
            [*checkpoint.expert_slices(0, range(EXPERTS)), *checkpoint.expert_slices(2, [4])]


def test_bytes_behind_the_last_tensor_are_an_error(tmp_path: Path) -> None:
    with (write(tmp_path, tensors()) / "model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError, match="1 bytes after the last tensor"):
        SafetensorsCheckpoint(tmp_path)


def test_a_header_that_is_not_json_is_an_error(tmp_path: Path) -> None:
    file = write(tmp_path, tensors()) / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[10] ^= 0xFF
    file.write_bytes(raw)
    with pytest.raises(CheckpointError, match="the header is not JSON"):
        SafetensorsCheckpoint(tmp_path)


def _wrong_shape(header: dict[str, dict[str, list[int]]]) -> None:
    header["lm_head.weight"]["shape"] = [3, 3]


def _overlap(header: dict[str, dict[str, list[int]]]) -> None:
    begin, end = header[PREFIX + "norm.weight"]["data_offsets"]
    header[PREFIX + "norm.weight"]["data_offsets"] = [begin - 4, end - 4]


def _no_offsets(header: dict[str, dict[str, list[int]]]) -> None:
    del header["lm_head.weight"]["data_offsets"]


def _unknown_dtype(header: dict[str, dict[str, object]]) -> None:
    header["lm_head.weight"]["dtype"] = "F4"


@pytest.mark.parametrize(
    ("change", "detail"),
    [
        (_wrong_shape, r"lm_head\.weight: corrupt: shape \[3, 3\] of F32 needs 36 bytes.* span 24"),
        (_overlap, "overlap"),
        (_no_offsets, r"lm_head\.weight: corrupt: malformed header entry"),
        (_unknown_dtype, r"lm_head\.weight: dtype 'F4' is not supported"),
        (lambda header: [1], "the header is not a JSON object"),
    ],
)
def test_a_header_that_contradicts_itself_is_an_error(
    tmp_path: Path, change: object, detail: str
) -> None:
    edit(write(tmp_path, tensors()), change)
    with pytest.raises(CheckpointError, match=detail):
        SafetensorsCheckpoint(tmp_path)


def test_an_index_must_agree_with_its_shards(tmp_path: Path) -> None:
    index_path = write(tmp_path, tensors(), num_shards=2) / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    shard = index["weight_map"].pop("lm_head.weight")
    index_path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: is unexpected"):
        SafetensorsCheckpoint(tmp_path)
    index["weight_map"]["lm_head.weight"] = shard
    index["weight_map"]["ghost"] = shard
    index_path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="ghost: is missing: the index places it"):
        SafetensorsCheckpoint(tmp_path)
    index["weight_map"]["ghost"] = "../elsewhere.safetensors"
    index_path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside the directory"):
        SafetensorsCheckpoint(tmp_path)
    (tmp_path / shard).unlink()
    del index["weight_map"]["ghost"]
    index_path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="cannot be opened: No such file"):
        SafetensorsCheckpoint(tmp_path)


def test_a_folder_without_config_or_weights_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        SafetensorsCheckpoint(tmp_path)
    write(tmp_path, tensors())
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds neither model\.safetensors nor"):
        SafetensorsCheckpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        SafetensorsCheckpoint(tmp_path)


@pytest.mark.parametrize("value", [0, -1, "16", None, True])
def test_a_config_without_a_usable_dimension_is_an_error(tmp_path: Path, value: object) -> None:
    with pytest.raises(CheckpointError, match="hidden_size must be a positive integer"):
        SafetensorsCheckpoint(write(tmp_path, tensors(), hidden_size=value))


def test_an_expert_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with SafetensorsCheckpoint(write(tmp_path, tensors())) as checkpoint:
        for layer_id, expert_id in ((LAYERS, 0), (0, EXPERTS), (0, -1)):
            with pytest.raises(CheckpointError, match=f"no layer {layer_id} expert {expert_id}"):
                list(checkpoint.expert_slices(layer_id, [expert_id]))
