from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ForwardRequest(_message.Message):
    __slots__ = ("frame",)
    FRAME_FIELD_NUMBER: _ClassVar[int]
    frame: bytes
    def __init__(self, frame: _Optional[bytes] = ...) -> None: ...

class ForwardResponse(_message.Message):
    __slots__ = ("frame",)
    FRAME_FIELD_NUMBER: _ClassVar[int]
    frame: bytes
    def __init__(self, frame: _Optional[bytes] = ...) -> None: ...

class OpenLaneRequest(_message.Message):
    __slots__ = ("router_id", "version", "host_id")
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    HOST_ID_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    version: int
    host_id: str
    def __init__(self, router_id: _Optional[str] = ..., version: _Optional[int] = ..., host_id: _Optional[str] = ...) -> None: ...

class OpenLaneResponse(_message.Message):
    __slots__ = ("unix_path", "tcp_address", "token", "version", "max_frame_bytes")
    UNIX_PATH_FIELD_NUMBER: _ClassVar[int]
    TCP_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MAX_FRAME_BYTES_FIELD_NUMBER: _ClassVar[int]
    unix_path: str
    tcp_address: str
    token: bytes
    version: int
    max_frame_bytes: int
    def __init__(self, unix_path: _Optional[str] = ..., tcp_address: _Optional[str] = ..., token: _Optional[bytes] = ..., version: _Optional[int] = ..., max_frame_bytes: _Optional[int] = ...) -> None: ...

class ExpertKey(_message.Message):
    __slots__ = ("layer_id", "expert_id")
    LAYER_ID_FIELD_NUMBER: _ClassVar[int]
    EXPERT_ID_FIELD_NUMBER: _ClassVar[int]
    layer_id: int
    expert_id: int
    def __init__(self, layer_id: _Optional[int] = ..., expert_id: _Optional[int] = ...) -> None: ...

class LoadExpertsRequest(_message.Message):
    __slots__ = ("experts", "placement_epoch", "dry_run")
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_EPOCH_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    experts: _containers.RepeatedCompositeFieldContainer[ExpertKey]
    placement_epoch: int
    dry_run: bool
    def __init__(self, experts: _Optional[_Iterable[_Union[ExpertKey, _Mapping]]] = ..., placement_epoch: _Optional[int] = ..., dry_run: _Optional[bool] = ...) -> None: ...

class LoadExpertsResponse(_message.Message):
    __slots__ = ("num_loaded", "bytes_needed", "bytes_free")
    NUM_LOADED_FIELD_NUMBER: _ClassVar[int]
    BYTES_NEEDED_FIELD_NUMBER: _ClassVar[int]
    BYTES_FREE_FIELD_NUMBER: _ClassVar[int]
    num_loaded: int
    bytes_needed: int
    bytes_free: int
    def __init__(self, num_loaded: _Optional[int] = ..., bytes_needed: _Optional[int] = ..., bytes_free: _Optional[int] = ...) -> None: ...

class DropExpertsRequest(_message.Message):
    __slots__ = ("experts", "placement_epoch")
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_EPOCH_FIELD_NUMBER: _ClassVar[int]
    experts: _containers.RepeatedCompositeFieldContainer[ExpertKey]
    placement_epoch: int
    def __init__(self, experts: _Optional[_Iterable[_Union[ExpertKey, _Mapping]]] = ..., placement_epoch: _Optional[int] = ...) -> None: ...

class DropExpertsResponse(_message.Message):
    __slots__ = ("num_dropped",)
    NUM_DROPPED_FIELD_NUMBER: _ClassVar[int]
    num_dropped: int
    def __init__(self, num_dropped: _Optional[int] = ...) -> None: ...

class GetStateRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LayerExperts(_message.Message):
    __slots__ = ("layer_id", "expert_ids")
    LAYER_ID_FIELD_NUMBER: _ClassVar[int]
    EXPERT_IDS_FIELD_NUMBER: _ClassVar[int]
    layer_id: int
    expert_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, layer_id: _Optional[int] = ..., expert_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class GetStateResponse(_message.Message):
    __slots__ = ("group_id", "state", "placement_epoch", "layers", "compute", "num_threads", "resident_bytes", "capacity_bytes", "num_calls", "num_rows", "num_pairs", "busy_s", "open_lanes", "open_streams", "host_id", "dtype", "layer_pairs")
    GROUP_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_EPOCH_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_FIELD_NUMBER: _ClassVar[int]
    NUM_THREADS_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_CALLS_FIELD_NUMBER: _ClassVar[int]
    NUM_ROWS_FIELD_NUMBER: _ClassVar[int]
    NUM_PAIRS_FIELD_NUMBER: _ClassVar[int]
    BUSY_S_FIELD_NUMBER: _ClassVar[int]
    OPEN_LANES_FIELD_NUMBER: _ClassVar[int]
    OPEN_STREAMS_FIELD_NUMBER: _ClassVar[int]
    HOST_ID_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    LAYER_PAIRS_FIELD_NUMBER: _ClassVar[int]
    group_id: str
    state: str
    placement_epoch: int
    layers: _containers.RepeatedCompositeFieldContainer[LayerExperts]
    compute: str
    num_threads: int
    resident_bytes: int
    capacity_bytes: int
    num_calls: int
    num_rows: int
    num_pairs: int
    busy_s: float
    open_lanes: int
    open_streams: int
    host_id: str
    dtype: str
    layer_pairs: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, group_id: _Optional[str] = ..., state: _Optional[str] = ..., placement_epoch: _Optional[int] = ..., layers: _Optional[_Iterable[_Union[LayerExperts, _Mapping]]] = ..., compute: _Optional[str] = ..., num_threads: _Optional[int] = ..., resident_bytes: _Optional[int] = ..., capacity_bytes: _Optional[int] = ..., num_calls: _Optional[int] = ..., num_rows: _Optional[int] = ..., num_pairs: _Optional[int] = ..., busy_s: _Optional[float] = ..., open_lanes: _Optional[int] = ..., open_streams: _Optional[int] = ..., host_id: _Optional[str] = ..., dtype: _Optional[str] = ..., layer_pairs: _Optional[_Iterable[int]] = ...) -> None: ...

class WatchLoadRequest(_message.Message):
    __slots__ = ("interval_s",)
    INTERVAL_S_FIELD_NUMBER: _ClassVar[int]
    interval_s: float
    def __init__(self, interval_s: _Optional[float] = ...) -> None: ...

class WatchLoadResponse(_message.Message):
    __slots__ = ("placement_epoch", "first_layer", "num_layers", "num_experts", "counts_u64le")
    PLACEMENT_EPOCH_FIELD_NUMBER: _ClassVar[int]
    FIRST_LAYER_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    COUNTS_U64LE_FIELD_NUMBER: _ClassVar[int]
    placement_epoch: int
    first_layer: int
    num_layers: int
    num_experts: int
    counts_u64le: bytes
    def __init__(self, placement_epoch: _Optional[int] = ..., first_layer: _Optional[int] = ..., num_layers: _Optional[int] = ..., num_experts: _Optional[int] = ..., counts_u64le: _Optional[bytes] = ...) -> None: ...
