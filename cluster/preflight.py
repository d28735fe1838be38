"""Everything that can be known to fail before anything is loaded.

`quick_checks` needs no torch and runs in `serve` itself: paths, port, group spec. `examine` opens
the checkpoint's headers with the very code that loads it later and compares sizes with memory. It
runs in its own process (`python -m cluster.preflight`), so that `serve` never imports torch and
Ray starts meanwhile; it answers with one JSON object: the facts, or a serialised error.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from google.rpc import status_pb2

from cluster.config import Config, ModelSection, parse_groups
from cluster.config_loading import load_config
from cluster.hf_overrides import parse_hf_overrides
from cluster.kv_budget import format_bytes, plan_kv_blocks
from cluster.security import load_security
from protos.errors import (
    CheckpointError,
    ConfigurationError,
    DeadlineExceededError,
    ExpertMeshError,
    InternalError,
    ResourceError,
    from_status,
)

PROCESS_BYTES = 350 << 20
"""Private memory of one of our processes with torch loaded, before weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the headers of a checkpoint say, at the dtype it will be served in."""

    model_type: str
    dtype: str
    num_layers: int
    num_experts: int
    """0: a dense model, which has no expert groups."""
    max_model_len: int
    expert_bytes: int
    """All routed experts together."""
    trunk_bytes: int
    kv_block_bytes: int
    """One KV block, all layers together."""
    state_slot_bytes: int
    """State of one sequence, all layers together."""
    has_tokenizer: bool
    has_chat_template: bool


def quick_checks(config: Config) -> list[str]:
    """Check what needs no checkpoint code: fast, in the calling process.

    Returns:
        What works and may not be meant, as sentences for the user.

    Raises:
        ConfigurationError: No checkpoint given, a port that is taken, an address that is not ours,
            certificates or keys that cannot be used.
        CheckpointError: No such folder, or a folder that is no checkpoint.
    """
    if not config.model.checkpoint:
        raise ConfigurationError("model.checkpoint", "must be the folder of a checkpoint", "")
    if "://" not in config.model.checkpoint:
        _check_folder(Path(config.model.checkpoint))
    parse_groups(config.experts.groups)
    warnings = load_security(config).warnings(config)
    if config.cluster.ray_address is None:
        for index in range(config.router.count if config.router.port else 0):
            _check_port(config.router.host, config.router.port + index)
    return warnings


def _check_folder(path: Path) -> None:
    if not path.exists():
        raise CheckpointError(str(path), "no such folder; give the path of a downloaded checkpoint")
    if not path.is_dir():
        raise CheckpointError(str(path), "is a file; give the folder that holds config.json")
    if not (path / "config.json").is_file():
        raise CheckpointError(
            str(path), "holds no config.json, so it is not a Hugging Face checkpoint folder"
        )


def checkpoint_folder(section: ModelSection) -> Path:
    """Return the folder to read the checkpoint from on this node; see `experts.remote_checkpoint`.

    Raises:
        CheckpointError: A URI behind which nothing can be read.
    """
    from experts.remote_checkpoint import local_folder

    cache = Path(section.cache_dir).expanduser() if section.cache_dir else None
    return local_folder(section.checkpoint, cache)


def router_port(config: Config, index: int) -> int:
    """Return the port of router `index`: the ports follow each other, 0 (a free one) stays 0."""
    return config.router.port + index if config.router.port else 0


def metrics_port(config: Config, index: int) -> int | None:
    """Return the metrics port of router `index`; None where there is none, 0 for a free one."""
    first = config.router.metrics_port
    return first + index if first else first


def _check_port(host: str, port: int) -> None:
    if port > 65535:
        raise ConfigurationError(
            "router.count", "needs port + count - 1 to be 65535 or less", port, hint="lower --port"
        )
    try:
        with socket.create_server((host, port), family=_family(host)):
            pass
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        rule = f"cannot be bound on {host}: {reason}"
        raise ConfigurationError(
            "router.port", rule, port, hint="take another --port; 0 picks a free one"
        ) from None


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


class Examination:
    """`examine` in a process of its own."""

    def __init__(self, config: Config) -> None:
        """Start it."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "cluster.preflight"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert self._process.stdin is not None
        # Far less than a pipe holds: this does not block.
        self._process.stdin.write(json.dumps(dataclasses.asdict(config)))
        self._process.stdin.close()
        self._process.stdin = None

    def finish(self, timeout_s: float) -> Facts:
        """Wait for it and return what it found.

        Raises:
            DeadlineExceededError: It does not end: a mount that is away, most likely.
            ExpertMeshError: What it raised.
        """
        try:
            out, _ = self._process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.cancel()
            raise DeadlineExceededError("reading the checkpoint's headers", timeout_s) from None
        try:
            answer = json.loads(out)
        except ValueError:
            code = self._process.returncode
            raise InternalError(f"the pre-flight check ended with exit code {code}") from None
        if "error" in answer:
            status = status_pb2.Status()
            status.ParseFromString(base64.b64decode(answer["error"]))
            raise from_status(status)
        return Facts(**answer)

    def cancel(self) -> None:
        """End it if it still runs."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()  # and closes the pipe


def examine(config: Config, available_bytes: float) -> Facts:
    """Validate the checkpoint's configuration and headers, and compare its size with the memory.

    Raises:
        UnsupportedArchitectureError: Another kind of model.
        CheckpointError: A missing, misshapen or unexpected tensor or file.
        ConfigurationError: A value that this checkpoint does not allow.
        ResourceError: Not enough memory; with the numbers.
    """
    import torch

    from experts.weights import SafetensorsCheckpoint
    from router.model import memory
    from router.model.config import ModelConfig

    path = checkpoint_folder(config.model)
    model = ModelConfig.from_checkpoint(path, parse_hf_overrides(config.model.hf_overrides))
    with SafetensorsCheckpoint(path) as checkpoint:
        stored = checkpoint.dtype
    dtype = serving_dtype(config.model.dtype, model.dtype or stored)
    torch_dtype = getattr(torch, dtype)
    weights = memory.estimate_memory(model, torch_dtype)
    facts = Facts(
        model_type=model.model_type,
        dtype=dtype,
        num_layers=model.num_layers,
        num_experts=model.num_experts,
        max_model_len=choose_max_model_len(config.model.max_model_len, model.max_context_tokens),
        expert_bytes=weights.total_expert_bytes,
        trunk_bytes=weights.trunk_bytes,
        kv_block_bytes=memory.kv_bytes_per_block(model, config.engine.block_size, torch_dtype),
        state_slot_bytes=memory.state_bytes_per_slot(model, torch.float32),
        has_tokenizer=(path / "tokenizer.json").is_file(),
        has_chat_template=_has_chat_template(path),
    )
    check_groups(config, facts)
    if facts.num_experts:
        check_frames(config, model.top_k * model.hidden_size * torch_dtype.itemsize)
    if config.cluster.ray_address is None:
        check_memory(config, facts, available_bytes)
    return facts


def check_frames(config: Config, bytes_per_token: int) -> None:
    """Refuse steps whose answers would not fit a frame when one group holds all chosen experts.

    Args:
        config: Everything.
        bytes_per_token: Of one token's slot results: top-k rows.

    Raises:
        ConfigurationError: Says how many tokens a step may have.
    """
    from experts.calls import MAX_FRAME_BYTES
    from protos.codec import HEADER_BYTES

    most = (MAX_FRAME_BYTES - HEADER_BYTES) // bytes_per_token
    if config.engine.max_num_batched_tokens > most:
        raise ConfigurationError(
            "engine.max_num_batched_tokens",
            f"must be at most {most}: a step's expert outputs travel in frames of"
            f" {MAX_FRAME_BYTES} bytes",
            config.engine.max_num_batched_tokens,
            hint=f"--max-num-batched-tokens {most}",
        )


def serving_dtype(wanted: str | None, stored: Any) -> str:
    """Return the dtype to serve in: as wanted, else the checkpoint's.

    Raises:
        ConfigurationError: The checkpoint's dtype is one that we do not compute in.
    """
    name = wanted or str(stored).removeprefix("torch.")
    if name not in ("float32", "bfloat16"):
        raise ConfigurationError(
            "model.dtype",
            "must be given: the checkpoint's is not float32 or bfloat16",
            name,
            hint="--dtype bfloat16",
        )
    return name


def choose_max_model_len(wanted: int | None, limit: int) -> int:
    """Return the context window.

    Raises:
        ConfigurationError: More than the checkpoint's position embedding is made for.
    """
    if wanted is not None and wanted > limit:
        raise ConfigurationError(
            "model.max_model_len",
            f"must be at most {limit}, what the position embedding is made for",
            wanted,
            hint="YaRN stretches it: --hf-overrides with rope_type yarn and a factor",
        )
    return limit if wanted is None else wanted


def check_groups(config: Config, facts: Facts) -> None:
    """Check that every group can get an expert of every layer.

    Raises:
        ConfigurationError: More groups than experts.
    """
    groups = parse_groups(config.experts.groups)
    if facts.num_experts and len(groups) > facts.num_experts:
        raise ConfigurationError(
            "experts.groups",
            f"must be at most {facts.num_experts} groups, the experts of a layer",
            len(groups),
            hint="lower --expert-groups",
        )


def check_memory(config: Config, facts: Facts, available_bytes: float) -> None:
    """Check that weights, KV cache and processes fit into this machine.

    Raises:
        ResourceError: They do not; with what each part needs.
    """
    groups = len(parse_groups(config.experts.groups)) if facts.num_experts else 0
    processes = (groups + config.router.count) * PROCESS_BYTES
    trunk = facts.trunk_bytes * config.router.count
    state = facts.state_slot_bytes * config.engine.max_num_seqs * config.router.count
    need = facts.expert_bytes + trunk + state + processes
    if need > available_bytes:
        halved = ", --dtype bfloat16 halves the weights" if facts.dtype == "float32" else ""
        fewer = ", fewer --routers" if config.router.count > 1 else ""
        raise ResourceError(
            what="memory",
            need=f"{format_bytes(need)} (experts {format_bytes(facts.expert_bytes)}, trunk"
            f" {format_bytes(trunk)}, state {format_bytes(state)}, processes"
            f" {format_bytes(processes)}, without KV cache)",
            have=format_bytes(available_bytes),
            hint=f"take a machine with more memory, join a cluster (--ray-address){halved}{fewer}",
        )
    plan_kv_blocks(
        config.engine,
        block_bytes=facts.kv_block_bytes,
        max_model_len=facts.max_model_len,
        free_bytes=(available_bytes - need) / config.router.count,
        has_blob_tier=config.state.enabled,
    )


def _has_chat_template(path: Path) -> bool:
    if (path / "chat_template.jinja").is_file():
        return True
    try:
        settings = json.loads((path / "tokenizer_config.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(settings, dict) and bool(settings.get("chat_template"))


def main() -> None:
    """Read a configuration from stdin, examine it, answer on stdout."""
    sections = json.load(sys.stdin)
    flat = {
        f"{s}.{name}": value for s, fields in sections.items() for name, value in fields.items()
    }
    try:
        config = load_config(flat).config
        answer = dataclasses.asdict(examine(config, psutil.virtual_memory().available))
    except ExpertMeshError as error:
        answer = {"error": base64.b64encode(error.to_status().SerializeToString()).decode()}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
