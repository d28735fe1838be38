"""Who may call whom, and in what clothes: certificates and keys of one member of a service.

Clients call routers, and routers call each other, over the port's certificate and an API key;
routers call expert groups over the cluster's certificate. Every process reads the files that the
configuration names on its own node; `serve` reads them first, so that a mistake shows at once.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from cluster.config import Config, RouterSection, StateSection
from protos.certificates import CertificateFiles, Identity, member_identity, port_identity
from protos.errors import ConfigurationError, UnauthenticatedError
from protos.ids import is_valid_session_id
from protos.tls import Access, check_api_key
from router.gateway.authentication import UNNAMED, ApiKey

EXPIRY_NOTICE_S = 14 * 86_400.0
LOOPBACK = ("127.0.0.1", "::1", "[::1]", "localhost")


@dataclass(frozen=True, slots=True, kw_only=True)
class Security:
    """What a member of the service shows and demands."""

    port: Identity | None
    """Of the routers' gRPC ports; None: plain."""
    member: Identity | None
    """Of the expert groups' ports, and of whoever calls them; None: plain."""
    api_keys: tuple[ApiKey, ...] = field(repr=False)
    """One of them is demanded of clients; none: calls need no key."""

    @property
    def to_routers(self) -> Access:
        """How a member calls a router: with a key of the unnamed tenant, if there is any."""
        keys = sorted(self.api_keys, key=lambda key: key.tenant != UNNAMED)
        return Access(
            tls=self.port.peer if self.port else None, api_key=keys[0].key if keys else None
        )

    def as_tenant(self, tenant: str) -> Access:
        """How to call a router on behalf of a tenant.

        Raises:
            UnauthenticatedError: The tenant has no key any more.
        """
        keys = [key.key for key in self.api_keys if key.tenant == tenant]
        if self.api_keys and not keys:
            raise UnauthenticatedError(f"the tenant {tenant!r} has no API key")
        tls = self.port.peer if self.port else None
        return Access(tls=tls, api_key=keys[0] if keys else None)

    @property
    def to_groups(self) -> Access:
        """How a router calls an expert group."""
        return Access(tls=self.member.peer if self.member else None)

    def warnings(self, config: Config, now_s: float | None = None) -> list[str]:
        """Return what works and may not be meant.

        Args:
            config: Everything.
            now_s: Seconds since the epoch; None: now.
        """
        now_s = time.time() if now_s is None else now_s
        found = []
        for section, identity in (("router", self.port), ("cluster", self.member)):
            if identity is not None and identity.expires_at_s - now_s < EXPIRY_NOTICE_S:
                days = (identity.expires_at_s - now_s) / 86_400.0
                found.append(f"{section}.ssl_certfile expires in {days:.1f} days")
        if config.router.host not in LOOPBACK:
            if not self.api_keys and (self.port is None or self.port.server.client_ca is None):
                found.append(
                    f"whoever reaches {config.router.host} may use this service; --api-key or"
                    " --ssl-ca-certs would change that"
                )
            elif self.port is None:
                found.append(
                    "API keys, prompts and answers travel readable; --ssl-certfile and"
                    " --ssl-keyfile would change that"
                )
        return found


def load_security(config: Config) -> Security:
    """Read what the configuration names, on this node.

    Raises:
        ConfigurationError: A file or a key that cannot be used.
    """
    router = config.router
    return Security(
        port=port_identity(
            CertificateFiles(
                section="router",
                keyfile=router.ssl_keyfile,
                certfile=router.ssl_certfile,
                ca_certs=router.ssl_ca_certs,
            )
        ),
        member=load_member(config),
        api_keys=_api_keys(router),
    )


def load_member(config: Config) -> Identity | None:
    """Read the cluster's certificate alone, which is all that an expert group needs.

    Raises:
        ConfigurationError: A file that cannot be used.
    """
    section = config.cluster
    return member_identity(
        CertificateFiles(
            section="cluster",
            keyfile=section.ssl_keyfile,
            certfile=section.ssl_certfile,
            ca_certs=section.ssl_ca_certs,
        )
    )


def config_of_group(config: Config) -> Config:
    """Return what an expert group gets to know: no keys of clients, no addresses of sessions."""
    return replace(config, router=RouterSection(), state=StateSection())


def _api_keys(router: RouterSection) -> tuple[ApiKey, ...]:
    keys = [_api_key(text, "router.api_keys") for text in router.api_keys]
    if router.api_key_file is not None:
        try:
            lines = Path(router.api_key_file).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise ConfigurationError(
                "router.api_key_file", f"must be a readable file ({why})", router.api_key_file
            ) from None
        found = [line.strip() for line in lines]
        found = [line for line in found if line and not line.startswith("#")]
        if not found:
            raise ConfigurationError(
                "router.api_key_file", "must hold a key, one a line", router.api_key_file
            )
        keys += [_api_key(line, "router.api_key_file") for line in found]
    tenants = {key.key: key.tenant for key in keys}
    if any(tenants[key.key] != key.tenant for key in keys):
        raise ConfigurationError("router.api_keys", "must not give one key two tenants", "(hidden)")
    return tuple(dict.fromkeys(keys))


def _api_key(text: str, path: str) -> ApiKey:
    """Read `KEY` or `TENANT KEY`; no key has a space, so every key without a tenant is one still.

    Raises:
        ConfigurationError: Neither; what was given is not shown, a key may stand anywhere in it.
    """
    tenant, _, key = text.rpartition(" ")
    tenant = tenant.strip()
    if tenant and not is_valid_session_id(tenant):  # the same rule: both are parts of Redis keys
        rule = "must be a key, or a tenant's name (A-Z a-z 0-9 . _ : -), a space and its key"
        raise ConfigurationError(path, rule, "(hidden)")
    return ApiKey(check_api_key(key, path), tenant)
