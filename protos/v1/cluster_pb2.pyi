from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetStatusRequest(_message.Message):
    __slots__ = ("local_only",)
    LOCAL_ONLY_FIELD_NUMBER: _ClassVar[int]
    local_only: bool
    def __init__(self, local_only: _Optional[bool] = ...) -> None: ...

class WatchStatusRequest(_message.Message):
    __slots__ = ("interval_s",)
    INTERVAL_S_FIELD_NUMBER: _ClassVar[int]
    interval_s: float
    def __init__(self, interval_s: _Optional[float] = ...) -> None: ...

class GroupStatus(_message.Message):
    __slots__ = ("group_id", "state", "grpc_address", "transport", "compute", "num_threads", "num_experts", "resident_bytes", "num_calls", "num_rows", "num_pairs", "busy_s", "node_id", "pid", "layer_pairs", "capacity_bytes")
    GROUP_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    GRPC_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_FIELD_NUMBER: _ClassVar[int]
    NUM_THREADS_FIELD_NUMBER: _ClassVar[int]
    NUM_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_CALLS_FIELD_NUMBER: _ClassVar[int]
    NUM_ROWS_FIELD_NUMBER: _ClassVar[int]
    NUM_PAIRS_FIELD_NUMBER: _ClassVar[int]
    BUSY_S_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    LAYER_PAIRS_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    group_id: str
    state: str
    grpc_address: str
    transport: str
    compute: str
    num_threads: int
    num_experts: int
    resident_bytes: int
    num_calls: int
    num_rows: int
    num_pairs: int
    busy_s: float
    node_id: str
    pid: int
    layer_pairs: _containers.RepeatedScalarFieldContainer[int]
    capacity_bytes: int
    def __init__(self, group_id: _Optional[str] = ..., state: _Optional[str] = ..., grpc_address: _Optional[str] = ..., transport: _Optional[str] = ..., compute: _Optional[str] = ..., num_threads: _Optional[int] = ..., num_experts: _Optional[int] = ..., resident_bytes: _Optional[int] = ..., num_calls: _Optional[int] = ..., num_rows: _Optional[int] = ..., num_pairs: _Optional[int] = ..., busy_s: _Optional[float] = ..., node_id: _Optional[str] = ..., pid: _Optional[int] = ..., layer_pairs: _Optional[_Iterable[int]] = ..., capacity_bytes: _Optional[int] = ...) -> None: ...

