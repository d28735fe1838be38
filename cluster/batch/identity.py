"""What a batch is: everything that its answers depend on. A run goes on only with the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from cluster.batch.rows import RowDefaults
from protos.errors import BatchChangedError
from protos.v1 import generation_pb2

VERSION = 2
"""2: the digest of the input is made file by file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Named values; equal ones mean equal outputs."""

    values: Mapping[str, Any]

    @property
    def config_hash(self) -> str:
        """64 hex digits that stand for all of them."""
        return hashlib.sha256(json.dumps(self.values, sort_keys=True).encode()).hexdigest()

    def check_same(self, begun: Mapping[str, Any], output: str) -> None:
        """Check that the output was begun with the same values.

        Args:
            begun: The values that it was begun with.
            output: Its URI.

        Raises:
            BatchChangedError: Some differ; names them.
        """
        names = sorted({*self.values, *begun})
        changed = tuple(
            f"{name}: begun with {_short(begun.get(name))}, now {_short(self.values.get(name))}"
            for name in names
            if begun.get(name) != self.values.get(name)
        )
        if changed:
            raise BatchChangedError(output, changed)


def identity_of(
    *,
    input_digest: str,
    num_rows: int,
    input_format: str,
    output_format: str,
    id_field: str,
    part_rows: int,
    limit: int | None,
    defaults: RowDefaults,
    model: generation_pb2.Model,
) -> Identity:
    """Return what a batch's answers depend on."""
    return Identity(
        values={
            "version": VERSION,
            "input.digest": input_digest,
            "input.rows": num_rows,
            "input.format": input_format,
            "input.id_column": id_field,
            "input.limit": limit,
            "output.format": output_format,
            "output.part_rows": part_rows,
            "model.name": model.name,
            "model.dtype": model.dtype,
            "model.max_model_len": model.max_model_len,
            "model.weights": model.weights_digest,
            "model.tokenizer_and_template": model.text_digest,
            "sampling.served_defaults": json.loads(model.sampling_defaults_json or "{}"),
            "sampling.defaults": asdict(defaults),
        }
    )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
