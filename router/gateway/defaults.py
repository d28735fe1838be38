"""What a request's unset fields mean: the checkpoint's `generation_config.json`, then ours."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from protos.errors import CheckpointError, ConfigurationError
from protos.v1 import generation_pb2
from protos.validate import RequestLimits, sampling_violations

_FROM_FILE = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingDefaults:
    """Values of unset sampling fields, ranges as in `generation.proto`."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> SamplingDefaults:
        """Read `generation_config.json` where there is one.

        `do_sample: false` says that the checkpoint is meant to be decoded greedily: temperature 0.

        Raises:
            CheckpointError: The file is no JSON object.
            ConfigurationError: A value is out of range.
        """
        file = Path(path) / "generation_config.json"
        if not file.exists():
            return cls()
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(str(file), f"no JSON: {error}") from error
        if not isinstance(values, dict):
            raise CheckpointError(str(file), "must be a JSON object")
        found = {name: values[name] for name in _FROM_FILE if values.get(name) is not None}
        if values.get("do_sample") is False:
            found["temperature"] = 0.0
        try:
            sampling = generation_pb2.Sampling(**found)
        except (TypeError, ValueError) as error:
            raise CheckpointError(str(file), str(error)) from error
        limits = RequestLimits(model="", vocab_size=1, max_model_len=1)
        if wrong := sampling_violations(sampling, limits):
            raise ConfigurationError(
                violations=[v._replace(field=f"generation_config.{v.field[9:]}") for v in wrong]
            )
        return cls(**found)
