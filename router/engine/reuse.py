"""Gives sequences the prefixes that are already computed, and keeps what they compute.

Decides where snapshots are taken and what is offered to the tier; what is found and given up is the
prefix cache's. Runs in the engine thread, beside the scheduler:

    find -> share -> restore     at admission: how far, whose blocks, state and tail into place
    note_computed                after a step: full cache blocks become findable, snapshots taken
    leave                        at the end of a turn: a snapshot of all that was computed
    release                      blocks back, the last cache block first

Snapshots stand at the prompt's end and the turn's, at junctions, where KV was found beyond the
deepest snapshot (so the second sighting of a prefix makes it restorable), and at intervals of a
long prefill or decode. A prefill chunk ends there.

While one sequence prefills towards a snapshot that another one could start from, the other waits:
its tokens would come after the first one's anyway, and it saves them. That is how the n sequences
of a request share its prompt.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from router.engine.block_manager import BlockManager
from router.engine.chain import CACHE_BLOCK, HashChain
from router.engine.config import EngineConfig, ReuseStats
from router.engine.model import CacheIo
from router.engine.prefix_cache import CachedBlock, Match, PrefixCache, PrefixUse
from router.engine.request import EngineRequest
from router.engine.sequence import Sequence
from router.engine.tier import Snapshot, Tier, TtlClass

logger = logging.getLogger(__name__)

Post = Callable[[Callable[[], None]], None]
"""Lets the engine thread call something; any thread may post."""

_WRITING_SHARE = 4
"""At most this part of the blocks is held for writes to the tier."""


class Reuse:
    """The prefix cache at work.

    Args:
        blocks: The pool.
        io: Its memory.
        config: Budgets and intervals.
        tier: Gets what is computed; None keeps it here.
        post: Brings the tier's callbacks into the engine thread.
    """

    def __init__(
        self, blocks: BlockManager, io: CacheIo, config: EngineConfig, tier: Tier | None, post: Post
    ) -> None:
        self.cache = PrefixCache(blocks, config.max_snapshot_bytes)
        self._blocks = blocks
        self.io = io
        self._config = config
        self._tier = tier
        self._post = post
        self._per = self.cache.blocks_per_entry
        self._expected: dict[bytes, Sequence] = {}
        """Positions where a running sequence is going to leave a snapshot."""
        self._num_writing = 0
        self._hit_tokens = self._restored_tokens = self._lost_tokens = 0
        self._num_snapshots = self._skipped_writes = 0

    def stats(self, num_restoring: int) -> ReuseStats:
        """Return what is held and was done."""
        cache = self.cache
        return ReuseStats(
            is_on=True,
            num_blocks=cache.num_blocks,
            num_snapshots=cache.num_snapshots,
            num_snapshot_bytes=cache.snapshot_bytes,
            num_restoring=num_restoring,
            num_writing_blocks=self._num_writing * self._per,
            hit_tokens=self._hit_tokens,
            restored_tokens=self._restored_tokens,
            lost_tokens=self._lost_tokens,
            snapshots=self._num_snapshots,
            evicted_blocks=cache.num_evicted_blocks,
            evicted_snapshots=cache.num_evicted_snapshots,
            skipped_writes=self._skipped_writes,
        )

    # Before and at admission.

    def new_use(self, request: EngineRequest, prompt: NDArray[np.int64]) -> PrefixUse:
        """Return what a new sequence starts with. Any thread may call it: a million tokens take 10
        to 20 ms to hash."""
        chain = HashChain(request.namespace or self._config.namespace)
        chain.extend(prompt)
        chain.extend(request.forced_ids)
        return PrefixUse(chain)

    def limit_of(self, sequence: Sequence) -> int:
        """Return the furthest position it could go on from: what still gives logits is computed."""
        if due := sequence.num_prompt_logprobs_due:
            return sequence.prompt_len - 1 - due
        return sequence.num_tokens - 1

    def find(self, sequence: Sequence) -> Match | None:
        """Return how far the pool restores a waiting sequence; None: it had better wait."""
        use = self.extended(sequence)
        limit = self.limit_of(sequence)
        match = self.cache.match(use.chain, limit)
        for position in self._wanted(sequence, match):
            leader = self._expected.get(use.chain.position_hash(position))
            if position <= limit and leader is not None:
                return None
        return match

    def share(self, sequence: Sequence, match: Match) -> None:
        """Make a sequence a user of the blocks found; call before blocks are allocated."""
        use = _use(sequence)
        for entry in match.held:
            self.cache.hold(entry)
        use.held = list(match.held)
        use.unwritten.extend((i, e) for i, e in enumerate(match.held) if not e.is_offered)
        sequence.blocks = [block for entry in match.held for block in entry.blocks]

    def restore(self, sequence: Sequence, match: Match) -> None:
        """Bring state and tail of an admitted sequence into place, and plan its snapshots."""
        use = _use(sequence)
        use.restored = match.snapshot
        self.write_back(sequence)
        if match.snapshot is not None:
            self.cache.touch_snapshot(use.chain.position_hash(match.num_tokens))
        use.floor, use.uploaded = match.num_tokens, match.uploaded
        if not sequence.prompt_reported:
            sequence.num_cached = match.num_tokens
        self._hit_tokens += match.num_tokens
        self._lost_tokens += match.lost_tokens
        self._plan(sequence, match)

    def write_back(self, sequence: Sequence) -> None:
        """Write state and tail of the snapshot that a sequence was restored from locally."""
        snapshot = _use(sequence).restored
        sequence.num_computed = 0
        if snapshot is not None:
            self.io.write_state(sequence.state_slot, snapshot.state)
            if tail := snapshot.num_tokens % CACHE_BLOCK:
                index = snapshot.num_tokens // CACHE_BLOCK
                self.io.write_tail(self._blocks_of(sequence, index), tail, snapshot.tail)
            sequence.num_computed = snapshot.num_tokens

    def _wanted(self, sequence: Sequence, match: Match) -> list[int]:
        """Return the positions behind a match where a prefill is to stop for a snapshot, rising."""
        request, stop = sequence.request, sequence.num_tokens
        found = {j - j % CACHE_BLOCK for j in request.junctions}
        gained = {match.kv_tokens, sequence.prompt_len}
        if interval := self._config.snapshot_interval:
            start = match.num_tokens // interval * interval
            gained |= set(range(start, stop + 1, interval))
        if request.sampling.n > 1:
            gained.add(sequence.prompt_len - 1)
        wanted: list[int] = []
        for position in sorted(found | gained):
            last = wanted[-1] if wanted else match.num_tokens
            is_due = position in found or position - last >= self._config.min_snapshot_gain
            if last < position <= stop and is_due:
                wanted.append(position)
        return wanted

    def _plan(self, sequence: Sequence, match: Match) -> None:
        use = _use(sequence)
        use.snapshot_at = self._wanted(sequence, match)[::-1]
        for position in use.snapshot_at:
            self._expected.setdefault(use.chain.position_hash(position), sequence)

    def extended(self, sequence: Sequence) -> PrefixUse:
        """Return the sequence's use, its chain at the last token."""
        use = _use(sequence)
        have = use.chain.num_tokens
        if have < sequence.num_tokens:
            use.chain.extend(sequence.tokens_between(have, sequence.num_tokens))
        return use

    def _span(self, sequence: Sequence, index: int) -> slice:
        """Return where the blocks of one cache block stand in a sequence's block table."""
        first = (index - sequence.num_cold_blocks) * self._per
        return slice(first, first + self._per)

    def _blocks_of(self, sequence: Sequence, index: int) -> list[int]:
        """Return the blocks of one cache block of a sequence; fewer where it ends."""
        return sequence.blocks[self._span(sequence, index)]

    # While it runs.

    def note_computed(self, sequence: Sequence) -> bool:
        """Keep the full cache blocks of a running sequence, and a snapshot where one is due.

        Returns:
            Whether its block table has changed: of two copies of a block, one goes.
        """
        use = _use(sequence)
        moved = self._keep_blocks(sequence)
        computed = sequence.num_computed
        is_due = False
        while use.snapshot_at and use.snapshot_at[-1] <= computed:
            is_due |= self._no_longer_expected(sequence, use.snapshot_at.pop()) == computed
        interval = self._config.decode_snapshot_interval
        is_spilled_decode = sequence.cold is not None and computed > sequence.prompt_len
        if (sequence.is_decoding or is_spilled_decode) and interval and computed % interval == 0:
            is_due |= computed - use.floor >= self._config.min_snapshot_gain
        if is_due:
            self._take_snapshot(sequence)
        return moved

    def _keep_blocks(self, sequence: Sequence, *, are_stored: bool = False) -> bool:
        use, moved = _use(sequence), False
        first = sequence.num_cold_blocks + len(use.held)
        for index in range(first, sequence.num_computed // CACHE_BLOCK):
            if use.chain.num_tokens < (index + 1) * CACHE_BLOCK:
                self.extended(sequence)
            key = use.chain.block_hash(index)
            own = self._blocks_of(sequence, index)
            entry = self.cache.find(key)
            if entry is None:
                entry = self.cache.insert(key, own)
                entry.is_offered = are_stored
            else:
                self.cache.hold(entry)
                sequence.blocks[self._span(sequence, index)] = entry.blocks
                self._blocks.release(own)
                moved = True
            use.held.append(entry)
            if not entry.is_offered:
                use.unwritten.append((index, entry))
        self._write_blocks(sequence)
        return moved

    def _no_longer_expected(self, sequence: Sequence, position: int) -> int:
        key = _use(sequence).chain.position_hash(position)
        if self._expected.get(key) is sequence:
            del self._expected[key]
        return position

    def _take_snapshot(self, sequence: Sequence) -> None:
        """Copy state and tail of all that is computed; its cache blocks are kept already."""
        num_tokens = sequence.num_computed
        use = self.extended(sequence)
        use.floor = num_tokens
        key = use.chain.position_hash(num_tokens)
        if self.cache.has_snapshot(key):
            self.cache.touch_snapshot(key)
            return
        io = self.io
        state_bytes, tail = io.state_bytes, num_tokens % CACHE_BLOCK
        values = np.empty(state_bytes + io.tail_bytes(tail), dtype=np.uint8)
        io.read_state(sequence.state_slot, values[:state_bytes])
        if tail:
            blocks = self._blocks_of(sequence, num_tokens // CACHE_BLOCK)
            io.read_tail(blocks, tail, values[state_bytes:])
        values.flags.writeable = False
        snapshot = Snapshot(num_tokens, values, state_bytes)
        self._num_snapshots += 1
        self._write_snapshot(sequence, key, snapshot)
        is_own = self._ttl_class(sequence, num_tokens) is TtlClass.SESSION
        self.cache.add_snapshot(
            use.chain, snapshot, use.uploaded, use.snapshots if is_own else None
        )

    def let_go_of_first(self, sequence: Sequence, values: NDArray[np.uint8]) -> None:
        """Let go of the oldest cache block of a sequence that spills it. If it still waits to be
        offered to the tier, its copy is: a hole would make all behind it useless to others.

        Args:
            sequence: Its cold cache blocks include this one already.
            values: The copy; not written any more.
        """
        use = _use(sequence)
        entry = use.held.pop(0)
        if use.unwritten and use.unwritten[0][1] is entry:
            index, _ = use.unwritten.popleft()
            self._offer(sequence, index, entry, lambda out: _copy(values, out), lambda: None)
        self.cache.let_go(entry)

    def distrust(self, sequence: Sequence) -> None:
        """Let nobody find what a sequence shares: its logits were not finite."""
        for entry in _use(sequence).held:
            self.cache.forget(entry)

    # At its end.

    def leave(self, sequence: Sequence) -> None:
        """Keep what a running sequence has computed, before it is released."""
        self._keep_blocks(sequence)
        if sequence.num_computed - _use(sequence).floor >= self._config.min_snapshot_gain:
            self._take_snapshot(sequence)

    def release(self, sequence: Sequence) -> list[int]:
        """Let go of what is shared; return the blocks that are the sequence's own."""
        use = _use(sequence)
        own = sequence.blocks[len(use.held) * self._per :]
        for entry in reversed(use.held):
            self.cache.let_go(entry)
        for position in use.snapshot_at:
            self._no_longer_expected(sequence, position)
        self._skipped_writes += len(use.unwritten)
        use.unwritten.clear()
        use.held, use.snapshot_at, use.restored, use.load_to = [], [], None, 0
        return own

    # The tier.

    def take_loaded(self, sequence: Sequence, snapshot: Snapshot) -> None:
        """Go on behind what a load has brought into a sequence's blocks and slot."""
        use = _use(sequence)
        gained = snapshot.num_tokens - sequence.num_computed
        sequence.num_computed = use.floor = use.uploaded = snapshot.num_tokens
        if not sequence.prompt_reported:
            sequence.num_cached = snapshot.num_tokens
        self._restored_tokens += gained
        self._keep_blocks(sequence, are_stored=True)
        self.cache.add_snapshot(use.chain, snapshot, use.uploaded, use.snapshots)
        while use.snapshot_at and use.snapshot_at[-1] <= snapshot.num_tokens:
            self._no_longer_expected(sequence, use.snapshot_at.pop())

    def _ttl_class(self, sequence: Sequence, stop: int) -> TtlClass:
        is_shared = any(stop <= junction for junction in sequence.request.junctions)
        return TtlClass.SHARED if is_shared else TtlClass.SESSION

    def _write_blocks(self, sequence: Sequence) -> None:
        """Offer waiting cache blocks to the tier, the first one first, until too much of the pool
        is held for that; each has a user more until it is copied out."""
        use = _use(sequence)
        if self._tier is None:
            use.unwritten.clear()
        while use.unwritten:
            if (self._num_writing + 1) * self._per > self._blocks.num_blocks // _WRITING_SHARE:
                return
            index, entry = use.unwritten.popleft()
            if not entry.is_offered:
                self._write_block(sequence, index, entry)

    def _write_block(self, sequence: Sequence, index: int, entry: CachedBlock) -> None:
        blocks, io = entry.blocks, self.io

        def release() -> None:
            self._post(lambda: self._written(entry))

        self.cache.hold(entry)
        self._num_writing += 1
        if not self._offer(
            sequence, index, entry, lambda out: io.read_blocks(blocks, out), release
        ):
            self._written(entry)

    def _offer(
        self,
        sequence: Sequence,
        index: int,
        entry: CachedBlock,
        read: Callable[[memoryview], None],
        release: Callable[[], None],
    ) -> bool:
        """Offer a cache block to the tier; return whether it was taken."""
        if self._tier is None:
            return False
        entry.is_offered = self._tier.put_block(
            entry.key,
            _use(sequence).chain.position_hash(index * CACHE_BLOCK),
            read,
            self.io.kv_block_bytes,
            release,
            self._ttl_class(sequence, (index + 1) * CACHE_BLOCK),
            num_tokens=(index + 1) * CACHE_BLOCK,
        )
        self._skipped_writes += not entry.is_offered
        return entry.is_offered

    def _written(self, entry: CachedBlock) -> None:
        self._num_writing -= 1
        self.cache.let_go(entry)

    def _write_snapshot(self, sequence: Sequence, key: bytes, snapshot: Snapshot) -> None:
        use, hint = _use(sequence), sequence.request.session
        least = CACHE_BLOCK if hint is None else self._config.min_snapshot_gain
        if self._tier is None or snapshot.num_tokens - use.uploaded < least:
            return
        told = hint.on_snapshot if hint is not None else None
        num_tokens = snapshot.num_tokens

        def stored(is_stored: bool) -> None:
            if is_stored and told is not None:
                told(num_tokens, key)

        if self._tier.put_snapshot(key, snapshot, self._ttl_class(sequence, num_tokens), stored):
            use.uploaded = num_tokens
            self._tier.touch(use.chain, num_tokens, max(sequence.request.junctions, default=0))
        else:
            self._skipped_writes += 1


def _copy(values: NDArray[np.uint8], out: memoryview) -> None:
    np.copyto(np.frombuffer(out, dtype=np.uint8), values)


def _use(sequence: Sequence) -> PrefixUse:
    assert sequence.prefix is not None, "a sequence without a chain"
    return sequence.prefix
