"""Certificate files: what is wrong with them is said before anything starts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from protos.certificates import CertificateFiles, member_identity, port_identity
from protos.errors import ConfigurationError
from tests.certificates import SERVER_ONLY, Authority, Issued, key_pem


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def files(issued: Issued, ca: Authority | Path | None = None) -> CertificateFiles:
    return CertificateFiles(
        section="router",
        keyfile=str(issued.keyfile),
        certfile=str(issued.certfile),
        ca_certs=str(getattr(ca, "certfile", ca)) if ca else None,
    )


def refusal(
    given: CertificateFiles, load: object = port_identity, path: str = "router.ssl_certfile"
) -> str:
    """The rule that `given` breaks; it is said of the setting `path`."""
    assert callable(load)
    with pytest.raises(ConfigurationError) as raised:
        load(given)
    (violation,) = raised.value.violations
    assert violation.field == path
    return violation.rule


def test_no_files_are_no_identity() -> None:
    assert port_identity(CertificateFiles(section="router")) is None
    assert member_identity(CertificateFiles(section="cluster")) is None


def test_a_port_is_pinned_by_its_peers(authority: Authority) -> None:
    issued = authority.issue("port", names=("*.mesh.test", "127.0.0.1"), usages=SERVER_ONLY)
    chain = issued.certfile.read_bytes() + authority.certfile.read_bytes()
    issued.certfile.write_bytes(chain)
    identity = port_identity(files(issued))
    assert identity is not None
    assert identity.server.client_ca is None
    assert identity.peer.ca == chain[: len(identity.peer.ca or b"")]
    assert (identity.peer.ca or b"").count(b"BEGIN CERTIFICATE") == 1, "the leaf alone"
    assert identity.peer.server_name == "member.mesh.test"
    assert identity.expires_at_s == issued.certificate.not_valid_after_utc.timestamp()


def test_a_port_with_client_certificates_takes_its_own_too(authority: Authority) -> None:
    issued = authority.issue("port")
    identity = port_identity(files(issued, authority))
    assert identity is not None
    assert identity.server.client_ca is not None
    assert authority.certfile.read_bytes() in identity.server.client_ca
    assert issued.certfile.read_bytes().strip() in identity.server.client_ca


def test_members_trust_their_ca(authority: Authority) -> None:
    identity = member_identity(files(authority.issue("member", names=("10.0.0.7",)), authority))
    assert identity is not None
    assert identity.server.client_ca == identity.peer.ca == authority.certfile.read_bytes()
    assert identity.peer.server_name == "10.0.0.7"


def test_keys_are_not_shown(authority: Authority) -> None:
    issued = authority.issue("port")
    identity = port_identity(files(issued))
    assert "PRIVATE" not in repr(identity)


def test_both_files_of_a_pair_are_needed(authority: Authority) -> None:
    issued = authority.issue("port")
    only_key = CertificateFiles(section="router", keyfile=str(issued.keyfile))
    assert refusal(only_key) == "must be set too, as ssl_keyfile is"
    only_certificate = CertificateFiles(section="router", certfile=str(issued.certfile))
    rule = refusal(only_certificate, path="router.ssl_keyfile")
    assert rule == "must be set too, as ssl_certfile is"
    only_ca = CertificateFiles(section="router", ca_certs=str(authority.certfile))
    assert "needs ssl_certfile" in refusal(only_ca, path="router.ssl_ca_certs")


@pytest.mark.parametrize("name", ["keyfile", "certfile", "ca_certs"])
def test_a_file_is_missing_a_folder_or_no_pem(
    authority: Authority, tmp_path: Path, name: str
) -> None:
    issued = authority.issue("port")
    text = tmp_path / "text"
    text.write_text("hello")
    path = f"router.ssl_{name}"
    for wrong, rule in (
        (tmp_path / "none", "must be a readable file (No such file or directory)"),
        (tmp_path, "must be a readable file (Is a directory)"),
        (text, "in PEM form"),
    ):
        settings = {
            "keyfile": str(issued.keyfile),
            "certfile": str(issued.certfile),
            "ca_certs": str(authority.certfile),
            name: str(wrong),
        }
        given = CertificateFiles(section="router", **settings)
        assert rule in refusal(given, path=path)
        assert rule in refusal(given, member_identity, path)


def test_a_key_of_another_certificate(authority: Authority) -> None:
    one, other = authority.issue("one"), authority.issue("other")
    os.replace(other.keyfile, one.keyfile)
    rule = refusal(files(one), path="router.ssl_keyfile")
    assert rule == f"does not belong to the certificate {one.certfile}"


def test_a_key_with_a_password(authority: Authority) -> None:
    issued = authority.issue("port")
    issued.keyfile.write_bytes(key_pem(issued.key, b"secret"))
    rule = refusal(files(issued), path="router.ssl_keyfile")
    assert rule == "must not be protected by a password"


def test_a_damaged_certificate(authority: Authority) -> None:
    issued = authority.issue("port")
    head, body = issued.certfile.read_bytes().split(b"\n", 1)
    issued.certfile.write_bytes(head + b"\n" + body.replace(b"M", b"A", 2))
    assert "cannot be used with" in refusal(files(issued))


def test_an_expired_certificate(authority: Authority) -> None:
    issued = authority.issue("old", days=-1)
    assert refusal(files(issued)) == "has expired"
    assert refusal(files(issued, authority), member_identity) == "has expired"


def test_a_certificate_that_names_no_host(authority: Authority) -> None:
    assert "subjectAltName" in refusal(files(authority.issue("nobody", names=())))


def test_a_member_needs_a_ca(authority: Authority) -> None:
    given = files(authority.issue("member"))
    assert "must be set" in refusal(given, member_identity, "router.ssl_ca_certs")


def test_a_member_of_another_ca(authority: Authority, tmp_path: Path) -> None:
    given = files(Authority(tmp_path, "stranger").issue("member"), authority)
    assert "unable to get local issuer certificate" in refusal(given, member_identity)


def test_a_port_that_asks_for_its_own_cas_certificates_has_a_fitting_one(
    authority: Authority, tmp_path: Path
) -> None:
    """Members show the port's certificate; where its CA is demanded, gRPC minds the usage."""
    server_only = authority.issue("port", usages=SERVER_ONLY)
    assert "for servers and for clients" in refusal(files(server_only, authority))
    assert port_identity(files(server_only, Authority(tmp_path, "clients"))) is not None


def test_a_member_is_client_and_server(authority: Authority) -> None:
    given = files(authority.issue("member", usages=SERVER_ONLY), authority)
    assert "for servers and for clients" in refusal(given, member_identity)
