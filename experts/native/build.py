"""Compile the C++ kernels beside this file: `python -m experts.native.build`.

One library per instruction set, so that a wheel or a checkout built here runs on any x86 host and
the loader (`kernels.load_kernels`) picks by the CPU's flags. A library's name carries a hash of the
sources and of the flags: a stale one is never loaded. Without a compiler, or on another
architecture, nothing is built and everything falls back to torch.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

SOURCE_DIR = Path(__file__).parent
BUILD_DIR = SOURCE_DIR / "_build"

COMMON_FLAGS = (
    *("-std=c++17", "-O3", "-shared", "-fPIC", "-pthread"),
    # Sums are never reordered or contracted; each library calls its own functions.
    *("-ffp-contract=off", "-fno-math-errno", "-Wl,-Bsymbolic"),
)
ISA_FLAGS = {
    "avx512bf16": (
        *("-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
        *("-mavx512bf16", "-mprefer-vector-width=512"),
    ),
    "avx2": ("-mavx2", "-mfma"),
}
"""Best first."""


def library_path(isa: str) -> Path:
    """Say where the library of the present sources lies (or would lie) for one instruction set."""
    digest = hashlib.sha256(" ".join(COMMON_FLAGS + ISA_FLAGS[isa]).encode())
    for path in sorted([*SOURCE_DIR.glob("*.cpp"), *SOURCE_DIR.glob("*.h")]):
        digest.update(path.name.encode() + path.read_bytes())
    return BUILD_DIR / f"kernels-{isa}-{digest.hexdigest()[:12]}.so"


def find_compiler() -> str | None:
    """Find a C++ compiler: `$CXX`, else g++, else clang++; None without one."""
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and (found := shutil.which(name)):
            return found
    return None


def build(isa: str) -> str:
    """Build one library unless it is up to date; say in a few words what happened."""
    target = library_path(isa)
    if target.exists():
        return "up to date"
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return f"not built: {platform.machine()} is not x86-64"
    compiler = find_compiler()
    if compiler is None:
        return "not built: no C++ compiler (set CXX or install g++)"
    BUILD_DIR.mkdir(exist_ok=True)
    part = target.with_suffix(f".{os.getpid()}.part")
    sources = [str(path) for path in sorted(SOURCE_DIR.glob("*.cpp"))]
    command = [compiler, *COMMON_FLAGS, *ISA_FLAGS[isa], *sources, "-o", str(part)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        part.unlink(missing_ok=True)
        return f"not built: {compiler} failed\n{result.stderr.strip()}"
    part.replace(target)
    for old in BUILD_DIR.glob(f"kernels-{isa}-*.so"):
        if old != target:
            old.unlink(missing_ok=True)
    return "built"


def main() -> int:
    """Build every instruction set, one line each; exit 0 even where nothing can be built."""
    for isa in ISA_FLAGS:
        sys.stdout.write(f"experts.native {isa}: {build(isa)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
