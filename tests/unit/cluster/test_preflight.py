"""What is refused before anything is loaded, by the rules themselves."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from cluster.config import Config
from cluster.config_loading import load_config
from cluster.preflight import (
    Examination,
    Facts,
    check_frames,
    check_groups,
    check_memory,
    choose_max_model_len,
    examine,
    quick_checks,
    router_port,
    serving_dtype,
)
from protos.errors import (
    CheckpointError,
    ConfigurationError,
    DeadlineExceededError,
    ResourceError,
)
from tests.parity.checkpoints import make_checkpoint

GIB = 1 << 30


def config(**values: object) -> Config:
    return load_config({name.replace("__", "."): value for name, value in values.items()}).config


def facts(num_experts: int = 8, dtype: str = "float32") -> Facts:
    return Facts(
        model_type="qwen3_5_moe",
        dtype=dtype,
        num_layers=4,
        num_experts=num_experts,
        max_model_len=1024,
        expert_bytes=4 * GIB,
        trunk_bytes=GIB,
        kv_block_bytes=1 << 20,
        state_slot_bytes=1 << 20,
        has_tokenizer=True,
        has_chat_template=True,
    )


def test_no_checkpoint_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"model\.checkpoint must be the folder"):
        quick_checks(config())


def test_a_folder_without_config_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        quick_checks(config(model__checkpoint=str(tmp_path)))


def test_a_taken_port_of_the_second_router_is_found(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        two = config(model__checkpoint=str(tmp_path), router__port=port - 1, router__count=2)
        with pytest.raises(ConfigurationError) as caught:
            quick_checks(two)
    assert caught.value.violations[0].value == port
    assert "take another --port" in str(caught.value)


def test_ports_follow_each_other_and_zero_stays_free() -> None:
    assert [router_port(config(router__port=7000), i) for i in range(3)] == [7000, 7001, 7002]
    assert router_port(config(router__port=0), 2) == 0


def test_more_groups_than_experts_is_refused() -> None:
    check_groups(config(experts__groups="8"), facts())
    check_groups(config(experts__groups="9"), facts(num_experts=0))
    with pytest.raises(ConfigurationError, match="at most 8 groups, the experts of a layer, got 9"):
        check_groups(config(experts__groups="9"), facts())


def test_a_step_whose_answers_fit_no_frame_is_refused_with_the_largest_that_does() -> None:
    per_token = 8 * 4096 * 2
    check_frames(config(engine__max_num_batched_tokens=8192), per_token)
    with pytest.raises(ConfigurationError, match=r"max_num_batched_tokens must be at most 8192"):
        check_frames(config(engine__max_num_batched_tokens=8193), per_token)


def test_too_little_memory_shows_every_part_and_what_to_change() -> None:
    with pytest.raises(ResourceError) as caught:
        check_memory(config(experts__groups="2", router__count=2), facts(), 4 * GIB)
    text = str(caught.value)
    # 4 GiB experts, 2 x 1 GiB trunk, 2 x 64 states of 1 MiB, 4 processes of 350 MiB
    assert (
        "need 7.5 GiB (experts 4.0 GiB, trunk 2.0 GiB, state 128.0 MiB, processes 1.4 GiB" in text
    )
    assert "have 4.0 GiB" in text
    assert "--dtype bfloat16 halves the weights" in text
    assert "fewer --routers" in text


def test_enough_memory_passes() -> None:
    check_memory(config(experts__groups="2"), facts(), 16 * GIB)


def test_dtype_is_the_checkpoints_unless_given() -> None:
    assert serving_dtype(None, "torch.bfloat16") == "bfloat16"
    assert serving_dtype("float32", "torch.bfloat16") == "float32"
    with pytest.raises(ConfigurationError, match=r"model\.dtype must be given.*float16"):
        serving_dtype(None, "torch.float16")


def test_the_window_may_be_smaller_than_the_checkpoints_not_larger() -> None:
    assert choose_max_model_len(None, 4096) == 4096
    assert choose_max_model_len(100, 4096) == 100
    with pytest.raises(ConfigurationError, match=r"rope_type yarn.*at most 4096, what.*got 5000"):
        choose_max_model_len(5000, 4096)


def test_overrides_stretch_the_window_of_a_checkpoint(tmp_path: Path) -> None:
    """The flag reaches the model: 64 tokens, times 4 with YaRN, and no more than that."""
    make_checkpoint(tmp_path, max_position_embeddings=64, num_layers=1)
    yarn = {"rope_type": "yarn", "factor": 4.0}
    overrides = json.dumps({"text_config": {"rope_parameters": yarn}})
    plain = {"model__checkpoint": str(tmp_path), "engine__kv_cache_gib": 0.01}
    assert examine(config(**plain), 16 * GIB).max_model_len == 64
    stretched = {**plain, "model__hf_overrides": overrides}
    assert examine(config(**stretched), 16 * GIB).max_model_len == 256
    with pytest.raises(ConfigurationError, match=r"at most 256, .*got 1010000"):
        examine(config(**stretched, model__max_model_len=1_010_000), 16 * GIB)


def test_an_examination_that_hangs_ends_with_the_time_there_is(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")  # as a mount that is away: whoever opens it waits
    examination = Examination(config(model__checkpoint=str(tmp_path)))
    with pytest.raises(DeadlineExceededError, match=r"headers did not finish within 0\.2 s"):
        examination.finish(0.2)
    assert examination._process.returncode is not None
