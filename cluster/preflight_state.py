"""Checks the servers of sessions and cached KV before anything is loaded.

`judge` is pure: from what a server says of itself (INFO) to what is wrong with it for its role.
Roles: *meta* holds sessions and must not lose or evict them; *blob* holds cached KV, must not grow
without bound, and needs no disk. One server may have both.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from cluster.config import StateSection
from protos.errors import ConfigurationError, StateUnavailableError
from router.state.control import ControlClient
from router.state.endpoint import Endpoint

MIN_VERSION = (7, 0)
META, BLOB = "meta", "blob"


def check_state_servers(section: StateSection) -> list[str]:
    """Ask every configured server, and return warnings, a sentence each.

    Raises:
        ConfigurationError: A URL that is none, a server too old, or one that evicts sessions.
        StateUnavailableError: A server does not answer, or refuses user and password.
    """
    roles: dict[Endpoint, list[str]] = {}
    settings: dict[Endpoint, str] = {}
    meta_url, blob_urls = state_urls(section)
    for role, setting, url in [
        (META, "state.redis_url", meta_url),
        *((BLOB, "state.blob_urls", url) for url in blob_urls),
    ]:
        if url is not None:
            endpoint = Endpoint.parse(url, setting)
            roles.setdefault(endpoint, []).append(role)
            settings.setdefault(endpoint, setting)
    found = asyncio.run(_ask_all(list(roles)))
    warnings = []
    for endpoint, info in found.items():
        if info is None:
            warnings.append(f"{endpoint} does not show its settings (INFO is not allowed)")
            continue
        error, notes = judge(roles[endpoint], info, section.wait_replicas)
        if error:
            raise ConfigurationError(settings[endpoint], error, str(endpoint))
        warnings += [f"{endpoint} {note}" for note in notes]
    return warnings


def state_urls(section: StateSection) -> tuple[str | None, tuple[str, ...]]:
    """Return the URLs of meta and blob; each stands in for the other where it is not given."""
    meta = section.redis_url or (section.blob_urls[0] if section.blob_urls else None)
    return meta, section.blob_urls or ((meta,) if meta is not None else ())


def judge(
    roles: list[str], info: Mapping[str, Any], wait_replicas: int = 0
) -> tuple[str, list[str]]:
    """Return what forbids to use a server (empty: nothing), and what should be known about it.

    Args:
        roles: `meta`, `blob`, or both.
        info: Its answer to INFO.
        wait_replicas: Replicas that a session's writes wait for.
    """
    version = str(info.get("redis_version", "0"))
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers < MIN_VERSION:
        return f"must be Redis {'.'.join(map(str, MIN_VERSION))} or newer, has {version}", []
    limit = int(info.get("maxmemory", 0))
    policy = str(info.get("maxmemory_policy", "noeviction"))
    is_logged = int(info.get("aof_enabled", 0)) == 1
    notes = []
    if META in roles:
        if limit and policy != "noeviction":
            rule = f"must have maxmemory-policy noeviction, or it evicts sessions; has {policy}"
            return rule, []
        if not is_logged:
            notes.append("has no append-only file: a restart of it loses all sessions")
        if info.get("role") == "slave":
            return "must be a primary, not a replica", []
        replicas = int(info.get("connected_slaves", 0))
        if replicas < wait_replicas:
            notes.append(
                f"has {replicas} replicas: sessions are refused until there are {wait_replicas}"
                " (state.wait_replicas)"
            )
        if BLOB in roles:
            full = "it is full" if limit else "the machine's memory is full"
            notes.append(
                f"holds sessions and cached KV together: when {full}, sessions are refused;"
                " give the cache servers of its own (--blob-url)"
            )
    else:
        if not limit:
            notes.append("has no maxmemory: cached KV grows until the machine's memory is full")
        elif policy == "noeviction":
            notes.append("has maxmemory-policy noeviction: once full it takes nothing new")
        if is_logged:
            notes.append("has an append-only file, which a cache does not need")
    return "", notes


async def _ask_all(endpoints: list[Endpoint]) -> dict[Endpoint, Mapping[str, Any] | None]:
    answers = await asyncio.gather(*(_ask(endpoint) for endpoint in endpoints))
    return dict(zip(endpoints, answers, strict=True))


async def _ask(endpoint: Endpoint) -> Mapping[str, Any] | None:
    """Return a server's INFO; None where we may not ask for it.

    Raises:
        StateUnavailableError: No answer, or we may not come in.
    """
    client = ControlClient(endpoint)
    try:
        await client.command("PING")
        try:
            info: Mapping[str, Any] = await client.command("INFO")
        except StateUnavailableError:
            return None
        return info
    finally:
        await client.close()
