"""Sizes of one engine, and what it says of itself.

Defaults that `cluster.config` has, too, are the same there (`tests/unit/cluster/test_config.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from protos.errors import ConfigurationError
from router.engine.chain import CACHE_BLOCK
from router.engine.latencies import LatencyStats


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Sizes of one engine."""

    vocab_size: int
    """Width of the logits."""

    max_model_len: int
    """Most tokens of a sequence, prompt and generated."""

    num_blocks: int
    """KV blocks."""

    num_state_slots: int
    """State slots; fewer than `max_num_seqs` limit the running sequences further."""

    block_size: int = 32
    """Tokens a KV block."""

    max_num_seqs: int = 64
    """Most running sequences."""

    max_num_batched_tokens: int = 2048
    """Most tokens of a step, at least `max_num_seqs`."""

    max_queued: int = 1024
    """Most sequences that wait beyond those that `max_num_seqs` lets run."""

    max_prompt_rows: int = 256
    """Most prompt positions a step whose logits are computed for prompt log-probabilities."""

    eos_token_ids: tuple[int, ...] = ()
    """Tokens that end a sequence unless it ignores them."""

    prefix_caching: bool = True
    """Reuse what earlier sequences have computed. Needs a model with `cache_io` and a block size
    that divides 128."""

    namespace: str = ""
    """Names prefixes of requests that bring no namespace of their own."""

    max_snapshot_bytes: int = 1 << 30
    """Host memory for snapshots."""

    snapshot_interval: int = 8192
    """Tokens between snapshots of a long prefill, a multiple of 128; 0: none."""

    decode_snapshot_interval: int = 4096
    """The same while a sequence decodes."""

    max_cold_bytes: int = 0
    """Host memory for the oldest KV of a sequence that does not fit the blocks."""

    min_snapshot_gain: int = 32
    """Tokens that a snapshot must save, but for one at a junction: fewer are prefilled faster than
    a snapshot is copied."""

    min_load_timeout_s: float = 0.5
    """A load from the tier may take so long, however short it was predicted to be."""

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "max_model_len",
            "num_blocks",
            "num_state_slots",
            "block_size",
            "max_num_seqs",
            "max_prompt_rows",
            "min_snapshot_gain",
        ):
            if getattr(self, name) < 1:
                raise ConfigurationError(
                    f"engine.{name}", "must be at least 1", getattr(self, name)
                )
        for name in ("max_queued", "max_snapshot_bytes", "max_cold_bytes"):
            if getattr(self, name) < 0:
                raise ConfigurationError(
                    f"engine.{name}", "must be at least 0", getattr(self, name)
                )
        for name in ("snapshot_interval", "decode_snapshot_interval"):
            if getattr(self, name) < 0 or getattr(self, name) % CACHE_BLOCK:
                raise ConfigurationError(
                    f"engine.{name}", f"must be a multiple of {CACHE_BLOCK}", getattr(self, name)
                )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigurationError(
                "engine.max_num_batched_tokens",
                f"must be at least max_num_seqs ({self.max_num_seqs}): every decoding sequence "
                "adds a token to every step",
                self.max_num_batched_tokens,
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ReuseStats:
    """What the prefix cache holds, and, in the counts without `num_`, has done."""

    is_on: bool = False
    num_blocks: int = 0
    """KV blocks that can be found by their tokens, in use or not."""
    num_snapshots: int = 0
    num_snapshot_bytes: int = 0
    num_restoring: int = 0
    """Sequences that a tier is probed or loading for."""
    num_writing_blocks: int = 0
    """KV blocks held for writes to the tier."""
    hit_tokens: int = 0
    """Not computed, because the pool had them."""
    restored_tokens: int = 0
    """Not computed, because the tier had them."""
    lost_tokens: int = 0
    """KV that was found without a snapshot, and computed again."""
    snapshots: int = 0
    """Taken."""
    evicted_blocks: int = 0
    evicted_snapshots: int = 0
    skipped_writes: int = 0
    """Values not handed to the tier or not taken by it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """What the engine holds, and, in the counts without `num_`, has done since its start."""

    num_running: int
    num_waiting: int
    num_queued_tokens: int
    """Of prompts, not computed yet: what a new request's prefill would wait for."""
    num_blocks_used: int
    """Owned by sequences; not those that only the prefix cache holds."""
    num_blocks: int
    num_state_slots_used: int
    num_state_slots: int
    prompt_tokens: int
    """Computed in prefills of prompts; not counting recomputation after a preemption."""
    generation_tokens: int
    preemptions: int
    steps: int
    step_s: float
    """Time in steps that ran the model."""
    dispatch_s: float
    """Time in which the model waited for experts."""
    is_asleep: bool = False
    """Requests only wait: see `Engine.sleep`."""
    num_cold_bytes: int = 0
    """Host memory of what a sequence has outside the blocks."""
    spilled_blocks: int = 0
    """Cache blocks that have left the pool."""
    reuse: ReuseStats = field(default_factory=ReuseStats)
    latency: LatencyStats = field(default_factory=LatencyStats)
