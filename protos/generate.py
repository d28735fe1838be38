"""Regenerate the Python code beside the `.proto` files.

Run `python -m protos.generate` after an edit and commit the result; a test regenerates into a
scratch folder and compares.
"""

from __future__ import annotations

import sys
from pathlib import Path

PACKAGE = Path(__file__).parent / "v1"
ROOT = PACKAGE.parent.parent


def generate(out: Path) -> None:
    """Write `*_pb2.py`, `*_pb2.pyi` and `*_pb2_grpc.py` of every `.proto` to `out/protos/v1`.

    Raises:
        RuntimeError: protoc rejected a file; its message is on stderr.
    """
    from importlib.resources import files

    from google.rpc import status_pb2
    from grpc_tools import protoc

    googleapis = Path(status_pb2.__file__).parents[2]

    sources = sorted(str(path.relative_to(ROOT)) for path in PACKAGE.glob("*.proto"))
    arguments = [
        "protoc",
        f"--proto_path={ROOT}",
        f"--proto_path={files('grpc_tools') / '_proto'}",
        f"--proto_path={googleapis}",
        f"--python_out={out}",
        f"--pyi_out={out}",
        f"--grpc_python_out={out}",
        *sources,
    ]
    status = protoc.main(arguments)
    if status != 0:
        raise RuntimeError(f"protoc exited with {status}")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
