"""Where a Redis or Valkey server is and how to get in; read from a URL, never printed with secrets.

Decides how a URL becomes an address and a TLS context; opens no connection. The control path
(`redis.asyncio`) and the bulk path (plain sockets) both start here, so one URL means one thing.

    redis://user:password@host:6379/0
    rediss://user:password@host:6380/0?ca=/path/ca.pem&cert=/path/me.pem&key=/path/me.key
    unix://user:password@/path/redis.sock?db=0

User, password and path are percent-encoded where they hold `/ @ : ? # %`.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlencode, urlsplit

from protos.errors import ConfigurationError

DEFAULT_PORT = 6379
_SCHEMES = ("redis", "rediss", "unix")
_TLS_OPTIONS = ("ca", "cert", "key")


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One server of one role. `str()` and `repr()` show neither user nor password."""

    host: str = ""
    """Name or address; empty where `path` is set."""
    port: int = DEFAULT_PORT
    """TCP port."""
    path: str = ""
    """Unix socket; empty where `host` is set."""
    db: int = 0
    """Number of the database, 0 or more."""
    username: str | None = field(default=None, repr=False)
    """ACL user; None is the server's `default`."""
    password: str | None = field(default=None, repr=False)
    """Password; None sends no AUTH."""
    tls: bool = False
    """Whether the server is spoken to in TLS; its certificate and name are always checked."""
    ca: str | None = None
    """File of the certificates to trust; None trusts the system's."""
    cert: str | None = None
    """File of our certificate, where the server asks for one."""
    key: str | None = None
    """File of our certificate's key; None where `cert` holds it too."""

    @classmethod
    def parse(cls, url: str, setting: str = "state.redis_url") -> Endpoint:
        """Read a URL.

        Args:
            url: As in the module's docstring.
            setting: Dotted path of the setting, named in the error.

        Raises:
            ConfigurationError: The URL breaks a rule; the error shows it without its secrets.
        """
        try:
            return cls._parse(url)
        except ValueError as error:
            # The parser's own text and traceback may hold the password.
            rule = str(error) if isinstance(error, _RuleError) else "must be a URL"
        raise ConfigurationError(setting, rule, masked(url))

    @classmethod
    def _parse(cls, url: str) -> Endpoint:
        parts = urlsplit(url.strip())
        if parts.scheme not in _SCHEMES:
            raise _RuleError(f"must begin with {', '.join(s + '://' for s in _SCHEMES)}")
        if parts.fragment:
            raise _RuleError("must hold no '#'; write %23 inside a password")
        options = _options(parts)
        username, password = _text(parts.username), _text(parts.password)
        if username and password is None:
            raise _RuleError("must give a password with the user")
        if parts.scheme == "unix":
            path = unquote(parts.path)
            if parts.hostname or not path.startswith("/"):
                raise _RuleError("must give the socket's absolute path (unix:///run/redis.sock)")
            db = _db(options.get("db", "0"))
            return cls(path=path, port=0, db=db, username=username, password=password)
        if not parts.hostname:
            raise _RuleError("must name a host")
        try:
            port = DEFAULT_PORT if parts.port is None else parts.port
        except ValueError:
            port = 0
        if not port:
            raise _RuleError("must have a port in [1, 65535]")
        if options.get("key") and not options.get("cert"):
            raise _RuleError("must give cert with key")
        return cls(
            host=unquote(parts.hostname),
            port=port,
            db=_db(parts.path.lstrip("/") or "0"),
            username=username,
            password=password,
            tls=parts.scheme == "rediss",
            ca=options.get("ca"),
            cert=options.get("cert"),
            key=options.get("key"),
        )

    def __str__(self) -> str:
        """Return the URL without user, password and options: names the server in logs."""
        if self.path:
            return f"unix://{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"redis{'s' * self.tls}://{host}:{self.port}/{self.db}"

    def url(self) -> str:
        """Return the URL with its secrets, for handing to another process of ours; never log it."""
        user = quote(self.username or "", safe="")
        secret = "" if self.password is None else f"{user}:{quote(self.password, safe='')}@"
        if self.path:
            return f"unix://{secret}{quote(self.path)}?db={self.db}"
        options = {name: value for name in _TLS_OPTIONS if (value := getattr(self, name))}
        query = f"?{urlencode(options)}" if options else ""
        scheme, _, rest = str(self).partition("://")
        return f"{scheme}://{secret}{rest}{query}"

    def ssl_context(self) -> ssl.SSLContext | None:
        """Return the TLS context, which checks certificate and host name; None without TLS.

        Raises:
            ConfigurationError: A file cannot be read or holds no certificate.
        """
        if not self.tls:
            return None
        context = ssl.create_default_context()
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            name, file = "ca", self.ca
            if file:
                context = ssl.create_default_context(cafile=file)
            name, file = "cert", self.cert
            if file:
                context.load_cert_chain(file, self.key)
        except OSError as error:  # ssl.SSLError is one
            raise ConfigurationError(
                f"{name} of {self}",
                f"must be readable PEM ({error.strerror or type(error).__name__})",
                file,
            ) from None
        return context

    def redis_arguments(self) -> dict[str, Any]:
        """Return the arguments of `redis.asyncio.Redis` that name this server."""
        found: dict[str, Any] = {
            "db": self.db,
            "username": self.username,
            "password": self.password,
        }
        if self.path:
            return {**found, "unix_socket_path": self.path}
        found |= {"host": self.host, "port": self.port}
        if self.tls:
            self.ssl_context()  # raises here what would else be a connection's error
            found |= {
                "ssl": True,
                "ssl_ca_certs": self.ca,
                "ssl_certfile": self.cert,
                "ssl_keyfile": self.key,
                "ssl_check_hostname": True,
                "ssl_min_version": ssl.TLSVersion.TLSv1_2,
            }
        return found


class _RuleError(ValueError):
    """A rule that a URL broke; the text holds nothing of the URL."""


def masked(url: str) -> str:
    """Return a URL for people: no user, no password, no options; works on malformed ones too."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        scheme, rest = "", url
    if "@" in rest:
        rest = "***@" + rest.rpartition("@")[2]
    return scheme + separator + rest.partition("?")[0]


def _options(parts: SplitResult) -> dict[str, str]:
    known = {"redis": (), "rediss": _TLS_OPTIONS, "unix": ("db",)}[parts.scheme]
    pairs = parse_qsl(parts.query, keep_blank_values=True)
    for name, _ in pairs:
        if name not in known:
            allowed = ", ".join(known) or "none"
            raise _RuleError(f"must have only known options ({parts.scheme}: {allowed})")
    return dict(pairs)


def _db(text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise _RuleError("must end in the number of a database, 0 or more")
    return int(text)


def _text(quoted: str | None) -> str | None:
    return unquote(quoted) if quoted else None
