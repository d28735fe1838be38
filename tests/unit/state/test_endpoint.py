from __future__ import annotations

import ssl
import traceback
from pathlib import Path

import pytest

from protos.errors import ConfigurationError
from router.state.endpoint import Endpoint, masked

SECRET = "s3cret"


@pytest.mark.parametrize(
    ("url", "shown", "expected"),
    [
        ("redis://h", "redis://h:6379/0", Endpoint(host="h")),
        (
            "redis://u:p%40s%2Fx@h:7000/3",
            "redis://h:7000/3",
            Endpoint(host="h", port=7000, db=3, username="u", password="p@s/x"),
        ),
        (
            f"redis://:{SECRET}@127.0.0.1/",
            "redis://127.0.0.1:6379/0",
            Endpoint(host="127.0.0.1", password=SECRET),
        ),
        ("redis://[::1]:7000", "redis://[::1]:7000/0", Endpoint(host="::1", port=7000)),
        (
            "rediss://h/1?ca=%2Fetc%2Fca.pem&cert=c&key=k",
            "rediss://h:6379/1",
            Endpoint(host="h", db=1, tls=True, ca="/etc/ca.pem", cert="c", key="k"),
        ),
        (
            f"unix://u:{SECRET}@/run/redis%20x.sock?db=2",
            "unix:///run/redis x.sock",
            Endpoint(path="/run/redis x.sock", port=0, db=2, username="u", password=SECRET),
        ),
    ],
)
def test_a_url_names_a_server(url: str, shown: str, expected: Endpoint) -> None:
    endpoint = Endpoint.parse(url)
    assert endpoint == expected
    assert str(endpoint) == shown
    assert Endpoint.parse(endpoint.url()) == endpoint


@pytest.mark.parametrize(
    ("url", "rule"),
    [
        ("h:6379", "must begin with redis://, rediss://, unix://"),
        ("", "must begin with redis://, rediss://, unix://"),
        ("http://h", "must begin with redis://, rediss://, unix://"),
        ("redis://:6379", "must name a host"),
        ("redis://h:0", "must have a port in [1, 65535]"),
        ("redis://h:65536", "must have a port in [1, 65535]"),
        ("redis://h:x", "must have a port in [1, 65535]"),
        ("redis://h/-1", "must end in the number of a database, 0 or more"),
        ("redis://h/0?timeout=1", "must have only known options (redis: none)"),
        ("redis://h?ca=x", "must have only known options (redis: none)"),
        ("rediss://h?tls=0", "must have only known options (rediss: ca, cert, key)"),
        ("rediss://h?key=x", "must give cert with key"),
        ("redis://u@h", "must give a password with the user"),
        ("redis://h#x", "must hold no '#'; write %23 inside a password"),
        ("unix://run/redis.sock", "must give the socket's absolute path (unix:///run/redis.sock)"),
        ("redis://[::1", "must be a URL"),
    ],
)
def test_a_wrong_url_names_the_setting_and_the_rule(url: str, rule: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Endpoint.parse(url, "state.blob_urls[1]")
    assert [(v.field, v.rule) for v in caught.value.violations] == [("state.blob_urls[1]", rule)]


@pytest.mark.parametrize(
    "url",
    [
        f"redis://u:{SECRET}@h:x",
        f"redis://u:{SECRET}#{SECRET}@h",
        f"redis://u:{SECRET}/{SECRET}@h",
        f"redis://u:{SECRET}@{SECRET}@h:99999",
        f"u:{SECRET}@h",
        f"http://u:{SECRET}@h",
        f"redis://h?password={SECRET}",
        f"unix://u:{SECRET}@h/x",
        f"redis://[{SECRET}@h",
    ],
)
def test_no_error_shows_a_password(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Endpoint.parse(url)
    shown = "".join(traceback.format_exception(caught.value)) + str(caught.value.to_status())
    assert SECRET not in shown
    assert SECRET not in masked(url)


def test_an_endpoint_shows_no_password() -> None:
    endpoint = Endpoint.parse(f"redis://{SECRET}u:{SECRET}@h:1/2")
    assert SECRET not in f"{endpoint} {endpoint!r}"
    assert endpoint.redis_arguments() == {
        "host": "h",
        "port": 1,
        "db": 2,
        "username": f"{SECRET}u",
        "password": SECRET,
    }


def test_tls_checks_certificate_and_name() -> None:
    assert Endpoint.parse("redis://h").ssl_context() is None
    context = Endpoint.parse("rediss://h").ssl_context()
    assert context is not None
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname


@pytest.mark.parametrize("option", ["ca", "cert"])
def test_a_missing_certificate_is_a_configuration_error(option: str, tmp_path: Path) -> None:
    empty = tmp_path / "empty.pem"
    empty.write_text("")
    for file in (tmp_path / "missing.pem", empty):
        endpoint = Endpoint.parse(f"rediss://h:1?{option}={file}")
        with pytest.raises(
            ConfigurationError, match=f"{option} of rediss://h:1/0 must be readable"
        ):
            endpoint.redis_arguments()
