"""`expertmesh serve`: one option a setting, described by the setting itself."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any, Literal

import typer

from cluster.cli_options import ConfigFile
from cluster.config import describe
from cluster.config_loading import load_config
from cluster.console import errors_exit


def _setting(path: str, *names: str, panel: str) -> Any:
    return typer.Option(*names, help=describe(path), rich_help_panel=panel, show_default=False)


Checkpoint = Annotated[
    str | None, typer.Argument(help=describe("model.checkpoint"), show_default=False)
]
ServedName = Annotated[
    str | None, _setting("model.served_model_name", "--served-model-name", panel="Model")
]
CacheDir = Annotated[str | None, _setting("model.cache_dir", "--cache-dir", panel="Model")]
DType = Annotated[
    Literal["float32", "bfloat16"] | None, _setting("model.dtype", "--dtype", panel="Model")
]
MaxModelLen = Annotated[
    int | None, _setting("model.max_model_len", "--max-model-len", panel="Model")
]
HfOverrides = Annotated[str | None, _setting("model.hf_overrides", "--hf-overrides", panel="Model")]
Groups = Annotated[str | None, _setting("experts.groups", "--expert-groups", panel="Experts")]
Transport = Annotated[
    Literal["auto", "lane", "grpc"] | None,
    _setting("experts.transport", "--expert-transport", panel="Experts"),
]
Compute = Annotated[
    Literal["auto", "native", "deepspeed", "torch"] | None,
    _setting("experts.compute", "--expert-compute", panel="Experts"),
]
ExpertThreads = Annotated[
    int | None, _setting("experts.threads", "--expert-threads", panel="Experts")
]
ExpertMetricsPort = Annotated[
    int | None, _setting("experts.metrics_port", "--expert-metrics-port", panel="Experts")
]
Routers = Annotated[int | None, _setting("router.count", "--routers", panel="Router")]
Host = Annotated[str | None, _setting("router.host", "--host", panel="Router")]
Port = Annotated[int | None, _setting("router.port", "--port", panel="Router")]
MetricsPort = Annotated[
    int | None, _setting("router.metrics_port", "--metrics-port", panel="Router")
]
TrunkOps = Annotated[
    Literal["auto", "native", "torch"] | None,
    _setting("router.trunk_ops", "--trunk-ops", panel="Router"),
]
RouterThreads = Annotated[
    int | None, _setting("router.threads", "--router-threads", panel="Router")
]
SslKeyfile = Annotated[str | None, _setting("router.ssl_keyfile", "--ssl-keyfile", panel="Router")]
SslCertfile = Annotated[
    str | None, _setting("router.ssl_certfile", "--ssl-certfile", panel="Router")
]
SslCaCerts = Annotated[
    str | None, _setting("router.ssl_ca_certs", "--ssl-ca-certs", panel="Router")
]
ApiKeys = Annotated[list[str] | None, _setting("router.api_keys", "--api-key", panel="Router")]
ApiKeyFile = Annotated[
    str | None, _setting("router.api_key_file", "--api-key-file", panel="Router")
]
MaxNumSeqs = Annotated[
    int | None, _setting("engine.max_num_seqs", "--max-num-seqs", panel="Engine")
]
MaxNumBatchedTokens = Annotated[
    int | None,
    _setting("engine.max_num_batched_tokens", "--max-num-batched-tokens", panel="Engine"),
]
MaxQueued = Annotated[int | None, _setting("engine.max_queued", "--max-queued", panel="Engine")]
BlockSize = Annotated[int | None, _setting("engine.block_size", "--block-size", panel="Engine")]
NumKvBlocks = Annotated[
    int | None, _setting("engine.num_kv_blocks", "--num-kv-blocks", panel="Engine")
]
KvCacheGib = Annotated[
    float | None, _setting("engine.kv_cache_gib", "--kv-cache-gib", panel="Engine")
]
PrefixCaching = Annotated[
    bool | None,
    _setting(
        "engine.enable_prefix_caching",
        "--enable-prefix-caching/--no-enable-prefix-caching",
        panel="Engine",
    ),
]
State = Annotated[bool | None, _setting("state.enabled", "--state/--no-state", panel="State")]
RedisUrl = Annotated[str | None, _setting("state.redis_url", "--redis-url", panel="State")]
BlobUrls = Annotated[list[str] | None, _setting("state.blob_urls", "--blob-url", panel="State")]
EmbeddedGib = Annotated[
    float | None, _setting("state.embedded_gib", "--embedded-gib", panel="State")
]
SnapshotCacheGib = Annotated[
    float | None, _setting("state.snapshot_cache_gib", "--snapshot-cache-gib", panel="State")
]
SnapshotInterval = Annotated[
    int | None, _setting("state.snapshot_interval_tokens", "--snapshot-interval", panel="State")
]
SessionTtl = Annotated[
    float | None, _setting("state.session_ttl_s", "--session-ttl", panel="State")
]
WaitReplicas = Annotated[
    int | None, _setting("state.wait_replicas", "--wait-replicas", panel="State")
]
CommitIntervalTokens = Annotated[
    int | None,
    _setting("state.commit_interval_tokens", "--commit-interval-tokens", panel="State"),
]
CommitIntervalS = Annotated[
    float | None, _setting("state.commit_interval_s", "--commit-interval-s", panel="State")
]
BatchRootUris = Annotated[list[str] | None, _setting("batch.roots", "--batch-root", panel="Batch")]
MaxBatches = Annotated[int | None, _setting("batch.max_running", "--max-batches", panel="Batch")]
BatchMetricsPort = Annotated[
    int | None, _setting("batch.metrics_port", "--batch-metrics-port", panel="Batch")
]
BatchTtl = Annotated[float | None, _setting("batch.ttl_s", "--batch-ttl", panel="Batch")]
ColdKvGib = Annotated[float | None, _setting("engine.cold_kv_gib", "--cold-kv-gib", panel="Engine")]
RayAddress = Annotated[
    str | None, _setting("cluster.ray_address", "--ray-address", panel="Cluster")
]
Namespace = Annotated[str | None, _setting("cluster.namespace", "--namespace", panel="Cluster")]
GroupResource = Annotated[
    str | None, _setting("cluster.group_resource", "--group-resource", panel="Cluster")
]
StatusPort = Annotated[
    int | None, _setting("cluster.status_port", "--status-port", panel="Cluster")
]
StartTimeout = Annotated[
    float | None, _setting("cluster.start_timeout_s", "--start-timeout", panel="Cluster")
]
ShutdownTimeout = Annotated[
    float | None, _setting("cluster.shutdown_timeout_s", "--shutdown-timeout", panel="Cluster")
]
ClusterSslKeyfile = Annotated[
    str | None, _setting("cluster.ssl_keyfile", "--cluster-ssl-keyfile", panel="Cluster")
]
ClusterSslCertfile = Annotated[
    str | None, _setting("cluster.ssl_certfile", "--cluster-ssl-certfile", panel="Cluster")
]
ClusterSslCaCerts = Annotated[
    str | None, _setting("cluster.ssl_ca_certs", "--cluster-ssl-ca-certs", panel="Cluster")
]
Autoscale = Annotated[
    Literal["off", "advise", "apply"] | None,
    _setting("autoscale.mode", "--autoscale", panel="Autoscale"),
]
MinGroups = Annotated[
    int | None, _setting("autoscale.min_groups", "--min-expert-groups", panel="Autoscale")
]
MaxGroups = Annotated[
    int | None, _setting("autoscale.max_groups", "--max-expert-groups", panel="Autoscale")
]
MinRouters = Annotated[
    int | None, _setting("autoscale.min_routers", "--min-routers", panel="Autoscale")
]
MaxRouters = Annotated[
    int | None, _setting("autoscale.max_routers", "--max-routers", panel="Autoscale")
]
UpscaleDelay = Annotated[
    float | None, _setting("autoscale.upscale_delay_s", "--upscale-delay", panel="Autoscale")
]
DownscaleDelay = Annotated[
    float | None, _setting("autoscale.downscale_delay_s", "--downscale-delay", panel="Autoscale")
]
TargetTtft = Annotated[
    float | None, _setting("autoscale.target_ttft_ms", "--target-ttft-ms", panel="Autoscale")
]
TargetItl = Annotated[
    float | None, _setting("autoscale.target_itl_ms", "--target-itl-ms", panel="Autoscale")
]
TargetBatch = Annotated[
    float | None, _setting("autoscale.target_batch_s", "--target-batch-s", panel="Autoscale")
]
Verbose = Annotated[bool | None, _setting("cluster.verbose", "--verbose", panel="Cluster")]


def serve(
    checkpoint: Checkpoint = None,
    expert_groups: Groups = None,
    routers: Routers = None,
    host: Host = None,
    port: Port = None,
    served_model_name: ServedName = None,
    cache_dir: CacheDir = None,
    dtype: DType = None,
    max_model_len: MaxModelLen = None,
    hf_overrides: HfOverrides = None,
    max_num_seqs: MaxNumSeqs = None,
    max_num_batched_tokens: MaxNumBatchedTokens = None,
    max_queued: MaxQueued = None,
    block_size: BlockSize = None,
    num_kv_blocks: NumKvBlocks = None,
    kv_cache_gib: KvCacheGib = None,
    cold_kv_gib: ColdKvGib = None,
    expert_transport: Transport = None,
    expert_compute: Compute = None,
    expert_threads: ExpertThreads = None,
    expert_metrics_port: ExpertMetricsPort = None,
    metrics_port: MetricsPort = None,
    trunk_ops: TrunkOps = None,
    router_threads: RouterThreads = None,
    ssl_keyfile: SslKeyfile = None,
    ssl_certfile: SslCertfile = None,
    ssl_ca_certs: SslCaCerts = None,
    api_key: ApiKeys = None,
    api_key_file: ApiKeyFile = None,
    enable_prefix_caching: PrefixCaching = None,
    state: State = None,
    redis_url: RedisUrl = None,
    blob_url: BlobUrls = None,
    embedded_gib: EmbeddedGib = None,
    snapshot_cache_gib: SnapshotCacheGib = None,
    snapshot_interval: SnapshotInterval = None,
    session_ttl: SessionTtl = None,
    wait_replicas: WaitReplicas = None,
    commit_interval_tokens: CommitIntervalTokens = None,
    commit_interval_s: CommitIntervalS = None,
    batch_root: BatchRootUris = None,
    max_batches: MaxBatches = None,
    batch_ttl: BatchTtl = None,
    batch_metrics_port: BatchMetricsPort = None,
    ray_address: RayAddress = None,
    namespace: Namespace = None,
    group_resource: GroupResource = None,
    status_port: StatusPort = None,
    start_timeout: StartTimeout = None,
    shutdown_timeout: ShutdownTimeout = None,
    cluster_ssl_keyfile: ClusterSslKeyfile = None,
    cluster_ssl_certfile: ClusterSslCertfile = None,
    cluster_ssl_ca_certs: ClusterSslCaCerts = None,
    autoscale: Autoscale = None,
    min_expert_groups: MinGroups = None,
    max_expert_groups: MaxGroups = None,
    min_routers: MinRouters = None,
    max_routers: MaxRouters = None,
    upscale_delay: UpscaleDelay = None,
    downscale_delay: DownscaleDelay = None,
    target_ttft_ms: TargetTtft = None,
    target_itl_ms: TargetItl = None,
    target_batch_s: TargetBatch = None,
    verbose: Verbose = None,
    config: ConfigFile = None,
) -> None:
    """Serve a checkpoint until SIGTERM; prints `ready grpc=HOST:PORT ...` when it answers."""
    from cluster.foreground import run_service

    with errors_exit():
        loaded = load_config(
            {
                "model.checkpoint": checkpoint,
                "model.served_model_name": served_model_name,
                "model.cache_dir": cache_dir,
                "model.dtype": dtype,
                "model.max_model_len": max_model_len,
                "model.hf_overrides": hf_overrides,
                "experts.groups": expert_groups,
                "experts.transport": expert_transport,
                "experts.compute": expert_compute,
                "experts.threads": expert_threads,
                "experts.metrics_port": expert_metrics_port,
                "router.count": routers,
                "router.host": host,
                "router.port": port,
                "router.metrics_port": metrics_port,
                "router.trunk_ops": trunk_ops,
                "router.threads": router_threads,
                "router.ssl_keyfile": ssl_keyfile,
                "router.ssl_certfile": ssl_certfile,
                "router.ssl_ca_certs": ssl_ca_certs,
                "router.api_keys": api_key or None,
                "router.api_key_file": api_key_file,
                "engine.max_num_seqs": max_num_seqs,
                "engine.max_num_batched_tokens": max_num_batched_tokens,
                "engine.max_queued": max_queued,
                "engine.block_size": block_size,
                "engine.num_kv_blocks": num_kv_blocks,
                "engine.kv_cache_gib": kv_cache_gib,
                "engine.cold_kv_gib": cold_kv_gib,
                "engine.enable_prefix_caching": enable_prefix_caching,
                "state.enabled": state,
                "state.redis_url": redis_url,
                "state.blob_urls": blob_url or None,
                "state.embedded_gib": embedded_gib,
                "state.snapshot_cache_gib": snapshot_cache_gib,
                "state.snapshot_interval_tokens": snapshot_interval,
                "state.session_ttl_s": session_ttl,
                "state.wait_replicas": wait_replicas,
                "state.commit_interval_tokens": commit_interval_tokens,
                "state.commit_interval_s": commit_interval_s,
                "batch.roots": batch_root or None,
                "batch.max_running": max_batches,
                "batch.ttl_s": batch_ttl,
                "batch.metrics_port": batch_metrics_port,
                "cluster.ray_address": ray_address,
                "cluster.namespace": namespace,
                "cluster.group_resource": group_resource,
                "cluster.status_port": status_port,
                "cluster.start_timeout_s": start_timeout,
                "cluster.shutdown_timeout_s": shutdown_timeout,
                "cluster.ssl_keyfile": cluster_ssl_keyfile,
                "cluster.ssl_certfile": cluster_ssl_certfile,
                "cluster.ssl_ca_certs": cluster_ssl_ca_certs,
                "cluster.verbose": verbose,
                "autoscale.mode": autoscale,
                "autoscale.min_groups": min_expert_groups,
                "autoscale.max_groups": max_expert_groups,
                "autoscale.min_routers": min_routers,
                "autoscale.max_routers": max_routers,
                "autoscale.upscale_delay_s": upscale_delay,
                "autoscale.downscale_delay_s": downscale_delay,
                "autoscale.target_ttft_ms": target_ttft_ms,
                "autoscale.target_itl_ms": target_itl_ms,
                "autoscale.target_batch_s": target_batch_s,
            },
            os.environ,
            config,
        )
        code = run_service(loaded.config)
    sys.exit(code)
