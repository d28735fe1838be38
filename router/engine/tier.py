"""The seam between the router's own pool and a slower store of cached values.

Decides what the two sides say to each other, not how values are stored: the engine asks what the
store could restore, has it restored into blocks it owns, and hands over what is worth keeping.
Every method returns at once. Callbacks come on the tier's threads, exactly once each, and must only
hand over to the engine's inbox or copy bytes.

Words: a *candidate* is a token position at which the store holds a snapshot and all KV blocks
before it. Only candidates can be restored: KV without a snapshot of the same position is no hit.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal, Protocol

from router.engine.chain import HashChain

Bytes = bytes | bytearray | memoryview
Decision = Literal["load", "prefill"]


class TtlClass(Enum):
    """How long a value is worth keeping; what expires first is evicted first."""

    SYSTEM = "system"
    """System prompt and tools: shared by many sessions."""
    JUNCTION = "junction"
    """Where prefixes of several sequences part."""
    SESSION = "session"
    """One conversation; its head outlives its tail."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What may be restorable of one sequence."""

    chain: HashChain
    """Covers at least `limit` tokens and does not change until `done` is called."""

    start: int
    """Tokens already in place."""

    limit: int
    """The last position worth restoring; at most the sequence's tokens less one."""

    snapshot_positions: tuple[int, ...] = ()
    """Positions, besides the multiples of 128, at which there may be a snapshot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeResult:
    """What the store holds, and whether to fetch it."""

    num_tokens: int = 0
    """The longest candidate behind `Probe.start`; 0: none."""

    candidates: tuple[int, ...] = ()
    """All candidates behind `Probe.start`, longest first; hand them on in `LoadJob`."""

    decision: Decision = "prefill"

    reason: str = ""
    """Why, as a short stable word: `faster`, `slower`, `unmeasured`, `remeasure`, `absent`,
    `no_snapshot`, `breaker_open`, `late`, `error`, `busy`, `closed`."""

    kv_tokens: int = 0
    """Tokens whose KV is there without a hole, with or without a snapshot."""

    predicted_load_s: float = 0.0
    predicted_prefill_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadJob:
    """Restore one sequence up to a candidate."""

    chain: HashChain
    start: int
    """Tokens already in place; blocks from `start // 128` on are loaded."""

    num_tokens: int
    """The candidate wanted."""

    candidates: tuple[int, ...] = ()
    """Lower ones to fall back to, in any order."""

    block_sink: Callable[[int, memoryview], None]
    """Writes cache block `index` of the sequence into the pool; called for distinct blocks from
    several threads, in about ascending order."""

    state_sink: Callable[[int, memoryview, memoryview], None]
    """Takes (num_tokens, state, tail): writes the state slot, and the KV of the
    `num_tokens % 128` tokens behind the last full cache block. Called once, last, and only when
    everything before it is in place."""

    cancelled: threading.Event = field(default_factory=threading.Event)
    """Set by the engine; `done` still comes, soon."""

    deadline_s: float | None = None
    """Seconds from now that the client still has; None: no bound but the tier's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadResult:
    """What a load left in place."""

    num_tokens: int
    """The candidate restored, or `LoadJob.start`: then the state slot is as it was."""

    num_bytes: int = 0
    """Verified bytes that went into the pool."""

    seconds: float = 0.0
    error: str = ""
    """Why less than wanted was restored, as a short stable word: `missing`, `corrupt`, `late`,
    `cancelled`, `breaker_open`, `unreachable`, `sink`, `busy`, `closed`; empty on full success."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockPut:
    """One full cache block to keep."""

    key: bytes
    """Its block hash, 32 bytes."""

    parent: bytes
    """The block hash before it, or the chain's position hash of 0."""

    num_tokens: int
    """Tokens up to the end of the block: 128 * (index + 1)."""

    nbytes: int
    read: Callable[[memoryview], None]
    """Copies the block into `nbytes` writable bytes; called at most once."""

    release: Callable[[], None]
    """Called once when the tier no longer needs the block in the pool, read or not."""

    ttl_class: TtlClass = TtlClass.SESSION


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotPut:
    """One snapshot to keep. `state` and `tail` do not change any more."""

    key: bytes
    """The position hash, 32 bytes."""

    num_tokens: int
    state: Bytes
    tail: Bytes = b""
    """KV of the `num_tokens % 128` tokens behind the last full cache block."""

    ttl_class: TtlClass = TtlClass.SESSION
    stored: Callable[[bool], None] = lambda _: None
    """Called once: whether all of it is in the store."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TierStats:
    """Counters since the start, and gauges; the names are the metrics' names."""

    counters: Mapping[str, float]
    """`hit_tokens_kv`, `hit_tokens_resumable`, `restored_tokens`, `restore_bytes`,
    `restore_seconds_<part>`, `decision_<load|prefill>`, `put_bytes`, `put_dropped_<reason>`,
    `corrupt_total`, ..."""

    gauges: Mapping[str, float]
    """`queued_bytes`, `bandwidth_bytes_per_s`, `prefill_tokens_per_s`, ..."""

    breakers: Mapping[str, str]
    """Server -> `closed`, `open` or `half_open`."""


class Tier(Protocol):
    """A slower store of cached values, behind the router's own pool."""

    def probe(self, query: Probe, done: Callable[[ProbeResult], None]) -> None:
        """Find the longest candidate and decide whether to load it; bounded at 100 ms."""
        ...

    def load(self, job: LoadJob, done: Callable[[LoadResult], None]) -> None:
        """Restore; after `done` neither sink is called again."""
        ...

    def put_block(self, put: BlockPut) -> bool:
        """Queue a block; False: dropped, and `release` will not be called."""
        ...

    def put_snapshot(self, put: SnapshotPut) -> bool:
        """Queue a snapshot; False: dropped, and `stored` will not be called."""
        ...

    def note_prefill(self, num_tokens: int, context: int, seconds: float) -> None:
        """Tell that `num_tokens` tokens behind `context` tokens took `seconds` to prefill."""
        ...

    def stats(self) -> TierStats:
        """Return counters and gauges; asks no server."""
        ...

    def close(self) -> None:
        """End all threads; what is queued is dropped, what runs is answered."""
        ...
