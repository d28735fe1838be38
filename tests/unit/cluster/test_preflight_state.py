"""What a server's own words say about its fitness for a role."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from cluster.config import StateSection
from cluster.preflight_state import check_state_servers, judge, state_urls
from protos.errors import ConfigurationError, StateUnavailableError

GOOD_META: dict[str, Any] = {
    "redis_version": "7.0.15",
    "maxmemory": 1 << 30,
    "maxmemory_policy": "noeviction",
    "aof_enabled": 1,
    "role": "master",
}
GOOD_BLOB: dict[str, Any] = {
    "redis_version": "7.2.4",
    "maxmemory": 1 << 30,
    "maxmemory_policy": "volatile-ttl",
    "aof_enabled": 0,
    "role": "master",
}


def test_good_servers_pass_without_a_word() -> None:
    assert judge(["meta"], GOOD_META) == ("", [])
    assert judge(["blob"], GOOD_BLOB) == ("", [])


@pytest.mark.parametrize(
    ("roles", "info", "error"),
    [
        (["meta"], {"redis_version": "6.2.14"}, "must be Redis 7.0 or newer, has 6.2.14"),
        (["blob"], {"redis_version": "6.2.14"}, "must be Redis 7.0 or newer, has 6.2.14"),
        (["blob"], {}, "must be Redis 7.0 or newer, has 0"),
        (["meta"], GOOD_META | {"maxmemory_policy": "allkeys-lru"}, "it evicts sessions; has allk"),
        (["meta", "blob"], GOOD_BLOB, "it evicts sessions; has volatile-ttl"),
        (["meta"], GOOD_META | {"role": "slave"}, "must be a primary"),
    ],
)
def test_what_cannot_work_is_refused(roles: list[str], info: dict[str, Any], error: str) -> None:
    assert error in judge(roles, info)[0]


@pytest.mark.parametrize(
    ("roles", "info", "note"),
    [
        (["meta"], GOOD_META | {"aof_enabled": 0}, "a restart of it loses all sessions"),
        (["meta", "blob"], GOOD_META, "sessions are refused"),
        (["blob"], GOOD_BLOB | {"maxmemory": 0}, "has no maxmemory"),
        (["blob"], GOOD_BLOB | {"maxmemory_policy": "noeviction"}, "takes nothing new"),
        (["blob"], GOOD_BLOB | {"aof_enabled": 1}, "which a cache does not need"),
    ],
)
def test_what_may_not_be_meant_is_said(roles: list[str], info: dict[str, Any], note: str) -> None:
    error, notes = judge(roles, info)
    assert error == ""
    assert any(note in text for text in notes), notes


def test_replicas_that_lack_are_counted() -> None:
    (note,) = judge(["meta"], GOOD_META | {"connected_slaves": 1}, 2)[1]
    assert note.startswith("has 1 replicas: sessions are refused until there are 2")
    assert judge(["meta"], GOOD_META | {"connected_slaves": 2}, 2) == ("", [])
    assert judge(["blob"], GOOD_BLOB, 2) == ("", [])


def test_each_url_stands_in_for_the_other() -> None:
    assert state_urls(StateSection()) == (None, ())
    assert state_urls(StateSection(redis_url="redis://m")) == ("redis://m", ("redis://m",))
    blobs = ("redis://a", "redis://b")
    assert state_urls(StateSection(blob_urls=blobs)) == ("redis://a", blobs)
    assert state_urls(StateSection(redis_url="redis://m", blob_urls=blobs)) == ("redis://m", blobs)


def test_a_url_that_is_none_and_a_server_that_is_not_there_are_named() -> None:
    with pytest.raises(ConfigurationError, match=r"state\.redis_url must begin with redis://"):
        check_state_servers(StateSection(redis_url="http://:hush@x"))
    with socket.create_server(("127.0.0.1", 0)) as closed_soon:
        port = closed_soon.getsockname()[1]
    with pytest.raises(StateUnavailableError) as caught:
        check_state_servers(StateSection(redis_url=f"redis://:hush@127.0.0.1:{port}"))
    assert f"redis://127.0.0.1:{port}/0" in caught.value.message
    assert "hush" not in caught.value.message
