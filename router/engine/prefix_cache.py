"""Which prefixes the router's own pool can go on from.

Decides what is found, shared and given up; it moves no bytes and knows no model. Everything is
found by the names of `router.engine.chain`, so equal tokens are equal values.

A position can be restored when its snapshot and all full cache blocks below it are here. KV without
a snapshot is no hit: the state of the Gated DeltaNet layers cannot be rolled back or guessed.

Who holds a cache block, by `num_users`:

    n > 0    n sequences and writes to the tier; it stays
    0        nobody; it counts as free, and the least recently used goes first

Whoever uses a cache block uses all before it and lets go of the last one first, so the least
recently used is always a leaf. A snapshot goes with the cache block it stands on, or when the
snapshots' own budget in bytes is used up.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from router.engine.block_manager import BlockManager
from router.engine.chain import CACHE_BLOCK, HashChain
from router.engine.tier import Snapshot


@dataclass(slots=True, eq=False)
class CachedBlock:
    """The KV of one cache block: immutable, and shared by all who have its tokens."""

    key: bytes
    """Its block hash."""
    blocks: tuple[int, ...]
    """The engine's blocks that hold it, in order."""
    num_users: int = 1
    is_listed: bool = True
    """False once it must not be found any more."""
    is_offered: bool = False
    """Whether the tier has taken it, or gave it."""


@dataclass(frozen=True, slots=True)
class Match:
    """How far a sequence can be restored."""

    num_tokens: int = 0
    snapshot: Snapshot | None = None
    """At `num_tokens`; None where that is 0."""
    held: tuple[CachedBlock, ...] = ()
    """The full cache blocks below `num_tokens`."""
    kv_tokens: int = 0
    """How far the KV alone would reach, in whole cache blocks."""
    uploaded: int = 0
    """Deepest position up to `num_tokens` whose snapshot the tier was given."""

    @property
    def num_blocks(self) -> int:
        """Blocks of the cache blocks."""
        return sum(len(entry.blocks) for entry in self.held)

    @property
    def num_spare(self) -> int:
        """Those of them that count as free until the match is used."""
        return sum(len(entry.blocks) for entry in self.held if not entry.num_users)

    @property
    def lost_tokens(self) -> int:
        """KV that is here and of no use, for want of a snapshot."""
        return max(0, self.kv_tokens - self.num_tokens)


NO_MATCH = Match()


@dataclass(frozen=True, slots=True)
class _Kept:
    """A snapshot in the cache."""

    snapshot: Snapshot
    base: bytes
    """The name that it stands on: the last full cache block's, or the root's."""
    uploaded: int
    """See `Match`."""


@dataclass(slots=True)
class PrefixUse:
    """What one sequence has to do with cached prefixes."""

    chain: HashChain
    held: list[CachedBlock] = field(default_factory=list)
    """Cache blocks it shares, from the first token on; its own blocks follow."""
    unwritten: deque[tuple[int, CachedBlock]] = field(default_factory=deque)
    """Those of them, with their index, that wait to be offered to the tier, the first one first."""
    snapshot_at: list[int] = field(default_factory=list)
    """Positions where its prefill stops for a snapshot, falling: the next is the last."""
    snapshots: dict[int, bytes] = field(default_factory=dict)
    """The names of its own that it left or was restored from, by position; not those at junctions.
    Some may have gone."""
    floor: int = 0
    """Deepest position that it was restored from or left a snapshot at."""
    uploaded: int = 0
    """Deepest position whose snapshot went to the tier or came from it."""
    load_to: int = 0
    """Position that the tier restores after admission; 0 where it does not."""
    load_timeout_s: float = 0.0
    restored: Snapshot | None = None
    """What the local pool restored it from, while a load may yet fail."""
    loading: threading.Event | None = None
    """While a load owns its blocks and its slot; set it to cancel the load."""


