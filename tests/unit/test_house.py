"""The habits of the house, as tests: who may import whom, what is generated, what never appears."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("protos", "experts", "router", "cluster")
TESTS = ROOT / "tests"

# Folder or file -> top-level modules it must not import, wherever the import stands in the file.
FORBIDDEN = {
    "protos": {"experts", "router", "cluster", "ray", "redis", "deepspeed"},
    "experts": {"router", "cluster", "ray", "redis"},
    "router": {"cluster", "ray"},
    "router/engine": {"grpc", "grpc_status", "redis"},
    "router/model": {"grpc", "grpc_status", "redis", "transformers"},
    "router/gating": {"redis"},
    "router/state": {"grpc", "grpc_status"},
    "cluster": {"transformers"},
}
ONLY_SEAM_TO_RAY = {"cluster/ray_api.py", "cluster/ray_data.py", "cluster/actors.py"}
UNPICKLING = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}


def python_files(folder: Path) -> list[Path]:
    """Every Python file of ours under `folder`; generated and built files are not ours."""
    return sorted(
        path
        for path in folder.rglob("*.py")
        if not re.search(r"_pb2(_grpc)?\.py$", path.name) and "_build" not in path.parts
    )


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports_of(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """`(line, dotted module)` of every import, in functions too; relative ones start with `.`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield node.lineno, module
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}"


def top(module: str) -> str:
    return module.split(".")[0]


OURS = [path for package in PACKAGES for path in python_files(ROOT / package)]
TEST_FILES = sorted(TESTS.rglob("test_*.py"))
by_path = pytest.mark.parametrize("path", OURS, ids=relative)


@by_path
def test_a_package_imports_only_to_its_left(path: Path) -> None:
    name = relative(path)
    forbidden = set().union(
        *(banned for area, banned in FORBIDDEN.items() if name.startswith(area + "/"))
    )
    found = [
        f"{name}:{line} imports {module}"
        for line, module in imports_of(ast.parse(path.read_text()))
        if top(module) in forbidden or module.startswith(("tests", "infra"))
    ]
    assert not found, found


@by_path
def test_only_the_seam_imports_ray_and_never_its_private_parts(path: Path) -> None:
    name = relative(path)
    modules = list(imports_of(ast.parse(path.read_text())))
    private = [
        f"{name}:{line} {m}" for line, m in modules if m.startswith(("ray._", "ray.core.generated"))
    ]
    assert not private, private
    assert "ray._private" not in path.read_text()
    if name not in ONLY_SEAM_TO_RAY:
        outside = [f"{name}:{line} {module}" for line, module in modules if top(module) == "ray"]
        assert not outside, outside


@by_path
def test_nothing_is_unpickled(path: Path) -> None:
    tree = ast.parse(path.read_text())
    found = [f"{relative(path)}:{line} {m}" for line, m in imports_of(tree) if top(m) in UNPICKLING]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {
            "torch.load",
            "np.load",
            "numpy.load",
            "eval",
            "exec",
        }:
            found.append(f"{relative(path)}:{node.lineno} {ast.unparse(node.func)}")
    assert not found, found


@by_path
def test_channels_are_opened_where_tls_and_keys_are_known(path: Path) -> None:
    if relative(path) == "protos/tls.py":
        return
    found = [
        f"{relative(path)}:{node.lineno} {node.attr}: take a protos.tls.Access"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in {"insecure_channel", "secure_channel"}
    ]
    assert not found, found


@by_path
def test_no_bare_except(path: Path) -> None:
    """Even `except Exception` has three places only: RPC boundary, outer loop, cleanup."""
    bare = [
        f"{relative(path)}:{node.lineno}"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ExceptHandler) and node.type is None
    ]
    assert not bare, bare