class RouterStatus(_message.Message):
    __slots__ = ("router_id", "state", "grpc_address", "requests_running", "requests_waiting", "kv_blocks_used", "kv_blocks_total", "state_slots_used", "state_slots_total", "prompt_tokens", "generation_tokens", "preemptions", "steps", "step_s", "dispatch_s", "pid", "trunk_ops", "sessions_held", "cache", "stores", "cold", "waiting_tokens", "prefill_tokens_per_s", "latency", "route_streams")
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    GRPC_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_RUNNING_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_WAITING_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_USED_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    STATE_SLOTS_USED_FIELD_NUMBER: _ClassVar[int]
    STATE_SLOTS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    GENERATION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    STEP_S_FIELD_NUMBER: _ClassVar[int]
    DISPATCH_S_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    TRUNK_OPS_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_HELD_FIELD_NUMBER: _ClassVar[int]
    CACHE_FIELD_NUMBER: _ClassVar[int]
    STORES_FIELD_NUMBER: _ClassVar[int]
    COLD_FIELD_NUMBER: _ClassVar[int]
    WAITING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    LATENCY_FIELD_NUMBER: _ClassVar[int]
    ROUTE_STREAMS_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    state: str
    grpc_address: str
    requests_running: int
    requests_waiting: int
    kv_blocks_used: int
    kv_blocks_total: int
    state_slots_used: int
    state_slots_total: int
    prompt_tokens: int
    generation_tokens: int
    preemptions: int
    steps: int
    step_s: float
    dispatch_s: float
    pid: int
    trunk_ops: str
    sessions_held: int
    cache: CacheStatus
    stores: _containers.RepeatedCompositeFieldContainer[StoreStatus]
    cold: ColdStatus
    waiting_tokens: int
    prefill_tokens_per_s: float
    latency: LatencyStatus
    route_streams: int
    def __init__(self, router_id: _Optional[str] = ..., state: _Optional[str] = ..., grpc_address: _Optional[str] = ..., requests_running: _Optional[int] = ..., requests_waiting: _Optional[int] = ..., kv_blocks_used: _Optional[int] = ..., kv_blocks_total: _Optional[int] = ..., state_slots_used: _Optional[int] = ..., state_slots_total: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., generation_tokens: _Optional[int] = ..., preemptions: _Optional[int] = ..., steps: _Optional[int] = ..., step_s: _Optional[float] = ..., dispatch_s: _Optional[float] = ..., pid: _Optional[int] = ..., trunk_ops: _Optional[str] = ..., sessions_held: _Optional[int] = ..., cache: _Optional[_Union[CacheStatus, _Mapping]] = ..., stores: _Optional[_Iterable[_Union[StoreStatus, _Mapping]]] = ..., cold: _Optional[_Union[ColdStatus, _Mapping]] = ..., waiting_tokens: _Optional[int] = ..., prefill_tokens_per_s: _Optional[float] = ..., latency: _Optional[_Union[LatencyStatus, _Mapping]] = ..., route_streams: _Optional[int] = ...) -> None: ...

class LatencyStatus(_message.Message):
    __slots__ = ("bounds_s", "first_token", "between_tokens")
    BOUNDS_S_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    BETWEEN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    bounds_s: _containers.RepeatedScalarFieldContainer[float]
    first_token: _containers.RepeatedScalarFieldContainer[int]
    between_tokens: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, bounds_s: _Optional[_Iterable[float]] = ..., first_token: _Optional[_Iterable[int]] = ..., between_tokens: _Optional[_Iterable[int]] = ...) -> None: ...

class ColdStatus(_message.Message):
    __slots__ = ("spilled_blocks", "host_bytes", "sent_bytes", "read_blocks", "read_bytes")
    SPILLED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HOST_BYTES_FIELD_NUMBER: _ClassVar[int]
    SENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    READ_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    READ_BYTES_FIELD_NUMBER: _ClassVar[int]
    spilled_blocks: int
    host_bytes: int
    sent_bytes: int
    read_blocks: int
    read_bytes: int
    def __init__(self, spilled_blocks: _Optional[int] = ..., host_bytes: _Optional[int] = ..., sent_bytes: _Optional[int] = ..., read_blocks: _Optional[int] = ..., read_bytes: _Optional[int] = ...) -> None: ...

