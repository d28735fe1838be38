"""The seam to a slower store of cached values, behind the router's own pool.

Decides what the engine asks of such a store and what it promises in return; knows neither Redis nor
sockets. `router.state.tier` implements it. Every method returns at once: the work happens on the
tier's threads, which call the given callbacks. A callback only hands over to the engine thread, so
it is cheap and never raises.

Who may touch the pool's memory:

    a load        its own sequence's private blocks and state slot, from `load` until `done`
    a write       reads one immutable cache block, from `put_block` until `release`
    a snapshot    is a copy of its own; nothing in the pool is held for it

Words: a *cache block* is 128 tokens of KV of all full-attention layers, a *snapshot* the state of
all Gated DeltaNet layers at one position with the KV of the *tail*, the tokens behind the last full
cache block. Positions are token counts: position p stands between tokens p - 1 and p.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from router.engine.chain import HashChain


class TtlClass(Enum):
    """How long a value is worth keeping; the tier turns it into seconds."""

    SHARED = "shared"
    """Part of a prefix that several requests begin with: below or at a junction."""
    SESSION = "session"
    """One conversation's own."""


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """What a sequence needs besides full cache blocks to go on at one position. Immutable."""

    num_tokens: int
    """The position."""
    values: NDArray[np.uint8]
    """State, then the tail's KV; contiguous, and written by nobody any more."""
    state_bytes: int
    """Bytes of the state; the rest is the tail."""

    @property
    def state(self) -> memoryview:
        """Conv and recurrent state of all Gated DeltaNet layers, canonical layout."""
        return self.values.data[: self.state_bytes]

    @property
    def tail(self) -> memoryview:
        """K and V of the last `num_tokens % 128` tokens, canonical layout."""
        return self.values.data[self.state_bytes :]

    @property
    def num_bytes(self) -> int:
        """Bytes of state and tail."""
        return self.values.nbytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Streaming:
    """How a sequence prefills that does not fit the pool: a step reads again what has left it.

    Worked: 1,000 tokens are kept, a step has 100. A prefill from 1,000 to 1,300 reads 0, 100 and
    200 tokens, by the integral 300 ** 2 / (2 * 100) = 450.
    """

    kept_tokens: int | None
    """Newest tokens that lie in the router, in the pool or in its memory; None: all do."""
    step_tokens: int
    """Tokens of a step."""

    def read_tokens(self, start: int, stop: int) -> int:
        """Return how many tokens' KV a prefill of `start .. stop - 1` reads from the tier."""
        if self.kept_tokens is None:
            return 0
        first, last = max(0, start - self.kept_tokens), max(0, stop - self.kept_tokens)
        return (last**2 - first**2) // (2 * self.step_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Asks how far a sequence could be restored."""

    chain: HashChain
    """Of at least `limit` tokens. The engine does not extend it before `done`."""
    start: int
    """Tokens that the router's own pool restores; nothing at or below it is of interest."""
    limit: int
    """Furthest position of use: the last token is always computed."""
    snapshot_positions: tuple[int, ...] = ()
    """Positions that the session's record names, in any order; multiples of 128 may be tried
    besides."""
    streaming: Streaming | None = None
    """Of a sequence that does not fit the pool: part of what a prefill would take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeResult:
    """How far a sequence could be restored, and whether that is worth it."""

    num_tokens: int
    """Deepest position in `(start, limit]` with its snapshot and all cache blocks; 0 where there is
    none."""
    decision: str
    """`load` or `prefill`."""
    reason: str
    """For logs and metrics, a few words."""
    predicted_load_s: float = 0.0
    predicted_prefill_s: float = 0.0

    @property
    def should_load(self) -> bool:
        """Whether the engine is to load `num_tokens` tokens."""
        return self.decision == "load" and self.num_tokens > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadJob:
    """Brings one sequence's prefix into the pool."""

    chain: HashChain
    start: int
    """Tokens in place. The first cache block to load is `start // 128`."""
    num_tokens: int
    """Wanted position, as probed."""
    snapshot_positions: tuple[int, ...]
    """As in the probe: what to fall back to where a value is gone."""
    block_sink: Callable[[int, memoryview], None]
    """Takes cache block `index` (tokens `[128 * index, 128 * (index + 1))`), once verified; copies
    it."""
    state_sink: Callable[[int, memoryview, memoryview], None]
    """Takes position, state and tail of a verified snapshot and copies them; the last call counts.
    May come before the blocks."""
    cancelled: threading.Event
    """Once set, call `done` soon and no sink any more."""
    deadline_s: float
    """Seconds from the call of `load` after which it gives up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadResult:
    """What a load has done; after `done`, the tier holds nothing of the pool."""

    num_tokens: int
    """Position that is wholly in place: the wanted one, a lower one that was complete, or
    `start`."""
    num_bytes: int
    seconds: float
    error: str = ""
    """Why it is not the wanted one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TierStats:
    """Counts since the start, but for `num_` and `is_`."""

    num_queued_bytes: int = 0
    """Waiting to be written."""
    is_open: bool = True
    """False while the breaker keeps all calls away from the servers."""
    hit_tokens: int = 0
    """Restored, beyond what the pool held."""
    read_bytes: int = 0
    read_s: float = 0.0
    written_bytes: int = 0
    dropped_bytes: int = 0
    """Not written: queue full, breaker open, server full."""
    corrupt: int = 0
    """Values refused by header or checksum."""
    loads: int = 0
    load_failures: int = 0
    """Loads that ended below the wanted position."""
    counters: Mapping[str, float] = field(default_factory=dict)
    """Everything counted, under the metrics' names: what was found and lost, what was dropped and
    why, seconds of a restore's parts, decisions."""
    gauges: Mapping[str, float] = field(default_factory=dict)
    """What is measured now: bandwidth, prefill rate."""
    breakers: Mapping[str, str] = field(default_factory=dict)
    """Server -> state of its breaker."""


