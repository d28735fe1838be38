"""The certificates of a service: read, and tried before anything starts.

A file that is missing, a key of another certificate or a certificate that has expired would show
as an unreachable port an hour later, on the client's side. So the files are used at once for a TLS
handshake in memory, and what is wrong has a sentence and the setting's name.

A *port's* certificate is pinned by the members of the service that call the port: they trust this
one certificate, whoever signed it, and show it themselves where clients need certificates. The
*cluster's* certificate works through its CA: whoever holds one that the CA signed is a member.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from protos.errors import ConfigurationError
from protos.tls import ClientTls, ServerTls

_BEGIN, _END = b"-----BEGIN CERTIFICATE-----", b"-----END CERTIFICATE-----"
_EXPIRED, _NOT_YET_VALID, _WRONG_PURPOSE = 10, 9, 26
"""OpenSSL's verify codes."""
_MAX_FLIGHTS = 10
"""Exchanges of a handshake in memory; TLS 1.3 takes three."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CertificateFiles:
    """Three PEM files, and the section of the configuration that names them."""

    section: str
    keyfile: str | None = None
    certfile: str | None = None
    ca_certs: str | None = None


class Identity(NamedTuple):
    """What a member of the service shows, and how it calls others of its kind."""

    server: ServerTls
    peer: ClientTls
    expires_at_s: float
    """Seconds since the epoch."""


def port_identity(files: CertificateFiles) -> Identity | None:
    """Return the identity of a port for clients; None where no file is named.

    With `ca_certs` clients must show a certificate of these CAs, or the port's own.

    Raises:
        ConfigurationError: A file that is missing, unreadable or no PEM, a key that does not match,
            a certificate that has expired, names no host, or is for servers only where members
            have to show it.
    """
    read = _Files.read(files)
    if read is None:
        return None
    leaf = _leaf(read.chain)
    facts = read.handshake(trusted=leaf, demanded=None)
    if read.ca is not None and read.is_signed_by(read.ca):
        # Then gRPC follows the chain to this CA instead of the pinned leaf, and minds the usage.
        read.handshake(trusted=read.ca, demanded=read.ca)
    return Identity(
        server=ServerTls(
            key=read.key,
            certificate=read.chain,
            client_ca=None if read.ca is None else read.ca + b"\n" + leaf,
        ),
        peer=ClientTls(ca=leaf, certificate=read.chain, key=read.key, server_name=facts.name),
        expires_at_s=facts.expires_at_s,
    )


def member_identity(files: CertificateFiles) -> Identity | None:
    """Return the identity of a member of the cluster, which only members may call.

    Raises:
        ConfigurationError: As `port_identity`; no CA, or a certificate that the CA did not sign or
            that is not for servers and clients both.
    """
    read = _Files.read(files)
    if read is None:
        return None
    if read.ca is None:
        raise _wrong(files, "ca_certs", "must be set: members know each other by their CA", "")
    facts = read.handshake(trusted=read.ca, demanded=read.ca)
    return Identity(
        server=ServerTls(key=read.key, certificate=read.chain, client_ca=read.ca),
        peer=ClientTls(ca=read.ca, certificate=read.chain, key=read.key, server_name=facts.name),
        expires_at_s=facts.expires_at_s,
    )


class _Facts(NamedTuple):
    name: str
    expires_at_s: float


class _Files(NamedTuple):
    """The contents of `CertificateFiles`."""

    files: CertificateFiles
    key: bytes
    chain: bytes
    ca: bytes | None

    @classmethod
    def read(cls, files: CertificateFiles) -> _Files | None:
        if files.keyfile is None and files.certfile is None:
            if files.ca_certs is not None:
                rule = "needs ssl_certfile and ssl_keyfile: plain ports ask for no certificates"
                raise _wrong(files, "ca_certs", rule, files.ca_certs)
            return None
        key = _read(files, "keyfile", files.keyfile, b"PRIVATE KEY-----")
        chain = _read(files, "certfile", files.certfile, _BEGIN)
        ca = None
        if files.ca_certs is not None:
            ca = _read(files, "ca_certs", files.ca_certs, _BEGIN)
        return cls(files, key, chain, ca)

    def handshake(self, *, trusted: bytes, demanded: bytes | None) -> _Facts:
        """Let this certificate call itself.

        Args:
            trusted: What the caller trusts.
            demanded: What the port demands of callers' certificates; None: no certificate.

        Raises:
            ConfigurationError: What stands in the way.
        """
        server = self._context(ssl.PROTOCOL_TLS_SERVER)
        client = self._context(ssl.PROTOCOL_TLS_CLIENT)
        client.check_hostname = False
        client.verify_flags |= ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN
        self._trust(client, "certfile" if demanded is None else "ca_certs", trusted)
        if demanded is not None:
            server.verify_mode = ssl.CERT_REQUIRED
            server.verify_flags |= ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN
            self._trust(server, "ca_certs", demanded)
        elif self.ca is not None:
            self._trust(server, "ca_certs", self.ca)
        try:
            facts = _handshake(server, client)
        except ssl.SSLCertVerificationError as error:
            raise self._refused(error) from None
        except ssl.SSLError as error:
            raise _wrong(self.files, "certfile", f"cannot be used: {error}", "") from None
        names = [name for kind, name in facts.get("subjectAltName", ()) if kind == "DNS"]
        names += [name for kind, name in facts.get("subjectAltName", ()) if kind == "IP Address"]
        if not names:
            rule = "must name a host or an address (subjectAltName)"
            raise _wrong(self.files, "certfile", rule, self.files.certfile)
        return _Facts(
            names[0].replace("*", "member", 1), ssl.cert_time_to_seconds(facts["notAfter"])
        )

    def is_signed_by(self, ca: bytes) -> bool:
        """Whether a caller that trusts `ca` takes the certificate."""
        try:
            self.handshake(trusted=ca, demanded=None)
        except ConfigurationError:
            return False
        return True

    def _context(self, protocol: int) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        assert self.files.certfile is not None
        try:
            context.load_cert_chain(self.files.certfile, self.files.keyfile, _no_password)
        except _EncryptedKeyError:
            rule = "must not be protected by a password"
            raise _wrong(self.files, "keyfile", rule, self.files.keyfile) from None
        except ssl.SSLError as error:
            if error.reason == "KEY_VALUES_MISMATCH":
                rule = f"does not belong to the certificate {self.files.certfile}"
                raise _wrong(self.files, "keyfile", rule, self.files.keyfile) from None
            rule = f"cannot be used with {self.files.keyfile}: {error.reason or error}"
            raise _wrong(self.files, "certfile", rule, self.files.certfile) from None
        return context

    def _trust(self, context: ssl.SSLContext, setting: str, roots: bytes) -> None:
        try:
            context.load_verify_locations(cadata=roots.decode("ascii", "replace"))
        except ssl.SSLError as error:
            value = getattr(self.files, setting)
            rule = f"holds no usable certificate: {error.reason or error}"
            raise _wrong(self.files, setting, rule, value) from None

    def _refused(self, error: ssl.SSLCertVerificationError) -> ConfigurationError:
        rule = {
            _EXPIRED: "has expired",
            _NOT_YET_VALID: "is not valid yet; compare this machine's clock",
            _WRONG_PURPOSE: "must be for servers and for clients (extendedKeyUsage): members of the"
            " service show it when they call each other",
        }.get(error.verify_code)
        if rule is None:
            signer = self.files.ca_certs
            rule = f"is refused by a member that trusts {signer}: {error.verify_message}"
        return _wrong(self.files, "certfile", rule, self.files.certfile)


class _EncryptedKeyError(Exception):
    """A key that asks for a password."""


def _no_password() -> str:
    raise _EncryptedKeyError


def _read(files: CertificateFiles, setting: str, path: str | None, marker: bytes) -> bytes:
    if path is None:
        other = "certfile" if setting == "keyfile" else "keyfile"
        raise _wrong(files, setting, f"must be set too, as ssl_{other} is", "")
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        rule = f"must be a readable file ({error.strerror})"
        raise _wrong(files, setting, rule, path) from None
    if marker not in content:
        what = "private key" if setting == "keyfile" else "certificate"
        raise _wrong(files, setting, f"must hold a {what} in PEM form", path)
    return content


def _wrong(
    files: CertificateFiles, setting: str, rule: str, value: str | None
) -> ConfigurationError:
    return ConfigurationError(f"{files.section}.ssl_{setting}", rule, value)


def _leaf(chain: bytes) -> bytes:
    """Return the first certificate of a file."""
    start = chain.index(_BEGIN)
    return chain[start : chain.index(_END, start) + len(_END)] + b"\n"


def _handshake(server: ssl.SSLContext, client: ssl.SSLContext) -> Any:
    """Connect two contexts in memory and return what the client learnt of the certificate.

    Raises:
        ssl.SSLError: Either side refused.
    """
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    near = client.wrap_bio(to_client, to_server)
    far = server.wrap_bio(to_server, to_client, server_side=True)
    waiting: list[Callable[[], None]] = [near.do_handshake, far.do_handshake]
    for _ in range(_MAX_FLIGHTS):
        for side in list(waiting):
            try:
                side()
            except ssl.SSLWantReadError:
                continue
            waiting.remove(side)
    return near.getpeercert()
