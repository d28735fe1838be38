"""Certificates and keys of a service: read from the configuration, never shown."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from cluster.config import Config
from cluster.config_loading import load_config
from cluster.preflight import quick_checks
from cluster.security import Security, config_of_group, load_security
from protos.errors import ConfigurationError, UnauthenticatedError
from router.gateway.authentication import ApiKey
from tests.certificates import SERVER_ONLY, Authority
from tests.integration.served import run_cli

SECRET = "sk-very-secret"


@pytest.fixture
def pki(tmp_path: Path) -> dict[str, Any]:
    """Settings of a service with certificates everywhere."""
    port_ca, member_ca = Authority(tmp_path, "port-ca"), Authority(tmp_path, "member-ca")
    clients = Authority(tmp_path, "clients")
    port = port_ca.issue("port", names=("mesh.test",), usages=SERVER_ONLY)
    member = member_ca.issue("member", names=("member.test",), days=30)
    return {
        "router.ssl_keyfile": str(port.keyfile),
        "router.ssl_certfile": str(port.certfile),
        "router.ssl_ca_certs": str(clients.certfile),
        "cluster.ssl_keyfile": str(member.keyfile),
        "cluster.ssl_certfile": str(member.certfile),
        "cluster.ssl_ca_certs": str(member_ca.certfile),
    }


def configured(**settings: Any) -> Config:
    return load_config({name.replace("__", "."): v for name, v in settings.items()}).config


def security(**settings: Any) -> Security:
    return load_security(configured(**settings))


def test_nothing_is_configured_and_nothing_is_demanded() -> None:
    found = security()
    assert (found.port, found.member, found.api_keys) == (None, None, ())
    assert found.to_routers == found.to_groups
    assert found.to_routers.tls is found.to_routers.api_key is None


def test_everything_is_configured(pki: dict[str, Any]) -> None:
    found = load_security(load_config({**pki, "router.api_keys": ["a", "b"]}).config)
    assert found.port is not None
    assert found.member is not None
    assert found.to_routers.tls == found.port.peer
    assert found.to_routers.api_key == "a"
    assert found.to_groups.tls == found.member.peer
    assert found.to_groups.api_key is None, "groups know no keys"


def test_keys_come_from_settings_and_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# of the team\n{SECRET}\n\n  second  \nfirst\n")
    found = security(router__api_keys=["first"], router__api_key_file=str(file))
    assert found.api_keys == (ApiKey("first"), ApiKey(SECRET), ApiKey("second"))
    environment = load_config(env={"EXPERTMESH_ROUTER__API_KEYS": "one,two"}).config
    assert load_security(environment).api_keys == (ApiKey("one"), ApiKey("two"))


def test_a_key_may_name_its_tenant(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("plain:with:colons\nteam-b   key-b\nteam-b key-c\n")
    found = security(router__api_keys=["team-a key-a"], router__api_key_file=str(file))
    assert found.api_keys == (
        ApiKey("key-a", "team-a"),
        ApiKey("plain:with:colons"),
        ApiKey("key-b", "team-b"),
        ApiKey("key-c", "team-b"),
    )
    assert found.to_routers.api_key == "plain:with:colons", "a tenant's may not change the service"
    assert found.as_tenant("team-b").api_key == "key-b"
    with pytest.raises(UnauthenticatedError, match="the tenant 'team-c' has no API key"):
        found.as_tenant("team-c")
    assert security().as_tenant("team-c").api_key is None, "nobody needs one"
    environment = load_config(env={"EXPERTMESH_ROUTER__API_KEYS": "a one,two"}).config
    assert load_security(environment).api_keys == (ApiKey("one", "a"), ApiKey("two"))
    assert "key-" not in repr(found)


def test_wrong_keys_and_files_are_refused_without_showing_them(tmp_path: Path) -> None:
    bad = tmp_path / "keys"
    bad.write_text(f"{SECRET} with spaces")
    empty = tmp_path / "empty"
    empty.write_text("# nothing\n")
    for settings, field, rule in (
        ({"router__api_keys": [f"{SECRET}\n"]}, "router.api_keys", "visible ASCII"),
        ({"router__api_keys": [""]}, "router.api_keys", "visible ASCII"),
        ({"router__api_key_file": str(bad)}, "router.api_key_file", "or a tenant's name"),
        ({"router__api_keys": [f"a/b {SECRET}"]}, "router.api_keys", "or a tenant's name"),
        ({"router__api_keys": [f"a {SECRET}é"]}, "router.api_keys", "visible ASCII"),
        ({"router__api_keys": [f"a {SECRET}", SECRET]}, "router.api_keys", "two tenants"),
        ({"router__api_key_file": str(empty)}, "router.api_key_file", "must hold a key"),
        ({"router__api_key_file": str(tmp_path / "no")}, "router.api_key_file", "No such file"),
    ):
        with pytest.raises(ConfigurationError, match=rule) as raised:
            security(**settings)
        assert raised.value.violations[0].field == field
        assert SECRET not in str(raised.value)
    with pytest.raises(ConfigurationError) as raised:
        load_config({"router.api_keys": SECRET})
    assert SECRET not in str(raised.value)


def test_a_key_is_shown_nowhere(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(f'[router]\napi_keys = ["{SECRET}"]\n')
    for flags in ((), ("--json",)):
        shown = run_cli("config", "show", "--config", str(file), *flags)
        assert shown.returncode == 0, shown.stderr
        assert SECRET not in shown.stdout
        assert "router.api_keys" in shown.stdout
    assert json.loads(shown.stdout)["router.api_keys"]["value"] == ["***"]
    config = load_config(file=file).config
    assert SECRET not in repr(config)
    assert SECRET not in repr(load_security(config))


def test_a_group_learns_no_key(pki: dict[str, Any]) -> None:
    given = load_config({**pki, "router.api_keys": [SECRET], "experts.groups": "2"}).config
    config = config_of_group(given)
    assert SECRET not in str(dataclasses.asdict(config))
    assert (config.experts, config.cluster) == (given.experts, given.cluster)


def test_the_preflight_reads_the_files(tmp_path: Path, pki: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text("{}")
    settings = {**pki, "model.checkpoint": str(tmp_path), "router.port": 0}
    assert quick_checks(load_config(settings).config) == ["router.ssl_certfile expires in 1.0 days"]
    for name in pki:
        wrong = {**settings, name: str(tmp_path / "none")}
        with pytest.raises(ConfigurationError, match="No such file") as raised:
            quick_checks(load_config(wrong).config)
        assert raised.value.violations[0].field == name


def test_an_open_port_is_noted(pki: dict[str, Any]) -> None:
    def notes(**settings: Any) -> str:
        config = load_config({"router.host": "0.0.0.0", **settings}).config
        return "; ".join(load_security(config).warnings(config, now_s=0.0))

    assert "whoever reaches 0.0.0.0 may use this service" in notes()
    assert "travel readable" in notes(**{"router.api_keys": ["a"]})
    port = {name: pki[name] for name in ("router.ssl_keyfile", "router.ssl_certfile")}
    assert "whoever reaches" in notes(**port)
    assert notes(**port, **{"router.api_keys": ["a"]}) == ""
    assert notes(**pki) == ""
    assert notes(**{"router.host": "127.0.0.1"}) == ""
