"""Certificates that tests make for themselves, and that are worth nothing a minute later."""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

SERVER_ONLY = (ExtendedKeyUsageOID.SERVER_AUTH,)
HOST = "127.0.0.1"


@dataclass(frozen=True)
class Issued:
    """A certificate, its key, and the files of both."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey
    certfile: Path
    keyfile: Path


class Authority:
    """A CA whose files lie in `folder`.

    Args:
        folder: Of its own certificate and of all that it issues.
        name: Sets it apart from others.
    """

    def __init__(self, folder: Path, name: str = "ca") -> None:
        self._folder = folder
        self._own = self._make(name, None, is_ca=True, days=1, names=(), usages=())

    @property
    def certfile(self) -> Path:
        """What its clients trust."""
        return self._own.certfile

    def issue(
        self,
        name: str,
        *,
        names: Sequence[str] = ("mesh.test", HOST),
        days: int = 1,
        usages: Sequence[x509.ObjectIdentifier] = (),
    ) -> Issued:
        """Write a certificate for these DNS names and addresses; it ends in `days`."""
        return self._make(name, self._own, is_ca=False, days=days, names=names, usages=usages)

    def _make(
        self,
        name: str,
        issuer: Issued | None,
        *,
        is_ca: bool,
        days: int,
        names: Sequence[str],
        usages: Sequence[x509.ObjectIdentifier],
    ) -> Issued:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer.certificate.subject if issuer else subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=30))
            .not_valid_after(now + datetime.timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
        )
        if names:
            found = [_general_name(text) for text in names]
            builder = builder.add_extension(x509.SubjectAlternativeName(found), critical=False)
        if usages:
            builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        certificate = builder.sign(issuer.key if issuer else key, hashes.SHA256())
        certfile, keyfile = self._folder / f"{name}.pem", self._folder / f"{name}.key"
        certfile.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        keyfile.write_bytes(key_pem(key))
        return Issued(certificate, key, certfile, keyfile)


def key_pem(key: ec.EllipticCurvePrivateKey, password: bytes | None = None) -> bytes:
    """Return a key as a file holds it."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(password)
        if password
        else serialization.NoEncryption(),
    )


def _general_name(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)
