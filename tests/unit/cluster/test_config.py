"""Configuration: precedence, rules, and errors that name path, rule and value."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from cluster.config import (
    describe,
    flatten,
    parse_groups,
    shown,
    to_json_schema,
)
from cluster.config_loading import load_config
from cluster.kv_budget import GIB
from protos.errors import ConfigurationError
from router.engine.config import EngineConfig
from router.state.control import ControlSettings
from router.state.leases import StoreSettings
from router.state.writer import WriterSettings


def test_command_line_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    file = tmp_path / "mesh.toml"
    file.write_text("[router]\nport = 1\ncount = 2\nhost = '0.0.0.0'\n[experts]\ngroups = 3\n")
    env = {"EXPERTMESH_ROUTER__PORT": "2", "EXPERTMESH_ROUTER__COUNT": "3", "HOME": "/"}
    loaded = load_config({"router.port": 4, "router.threads": None}, env, file)
    router = loaded.config.router
    assert (router.port, router.count, router.host, router.threads) == (4, 3, "0.0.0.0", None)
    assert loaded.config.experts.groups == "3"
    assert loaded.origins["router.port"] == "command line"
    assert loaded.origins["router.count"] == "environment"
    assert loaded.origins["router.host"] == "file"
    assert loaded.origins["engine.block_size"] == "default"


def test_json_and_toml_files_say_the_same(tmp_path: Path) -> None:
    toml, as_json = tmp_path / "a.toml", tmp_path / "a.json"
    toml.write_text("[engine]\nkv_cache_gib = 2\n[cluster]\nverbose = true\n")
    as_json.write_text('{"engine": {"kv_cache_gib": 2}, "cluster": {"verbose": true}}')
    assert load_config(file=toml).config == load_config(file=as_json).config
    assert load_config(file=toml).config.engine.kv_cache_gib == 2.0


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("router.port", 70000, "router.port must be 0 to 65535, got 70000"),
        ("router.port", "x", 'router.port must be a whole number, got "x"'),
        ("router.port", True, "router.port must be a whole number, got true"),
        ("router.count", 0, "router.count must be 1 to 64, got 0"),
        ("engine.block_size", 1.5, "engine.block_size must be a whole number, got 1.5"),
        ("cluster.shutdown_timeout_s", -1.0, "cluster.shutdown_timeout_s must be 0 or more, got"),
        ("cluster.shutdown_timeout_s", float("nan"), "cluster.shutdown_timeout_s must be 0 or"),
        ("model.dtype", "bfloat61", "model.dtype must be one of float32, bfloat16; did you mean b"),
        ("engine.max_num_seq", 4, "(command line); did you mean engine.max_num_seqs?, got 4"),
        ("engine.port", 4, "did you mean router.port?"),
        ("nonsense", 4, "sections: model, experts, router, engine, state, cluster"),
    ],
)
def test_an_error_names_path_rule_and_value(path: str, value: object, message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load_config({path: value})
    assert message in str(caught.value)


def test_all_mistakes_are_reported_together() -> None:
    with pytest.raises(ConfigurationError) as caught:
        load_config({"router.port": -1}, {"EXPERTMESH_ENGINE__MAX_NUM_SEQS": "many"})
    assert [v.field for v in caught.value.violations] == ["engine.max_num_seqs", "router.port"]


def test_environment_text_becomes_the_fields_type() -> None:
    env = {
        "EXPERTMESH_CLUSTER__VERBOSE": "yes",
        "EXPERTMESH_MODEL__DTYPE": "none",
        "EXPERTMESH_ENGINE__KV_CACHE_GIB": "0.5",
    }
    config = load_config(env=env).config
    assert (config.cluster.verbose, config.model.dtype, config.engine.kv_cache_gib) == (
        True,
        None,
        0.5,
    )


def test_a_step_must_hold_every_running_sequence() -> None:
    with pytest.raises(ConfigurationError, match=r"at least engine\.max_num_seqs \(64\), got 32"):
        load_config({"engine.max_num_batched_tokens": 32})


@pytest.mark.parametrize(
    "content", ["[router\nport = 1", "port = ", "[router]\nport = 1\nport = 2"]
)
def test_a_broken_file_is_named(tmp_path: Path, content: str) -> None:
    file = tmp_path / "mesh.toml"
    file.write_text(content)
    with pytest.raises(ConfigurationError, match="--config must be valid toml"):
        load_config(file=file)


def test_a_missing_file_and_a_foreign_suffix_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="No such file"):
        load_config(file=tmp_path / "gone.toml")
    (tmp_path / "mesh.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigurationError, match="not UTF-8 text"):
        load_config(file=tmp_path / "mesh.toml")
    (tmp_path / "mesh.yaml").write_text("router: {}")
    with pytest.raises(ConfigurationError, match=r"must end in \.toml or \.json"):
        load_config(file=tmp_path / "mesh.yaml")


def test_batches_have_roots_that_are_folders_and_a_place_for_their_records() -> None:
    roots = ["/data", "s3://bucket/x"]
    assert load_config({"batch.roots": roots}).config.batch.roots == tuple(roots)
    for root in ("data", "/data/../etc", "s3://bucket/x?endpoint_override=h"):
        with pytest.raises(ConfigurationError) as caught:
            load_config({"batch.roots": [root]})
        [violation] = caught.value.violations
        assert (violation.field, violation.value) == ("batch.roots", root)
    with pytest.raises(ConfigurationError, match=r"batch\.roots must be empty with --no-state"):
        load_config({"batch.roots": roots, "state.enabled": False})


def test_replicas_need_a_server_that_may_have_some() -> None:
    given = {"state.wait_replicas": 1}
    assert load_config(given | {"state.redis_url": "redis://h"}).config.state.wait_replicas == 1
    assert load_config(given | {"state.blob_urls": ["redis://h"]}).config.state.wait_replicas == 1
    assert load_config(given | {"state.enabled": False}).config.state.wait_replicas == 1
    with pytest.raises(ConfigurationError, match=r"state\.wait_replicas must be 0 without state\."):
        load_config(given)


def test_a_default_that_another_package_has_is_the_same_there() -> None:
    config = load_config().config
    engine, state = config.engine, config.state
    for kind, name, ours in (
        (EngineConfig, "block_size", engine.block_size),
        (EngineConfig, "max_num_seqs", engine.max_num_seqs),
        (EngineConfig, "max_num_batched_tokens", engine.max_num_batched_tokens),
        (EngineConfig, "max_queued", engine.max_queued),
        (EngineConfig, "prefix_caching", engine.enable_prefix_caching),
        (EngineConfig, "max_snapshot_bytes", state.snapshot_cache_gib * GIB),
        (EngineConfig, "snapshot_interval", state.snapshot_interval_tokens),
        (StoreSettings, "commit_interval_tokens", state.commit_interval_tokens),
        (StoreSettings, "commit_interval_s", state.commit_interval_s),
        (ControlSettings, "wait_replicas", state.wait_replicas),
        (WriterSettings, "max_queue_bytes", state.write_queue_mib << 20),
    ):
        (default,) = [item.default for item in dataclasses.fields(kind) if item.name == name]
        assert default == ours, f"{kind.__name__}.{name}"


def test_groups_by_number_and_by_name() -> None:
    assert parse_groups(None) == {"group-0": 1.0}
    assert parse_groups("2") == {"group-0": 1.0, "group-1": 1.0}
    assert parse_groups("a:2, b:0.5,c") == {"a": 2.0, "b": 0.5, "c": 1.0}


@pytest.mark.parametrize(
    "spec", ["0", "a:0", "a:-1", "a:x", "a:1,a:2", ",", "a b:1", "a:inf", "a:nan"]
)
def test_a_wrong_group_spec_is_an_error(spec: str) -> None:
    with pytest.raises(ConfigurationError, match=r"experts\.groups must be a number of groups"):
        load_config({"experts.groups": spec})


def test_every_field_has_a_sentence_and_the_schema_has_every_field() -> None:
    schema = to_json_schema()
    json.dumps(schema)
    for path in flatten(load_config().config):
        section, name = path.split(".")
        entry = schema["properties"][section]["properties"][name]
        assert entry["description"].endswith("."), path
        assert describe(path).startswith(entry["description"])
    assert schema["properties"]["router"]["properties"]["port"]["maximum"] == 65535
    assert schema["properties"]["model"]["properties"]["dtype"]["enum"] == [
        "float32",
        "bfloat16",
        None,
    ]


def test_a_list_comes_from_flags_a_file_or_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "mesh.toml"
    file.write_text('[state]\nblob_urls = ["redis://a", "redis://b"]\n')
    urls = ("redis://a", "redis://b")
    env = {"EXPERTMESH_STATE__BLOB_URLS": "redis://a, redis://b"}
    assert load_config(file=file).config.state.blob_urls == urls
    assert load_config(env=env).config.state.blob_urls == urls
    assert load_config({"state.blob_urls": list(urls)}).config.state.blob_urls == urls
    with pytest.raises(ConfigurationError, match=r"state\.blob_urls must be a list"):
        load_config({"state.blob_urls": 3})
    item = to_json_schema()["properties"]["state"]["properties"]["blob_urls"]
    assert item == {
        "description": item["description"],
        "default": [],
        "type": "array",
        "items": {"type": "string"},
    }


def test_secrets_are_neither_shown_nor_in_errors() -> None:
    given = {
        "state.redis_url": "redis://u:hush@h",
        "state.blob_urls": ["redis://:hush@b"],
        "state.tenant_salt": "hush",
    }
    seen = shown(load_config(given).config)
    assert seen["state.redis_url"] == "redis://***@h"
    assert seen["state.blob_urls"] == ["redis://***@b"]
    assert seen["state.tenant_salt"] == "***"
    with pytest.raises(ConfigurationError) as caught:
        load_config({"state.redis_url": ["redis://:hush@h"], "state.tenant_salt": 1.5})
    assert "hush" not in str(caught.value)
    assert len(caught.value.violations) == 2
