"""Cluster files: what is refused before a machine is touched."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from cluster.cli import app
from cluster.cluster_file import ensure_token, read_cluster_file
from protos.errors import ConfigurationError

ROOT = Path(__file__).resolve().parents[3]
ONPREM = ROOT / "infra/ray/onprem.yaml"


@pytest.fixture
def document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The on-prem file with a key that exists, read from the repository's root."""
    monkeypatch.chdir(ROOT)
    key = tmp_path / "id"
    key.write_text("")
    found: dict[str, Any] = yaml.safe_load(ONPREM.read_text())
    found["auth"]["ssh_private_key"] = str(key)
    found["file_mounts"]["~/.ray/auth_token"] = str(tmp_path / "made" / "token")
    return found


def written(tmp_path: Path, document: dict[str, Any]) -> Path:
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def refusal(tmp_path: Path, document: dict[str, Any]) -> str:
    with pytest.raises(ConfigurationError) as caught:
        read_cluster_file(written(tmp_path, document))
    return "\n".join(map(str, caught.value.violations))


def test_the_on_prem_file_says_what_we_need(tmp_path: Path, document: dict[str, Any]) -> None:
    file = read_cluster_file(written(tmp_path, document))
    assert file.machines == ("10.0.0.11", "10.0.0.12", "10.0.0.13")
    assert file.checkpoint == "/models/Qwen3.5-35B-A3B"
    assert file.status_port == 50050
    assert file.flag("--group-resource") == "expert_group"
    assert file.flag("--api-key") is None


def test_the_secret_is_made_once_and_for_its_owner_alone(
    tmp_path: Path, document: dict[str, Any]
) -> None:
    file = read_cluster_file(written(tmp_path, document))
    assert ensure_token(file)
    assert file.token is not None
    secret = file.token.read_text()
    assert len(secret) == 64
    assert stat.S_IMODE(file.token.stat().st_mode) == 0o600
    assert not ensure_token(file)
    assert file.token.read_text() == secret
    file.token.chmod(0o644)
    with pytest.raises(ConfigurationError, match="must be readable by you alone"):
        ensure_token(file)
    del document["file_mounts"]["~/.ray/auth_token"]
    with pytest.raises(ConfigurationError, match="must name the secret"):
        ensure_token(read_cluster_file(written(tmp_path, document)))


def test_what_ray_does_not_know_is_refused(tmp_path: Path, document: dict[str, Any]) -> None:
    document["max_worker"] = 2
    document["idle_timeout_minutes"] = "five"
    assert refusal(tmp_path, document) == (
        "cluster file Additional properties are not allowed ('max_worker' was unexpected),"
        ' got "dict"\n'
        "cluster file.idle_timeout_minutes 'five' is not of type 'number', got \"five\""
    )


def test_a_flag_that_serve_does_not_know_is_refused(
    tmp_path: Path, document: dict[str, Any]
) -> None:
    document["head_start_ray_commands"][-1] += " --expert-group 3"
    assert "No such option: --expert-group" in refusal(tmp_path, document)


def test_what_no_shell_can_read_is_refused(tmp_path: Path, document: dict[str, Any]) -> None:
    document["head_start_ray_commands"][-1] += ' --api-key-file "keys'
    assert "must be what a shell can read (No closing quotation)" in refusal(tmp_path, document)


def test_a_file_that_starts_no_service_is_refused(tmp_path: Path, document: dict[str, Any]) -> None:
    del document["head_start_ray_commands"][-1]
    assert "must hold one command that begins with `expertmesh service start --`" in refusal(
        tmp_path, document
    )


def test_files_that_are_not_here_are_named(tmp_path: Path, document: dict[str, Any]) -> None:
    document["file_mounts"]["~/expertmesh/router"] = "ruter"
    document["auth"]["ssh_private_key"] = "/no/such/key"
    refused = refusal(tmp_path, document)
    assert "cluster file.file_mounts[~/expertmesh/router] must exist here" in refused
    assert "cluster file.auth.ssh_private_key must be a file" in refused


@pytest.mark.parametrize("target", ["aws", "gcp"])
def test_what_the_user_must_fill_in_is_named(
    tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    document = yaml.safe_load((ROOT / f"infra/ray/{target}.yaml").read_text())
    refused = refusal(tmp_path, document)
    assert refused.count("must be filled in") >= 3, refused


def test_machines_that_do_not_answer_are_named(tmp_path: Path, document: dict[str, Any]) -> None:
    document["provider"].update(head_ip="127.0.0.1", worker_ips=["127.0.0.1"])
    document["auth"]["ssh_user"] = "nobody-of-that-name"
    answer = CliRunner().invoke(app, ["up", "--check", str(written(tmp_path, document))])
    assert answer.exit_code == 4, answer.output
    assert "ssh nobody-of-that-name@127.0.0.1: " in answer.stderr


def test_a_file_that_is_no_text_and_a_provider_that_is_no_mapping_are_refused(
    tmp_path: Path,
) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigurationError, match="not UTF-8 text"):
        read_cluster_file(path)
    path.write_text("cluster_name: x\nprovider: local\n")
    with pytest.raises(ConfigurationError, match=r"provider 'local' is not of type 'object'"):
        read_cluster_file(path)


def test_no_file_and_no_yaml_are_configuration_errors(tmp_path: Path) -> None:
    answer = CliRunner().invoke(app, ["up", str(tmp_path / "none.yaml")])
    assert answer.exit_code == 3
    assert "must be a readable file (No such file or directory)" in answer.stderr
    (tmp_path / "bad.yaml").write_text("a: [")
    answer = CliRunner().invoke(app, ["down", str(tmp_path / "bad.yaml")])
    assert answer.exit_code == 3
    assert "must be valid YAML" in answer.stderr
