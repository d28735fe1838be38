"""Which router starts a request soonest: pure arithmetic over what the routers say of themselves.

Every router publishes a heartbeat (`PeerView`): how fast it prefills, what waits before a new
request, and its *warm set*: the first `WARM_BYTES` bytes of the hash of every token position that
it could resume from (`router.engine.chain`), the newest `MAX_WARM` of them. A warm prefix saves its
tokens; a queue costs its tokens; the cheapest router is the best.

    cost_s = (queued tokens + tokens still to prefill) / (prefill tokens per second) + wait for room

Worked: 4,096 tokens, rate 1,000/s. Own router cold and idle: 4.1 s. Another that is warm up to
4,000 and has 500 tokens waiting: (500 + 96) / 1,000 = 0.6 s: it is better, and clearly so.

A hash prefix of 8 bytes may collide; the price is a worse choice, never a wrong token. Ties go to
the asking router, then to the lower id.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from router.engine.chain import CACHE_BLOCK, HashChain

WARM_BYTES = 8
"""Of a position's hash, in a heartbeat."""
MAX_WARM = 1024
"""Positions in a heartbeat: 8 KiB."""
FULL_WAIT_S = 1.0
"""Counted for a router whose places are all taken; how long one really takes is not known."""
UNKNOWN_RATE = 1000.0
"""Prefill tokens per second where no router has measured any; the same for all, so only ratios of
prompt to queue depend on it."""
MIN_GAIN_S = 0.05
"""Seconds that a forward must save: a hop costs some milliseconds, and estimates are rough."""
MIN_GAIN_SHARE = 0.3
"""Share of the own cost that a forward must save."""

_LOAD = struct.Struct("<dIII")


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterLoad:
    """How busy a router is."""

    prefill_tokens_per_s: float
    """Measured; 0 where nothing was prefilled yet."""
    queued_tokens: int
    """Tokens of prompts that are not computed yet, waiting and running requests together."""
    num_running: int
    max_running: int

    PACKED_BYTES: ClassVar[int] = _LOAD.size

    def pack(self) -> bytes:
        """Return the bytes that travel in a heartbeat."""
        return _LOAD.pack(
            self.prefill_tokens_per_s, self.queued_tokens, self.num_running, self.max_running
        )

    @classmethod
    def unpack(cls, packed: bytes) -> RouterLoad:
        """Return what `pack` packed.

        Raises:
            ValueError: Another length: a router of another version.
        """
        if len(packed) != _LOAD.size:
            raise ValueError(f"load of {len(packed)} bytes, expected {_LOAD.size}")
        rate, queued, running, most = _LOAD.unpack(packed)
        return cls(
            prefill_tokens_per_s=rate, queued_tokens=queued, num_running=running, max_running=most
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerView:
    """A router as the others see it."""

    router_id: str
    address: str
    load: RouterLoad
    warm: frozenset[bytes]
    """First `WARM_BYTES` of the hashes of the positions that it can resume from."""

    def with_queued(self, num_tokens: int) -> PeerView:
        """Return the view with so many more tokens waiting."""
        queued = self.load.queued_tokens + num_tokens
        return replace(self, load=replace(self.load, queued_tokens=queued))


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Who serves, and why."""

    view: PeerView
    warm_tokens: int
    """Tokens of the prompt that it need not compute."""
    cost_s: float
    """Predicted time to the first token there."""
    own_cost_s: float
    """The same on the asking router."""

    @property
    def reason(self) -> str:
        """Return the choice in words, for logs."""
        return (
            f"{self.view.router_id} warm={self.warm_tokens} cost_s={self.cost_s:.3f}"
            f" own_cost_s={self.own_cost_s:.3f}"
        )


def choose(
    views: Sequence[PeerView], own_id: str, hashes: Mapping[int, bytes], num_tokens: int
) -> Choice:
    """Return the router that should serve a prompt: the asking one, unless another is clearly best.

    Args:
        views: All routers that serve, the asking one among them.
        own_id: The asking router.
        hashes: Position -> its hash, where a router may be warm: multiples of 128 tokens, or the
            snapshots of the session. The last token is always computed, so its position is no use.
        num_tokens: Of the prompt, a session's history included.

    Raises:
        ValueError: The asking router is not among the views.
    """
    own = next((view for view in views if view.router_id == own_id), None)
    if own is None:
        raise ValueError(f"no view of {own_id}")
    keys = {n: found[:WARM_BYTES] for n, found in hashes.items() if 0 < n < num_tokens}
    rate = _usual_rate(views)
    own_warm = _warm_tokens(own, keys)
    own_cost_s = _cost_s(own, num_tokens - own_warm, rate)
    best = Choice(view=own, warm_tokens=own_warm, cost_s=own_cost_s, own_cost_s=own_cost_s)
    limit_s = own_cost_s - max(MIN_GAIN_S, MIN_GAIN_SHARE * own_cost_s)
    for view in sorted(views, key=lambda view: view.router_id):
        warm = _warm_tokens(view, keys)
        cost_s = _cost_s(view, num_tokens - warm, rate)
        if view is not own and cost_s <= limit_s and cost_s < best.cost_s:
            best = Choice(view=view, warm_tokens=warm, cost_s=cost_s, own_cost_s=own_cost_s)
    return best


def aligned_hashes(namespace: str, token_ids: Sequence[int]) -> dict[int, bytes]:
    """Return position -> hash at every multiple of 128 tokens of a prompt."""
    chain = HashChain(namespace)
    chain.extend(token_ids)
    ends = range(CACHE_BLOCK, len(token_ids), CACHE_BLOCK)
    return {n: chain.position_hash(n) for n in ends}


def warm_set(hashes: Iterable[bytes]) -> bytes:
    """Return the warm set of a heartbeat: the first `MAX_WARM` hashes, newest first."""
    kept: list[bytes] = []
    for position_hash in hashes:
        if len(kept) == MAX_WARM:
            break
        kept.append(position_hash[:WARM_BYTES])
    return b"".join(kept)


def unpack_warm(packed: bytes) -> frozenset[bytes]:
    """Return the set that `warm_set` packed; a rest that is no whole entry is left out."""
    ends = range(WARM_BYTES, len(packed) + 1, WARM_BYTES)
    return frozenset(packed[end - WARM_BYTES : end] for end in ends)


def _warm_tokens(view: PeerView, keys: dict[int, bytes]) -> int:
    """Return the longest position at which a router is warm."""
    return max((position for position, key in keys.items() if key in view.warm), default=0)


def _cost_s(view: PeerView, num_tokens: int, usual_rate: float) -> float:
    """Return the seconds to the first token of a prompt with `num_tokens` left to compute."""
    load = view.load
    rate = load.prefill_tokens_per_s or usual_rate
    wait_s = FULL_WAIT_S if load.num_running >= load.max_running else 0.0
    return (load.queued_tokens + num_tokens) / rate + wait_s


def _usual_rate(views: Sequence[PeerView]) -> float:
    """Return the prefill rate to assume of a router that has not measured one: the others' mean."""
    rates = [view.load.prefill_tokens_per_s for view in views if view.load.prefill_tokens_per_s]
    return sum(rates) / len(rates) if rates else UNKNOWN_RATE