class CacheStatus(_message.Message):
    __slots__ = ("lookup_tokens", "hit_tokens", "restored_tokens", "lost_reuse_tokens", "hit_ratio", "block_bytes", "snapshot_bytes", "snapshot_limit_bytes", "loaded_bytes", "stored_bytes", "dropped_bytes", "queued_bytes", "loads_chosen", "prefills_chosen", "loads_failed")
    LOOKUP_TOKENS_FIELD_NUMBER: _ClassVar[int]
    HIT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RESTORED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOST_REUSE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    HIT_RATIO_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_BYTES_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_LIMIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    LOADED_BYTES_FIELD_NUMBER: _ClassVar[int]
    STORED_BYTES_FIELD_NUMBER: _ClassVar[int]
    DROPPED_BYTES_FIELD_NUMBER: _ClassVar[int]
    QUEUED_BYTES_FIELD_NUMBER: _ClassVar[int]
    LOADS_CHOSEN_FIELD_NUMBER: _ClassVar[int]
    PREFILLS_CHOSEN_FIELD_NUMBER: _ClassVar[int]
    LOADS_FAILED_FIELD_NUMBER: _ClassVar[int]
    lookup_tokens: int
    hit_tokens: int
    restored_tokens: int
    lost_reuse_tokens: int
    hit_ratio: float
    block_bytes: int
    snapshot_bytes: int
    snapshot_limit_bytes: int
    loaded_bytes: int
    stored_bytes: int
    dropped_bytes: int
    queued_bytes: int
    loads_chosen: int
    prefills_chosen: int
    loads_failed: int
    def __init__(self, lookup_tokens: _Optional[int] = ..., hit_tokens: _Optional[int] = ..., restored_tokens: _Optional[int] = ..., lost_reuse_tokens: _Optional[int] = ..., hit_ratio: _Optional[float] = ..., block_bytes: _Optional[int] = ..., snapshot_bytes: _Optional[int] = ..., snapshot_limit_bytes: _Optional[int] = ..., loaded_bytes: _Optional[int] = ..., stored_bytes: _Optional[int] = ..., dropped_bytes: _Optional[int] = ..., queued_bytes: _Optional[int] = ..., loads_chosen: _Optional[int] = ..., prefills_chosen: _Optional[int] = ..., loads_failed: _Optional[int] = ...) -> None: ...

class StoreStatus(_message.Message):
    __slots__ = ("role", "address", "breaker", "failures", "used_bytes", "limit_bytes", "last_error")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    BREAKER_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    LIMIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    LAST_ERROR_FIELD_NUMBER: _ClassVar[int]
    role: str
    address: str
    breaker: str
    failures: int
    used_bytes: int
    limit_bytes: int
    last_error: str
    def __init__(self, role: _Optional[str] = ..., address: _Optional[str] = ..., breaker: _Optional[str] = ..., failures: _Optional[int] = ..., used_bytes: _Optional[int] = ..., limit_bytes: _Optional[int] = ..., last_error: _Optional[str] = ...) -> None: ...

class ClusterStatus(_message.Message):
    __slots__ = ("model", "dtype", "placement_epoch", "max_model_len", "routers", "groups", "scaling", "state", "progress")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_EPOCH_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    ROUTERS_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    SCALING_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    model: str
    dtype: str
    placement_epoch: int
    max_model_len: int
    routers: _containers.RepeatedCompositeFieldContainer[RouterStatus]
    groups: _containers.RepeatedCompositeFieldContainer[GroupStatus]
    scaling: ScalingStatus
    state: str
    progress: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, model: _Optional[str] = ..., dtype: _Optional[str] = ..., placement_epoch: _Optional[int] = ..., max_model_len: _Optional[int] = ..., routers: _Optional[_Iterable[_Union[RouterStatus, _Mapping]]] = ..., groups: _Optional[_Iterable[_Union[GroupStatus, _Mapping]]] = ..., scaling: _Optional[_Union[ScalingStatus, _Mapping]] = ..., state: _Optional[str] = ..., progress: _Optional[_Iterable[str]] = ...) -> None: ...

