"""TLS and API keys on a gRPC connection, on both ends.

`ServerTls` is what a port shows and demands, `ClientTls` what a caller trusts and shows, `Access`
the whole way to a port: TLS or plain, with an API key or without. All hold PEM bytes;
`protos.certificates` reads the files of a service and checks them before anything starts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from protos.errors import ConfigurationError

PLAIN_SCHEME, TLS_SCHEME = "grpc://", "grpcs://"
API_KEY_HEADER = "authorization"
API_KEY_PREFIX = "Bearer "
MAX_PORT = 65535

ChannelOptions = Sequence[tuple[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerTls:
    """What a port shows, and what it demands of callers."""

    key: bytes = field(repr=False)
    certificate: bytes
    """The port's certificate first, then the ones that lead to its CA."""
    client_ca: bytes | None = None
    """Callers must show a certificate that one of these signed; None: no certificate is asked."""

    def credentials(self) -> grpc.ServerCredentials:
        """Return what `add_secure_port` takes."""
        return grpc.ssl_server_credentials(
            [(self.key, self.certificate)], self.client_ca, self.client_ca is not None
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientTls:
    """What a caller trusts, and what it shows. With no field set: the public CAs that gRPC knows.

    A `server_name` is expected in the server's certificate instead of the address's host: members
    of a service call each other by numbers that no certificate names.
    """

    ca: bytes | None = None
    certificate: bytes | None = None
    key: bytes | None = field(default=None, repr=False)
    server_name: str | None = None

    @classmethod
    def from_files(
        cls,
        ca: str | Path | None = None,
        certificate: str | Path | None = None,
        key: str | Path | None = None,
        *,
        server_name: str | None = None,
    ) -> ClientTls:
        """Read PEM files.

        Raises:
            ConfigurationError: A file that cannot be read, or a certificate without its key.
        """
        if (certificate is None) != (key is None):
            rule = "must be set too: a client certificate and its key come together"
            raise ConfigurationError("tls_key" if certificate else "tls_cert", rule, "")
        return cls(
            ca=_read("tls_ca", ca),
            certificate=_read("tls_cert", certificate),
            key=_read("tls_key", key),
            server_name=server_name,
        )

    def credentials(self) -> grpc.ChannelCredentials:
        """Return what `secure_channel` takes."""
        return grpc.ssl_channel_credentials(self.ca, self.key, self.certificate)

    def options(self) -> ChannelOptions:
        """Return the channel options that belong to it."""
        if self.server_name is None:
            return ()
        return (("grpc.ssl_target_name_override", self.server_name),)


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """How to reach a port. Without TLS everything, the API key too, travels readable."""

    tls: ClientTls | None = None
    api_key: str | None = field(default=None, repr=False)

    def channel(self, address: str, options: ChannelOptions = ()) -> grpc.Channel:
        """Return a channel for threads; the caller closes it.

        Args:
            address: `host:port`, `grpcs://host:port` (TLS) or `grpc://host:port` (plain).
            options: Of the channel.

        Raises:
            ConfigurationError: A plain address with TLS files, or another scheme.
        """
        target, tls = self._target(address)
        if tls is None:
            channel = grpc.insecure_channel(target, options=options)
        else:
            channel = grpc.secure_channel(target, tls.credentials(), [*options, *tls.options()])
        keyed: grpc.Channel = self._keyed(channel)
        return keyed

    def aio_channel(self, address: str, options: ChannelOptions = ()) -> grpc.aio.Channel:
        """Return a channel for the running event loop; see `channel`."""
        target, tls = self._target(address)
        if tls is None:
            channel = grpc.aio.insecure_channel(target, options=options)
        else:
            channel = grpc.aio.secure_channel(target, tls.credentials(), [*options, *tls.options()])
        keyed: grpc.aio.Channel = self._keyed(channel)
        return keyed

    def _target(self, address: str) -> tuple[str, ClientTls | None]:
        scheme, separator, target = address.rpartition("://")
        port = target.rpartition(":")[2]
        if not target or (port.isdigit() and int(port) > MAX_PORT):  # gRPC would take another one
            raise ConfigurationError(
                "address", f"must be host:port with a port of at most {MAX_PORT}", address
            )
        if not separator:
            return address, self.tls
        if scheme + separator == TLS_SCHEME:
            return target, self.tls or ClientTls()
        if scheme + separator != PLAIN_SCHEME:
            raise ConfigurationError(
                "address", "must be host:port, grpcs://host:port or grpc://host:port", address
            )
        if self.tls is not None:
            raise ConfigurationError(
                "address", "must not be grpc:// (plain) when TLS is configured", address
            )
        return target, None

    def _keyed(self, channel: Any) -> Any:
        if self.api_key is None:
            return channel
        check_api_key(self.api_key, "api_key")
        return _KeyedChannel(channel, (API_KEY_HEADER, API_KEY_PREFIX + self.api_key))


def check_api_key(key: str, path: str) -> str:
    """Return the key when a header can carry it; the error never shows it.

    Raises:
        ConfigurationError: Empty, or with characters other than visible ASCII, or a comma.
    """
    if not key or not all("!" <= c <= "~" and c != "," for c in key):
        raise ConfigurationError(
            path, "must be visible ASCII characters without spaces and commas", "(hidden)"
        )
    return key


class _KeyedChannel:
    """A sync or async channel whose every call carries one more header, unless it has it already.

    A wrapper and no interceptor: those add a layer of objects to every asynchronous stream.
    """

    def __init__(self, channel: Any, header: tuple[str, str]) -> None:
        self._channel = channel
        self._header = header
        self.close = channel.close

    def unary_unary(self, *arguments: Any, **options: Any) -> Callable[..., Any]:
        return self._with_header(self._channel.unary_unary(*arguments, **options))

    def unary_stream(self, *arguments: Any, **options: Any) -> Callable[..., Any]:
        return self._with_header(self._channel.unary_stream(*arguments, **options))

    def stream_unary(self, *arguments: Any, **options: Any) -> Callable[..., Any]:
        return self._with_header(self._channel.stream_unary(*arguments, **options))

    def stream_stream(self, *arguments: Any, **options: Any) -> Callable[..., Any]:
        return self._with_header(self._channel.stream_stream(*arguments, **options))

    def __enter__(self) -> _KeyedChannel:
        self._channel.__enter__()
        return self

    def __exit__(self, *what: Any) -> Any:
        return self._channel.__exit__(*what)

    async def __aenter__(self) -> _KeyedChannel:
        await self._channel.__aenter__()
        return self

    async def __aexit__(self, *what: Any) -> None:
        await self._channel.__aexit__(*what)

    def _with_header(self, method: Any) -> Callable[..., Any]:
        def call(*arguments: Any, metadata: Any = (), **options: Any) -> Any:
            given = tuple(metadata or ())
            if all(name != self._header[0] for name, _ in given):
                given += (self._header,)
            return method(*arguments, metadata=given, **options)

        return call


def _read(path: str, file: str | Path | None) -> bytes | None:
    if file is None:
        return None
    try:
        return Path(file).read_bytes()
    except OSError as error:
        rule = f"must be a readable file ({error.strerror})"
        raise ConfigurationError(path, rule, str(file)) from None
