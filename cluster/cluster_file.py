"""A cluster file of `ray up`: read, and held against Ray's schema and our own rules.

Ours are what `infra/ray/*.yaml` share: a token for all machines, and a command that starts the
service with flags that `serve` knows. Ray itself finds a mistake late: a wrong flag of `serve` is
seen in a log on the head only, minutes and some dollars later.
"""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from protos.errors import ConfigurationError, InternalError, Violation

TOKEN_MOUNT = "~/.ray/auth_token"
SERVICE_START = "expertmesh service start -- "
LOCAL = "local"
DEFAULT_TOKEN = "~/.expertmesh/ray_token"
FIELD = "cluster file"
PLACEHOLDERS = ("-...", "/...", "FILE_SYSTEM:", "FILESTORE:")
"""What the files of `infra/ray` hold where only the user knows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterFile:
    """What we need to know of one."""

    path: Path
    name: str
    provider: str
    """local, aws, gcp, ..."""
    head_ip: str | None
    """None: the provider chooses."""
    worker_ips: tuple[str, ...]
    ssh_user: str
    ssh_key: str | None
    is_docker: bool
    token: Path | None
    """The secret on this machine that every node gets; None: the file has none."""
    checkpoint: str
    serve_flags: tuple[str, ...]

    @property
    def machines(self) -> tuple[str, ...]:
        """The machines that are known beforehand, the head first."""
        return (self.head_ip, *self.worker_ips) if self.head_ip else ()

    @property
    def known_hosts(self) -> Path:
        """Host keys that the machines of this cluster showed first, beside the secret."""
        token = self.token or Path(DEFAULT_TOKEN).expanduser()
        return token.with_name("known_hosts")

    def flag(self, name: str) -> str | None:
        """Return the value of a flag of `serve`, or None where it is not given."""
        for here, after in zip(self.serve_flags, (*self.serve_flags[1:], ""), strict=True):
            if here == name:
                return after
            if here.startswith(f"{name}="):
                return here.partition("=")[2]
        return None

    @property
    def status_port(self) -> int | None:
        """Where the head says how the service is; None: nowhere."""
        port = self.flag("--status-port")
        return int(port) if port else None


def read_cluster_file(path: Path) -> ClusterFile:
    """Read and check a file.

    Raises:
        ConfigurationError: Not readable, not what Ray wants, or not what we want; all mistakes of a
            kind in one error.
    """
    document = _document(path)
    _check_schema(document)
    start = [c for c in document.get("head_start_ray_commands", ()) if SERVICE_START in c]
    violations = []
    if len(start) != 1:
        rule = f"must hold one command that begins with `{SERVICE_START.strip()}`"
        violations.append(Violation(f"{FIELD}.head_start_ray_commands", rule, str(len(start))))
    arguments: list[str] = []
    try:
        arguments = shlex.split(start[0].partition(SERVICE_START)[2]) if start else []
    except ValueError as error:
        rule = f"must be what a shell can read ({error})"
        violations.append(Violation(f"{FIELD}.head_start_ray_commands", rule, start[0]))
    provider, auth = document["provider"], document.get("auth", {})
    mounts = document.get("file_mounts", {})
    token = mounts.get(TOKEN_MOUNT)
    violations += _placeholders(document, FIELD)
    for remote, local in mounts.items():
        if remote != TOKEN_MOUNT and not Path(local).expanduser().exists():
            rule = f"must exist here ({os.getcwd()}); run this from the repository's root"
            violations.append(Violation(f"{FIELD}.file_mounts[{remote}]", rule, local))
    key = auth.get("ssh_private_key")
    if key is not None and not Path(key).expanduser().is_file():
        violations.append(Violation(f"{FIELD}.auth.ssh_private_key", "must be a file", key))
    if violations:
        raise ConfigurationError(violations=violations)
    checkpoint = _check_serve(arguments)
    return ClusterFile(
        path=path,
        name=document["cluster_name"],
        provider=provider["type"],
        head_ip=provider.get("head_ip"),
        worker_ips=tuple(provider.get("worker_ips", ())),
        ssh_user=auth.get("ssh_user", "root"),
        ssh_key=key,
        is_docker=bool(document.get("docker")),
        token=Path(token).expanduser() if token else None,
        checkpoint=checkpoint,
        serve_flags=tuple(arguments),
    )


def ensure_token(file: ClusterFile) -> bool:
    """Make the cluster's secret where there is none yet; return whether it was made.

    Raises:
        ConfigurationError: The file names none, or others may read it.
    """
    field = f"{FIELD}.file_mounts[{TOKEN_MOUNT}]"
    if file.token is None:
        raise ConfigurationError(field, "must name the secret that all nodes share", None)
    if not file.token.exists():
        file.token.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(file.token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as out:
            out.write(secrets.token_hex(32))
        return True
    if file.token.stat().st_mode & 0o077:
        raise ConfigurationError(
            field, "must be readable by you alone", str(file.token), hint=f"chmod 600 {file.token}"
        )
    return False


def _document(path: Path) -> dict[str, Any]:
    try:
        document = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigurationError(FIELD, f"must be a readable file ({why})", str(path)) from None
    except yaml.YAMLError as error:
        raise ConfigurationError(FIELD, f"must be valid YAML: {error}", str(path)) from None
    if not isinstance(document, dict):
        raise ConfigurationError(FIELD, "must be a mapping", str(path))
    return document


def _check_schema(document: dict[str, Any]) -> None:
    """Hold the file against Ray's schema.

    Raises:
        ConfigurationError: All that does not fit.
    """
    spec = importlib.util.find_spec("ray")
    if spec is None or spec.origin is None:
        raise InternalError("ray is not installed")
    schema = json.loads((Path(spec.origin).parent / "autoscaler/ray-schema.json").read_text())
    # Ray moves this one into a node type of its own before it looks.
    provider = document.get("provider")
    is_local = isinstance(provider, dict) and provider.get("type") == LOCAL
    seen = {k: v for k, v in document.items() if not (is_local and k == "min_workers")}
    violations = [
        Violation(".".join([FIELD, *map(str, error.path)]), error.message, _short(error.instance))
        for error in jsonschema.Draft7Validator(schema).iter_errors(seen)
    ]
    if violations:
        raise ConfigurationError(violations=violations)


def _short(value: Any) -> str:
    return str(value) if isinstance(value, str | int | float) else type(value).__name__


def _placeholders(value: Any, path: str) -> list[Violation]:
    """Find what the user has not filled in."""
    if isinstance(value, dict):
        return [v for key, part in value.items() for v in _placeholders(part, f"{path}.{key}")]
    if isinstance(value, list):
        return [v for i, part in enumerate(value) for v in _placeholders(part, f"{path}[{i}]")]
    if isinstance(value, str) and any(mark in value for mark in PLACEHOLDERS):
        return [Violation(path, "must be filled in", value)]
    return []


def _check_serve(arguments: list[str]) -> str:
    """Let `serve` parse its flags; return the checkpoint.

    Raises:
        ConfigurationError: A flag that it does not know, or no checkpoint.
    """
    from typer.exceptions import TyperException
    from typer.main import get_command

    from cluster.cli import app

    field = f"{FIELD}.head_start_ray_commands"
    commands: Any = get_command(app)
    try:
        context = commands.commands["serve"].make_context("expertmesh serve", list(arguments))
    except TyperException as error:
        rule = f"must start serve with flags that it knows: {error}"
        raise ConfigurationError(field, rule, shlex.join(arguments)) from None
    checkpoint = context.params["checkpoint"]
    if not checkpoint:
        raise ConfigurationError(field, "must name a checkpoint", shlex.join(arguments))
    return str(checkpoint)
