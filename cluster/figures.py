"""What one router counts of itself, gathered once for `GetStatus` and for Prometheus."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from router.engine.config import EngineStats
from router.engine.tier import TierStats
from router.gateway.forwarding import ForwardStats
from router.gateway.turn_figures import TurnStats
from router.state.cold import ColdStats

META, BLOB = "meta", "blob"


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """One server of sessions or cached values, as this router sees it."""

    role: str
    """META or BLOB."""
    address: str
    """Without credentials."""
    breaker: str
    """closed, open or half-open."""
    failures: int = 0
    used_bytes: int = 0
    limit_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What one router says of itself."""

    router_id: str
    model: str
    stats: EngineStats
    tier: TierStats | None = None
    """Of the blob servers; None: there are none."""
    cold: ColdStats = field(default_factory=ColdStats)
    servers: Sequence[Server] = ()
    forwards: ForwardStats | None = None
    turns: TurnStats | None = None
    sessions_held: int = 0
    route_streams: int = 0
    """Of `GatingService`, open."""
    prefill_tokens_per_s: float = 0.0
    """As the tier has measured it; 0: not yet, or no tier."""
