"""Addresses that a user may give, and what is wrong with the others."""

from __future__ import annotations

import pytest

from protos.errors import ConfigurationError
from protos.tls import Access, ClientTls


@pytest.mark.parametrize(
    "address", ["", "grpcs://", "127.0.0.1:65536", "grpc://127.0.0.1:99999", "http://127.0.0.1:1"]
)
def test_what_is_no_address_is_refused_before_anybody_is_called(address: str) -> None:
    with pytest.raises(ConfigurationError, match="must be host:port") as caught:
        Access().channel(address)
    assert caught.value.violations[0].value == address


def test_a_plain_address_is_refused_where_tls_is_configured() -> None:
    with pytest.raises(ConfigurationError, match="must not be grpc://"):
        Access(tls=ClientTls()).channel("grpc://127.0.0.1:1")


@pytest.mark.parametrize("address", ["127.0.0.1:65535", "[::1]:1", "host", "grpc://host:1"])
def test_what_is_an_address_is_taken(address: str) -> None:
    Access().channel(address).close()
