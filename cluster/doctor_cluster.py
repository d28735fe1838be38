"""`expertmesh doctor FILE`: the machines of a cluster file, the secret, the store and the service.

One script goes to every machine over ssh and answers with one JSON object; `judge` is pure and
turns the answers into findings. Nothing is changed on any machine; the host key that one shows
first is remembered here (`cluster.remote`). A cloud's machines do not exist before `up`, so there
only this machine's side is looked at.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from cluster.cluster_file import LOCAL, TOKEN_MOUNT, ClusterFile
from cluster.doctor import FAIL, MIN_SHM_BYTES, OK, WARN, Check
from cluster.kv_budget import format_bytes
from cluster.remote import Answer, Machine, ask_all, is_open
from cluster.status import ask_status
from protos.errors import ExpertMeshError
from protos.tls import Access

MIN_DISK_BYTES = 5 << 30
MAX_SKEW_S = 5.0
"""Leases and heartbeats compare no clocks of two machines, but logs and certificates do."""
GCS_PORT = 6379

PROBE = r"""
import hashlib, importlib.metadata as m, json, os, shutil, socket, sys, time
def version(name):
    try: return m.version(name)
    except m.PackageNotFoundError: return ""
def digest(path):
    try: return hashlib.sha256(open(os.path.expanduser(path), "rb").read().strip()).hexdigest()
    except OSError: return ""
def is_open(address):
    host, port = address.rsplit(":", 1)
    try: socket.create_connection((host, int(port)), 3).close(); return True
    except OSError: return False
def free(path):
    try: return shutil.disk_usage(path).free
    except OSError: return 0
checkpoint, reach = sys.argv[1], sys.argv[2:]
print(json.dumps({
    "time_s": time.time(), "python": "%d.%d" % sys.version_info[:2],
    "ray": version("ray"), "expertmesh": version("expertmesh"),
    "token": digest("~/.ray/auth_token"), "shm_bytes": free("/dev/shm"),
    "disk_bytes": free(os.path.expanduser("~")),
    "checkpoint": "://" in checkpoint or os.path.exists(os.path.join(checkpoint, "config.json")),
    "reaches": {address: is_open(address) for address in reach},
}))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What every machine should be like."""

    checkpoint: str
    token: str
    """SHA-256 of the secret here; empty: there is none yet."""
    redis: str | None
    """`host:port`; None: the head's own."""
    head: str
    """`host:port` of Ray's head."""
    is_up: bool
    """Whether the service answers: Ray then runs, too."""
    versions: Mapping[str, str]
    """Of python, ray and expertmesh, here."""
    started_s: float
    """Seconds since the epoch, here, before the machines were asked."""
    ended_s: float


def examine_cluster(file: ClusterFile, access: Access) -> list[Check]:
    """Look at everything that the file names."""
    token = _digest(file)
    checks = [_check_secret(file, token)]
    if file.provider != LOCAL:
        detail = f"{file.provider} makes them; nothing to look at before `up`"
        return [*checks, Check("machines", OK, detail)]
    service = _check_service(file, access)
    redis = _redis_address(file)
    head = f"{file.head_ip}:{GCS_PORT}"
    words = [file.checkpoint, *([redis] if redis else []), head]
    command = (
        "py=~/expertmesh/.venv/bin/python; test -x $py || py=python3.11\n"
        f"$py - {shlex.join(words)} <<'PROBE'\n{PROBE}\nPROBE"
    )
    started_s = time.time()
    answers = ask_all([Machine.of(file, address) for address in file.machines], command)
    expected = Expected(
        checkpoint=file.checkpoint,
        token=token,
        redis=redis,
        head=head,
        is_up=service.state == OK,
        versions={
            "python": ".".join(platform.python_version_tuple()[:2]),
            **{name: importlib.metadata.version(name) for name in ("ray", "expertmesh")},
        },
        started_s=started_s,
        ended_s=time.time(),
    )
    for address, answer in answers.items():
        checks += judge(address, answer, expected)
    return [*checks, service]


