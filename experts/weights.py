"""Reads a released checkpoint: the slices that were asked for, and nothing else.

Decides what a well-formed checkpoint is. All headers are validated and all names compared with the
configuration when a `SafetensorsCheckpoint` is made, so a broken checkpoint fails before memory is
spent on it. The router reads its trunk with `get`, a group its experts with `expert_slices`. Must
not know placement, devices or how experts compute.

Layouts of the experts of a layer: fused (`mlp.experts.gate_up_proj [E, 2I, H]`,
`mlp.experts.down_proj [E, H, I]`) or split (`mlp.experts.E.{gate,up,down}_proj.weight`). Dimension
letters: E experts, H hidden, I intermediate.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from experts.checkpoint_names import (
    FUSED_EXPERTS,
    IGNORED_PREFIXES,
    PREFIXES,
    split_expert_names,
    trunk_names,
)
from experts.finite import all_finite
from experts.tensor_file import TensorEntry, TensorFile
from protos.errors import CheckpointError

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class SafetensorsCheckpoint:
    """A checkpoint directory, validated, open for reading. Safe to read from several threads.

    Attributes:
        path: The directory.
        config: `config.json` as it is.
        text_config: Its `text_config` section, or the whole of a text-only one.
        num_layers, num_experts, hidden_size, intermediate_size: Of the routed experts;
            `num_experts` is 0 in a dense model.
        dtype: Stored dtype of the experts (of the embedding in a dense model).
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self._read_json("config.json")
        self.text_config: dict[str, Any] = self.config.get("text_config", self.config)
        self.num_layers = self._dimension("num_hidden_layers")
        self.num_experts = int(self.text_config.get("num_experts") or 0)
        self.hidden_size = self._dimension("hidden_size")
        self.intermediate_size = self._dimension("moe_intermediate_size") if self.num_experts else 0
        self._files: list[TensorFile] = []
        self._entries: dict[str, tuple[TensorFile, TensorEntry]] = {}
        try:
            self._open_files()
            self.prefix = self._find_prefix()
            self.fused = self._has(self._layer_name(0, FUSED_EXPERTS[0]))
            self._check_names()
            self._check_experts()
        except BaseException:
            self.close()
            raise
        first = self._layer_name(0, FUSED_EXPERTS[0] if self.fused else split_expert_names(0)[0])
        self.dtype = self._entry(first if self.num_experts else "embed_tokens.weight")[1].dtype

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()

    @property
    def names(self) -> frozenset[str]:
        """Full names of all tensors."""
        return frozenset(self._entries)

    def entries(self) -> list[tuple[TensorFile, TensorEntry]]:
        """Return where every tensor lies."""
        return list(self._entries.values())

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert as stored."""
        return 3 * self.hidden_size * self.intermediate_size * self.dtype.itemsize

    def get(
        self,
        name: str,
        *,
        shape: tuple[int, ...] | None = None,
        dtype: torch.dtype | None = None,
        check_finite: bool = True,
    ) -> torch.Tensor:
        """Read one whole tensor into fresh memory.

        Args:
            name: Full name, or the name below the text prefix (`layers.0.mlp.gate.weight`).
            shape: The shape it must have.
            dtype: Wanted dtype; the stored one must be a float of 16 or 32 bits. None keeps the
                stored one.
            check_finite: Refuse NaN and infinity.

        Raises:
            CheckpointError: Missing, misshapen, of a dtype that cannot be converted, unreadable, or
                not finite.
        """
        file, entry = self._entry(name)
        if shape is not None and entry.shape != tuple(shape):
            raise self._error(f"has shape {list(entry.shape)}, expected {list(shape)}", entry.name)
        if dtype is not None:
            self._require_float(entry)
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        file.read_into(entry, tensor)
        if check_finite and entry.dtype in FLOAT_DTYPES and not all_finite(tensor):
            raise self._error("holds NaN or infinity", entry.name)
        return tensor if dtype is None else tensor.to(dtype)

    def has(self, name: str) -> bool:
        """Return whether `get` would find the name."""
        return self._has(name)

    def expert_slices(
        self, layer_id: int, expert_ids: Iterable[int], dtype: torch.dtype | None = None
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Read the given experts of one layer, one after the other.

        The two tensors of an item are reused for the next: copy what is to be kept.

        Args:
            layer_id: Transformer layer.
            expert_ids: Logical experts, read in this order.
            dtype: Wanted dtype; None keeps the stored one.

        Yields:
            `(expert_id, gate_up [2I, H], down [H, I])`, gate above up.

        Raises:
            CheckpointError: Unreadable or not finite, naming tensor and expert.
        """
        hidden, inter = self.hidden_size, self.intermediate_size
        gate_up = torch.empty(2 * inter, hidden, dtype=self.dtype)
        down = torch.empty(hidden, inter, dtype=self.dtype)
        ordered = list(expert_ids)
        for expert_id in ordered:
            if not (0 <= layer_id < self.num_layers and 0 <= expert_id < self.num_experts):
                raise self._error(
                    f"has no layer {layer_id} expert {expert_id}:"
                    f" {self.num_layers} layers, {self.num_experts} experts"
                )
        for expert_id, next_id in zip(ordered, [*ordered[1:], None], strict=True):
            if next_id is not None:
                for name, out, part in self._parts(layer_id, next_id, gate_up, down):
                    file, entry = self._entry(name)
                    file.prefetch(entry, part * out.nbytes, out.nbytes)
            for name, out, part in self._parts(layer_id, expert_id, gate_up, down):
                file, entry = self._entry(name)
                file.read_into(entry, out, part * out.nbytes)
                if not all_finite(out):
                    raise self._error(f"expert {expert_id} holds NaN or infinity", entry.name)
            if dtype is None or dtype == self.dtype:
                yield expert_id, gate_up, down
            else:
                yield expert_id, gate_up.to(dtype), down.to(dtype)

    def _parts(
        self, layer_id: int, expert_id: int, gate_up: torch.Tensor, down: torch.Tensor
    ) -> tuple[tuple[str, torch.Tensor, int], ...]:
        """Return (tensor name, destination, index of the destination-sized part) of one expert."""
        if self.fused:
            names = (self._layer_name(layer_id, leaf) for leaf in FUSED_EXPERTS)
            return tuple(
                (name, out, expert_id) for name, out in zip(names, (gate_up, down), strict=True)
            )
        inter = self.intermediate_size
        names = (self._layer_name(layer_id, leaf) for leaf in split_expert_names(expert_id))
        outs = (gate_up[:inter], gate_up[inter:], down)
        return tuple((name, out, 0) for name, out in zip(names, outs, strict=True))

    def _layer_name(self, layer_id: int, leaf: str) -> str:
        return f"layers.{layer_id}.{leaf}"

    def _has(self, name: str) -> bool:
        return name in self._entries or self.prefix + name in self._entries

    def _entry(self, name: str) -> tuple[TensorFile, TensorEntry]:
        found = self._entries.get(name) or self._entries.get(self.prefix + name)
        if found is None:
            full = name if name.startswith(("model.", "lm_head.")) else self.prefix + name
            raise self._error("is missing", full)
        return found

    def _open_files(self) -> None:
        """Open every shard; refuse an index that does not agree with the shards."""
        if not (self.path / "model.safetensors.index.json").exists():
            if not (self.path / "model.safetensors").exists():
                raise self._error("holds neither model.safetensors nor an index of shards")
            self._add_file("model.safetensors")
            return
        weight_map = self._read_json("model.safetensors.index.json").get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise self._error("model.safetensors.index.json has no weight_map")
        for shard in sorted(set(map(str, weight_map.values()))):
            if Path(shard).name != shard:
                raise self._error(f"the index names a shard outside the directory: {shard!r}")
            self._add_file(shard)
        for name, shard in weight_map.items():
            if name not in self._entries or self._entries[name][0].path.name != shard:
                raise self._error(f"is missing: the index places it in {shard}", name)
        for name, (file, _) in self._entries.items():
            if name not in weight_map:
                raise self._error(f"is unexpected: {file.path.name} holds it, the index not", name)

    def _add_file(self, file_name: str) -> None:
        file = TensorFile(self.path / file_name)
        self._files.append(file)
        for name, entry in file.entries.items():
            if name in self._entries:
                other = self._entries[name][0].path.name
                raise self._error(f"occurs in {other} and in {file_name}", name)
            self._entries[name] = (file, entry)

    def _find_prefix(self) -> str:
        for prefix in PREFIXES:
            if f"{prefix}embed_tokens.weight" in self._entries:
                return prefix
        expected = " nor ".join(f"{prefix}embed_tokens.weight" for prefix in PREFIXES)
        raise self._error(f"holds neither {expected}")

    def _check_names(self) -> None:
        """Compare the names with those that the configuration asks for."""
        expected = {self.prefix + name for name in trunk_names(self.text_config)}
        for layer_id in range(self.num_layers if self.num_experts else 0):
            leaves = FUSED_EXPERTS if self.fused else self._all_split_names()
            expected.update(f"{self.prefix}{self._layer_name(layer_id, leaf)}" for leaf in leaves)
        tied = self.config.get("tie_word_embeddings", self.text_config.get("tie_word_embeddings"))
        if not tied:
            expected.add("lm_head.weight")
        missing = sorted(expected - self._entries.keys())
        if missing:
            raise self._error(f"is missing{_and_more(missing)}", missing[0])
        unexpected = sorted(
            name
            for name in self._entries.keys() - expected - {"lm_head.weight"}
            if not name.startswith(IGNORED_PREFIXES)
        )
        if unexpected:
            detail = f"is unexpected: no layer of this configuration has it{_and_more(unexpected)}"
            raise self._error(detail, unexpected[0])

    def _check_experts(self) -> None:
        """Check shape and dtype of every expert tensor."""
        if not self.num_experts:
            return
        experts, hidden, inter = self.num_experts, self.hidden_size, self.intermediate_size
        dtype: torch.dtype | None = None
        for layer_id in range(self.num_layers):
            shapes: list[tuple[int, ...]]
            if self.fused:
                leaves = list(FUSED_EXPERTS)
                shapes = [(experts, 2 * inter, hidden), (experts, hidden, inter)]
            else:
                leaves = self._all_split_names()
                shapes = [(inter, hidden), (inter, hidden), (hidden, inter)] * experts
            for leaf, shape in zip(leaves, shapes, strict=True):
                _, entry = self._entry(self._layer_name(layer_id, leaf))
                if entry.shape != shape:
                    raise self._error(
                        f"has shape {list(entry.shape)}, expected {list(shape)}", entry.name
                    )
                self._require_float(entry)
                dtype = dtype or entry.dtype
                if entry.dtype != dtype:
                    raise self._error(
                        f"has dtype {entry.dtype}, the experts before it {dtype}", entry.name
                    )

    def _all_split_names(self) -> list[str]:
        return [name for e in range(self.num_experts) for name in split_expert_names(e)]

    def _require_float(self, entry: TensorEntry) -> None:
        if entry.dtype not in FLOAT_DTYPES:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES)
            raise self._error(
                f"has dtype {str(entry.dtype).removeprefix('torch.')}, expected one of {allowed}"
                " (quantised checkpoints are not supported)",
                entry.name,
            )

    def _dimension(self, field: str) -> int:
        value = self.text_config.get(field)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise CheckpointError(
                str(self.path / "config.json"), f"{field} must be a positive integer, got {value!r}"
            )
        return value

    def _read_json(self, file_name: str) -> dict[str, Any]:
        path = self.path / file_name
        try:
            value = json.loads(path.read_bytes())
        except OSError as error:
            raise CheckpointError(str(path), f"cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise CheckpointError(str(path), f"is not JSON: {error}") from None
        if not isinstance(value, dict):
            raise CheckpointError(str(path), "is not a JSON object")
        return value

    def _error(self, detail: str, tensor: str | None = None) -> CheckpointError:
        return CheckpointError(str(self.path), detail, tensor)


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