@pytest.mark.parametrize(
    "path",
    sorted(p for package in PACKAGES for p in (ROOT / package).rglob("__init__.py")),
    ids=relative,
)
def test_a_package_init_holds_only_a_docstring(path: Path) -> None:
    body = ast.parse(path.read_text()).body
    if path.parent == ROOT / "protos" / "v1" and not body:
        return
    assert len(body) == 1, f"{relative(path)} holds more than a docstring"
    assert isinstance(body[0], ast.Expr)
    assert isinstance(body[0].value, ast.Constant)
    assert isinstance(body[0].value.value, str)


@by_path
def test_importing_changes_nothing(path: Path) -> None:
    """No logging set-up, environment read, thread or device probe at module level."""
    banned = re.compile(
        r"^(logging\.basicConfig|os\.environ|os\.getenv|os\.putenv|ray\.init|torch\.set_|signal\.signal"
        r"|torch\.cuda\.|warnings\.filterwarnings|load_kernels)"
    )
    found = []
    for statement in ast.parse(path.read_text()).body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.If):
            continue
        for node in ast.walk(statement):
            if isinstance(node, ast.Call | ast.Subscript):
                text = ast.unparse(node)
                if banned.match(text):
                    found.append(f"{relative(path)}:{node.lineno} {text}")
    assert not found, found


@pytest.mark.parametrize("path", TEST_FILES, ids=relative)
def test_a_test_file_collects_something(path: Path) -> None:
    tree = ast.parse(path.read_text())
    bodies = [tree.body] + [
        node.body
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name.startswith("Test")
    ]
    tests = [
        node.name
        for body in bodies
        for node in body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.name.startswith("test_")
    ]
    assert tests, f"{relative(path)} holds no test"
    assert len(tests) == len(set(tests)) or len(bodies) > 1, (
        f"{relative(path)} defines a test twice"
    )
    assert (path.parent / "__init__.py").exists(), f"{relative(path.parent)} needs an __init__.py"


# What a machine may lack, though CI has it: the reason is printed with the skip.
MAY_SKIP = {
    "tests/unit/state/conftest.py": "redis-server of the system",
    "tests/cluster/conftest.py": "the right to make network namespaces, and sshd",
}


@pytest.mark.parametrize(
    "path", [p for p in sorted(TESTS.rglob("*.py")) if "benchmarks" not in p.parts], ids=relative
)
def test_tests_neither_sleep_nor_skip(path: Path) -> None:
    """Benchmarks may pace their requests; a test waits for the event."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call | ast.Attribute):
            continue
        text = ast.unparse(node.func) if isinstance(node, ast.Call) else ast.unparse(node)
        if text == "pytest.skip" and relative(path) in MAY_SKIP:
            continue
        if text in {
            "time.sleep",
            "pytest.skip",
            "pytest.mark.skip",
            "pytest.mark.skipif",
            "pytest.mark.xfail",
            "pytest.importorskip",
        }:
            found.append(f"{relative(path)}:{node.lineno} {text}")
    assert not found, found


def test_generated_code_is_current(tmp_path: Path) -> None:
    """Regenerate in a process of its own: protoc keeps a registry that is filled here."""
    subprocess.run(
        [sys.executable, "-m", "protos.generate", str(tmp_path)], cwd=ROOT, check=True, timeout=60
    )
    fresh = sorted((tmp_path / "protos" / "v1").iterdir())
    assert len(fresh) == 3 * len(list((ROOT / "protos" / "v1").glob("*.proto")))
    stale = [
        path.name
        for path in fresh
        if not (ROOT / "protos/v1" / path.name).exists()
        or (ROOT / "protos/v1" / path.name).read_bytes() != path.read_bytes()
    ]
    assert not stale, f"run `make protos`: {stale}"
    known = {path.name for path in fresh}
    orphans = [p.name for p in (ROOT / "protos/v1").glob("*_pb2*") if p.name not in known]
    assert not orphans, f"generated from a .proto file that is gone: {orphans}"


def test_top_level_holds_what_the_design_names() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    folders = {name.split("/")[0] for name in listed if "/" in name and not name.startswith(".")}
    assert folders <= {*PACKAGES, "tests", "infra"}, folders
