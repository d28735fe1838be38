"""What can be set, its one default, its rule, and how it is shown.

No other file holds a default for a field listed here. Where a value comes from is decided in
`cluster.config_loading`. This file knows nothing of checkpoints, Ray or torch.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from cluster.config_fields import Field, fields_of, json_schema, number, secret
from protos.errors import ConfigurationError


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSection:
    """Which checkpoint is served, and in what precision."""

    checkpoint: str = ""
    """Folder in the Hugging Face layout (config.json, *.safetensors, tokenizer files), the same on
    every node, or a URI (s3://, gs://, file://, ...)."""
    cache_dir: str | None = None
    """Folder where a node keeps what it read of a checkpoint behind a URI; unset:
    ~/.cache/expertmesh."""
    served_model_name: str | None = None
    """Name that clients use; unset: the checkpoint folder's name."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Precision of weights and activations; unset: the checkpoint's."""
    max_model_len: int | None = number(None, minimum=1)
    """Context window in tokens, prompt and output together; unset: what the checkpoint allows."""
    hf_overrides: str | None = None
    """JSON object merged into the checkpoint's config.json, for example to switch YaRN on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsSection:
    """Where the routed experts live, and how they compute."""

    groups: str | None = None
    """Number of expert groups, or `name:capacity,name:capacity` for unequal ones; unset: 1."""
    transport: Literal["auto", "lane", "grpc"] = "auto"
    """How rows travel: a framed socket (lane), a gRPC stream, or a lane where one opens (auto)."""
    compute: Literal["auto", "native", "deepspeed", "torch"] = "auto"
    """Kernels of the experts; auto measures at start-up."""
    threads: int | None = number(None, minimum=1)
    """Threads of one expert group; unset: the node's cores shared among its groups."""
    metrics_port: int | None = number(None, minimum=0, maximum=65535)
    """Port of Prometheus metrics of expert groups; each group of a node takes the first free one
    from it on; 0: any; unset: none."""
    patience_s: float = number(300.0, minimum=0)
    """Seconds that requests wait for experts whose group has died; then they fail. 0: at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSection:
    """The processes that clients talk to."""

    count: int = number(1, minimum=1, maximum=64)
    """Routers; each runs the trunk and has its own port (port, port + 1, ...)."""
    host: str = "127.0.0.1"
    """Address to bind; 0.0.0.0 opens the port to the network."""
    port: int = number(50051, minimum=0, maximum=65535)
    """gRPC port of the first router; 0 picks a free one."""
    metrics_port: int | None = number(None, minimum=0, maximum=65535)
    """Port of Prometheus metrics of the first router (the next one's is 1 higher); unset: none."""
    trunk_ops: Literal["auto", "native", "torch"] = "auto"
    """Kernels of the trunk; auto takes native where this CPU has them."""
    threads: int | None = number(None, minimum=1)
    """Threads of the trunk; unset: the node's cores."""
    ssl_keyfile: str | None = None
    """Private key of the gRPC port (PEM, on every router's node); with ssl_certfile: TLS."""
    ssl_certfile: str | None = None
    """Certificate of the gRPC port, the same for all routers, then the ones up to its CA (PEM)."""
    ssl_ca_certs: str | None = None
    """CAs of client certificates (PEM); set: clients must show one."""
    api_keys: tuple[str, ...] = secret(())
    """Clients send one of these as `authorization: Bearer KEY`; none: no key is asked for. With
    `TENANT KEY` the key is of a tenant, whose sessions and cached KV are its own."""
    api_key_file: str | None = None
    """File with further keys, KEY or TENANT KEY a line, read on every router's node; # begins a
    comment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSection:
    """Continuous batching and its memory, per router."""

    max_num_seqs: int = number(64, minimum=1, maximum=4096)
    """Sequences that run at the same time."""
    max_num_batched_tokens: int = number(2048, minimum=1)
    """Tokens in one step, prefill chunks and decode together."""
    max_queued: int = number(1024, minimum=0)
    """Requests that wait; more are refused with QUEUE_FULL."""
    block_size: int = number(32, minimum=1, maximum=1024)
    """Tokens in one KV block."""
    num_kv_blocks: int | None = number(None, minimum=1)
    """KV blocks; unset: from kv_cache_gib."""
    cold_kv_gib: float | None = number(None, minimum=0)
    """Memory in GiB for the older KV of a sequence longer than the KV cache; what does not fit goes
    to the blob servers; unset: half of what is free behind the KV cache."""
    kv_cache_gib: float | None = number(None, minimum=0.001)
    """Memory of the KV cache in GiB; unset: a share of what is free."""
    enable_prefix_caching: bool = True
    """Reuse the KV blocks and state of earlier prompts with the same beginning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StateSection:
    """Sessions and cached KV: where they live, and how much of them is kept."""

    enabled: bool = True
    """Keep sessions and share the cache between routers; without, every router is on its own."""
    redis_url: str | None = secret(None, kind="url")
    """Redis or Valkey of sessions (redis://, rediss://, unix://); unset: blob_urls' first, else an
    embedded Valkey that lives as long as the service."""
    blob_urls: tuple[str, ...] = secret((), kind="url")
    """Servers of KV blocks and snapshots, which may evict; unset: the one of sessions."""
    embedded_gib: float | None = number(None, minimum=0.01)
    """Memory of the embedded Valkey in GiB; unset: an eighth of this machine's."""
    snapshot_cache_gib: float = number(1.0, minimum=0)
    """Memory of each router for snapshots of recurrent state, in GiB."""
    snapshot_interval_tokens: int = number(8192, minimum=128)
    """Tokens between two snapshots of a long prefill."""
    write_queue_mib: int = number(256, minimum=1)
    """Memory of each router for what waits to be written, in MiB; what does not fit is dropped."""
    session_ttl_s: float = number(604800.0, minimum=1)
    """Seconds that an idle session is kept, unless it was made with another TTL."""
    wait_replicas: int = number(0, minimum=0, maximum=16)
    """Replicas of redis_url that must have a commit, a new, forked or deleted session, before it
    counts; with fewer of them sessions are refused."""
    commit_interval_tokens: int = number(64, minimum=1)
    """Generated tokens of a running turn after which they are saved; those since are drawn again
    when its router dies."""
    commit_interval_s: float = number(1.0, minimum=0.01, maximum=5.0)
    """Seconds after which they are saved at the latest; at most a third of a lease."""
    tenant_salt: str | None = secret(None)
    """Text that sets this service's cached KV apart from others on the same servers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSection:
    """Batches that clients submit and the service runs; see `expertmesh batch submit`."""

    roots: tuple[str, ...] = ()
    """Folder (absolute path or URI) that inputs and outputs of submitted batches lie under, those
    of a named tenant under ROOT/TENANT; every node must reach it; none: batches are refused."""
    max_running: int = number(1, minimum=1, maximum=64)
    """Submitted batches that run at the same time; the others wait."""
    ttl_s: float = number(2592000.0, minimum=60)
    """Seconds that a batch is listed after its last change; its files stay."""
    metrics_port: int | None = number(None, minimum=0, maximum=65535)
    """Port of Prometheus metrics of submitted batches, in the process of `serve`; unset: none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSection:
    """The Ray cluster and the life of the service in it."""

    ray_address: str | None = None
    """Ray cluster to join (host:port, or auto); unset: a private one on this machine."""
    namespace: str = "expertmesh"
    """Ray namespace of the actors; two services in one cluster need two."""
    group_resource: str | None = None
    """Custom resource of Ray that an expert group takes 1 of: only nodes that offer it hold groups;
    unset: expert_group where a node offers that when the service starts."""
    status_port: int | None = number(None, minimum=1, maximum=65535)
    """Port of this process, where `status` is answered from the first second on; unset: none."""
    start_timeout_s: float = number(600.0, minimum=1)
    """Seconds from the command to `ready`."""
    shutdown_timeout_s: float = number(45.0, minimum=0)
    """Seconds that running requests get to finish after SIGTERM."""
    ssl_keyfile: str | None = None
    """Private key of the cluster's certificate (PEM, on every node)."""
    ssl_certfile: str | None = None
    """Certificate of routers and expert groups (PEM); set: mutual TLS between them."""
    ssl_ca_certs: str | None = None
    """CA of that certificate (PEM); whoever holds one of its certificates is a member."""
    verbose: bool = False
    """Show INFO of every process; otherwise WARNING and above."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoscaleSection:
    """How many routers and expert groups there should be; see `expertmesh autoscale`."""

    mode: Literal["off", "advise", "apply"] = "off"
    """Decide nothing, decide and tell, or decide and do."""
    min_groups: int | None = number(None, minimum=0, maximum=1024)
    """Expert groups at least; 0: none after a long idle time; unset: as many as at the start."""
    max_groups: int | None = number(None, minimum=1, maximum=1024)
    """Expert groups at most; unset: as many as at the start."""
    min_routers: int | None = number(None, minimum=1, maximum=64)
    """Routers at least: somebody takes the first request; unset: as many as at the start."""
    max_routers: int | None = number(None, minimum=1, maximum=64)
    """Routers at most; unset: as many as at the start."""
    interval_s: float = number(2.0, minimum=0.1)
    """Seconds between two decisions."""
    look_back_period_s: float = number(10.0, minimum=0.1)
    """Seconds that rates are measured over."""
    upscale_delay_s: float = number(5.0, minimum=0)
    """Seconds that more members must be wished without a break."""
    downscale_delay_s: float = number(300.0, minimum=0)
    """Seconds that fewer members must do without a break. Where few requests come it takes longer;
    and 4, then 16 times as long, after members that left had to come back soon."""
    downscale_to_zero_delay_s: float = number(900.0, minimum=1)
    """Idle seconds after which no groups are left, where min_groups is 0."""
    target_backlog_s: float = number(2.0, minimum=0.01)
    """Seconds of prefill that may wait."""
    target_ongoing_requests: int | None = number(None, minimum=1)
    """Running and waiting requests of one router; unset: 80 % of engine.max_num_seqs."""
    target_group_busy: float = number(0.7, minimum=0.05, maximum=0.95)
    """Part of the time that a group computes."""
    max_kv_usage: float = number(0.85, minimum=0.05, maximum=1)
    """Part of the KV blocks, and of the state slots, that sequences own."""
    target_ttft_ms: float | None = number(None, minimum=1)
    """Time to first token, 95th percentile, in milliseconds; unset: any."""
    target_itl_ms: float | None = number(None, minimum=0.1)
    """Time between two tokens, 95th percentile, in milliseconds; unset: any."""
    target_batch_s: float = number(3600.0, minimum=1)
    """Seconds in which what is left of submitted batches is to be done, at their measured pace."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The whole configuration; a component receives its own section only."""

    model: ModelSection = field(default_factory=ModelSection)
    """Which checkpoint is served, and in what precision."""
    experts: ExpertsSection = field(default_factory=ExpertsSection)
    """Where the routed experts live, and how they compute."""
    router: RouterSection = field(default_factory=RouterSection)
    """The processes that clients talk to."""
    engine: EngineSection = field(default_factory=EngineSection)
    """Continuous batching and its memory, per router."""
    state: StateSection = field(default_factory=StateSection)
    """Sessions and cached KV: where they live, and how much of them is kept."""
    cluster: ClusterSection = field(default_factory=ClusterSection)
    """The Ray cluster and the life of the service in it."""
    autoscale: AutoscaleSection = field(default_factory=AutoscaleSection)
    """How many routers and expert groups there should be; see `expertmesh autoscale`."""
    batch: BatchSection = field(default_factory=BatchSection)
    """Batches that clients submit and the service runs; see `expertmesh batch submit`."""


def parse_groups(spec: str | None) -> dict[str, float]:
    """Return group name -> capacity of `experts.groups`; `3` is three equal groups `group-0` ....

    Raises:
        ConfigurationError: Neither form, a name twice, or a capacity of 0 or less.
    """
    text = (spec or "1").strip()
    rule = "must be a number of groups (3) or name:capacity pairs (a:2,b:1)"

    def refuse(why: str) -> ConfigurationError:
        return ConfigurationError("experts.groups", f"{rule}: {why}", text)

    if text.isdigit():
        count = int(text)
        if not 1 <= count <= 1024:
            raise refuse("1 to 1024 groups")
        return {f"group-{i}": 1.0 for i in range(count)}
    groups: dict[str, float] = {}
    for part in text.split(","):
        name, separator, capacity = part.strip().partition(":")
        if not name or not all(c.isalnum() or c in "-_" for c in name):
            raise refuse(f"{name!r} is not a name of letters, digits, - and _")
        try:
            share = float(capacity) if separator else 1.0
        except ValueError:
            raise refuse(f"capacity {capacity!r} of {name} is not a number") from None
        if not 0 < share < float("inf"):
            raise refuse(f"capacity {capacity!r} of {name} must be above 0")
        if name in groups:
            raise refuse(f"{name} is named twice")
        groups[name] = share
    return groups


def to_json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a configuration file."""
    return json_schema(Config, fields())


def describe(path: str) -> str:
    """Return the sentence and the rule of a field, as help texts show it."""
    spec = fields()[path]
    rule = spec.rule
    default = "" if spec.default in (None, "") else f" Default: {spec.default}."
    return f"{spec.doc}{f' Rule: {rule}.' if rule else ''}{default}"


def flatten(config: Config) -> dict[str, Any]:
    """Return dotted path -> value of every field."""
    return {
        path: getattr(getattr(config, path.split(".")[0]), path.split(".")[1]) for path in fields()
    }


def shown(config: Config) -> dict[str, Any]:
    """Return `flatten(config)` with secrets masked, in JSON's types: for people and logs."""
    return {path: fields()[path].shown(value) for path, value in flatten(config).items()}


@functools.cache
def fields() -> Mapping[str, Field]:
    """Return dotted path -> what is known of the field, in the order of the source."""
    return fields_of(Config)
