"""The KV cache's share of the memory, and its errors with numbers."""

from __future__ import annotations

import pytest

from cluster.config import EngineSection
from cluster.kv_budget import GIB, format_bytes, plan_cold_bytes, plan_kv_blocks
from protos.errors import ResourceError

MIB = 1 << 20


def test_all_sequences_at_full_length_when_there_is_room() -> None:
    # 1000 tokens at 32 a block are 32 blocks (31.25 rounded up), for 4 sequences.
    engine = EngineSection(max_num_seqs=4)
    assert plan_kv_blocks(engine, block_bytes=MIB, max_model_len=1000, free_bytes=GIB) == 128


def test_a_quarter_of_the_free_memory_at_most() -> None:
    engine = EngineSection(max_num_seqs=64)
    assert plan_kv_blocks(engine, block_bytes=MIB, max_model_len=1000, free_bytes=GIB) == 256


def test_more_than_a_quarter_for_one_sequence_of_full_length() -> None:
    engine = EngineSection(max_num_seqs=64)
    assert plan_kv_blocks(engine, block_bytes=MIB, max_model_len=16000, free_bytes=GIB) == 500


def test_configured_blocks_and_memory_are_taken_as_they_are() -> None:
    sizes = {"block_bytes": MIB, "max_model_len": 1000, "free_bytes": GIB}
    assert plan_kv_blocks(EngineSection(num_kv_blocks=40), **sizes) == 40
    assert plan_kv_blocks(EngineSection(kv_cache_gib=0.5), **sizes) == 512


def test_a_window_that_does_not_fit_says_what_would() -> None:
    with pytest.raises(ResourceError) as caught:
        plan_kv_blocks(EngineSection(), block_bytes=MIB, max_model_len=32000, free_bytes=GIB)
    # 75 % of 1 GiB are 768 blocks of 32 tokens.
    assert str(caught.value) == (
        "not enough KV cache for one sequence of the context window: need 1000 blocks (1000.0 MiB)"
        " for 32000 tokens, have 768 blocks (768.0 MiB); lower --max-model-len to 24576 or set"
        " --kv-cache-gib"
    )


def test_a_window_beyond_the_cache_is_said_where_it_can_be_streamed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "cluster.kv_budget")
    sizes = {"block_bytes": MIB, "max_model_len": 32000, "free_bytes": 4 * GIB}
    # 64 blocks of 32 tokens; 1000 - 32 blocks may have to lie in memory: 968 MiB.
    engine = EngineSection(num_kv_blocks=64, cold_kv_gib=1.0)
    assert plan_kv_blocks(engine, **sizes) == 64
    assert "cache_tokens=2048 window_tokens=32000" in caplog.text
    assert plan_kv_blocks(EngineSection(num_kv_blocks=64), **sizes) == 64  # half of 3.9 GiB
    no_memory = EngineSection(num_kv_blocks=64, cold_kv_gib=0.0)
    assert plan_kv_blocks(no_memory, **sizes, has_blob_tier=True) == 64
    for engine, has_blob_tier in (
        (no_memory, False),
        (EngineSection(num_kv_blocks=64, cold_kv_gib=0.9), False),
        (EngineSection(num_kv_blocks=15), True),  # 480 tokens hold no window
        (EngineSection(num_kv_blocks=64, block_size=48), True),
    ):
        with pytest.raises(ResourceError, match="context window"):
            plan_kv_blocks(engine, **sizes, has_blob_tier=has_blob_tier)


def test_half_of_what_the_cache_leaves_may_hold_older_kv() -> None:
    assert plan_cold_bytes(EngineSection(), kv_bytes=GIB, free_bytes=3 * GIB) == GIB
    assert plan_cold_bytes(EngineSection(), kv_bytes=GIB, free_bytes=0.5 * GIB) == 0
    engine = EngineSection(cold_kv_gib=0.25)
    assert plan_cold_bytes(engine, kv_bytes=GIB, free_bytes=0) == GIB // 4


def test_too_few_configured_blocks_name_the_flag() -> None:
    with pytest.raises(ResourceError, match="lower --max-model-len to 64 or raise --num-kv-blocks"):
        plan_kv_blocks(
            EngineSection(num_kv_blocks=2), block_bytes=MIB, max_model_len=100, free_bytes=GIB
        )


def test_more_than_the_memory_is_refused() -> None:
    with pytest.raises(ResourceError, match=r"need 2\.0 GiB, have 1\.0 GiB after the weights"):
        plan_kv_blocks(
            EngineSection(kv_cache_gib=2.0), block_bytes=MIB, max_model_len=100, free_bytes=GIB
        )


def test_a_model_without_full_attention_needs_no_memory() -> None:
    engine = EngineSection(max_num_seqs=2)
    assert plan_kv_blocks(engine, block_bytes=0, max_model_len=100, free_bytes=0) == 8


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0.0 MiB"), (MIB, "1.0 MiB"), (1.5 * GIB, "1.5 GiB")]
)
def test_bytes_are_shown_in_a_unit_that_fits(num_bytes: float, text: str) -> None:
    assert format_bytes(num_bytes) == text
