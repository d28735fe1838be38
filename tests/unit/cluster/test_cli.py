"""The command line without a service."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.cli import app
from cluster.config import flatten
from cluster.config_loading import load_config

ROOT = Path(__file__).resolve().parents[3]
runner = CliRunner()


def test_help_lists_the_commands() -> None:
    answer = runner.invoke(app, ["--help"])
    assert answer.exit_code == 0
    for command in (
        "serve",
        "chat",
        "complete",
        "status",
        "doctor",
        "service",
        "config",
        "version",
    ):
        assert command in answer.stdout


def test_an_unknown_flag_is_a_usage_error() -> None:
    assert runner.invoke(app, ["serve", "--no-such-flag"]).exit_code == 2
    assert runner.invoke(app, ["serve", "x", "--dtype", "int8"]).exit_code == 2


def test_a_value_against_its_rule_is_a_configuration_error() -> None:
    answer = runner.invoke(app, ["serve", "x", "--routers", "0"])
    assert answer.exit_code == 3
    assert "router.count must be 1 to 64, got 0" in answer.stderr


def test_config_show_tells_values_and_origins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mesh.toml"
    file.write_text("[router]\nport = 7000\n")
    monkeypatch.setenv("EXPERTMESH_ENGINE__BLOCK_SIZE", "16")
    answer = runner.invoke(app, ["config", "show", "--config", str(file), "--json"])
    shown = json.loads(answer.stdout)
    assert shown["router.port"] == {"value": 7000, "origin": "file"}
    assert shown["engine.block_size"] == {"value": 16, "origin": "environment"}
    assert shown.keys() == flatten(load_config().config).keys()


def test_config_check_lists_mistakes(tmp_path: Path) -> None:
    file = tmp_path / "mesh.json"
    file.write_text('{"router": {"prot": 1}}')
    answer = runner.invoke(app, ["config", "check", "--config", str(file)])
    assert answer.exit_code == 3
    assert "did you mean router.port?" in answer.stderr
    assert runner.invoke(app, ["config", "check"]).stdout == "ok\n"


def test_config_schema_is_json() -> None:
    assert json.loads(runner.invoke(app, ["config", "schema"]).stdout)["type"] == "object"


def test_doctor_reports_as_json() -> None:
    answer = runner.invoke(app, ["doctor", "--json"])
    checks = {check["name"]: check for check in json.loads(answer.stdout)}
    assert {"python", "torch", "deepspeed", "ray", "compiler", "native kernels", "memory"} <= set(
        checks
    )
    assert {check["state"] for check in checks.values()} <= {"ok", "warn"}
    assert answer.exit_code == 0
    assert all(check["remedy"] for check in checks.values() if check["state"] != "ok")


def test_serve_and_the_command_line_import_no_torch() -> None:
    """The process in the foreground stays small: 300 MB and two seconds otherwise."""
    code = (
        "import sys, cluster.cli, cluster.foreground, cluster.launch, cluster.talk, cluster.status;"
        "heavy = ('torch', 'ray', 'deepspeed', 'transformers');"
        "sys.exit(sum(name in sys.modules for name in heavy))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
