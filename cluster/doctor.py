"""`expertmesh doctor`: what this machine has, what is missing, and what to do about it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import psutil

from cluster.config import RouterSection
from cluster.console import out_console
from cluster.kv_budget import format_bytes
from protos.errors import ExpertMeshError

OK, WARN, FAIL = "ok", "warn", "fail"
_STYLES = {OK: "green", WARN: "yellow", FAIL: "bold red"}

MIN_MEMORY_BYTES = 2 << 30
MIN_SHM_BYTES = 128 << 20
MIN_TMP_BYTES = 1 << 30
MIN_FILES = 1024


@dataclass(frozen=True, slots=True)
class Check:
    """One finding."""

    name: str
    state: str
    """ok, warn or fail."""
    detail: str
    remedy: str = ""

    def document(self) -> dict[str, str]:
        """Return the finding as plain JSON types."""
        return {
            "name": self.name,
            "state": self.state,
            "detail": self.detail,
            "remedy": self.remedy,
        }


def examine_machine() -> list[Check]:
    """Run every check; none of them changes anything."""
    checks: tuple[Callable[[], Check], ...] = (
        _python,
        _torch,
        _deepspeed,
        _ray,
        _grpc,
        _compiler,
        _native_kernels,
        _cores,
        _memory,
        _shared_memory,
        _temporary_space,
        _open_files,
        _port,
    )
    return [check() for check in checks]


def print_checks(checks: list[Check]) -> None:
    """Print one line a finding, and the remedies."""
    console = out_console()
    width = max(16, *(len(check.name) for check in checks))
    for check in checks:
        console.print(f"{check.state:<5}", style=_STYLES[check.state], end="")
        console.print(f"{check.name:<{width}} {check.detail}", markup=False)
        if check.remedy and check.state != OK:
            console.print(f"{'':<{width + 6}}-> {check.remedy}", markup=False)


def _python() -> Check:
    return Check("python", OK, f"{platform.python_version()} {sys.executable}")


def _installed(name: str, distribution: str, wanted: str = "") -> Check:
    try:
        found = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return Check(
            name, FAIL, "not installed", f"pip install {distribution}{wanted and '=='}{wanted}"
        )
    if wanted and not found.startswith(wanted):
        return Check(
            name, WARN, f"{found}, tested with {wanted}", f"pip install {distribution}=={wanted}"
        )
    return Check(name, OK, found)


def _torch() -> Check:
    check = _installed("torch", "torch", "2.13")
    if check.state == FAIL:
        return check
    import torch

    devices = f"{torch.cuda.device_count()} GPUs" if torch.cuda.is_available() else "CPU only"
    return Check("torch", check.state, f"{check.detail}, {devices}", check.remedy)


def _deepspeed() -> Check:
    return _installed("deepspeed", "deepspeed", "0.19.8")


def _ray() -> Check:
    return _installed("ray", "ray", "2.60")


def _grpc() -> Check:
    return _installed("grpcio", "grpcio")


def _compiler() -> Check:
    path = shutil.which("g++") or shutil.which("c++")
    if path is None:
        return Check(
            "compiler", WARN, "no g++", "install g++ and run `python -m experts.native.build`"
        )
    answer = subprocess.run([path, "-dumpfullversion"], capture_output=True, text=True, timeout=20)
    return Check("compiler", OK, f"{path} {answer.stdout.strip()}")


def _native_kernels() -> Check:
    from experts.native.kernels import load_kernels

    remedy = "python -m experts.native.build"
    try:
        kernels = load_kernels()
    except ExpertMeshError as error:
        return Check("native kernels", WARN, str(error), remedy)
    if kernels is None:
        return Check("native kernels", WARN, "none for this CPU; torch is used", remedy)
    return Check("native kernels", OK, kernels.isa)


def _cores() -> Check:
    usable, present = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    detail = f"{usable} of {present} usable"
    if usable >= 2:
        return Check("cores", OK, detail)
    return Check("cores", WARN, detail, "router and expert groups take turns on one core")


def _memory() -> Check:
    memory = psutil.virtual_memory()
    detail = f"{format_bytes(memory.available)} free of {format_bytes(memory.total)}"
    if memory.available >= MIN_MEMORY_BYTES:
        return Check("memory", OK, detail)
    return Check("memory", WARN, detail, "Ray and two processes alone take about 1.5 GiB")


def _shared_memory() -> Check:
    if not os.path.isdir("/dev/shm"):
        return Check("/dev/shm", WARN, "not there", "Ray falls back to files in /tmp")
    free = shutil.disk_usage("/dev/shm").free
    if free >= MIN_SHM_BYTES:
        return Check("/dev/shm", OK, f"{format_bytes(free)} free")
    return Check("/dev/shm", WARN, f"{format_bytes(free)} free", "docker run --shm-size=256m")


def _temporary_space() -> Check:
    import tempfile

    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if free >= MIN_TMP_BYTES:
        return Check("temporary space", OK, f"{format_bytes(free)} free in {folder}")
    return Check(
        "temporary space",
        WARN,
        f"{format_bytes(free)} free in {folder}",
        "Ray keeps its logs there",
    )


def _open_files() -> Check:
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= MIN_FILES:
        return Check("open files", OK, f"limit {soft}")
    return Check("open files", WARN, f"limit {soft}", "ulimit -n 65536")


def _port() -> Check:
    port = RouterSection().port
    try:
        with socket.create_server(("127.0.0.1", port)):
            return Check("default port", OK, f"{port} is free")
    except OSError as error:
        return Check(
            "default port",
            WARN,
            f"{port}: {error.strerror}",
            "a service runs already (`expertmesh status`), or take another --port",
        )