class ScalingStatus(_message.Message):
    __slots__ = ("target_groups", "target_routers", "change", "trouble", "is_settled", "is_asleep")
    TARGET_GROUPS_FIELD_NUMBER: _ClassVar[int]
    TARGET_ROUTERS_FIELD_NUMBER: _ClassVar[int]
    CHANGE_FIELD_NUMBER: _ClassVar[int]
    TROUBLE_FIELD_NUMBER: _ClassVar[int]
    IS_SETTLED_FIELD_NUMBER: _ClassVar[int]
    IS_ASLEEP_FIELD_NUMBER: _ClassVar[int]
    target_groups: int
    target_routers: int
    change: str
    trouble: str
    is_settled: bool
    is_asleep: bool
    def __init__(self, target_groups: _Optional[int] = ..., target_routers: _Optional[int] = ..., change: _Optional[str] = ..., trouble: _Optional[str] = ..., is_settled: _Optional[bool] = ..., is_asleep: _Optional[bool] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("target", "timeout_s")
    TARGET_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    target: str
    timeout_s: float
    def __init__(self, target: _Optional[str] = ..., timeout_s: _Optional[float] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("requests_left",)
    REQUESTS_LEFT_FIELD_NUMBER: _ClassVar[int]
    requests_left: int
    def __init__(self, requests_left: _Optional[int] = ...) -> None: ...

class ScaleRequest(_message.Message):
    __slots__ = ("expert_groups", "routers")
    EXPERT_GROUPS_FIELD_NUMBER: _ClassVar[int]
    ROUTERS_FIELD_NUMBER: _ClassVar[int]
    expert_groups: int
    routers: int
    def __init__(self, expert_groups: _Optional[int] = ..., routers: _Optional[int] = ...) -> None: ...

class ScaleResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GroupCapacity(_message.Message):
    __slots__ = ("group_id", "capacity")
    GROUP_ID_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_FIELD_NUMBER: _ClassVar[int]
    group_id: str
    capacity: float
    def __init__(self, group_id: _Optional[str] = ..., capacity: _Optional[float] = ...) -> None: ...

class PlanPlacementRequest(_message.Message):
    __slots__ = ("groups",)
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    groups: _containers.RepeatedCompositeFieldContainer[GroupCapacity]
    def __init__(self, groups: _Optional[_Iterable[_Union[GroupCapacity, _Mapping]]] = ...) -> None: ...

class GroupPlan(_message.Message):
    __slots__ = ("group_id", "num_experts", "bytes", "expected_load")
    GROUP_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_LOAD_FIELD_NUMBER: _ClassVar[int]
    group_id: str
    num_experts: int
    bytes: int
    expected_load: float
    def __init__(self, group_id: _Optional[str] = ..., num_experts: _Optional[int] = ..., bytes: _Optional[int] = ..., expected_load: _Optional[float] = ...) -> None: ...

class PlanPlacementResponse(_message.Message):
    __slots__ = ("groups", "balancedness", "num_moves")
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    BALANCEDNESS_FIELD_NUMBER: _ClassVar[int]
    NUM_MOVES_FIELD_NUMBER: _ClassVar[int]
    groups: _containers.RepeatedCompositeFieldContainer[GroupPlan]
    balancedness: float
    num_moves: int
    def __init__(self, groups: _Optional[_Iterable[_Union[GroupPlan, _Mapping]]] = ..., balancedness: _Optional[float] = ..., num_moves: _Optional[int] = ...) -> None: ...

class ApplyPlacementRequest(_message.Message):
    __slots__ = ("groups", "expected_epoch")
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_EPOCH_FIELD_NUMBER: _ClassVar[int]
    groups: _containers.RepeatedCompositeFieldContainer[GroupCapacity]
    expected_epoch: int
    def __init__(self, groups: _Optional[_Iterable[_Union[GroupCapacity, _Mapping]]] = ..., expected_epoch: _Optional[int] = ...) -> None: ...

class ApplyPlacementResponse(_message.Message):
    __slots__ = ("placement_epoch",)
    PLACEMENT_EPOCH_FIELD_NUMBER: _ClassVar[int]
    placement_epoch: int
    def __init__(self, placement_epoch: _Optional[int] = ...) -> None: ...

class ExplainAutoscaleRequest(_message.Message):
    __slots__ = ("limit",)
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    limit: int
    def __init__(self, limit: _Optional[int] = ...) -> None: ...

class ExplainAutoscaleResponse(_message.Message):
    __slots__ = ("mode", "decisions")
    MODE_FIELD_NUMBER: _ClassVar[int]
    DECISIONS_FIELD_NUMBER: _ClassVar[int]
    mode: str
    decisions: _containers.RepeatedCompositeFieldContainer[AutoscaleDecision]
    def __init__(self, mode: _Optional[str] = ..., decisions: _Optional[_Iterable[_Union[AutoscaleDecision, _Mapping]]] = ...) -> None: ...

class AutoscaleDecision(_message.Message):
    __slots__ = ("unix_s", "routers", "groups", "load")
    UNIX_S_FIELD_NUMBER: _ClassVar[int]
    ROUTERS_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    unix_s: float
    routers: PoolDecision
    groups: PoolDecision
    load: AutoscaleLoad
    def __init__(self, unix_s: _Optional[float] = ..., routers: _Optional[_Union[PoolDecision, _Mapping]] = ..., groups: _Optional[_Union[PoolDecision, _Mapping]] = ..., load: _Optional[_Union[AutoscaleLoad, _Mapping]] = ...) -> None: ...

class PoolDecision(_message.Message):
    __slots__ = ("count", "wanted", "ready", "reason", "signals")
    COUNT_FIELD_NUMBER: _ClassVar[int]
    WANTED_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    SIGNALS_FIELD_NUMBER: _ClassVar[int]
    count: int
    wanted: int
    ready: int
    reason: str
    signals: _containers.RepeatedCompositeFieldContainer[AutoscaleSignal]
    def __init__(self, count: _Optional[int] = ..., wanted: _Optional[int] = ..., ready: _Optional[int] = ..., reason: _Optional[str] = ..., signals: _Optional[_Iterable[_Union[AutoscaleSignal, _Mapping]]] = ...) -> None: ...

class AutoscaleSignal(_message.Message):
    __slots__ = ("name", "demand", "raises_to", "keeps", "text")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DEMAND_FIELD_NUMBER: _ClassVar[int]
    RAISES_TO_FIELD_NUMBER: _ClassVar[int]
    KEEPS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    name: str
    demand: float
    raises_to: int
    keeps: int
    text: str
    def __init__(self, name: _Optional[str] = ..., demand: _Optional[float] = ..., raises_to: _Optional[int] = ..., keeps: _Optional[int] = ..., text: _Optional[str] = ...) -> None: ...

class AutoscaleLoad(_message.Message):
    __slots__ = ("prompt_tokens_per_s", "waiting_tokens", "prefill_tokens_per_s", "num_requests", "kv_usage", "state_slot_usage", "dispatch_share", "group_busy", "ttft_s", "itl_s", "batch_tokens", "requests_per_s", "batch_tokens_per_s")
    PROMPT_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    WAITING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    NUM_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    KV_USAGE_FIELD_NUMBER: _ClassVar[int]
    STATE_SLOT_USAGE_FIELD_NUMBER: _ClassVar[int]
    DISPATCH_SHARE_FIELD_NUMBER: _ClassVar[int]
    GROUP_BUSY_FIELD_NUMBER: _ClassVar[int]
    TTFT_S_FIELD_NUMBER: _ClassVar[int]
    ITL_S_FIELD_NUMBER: _ClassVar[int]
    BATCH_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_PER_S_FIELD_NUMBER: _ClassVar[int]
    BATCH_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens_per_s: float
    waiting_tokens: float
    prefill_tokens_per_s: float
    num_requests: float
    kv_usage: float
    state_slot_usage: float
    dispatch_share: float
    group_busy: float
    ttft_s: float
    itl_s: float
    batch_tokens: float
    requests_per_s: float
    batch_tokens_per_s: float
    def __init__(self, prompt_tokens_per_s: _Optional[float] = ..., waiting_tokens: _Optional[float] = ..., prefill_tokens_per_s: _Optional[float] = ..., num_requests: _Optional[float] = ..., kv_usage: _Optional[float] = ..., state_slot_usage: _Optional[float] = ..., dispatch_share: _Optional[float] = ..., group_busy: _Optional[float] = ..., ttft_s: _Optional[float] = ..., itl_s: _Optional[float] = ..., batch_tokens: _Optional[float] = ..., requests_per_s: _Optional[float] = ..., batch_tokens_per_s: _Optional[float] = ...) -> None: ...
