"""A Ray cluster whose nodes are processes of one host, started and stopped by Ray's own autoscaler.

The host (`hosts.py`) has processes, ports and files of its own: Ray's ports are fixed, and Ray's
nodes keep what they share in one folder. When the host ends, so does everything on it.

The head has room for no group, each further node for one. So a group that is asked for brings a
node, and one that has gone leaves a node without anything on it, which Ray ends.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.resources import GROUP_RESOURCE
from tests.cluster.hosts import Host
from tests.eventually import eventually
from tests.integration.served import CLI, ROOT, clean_environment

GCS_PORT = 6379
OBJECT_STORE_BYTES = 100 << 20
HEAD_ID = "fffffffffffffffffffffffffffffffffffffffffffffffffffffff0"
"""Of the head, where nodes are faked."""
START_TIMEOUT_S = 240.0
PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
"""Named as an external one: Ray's wheel lacks the file that its own name for it needs."""


def autoscaling_config(most: int, idle_timeout_s: float) -> dict[str, Any]:
    """Return what `ray start --autoscaling-config` reads."""
    resources = {"CPU": 1, GROUP_RESOURCE: 1, "object_store_memory": OBJECT_STORE_BYTES}
    node = {"resources": resources, "node_config": {}, "min_workers": 0, "max_workers": most}
    head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    lists = (
        *("initialization_commands", "cluster_synced_files", "rsync_exclude", "rsync_filter"),
        *("setup_commands", "head_setup_commands", "worker_setup_commands"),
        *("head_start_ray_commands", "worker_start_ray_commands"),
    )
    maps = ("head_node", "worker_nodes", "auth", "docker", "file_mounts")
    return {
        "cluster_name": "fake",
        "max_workers": most,
        "upscaling_speed": 100,
        "idle_timeout_minutes": idle_timeout_s / 60,
        "provider": {
            "type": "external",
            "module": PROVIDER,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
            "head_node_id": HEAD_ID,
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {"ray.head.default": head, "expert": node},
        "file_mounts_sync_continuously": False,
        **{name: [] for name in lists},
        **{name: {} for name in maps},
    }


@dataclass(slots=True)
class FakeNodes:
    """The Ray cluster of one host, and a service on it.

    Args:
        host: Sees `ROOT` and `folder`.
        folder: For files.
        most: Nodes beside the head.
        idle_timeout_s: A node without anything on it ends after this time.
    """

    host: Host
    folder: Path
    most: int
    idle_timeout_s: float = 3.0
    lines: list[tuple[float, str]] = field(default_factory=list)
    """What `serve` said, and when: monotonic seconds."""
    _readers: list[threading.Thread] = field(default_factory=list)

    def start(self) -> None:
        """Start the head; returns when it runs. It ends with the host."""
        config = self.folder / "autoscaling.json"
        config.write_text(json.dumps(autoscaling_config(self.most, self.idle_timeout_s)))
        head = (
            *("ray", "start", "--head", f"--port={GCS_PORT}", "--num-cpus=0"),
            *(f"--node-ip-address={self.host.address}", "--include-dashboard=false"),
            *(f"--autoscaling-config={config}", f"--object-store-memory={OBJECT_STORE_BYTES}"),
        )
        settings = {
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
        }
        started = self.host.start(*self._in_place(head, settings), is_read=True)
        said, _ = started.communicate(timeout=START_TIMEOUT_S)
        assert started.returncode == 0, said

    def serve(self, checkpoint: Path, *flags: str, env: dict[str, str] | None = None) -> str:
        """Run `expertmesh serve` on the head and return its address when it is ready."""
        command = (
            *(*CLI, "serve", str(checkpoint), "--host", self.host.address, "--port", "0"),
            *("--ray-address", f"{self.host.address}:{GCS_PORT}"),
            *("--group-resource", GROUP_RESOURCE, *flags),
        )
        service = self.host.start(*self._in_place(command, env or {}), is_read=True)
        reader = threading.Thread(target=self._read, args=(service,), daemon=True)
        reader.start()
        self._readers.append(reader)

        def ready() -> str:
            said = [line for _, line in self.lines]
            found = [line for line in said if line.startswith("ready grpc=")]
            if not found and service.poll() is not None:
                raise RuntimeError("serve ended:\n" + "\n".join(said))
            return found[0].split()[1].removeprefix("grpc=") if found else ""

        return eventually(ready, START_TIMEOUT_S, 0.1)

    def join(self) -> None:
        """Take the last of what `serve` said; the host has ended."""
        for reader in self._readers:
            reader.join(START_TIMEOUT_S)

    def num_nodes(self) -> int:
        """Return how many nodes there are beside the head, by their processes."""
        raylets = self.host.run("ps -C raylet -o stat= || true").split()
        return sum(not state.startswith("Z") for state in raylets) - 1

    def _in_place(self, command: Sequence[str], settings: Mapping[str, str]) -> list[str]:
        """Return what runs a command in `ROOT`, with this interpreter's programs first."""
        environment = {
            **clean_environment(),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "disabled",
            **settings,
        }
        words = [f"{name}={value}" for name, value in environment.items()]
        return ["env", "-i", f"--chdir={ROOT}", *words, *command]

    def _read(self, service: subprocess.Popen[str]) -> None:
        assert service.stdout is not None
        with service.stdout as output:
            for line in output:
                self.lines.append((time.monotonic(), line.rstrip()))