class Tier(Protocol):
    """A slower store of cached values."""

    def probe(self, query: Probe, done: Callable[[ProbeResult], None]) -> None:
        """Look how far a sequence could be restored; `done` comes within 100 ms."""
        ...

    def load(self, job: LoadJob, done: Callable[[LoadResult], None]) -> None:
        """Bring values into the pool; `done` comes once, soon after `deadline_s` at the latest."""
        ...

    def put_block(
        self,
        key: bytes,
        parent: bytes,
        read: Callable[[memoryview], None],
        num_bytes: int,
        release: Callable[[], None],
        ttl_class: TtlClass,
        *,
        num_tokens: int = 0,
    ) -> bool:
        """Write one cache block behind the step.

        Args:
            key: Its block hash, 32 bytes.
            parent: The block hash before it, or the chain's root (`chain.position_hash(0)`).
            read: Copies the block's `num_bytes` out of the pool; called at most once.
            num_bytes: Size of the value without header.
            release: Called once, when `read` is not going to be called any more.
            ttl_class: How long it is worth keeping.
            num_tokens: Tokens up to its end: of one class, the tail of a prefix goes first.

        Returns:
            False where it was dropped at once; then neither `read` nor `release` is called.
        """
        ...

    def put_snapshot(
        self,
        key: bytes,
        snapshot: Snapshot,
        ttl_class: TtlClass,
        stored: Callable[[bool], None],
    ) -> bool:
        """Write a snapshot behind the step.

        Args:
            key: The position hash, 32 bytes.
            snapshot: Shared with the router's own cache.
            ttl_class: How long it is worth keeping.
            stored: Told once whether a later probe would find it.

        Returns:
            False where it was dropped at once; then `stored` is not called.
        """
        ...

    def touch(self, chain: HashChain, num_tokens: int, num_shared: int) -> None:
        """Let the cache blocks of a prefix that was used live on, the head longer than the tail.

        What a router has in its pool it does not read: else the head of a long conversation, which
        was written first and which all of it stands on, would expire first.

        Args:
            chain: Of at least `num_tokens` tokens.
            num_tokens: The prefix.
            num_shared: Tokens of it that are of class `SHARED`.
        """
        ...

    def note_prefill(self, num_tokens: int, context: int, seconds: float) -> None:
        """Learn how long a prefill took: `num_tokens` behind `context` cached ones."""
        ...

    def stats(self) -> TierStats:
        """Return what it holds and has done."""
        ...

    def close(self) -> None:
        """End its threads; callbacks under way come first or never."""
        ...
