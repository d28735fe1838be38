"""The files of `infra/ray`: Ray's own schema, one secret, and commands that exist."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from typer.main import get_command

from cluster.cli import app

ROOT = Path(__file__).resolve().parents[3]
FILES = sorted((ROOT / "infra/ray").glob("*.yaml"))
by_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def load(path: Path) -> dict[str, Any]:
    config = yaml.safe_load(path.read_text())
    assert isinstance(config, dict)
    return config


def commands(config: dict[str, Any]) -> list[str]:
    """Every command of a file, in the order in which a machine runs them."""
    names = [name for name in config if name.endswith("_commands")]
    return [command for name in names for command in config[name]]


def test_there_is_a_file_for_every_target() -> None:
    assert [path.stem for path in FILES] == ["aws", "docker", "gcp", "onprem"]


@by_file
def test_a_file_is_what_ray_wants(path: Path) -> None:
    """As `ray up` does: fill in the provider's defaults, then hold it against Ray's schema."""
    validate_config(prepare_config(load(path)))


def test_ray_finds_a_misspelt_key() -> None:
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        validate_config(prepare_config({**load(FILES[0]), "max_worker": 2}))


@by_file
def test_every_machine_gets_the_same_token_and_asks_for_it(path: Path) -> None:
    config = load(path)
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.expertmesh/ray_token"
    assert any("RAY_AUTH_MODE=token" in command for command in config["setup_commands"])


@by_file
def test_what_a_machine_installs_is_here(path: Path) -> None:
    mounts = load(path)["file_mounts"]
    for remote, local in mounts.items():
        if remote.startswith("~/expertmesh/"):
            assert (ROOT / local).exists(), local
            assert remote == f"~/expertmesh/{local}"
    needed = {"pyproject.toml", "Makefile", "README.md", "protos", "experts", "router", "cluster"}
    assert needed <= set(mounts.values())


@by_file
def test_every_flag_of_expertmesh_exists(path: Path) -> None:
    """A flag that `serve` does not know would be seen on the head only, in a log."""
    root = get_command(app)
    serve = root.commands["serve"]
    known = {flag for parameter in serve.params for flag in parameter.opts}
    start = [c for c in commands(load(path)) if c.startswith("expertmesh service start -- ")]
    assert len(start) == 1
    flags = [part for part in shlex.split(start[0])[4:] if part.startswith("--")]
    assert flags
    advised = re.findall(r"^ *#.*?`(--[a-z-]+)", path.read_text(), re.MULTILINE)
    assert "--batch-root" in advised
    flags += advised
    assert set(flags) <= known
    service = root.commands["service"]
    used = {m[1] for c in commands(load(path)) for m in re.finditer(r"expertmesh service (\w+)", c)}
    assert used <= service.commands.keys()


@by_file
def test_groups_wait_for_machines_that_are_meant_for_them(path: Path) -> None:
    config = load(path)
    text = " ".join(commands(config)) + json.dumps(config.get("available_node_types", {}))
    if "--group-resource" in text:
        assert re.search(r'"expert_group": ?1', text)