def judge(address: str, answer: Answer, expected: Expected) -> list[Check]:
    """Turn what a machine said into findings."""
    remedy = f"check user and key of the cluster file: ssh {address} true"
    try:
        found: dict[str, Any] = json.loads(answer.output.strip().splitlines()[-1])
    except (ValueError, IndexError):
        why = answer.error or "no answer"
        return [Check(f"{address} ssh", FAIL, why, answer.remedy or remedy)]
    checks = [Check(f"{address} ssh", OK, "answers")]

    def add(name: str, state: str, detail: str, remedy: str = "") -> None:
        checks.append(Check(f"{address} {name}", state, detail, remedy))

    for name, ours in expected.versions.items():
        theirs = found[name]
        if theirs == ours:
            add(name, OK, theirs)
        elif not theirs:
            add(name, WARN, "not installed yet", "`expertmesh up` installs it")
        else:
            add(name, FAIL, f"{theirs}, here {ours}", "the same version everywhere, Ray insists")
    early, late = expected.started_s - found["time_s"], found["time_s"] - expected.ended_s
    skew_s = max(early, late, 0.0)
    if skew_s <= MAX_SKEW_S:
        add("clock", OK, f"within {MAX_SKEW_S:g} s of ours")
    else:
        side = "behind" if early > late else "ahead of"
        add("clock", WARN, f"{skew_s:.0f} s {side} ours", "run an NTP client, e.g. chrony")
    if not found["token"]:
        add("token", WARN, "none yet", "`expertmesh up` copies it")
    elif found["token"] != expected.token:
        add("token", FAIL, "another secret than here", "`expertmesh up --restart` brings ours")
    else:
        add("token", OK, "the same as here")
    _add_space(add, "/dev/shm", found["shm_bytes"], MIN_SHM_BYTES, "docker: --shm-size=256m")
    _add_space(add, "disk", found["disk_bytes"], MIN_DISK_BYTES, "torch alone takes 2 GiB")
    if found["checkpoint"]:
        add("checkpoint", OK, expected.checkpoint)
    else:
        add("checkpoint", FAIL, f"no {expected.checkpoint}", "mount or copy it to that path")
    if expected.redis is not None:
        if found["reaches"][expected.redis]:
            add("redis", OK, f"{expected.redis} answers")
        else:
            add("redis", FAIL, f"{expected.redis} cannot be reached", "firewall, or it is down")
    is_open = found["reaches"][expected.head]
    if is_open == expected.is_up:
        add("ray's port", OK, f"{expected.head} {'answers' if is_open else 'is free'}")
    elif is_open:
        add("ray's port", WARN, f"{expected.head} is taken", "`expertmesh up` restarts a Ray there")
    else:
        remedy = "open all TCP ports between the machines"
        add("ray's port", FAIL, f"{expected.head} cannot be reached", remedy)
    return checks


def _add_space(add: Callable[..., None], name: str, free: int, least: int, remedy: str) -> None:
    state = OK if free >= least else WARN
    add(name, state, f"{format_bytes(free)} free", remedy)


def _digest(file: ClusterFile) -> str:
    if file.token is None or not file.token.is_file():
        return ""
    return hashlib.sha256(file.token.read_bytes().strip()).hexdigest()


def _check_secret(file: ClusterFile, digest: str) -> Check:
    if file.token is None:
        remedy = f"file_mounts: {{{TOKEN_MOUNT}: ~/.expertmesh/ray_token}}"
        return Check("secret", FAIL, "the file names none: whoever reaches Ray owns it", remedy)
    if not digest:
        return Check("secret", WARN, f"no {file.token} yet", "`expertmesh up` makes it")
    if file.token.stat().st_mode & 0o077:
        return Check("secret", FAIL, f"others may read {file.token}", f"chmod 600 {file.token}")
    return Check("secret", OK, str(file.token))


def _check_service(file: ClusterFile, access: Access) -> Check:
    if file.status_port is None or file.head_ip is None:
        return Check("service", WARN, "has no --status-port", "give it one in the cluster file")
    address = f"{file.head_ip}:{file.status_port}"
    try:
        status = ask_status(address, access)
    except ExpertMeshError as error:
        return Check("service", WARN, f"{address}: {error}", "`expertmesh up`, or read its log")
    closed = [router.grpc_address for router in status.routers if not is_open(router.grpc_address)]
    if closed:
        remedy = "open the routers' ports to this machine"
        return Check("service", FAIL, f"no way to {', '.join(closed)}", remedy)
    return Check("service", OK, f"{address} {status.state}, {len(status.routers)} routers")


def _redis_address(file: ClusterFile) -> str | None:
    url = file.flag("--redis-url")
    if url is None:
        return None
    parts = urlsplit(url)
    return f"{parts.hostname}:{parts.port or 6379}"