class PrefixCache:
    """Cache blocks and snapshots by name.

    Args:
        blocks: The pool; the cache becomes its reserve.
        max_snapshot_bytes: Budget of the snapshots.
    """

    def __init__(self, blocks: BlockManager, max_snapshot_bytes: int) -> None:
        assert CACHE_BLOCK % blocks.block_size == 0, "cache blocks are whole blocks"
        self.blocks_per_entry = CACHE_BLOCK // blocks.block_size
        self.num_evicted_blocks = 0
        self.num_evicted_snapshots = 0
        self.snapshot_bytes = 0
        self._blocks = blocks
        self._max_snapshot_bytes = max_snapshot_bytes
        self._entries: dict[bytes, CachedBlock] = {}
        self._unused: OrderedDict[CachedBlock, None] = OrderedDict()
        """Least recently used first."""
        self._snapshots: OrderedDict[bytes, _Kept] = OrderedDict()
        """By position hash."""
        self._standing: dict[bytes, dict[int, set[bytes]]] = {}
        """Snapshots by what they stand on (the last full cache block, or the root) and by the
        tokens of their tail."""
        blocks.reserve = self

    # Cache blocks.

    @property
    def num_blocks(self) -> int:
        """Blocks in cache blocks that can be found, in use or not."""
        return len(self._entries) * self.blocks_per_entry

    @property
    def num_spare(self) -> int:
        """See `Reserve.num_spare`."""
        return len(self._unused) * self.blocks_per_entry

    def find(self, key: bytes) -> CachedBlock | None:
        """Return the cache block of this name, in use or not."""
        return self._entries.get(key)

    def insert(self, key: bytes, blocks: list[int]) -> CachedBlock:
        """Take over a sequence's blocks; the sequence becomes the first user."""
        assert key not in self._entries, "a cache block has one copy"
        entry = self._entries[key] = CachedBlock(key, tuple(blocks))
        return entry

    def hold(self, entry: CachedBlock) -> None:
        """Count one more user."""
        if not entry.num_users:
            del self._unused[entry]
        entry.num_users += 1

    def let_go(self, entry: CachedBlock) -> None:
        """Count one user less."""
        assert entry.num_users, "a cache block without users"
        entry.num_users -= 1
        if entry.num_users:
            return
        if entry.is_listed:
            self._unused[entry] = None
        else:
            self._blocks.release(entry.blocks)

    def give_up(self, count: int) -> None:
        """See `Reserve.give_up`."""
        for _ in range(-(-count // self.blocks_per_entry)):
            entry, _nothing = self._unused.popitem(last=False)
            self._unlist(entry)
            self.num_evicted_blocks += len(entry.blocks)
            self._blocks.release(entry.blocks)

    def forget(self, entry: CachedBlock) -> None:
        """Let nobody find an entry any more; it is freed when its last user lets go of it."""
        if entry.is_listed:
            self._unlist(entry)
            if not entry.num_users:
                del self._unused[entry]
                self._blocks.release(entry.blocks)

    def _unlist(self, entry: CachedBlock) -> None:
        entry.is_listed = False
        del self._entries[entry.key]
        for keys in self._standing.pop(entry.key, {}).values():
            for key in keys:
                self._drop(key)

    # Snapshots.

    @property
    def num_snapshots(self) -> int:
        """Snapshots that can be found."""
        return len(self._snapshots)

    def snapshot_keys(self) -> list[bytes]:
        """Return the names of all snapshots, last used first. Any thread may call it."""
        return list(self._snapshots)[::-1]

    def has_snapshot(self, key: bytes) -> bool:
        """Say whether there is a snapshot of this name."""
        return key in self._snapshots

    def add_snapshot(
        self,
        chain: HashChain,
        snapshot: Snapshot,
        uploaded: int = 0,
        own: dict[int, bytes] | None = None,
    ) -> None:
        """Keep a snapshot, as long as it stands and the budget lasts.

        Args:
            chain: Of the sequence, at least to the snapshot's position.
            snapshot: Its full cache blocks are here.
            uploaded: See `Match`.
            own: See `PrefixUse.snapshots`; None where it is not the sequence's alone.
        """
        num_tokens = snapshot.num_tokens
        key = chain.position_hash(num_tokens)
        if key in self._snapshots or snapshot.num_bytes > self._max_snapshot_bytes:
            return
        tail = num_tokens % CACHE_BLOCK
        base = chain.position_hash(num_tokens - tail)
        if num_tokens >= CACHE_BLOCK and base not in self._entries:
            return
        while self.snapshot_bytes + snapshot.num_bytes > self._max_snapshot_bytes:
            self._forget_snapshot(self._victim(snapshot, own or {}))
        if own is not None:
            own[num_tokens] = key
        self._snapshots[key] = _Kept(snapshot, base, uploaded)
        self._standing.setdefault(base, {}).setdefault(tail, set()).add(key)
        self.snapshot_bytes += snapshot.num_bytes

    def touch_snapshot(self, key: bytes) -> None:
        """Make a snapshot the most recently used."""
        self._snapshots.move_to_end(key)

    def _victim(self, snapshot: Snapshot, own: dict[int, bytes]) -> bytes:
        """Return the name of what goes for a new snapshot."""
        here = {n: self._snapshots[key] for n, key in own.items() if key in self._snapshots}
        own_bytes = snapshot.num_bytes + sum(kept.snapshot.num_bytes for kept in here.values())
        if len(here) > 1 and 2 * own_bytes > self._max_snapshot_bytes:
            return own[thinnest(sorted(here), snapshot.num_tokens)]
        return next(iter(self._snapshots))

    def _forget_snapshot(self, key: bytes) -> None:
        kept = self._snapshots[key]
        tails = self._standing[kept.base]
        tail = kept.snapshot.num_tokens % CACHE_BLOCK
        tails[tail].remove(key)
        if not tails[tail]:
            del tails[tail]
        if not tails:
            del self._standing[kept.base]
        self._drop(key)

    def _drop(self, key: bytes) -> None:
        self.snapshot_bytes -= self._snapshots.pop(key).snapshot.num_bytes
        self.num_evicted_snapshots += 1

    # Looking up.

    def match(self, chain: HashChain, limit: int) -> Match:
        """Return the deepest position that can be restored.

        Args:
            chain: Of the sequence, at least to `limit`.
            limit: Furthest position of use.
        """
        run: list[CachedBlock] = []
        for index in range(limit // CACHE_BLOCK):
            entry = self._entries.get(chain.block_hash(index))
            if entry is None:
                break
            run.append(entry)
        kv_tokens = len(run) * CACHE_BLOCK
        for count in range(len(run), -1, -1):
            base = chain.position_hash(count * CACHE_BLOCK)
            tails = self._standing.get(base)
            if tails is None:
                continue
            for tail in sorted(tails, reverse=True):
                num_tokens = count * CACHE_BLOCK + tail
                if num_tokens > limit:
                    continue
                found = self._snapshots.get(chain.position_hash(num_tokens))
                if found is not None:
                    held = tuple(run[:count])
                    return Match(num_tokens, found.snapshot, held, kv_tokens, found.uploaded)
        return Match(0, None, (), kv_tokens)


def thinnest(positions: Sequence[int], newest: int) -> int:
    """Return which snapshot of a sequence is missed least, that at `newest` being kept.

    Without it, who begins between it and the next one computes from the one before. That is seldom
    far behind the newest, so the stretch between its neighbours counts relative to how far behind
    the newest it begins: what stays lies ever further apart, as 1, 2, 4, 8 intervals do.

    Worked: of 1, 2, 3 with 4 as the newest the stretches are 2 of 4, 2 of 3, 2 of 2: 1 goes.

    Args:
        positions: Rising, at least one, below `newest`; ties go to the lowest.
        newest: The position to come.
    """
    around = [0, *positions, newest]

    def worth(index: int) -> float:
        before, after = around[index - 1], around[index + 1]
        return (after - before) / (newest - before)

    return around[min(range(1, len(around) - 1), key=worth)]
