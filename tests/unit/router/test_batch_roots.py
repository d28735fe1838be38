"""Where batches may read and write: below the roots, and by no trick elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from router.gateway.batch_roots import RULE, BatchRoots

ROOTS = BatchRoots(["/data/batches", "s3://bucket/team/"])


@pytest.mark.parametrize(
    "uri",
    [
        "/data/batches",
        "/data/batches/in.jsonl",
        "/data/batches/a b/ü/",
        "file:///data/batches/in.jsonl",
        "s3://bucket/team/in/",
        "S3://bucket/team/out",
    ],
)
def test_what_lies_below_a_root_may_be_used(uri: str) -> None:
    assert ROOTS.violation("input_uri", uri, "") is None


@pytest.mark.parametrize(
    "uri",
    [
        "/etc/passwd",
        "/data/batches-of-others/in",
        "/data",
        "/",
        "file:///etc/passwd",
        "file://host/data/batches/in",
        "s3://bucket/teams/in",
        "s3://other/team/in",
        "gs://bucket/team/in",
        "s3://bucket",
    ],
)
def test_what_lies_elsewhere_is_refused_by_name(uri: str) -> None:
    violation = ROOTS.violation("output_uri", uri, "")
    assert violation is not None
    assert (violation.field, violation.value) == ("output_uri", uri)
    assert violation.rule == "must lie under /data/batches, s3://bucket/team/"


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "in.jsonl",
        "./data/batches/in",
        "/data/batches/../../etc/passwd",
        "/data/batches/./in",
        "/data/batches/..",
        "/data/batches//in",
        "/data/batches/a\\b",
        "/data/batches/a\nb",
        "/data/batches/a\x00b",
        "file:///data/batches/%2e%2e/secret",
        "s3://bucket/team/%2E%2E/other",
        "s3://bucket/team/../other",
        "s3://bucket/team/in?endpoint_override=evil.example",
        "s3://bucket/team/in#x",
        "s3://key:secret@bucket/team/in",
        "s3://[bucket/team/in",
        "/data/batches/" + "x" * 1024,
    ],
)
def test_what_could_lead_elsewhere_is_refused(uri: str) -> None:
    violation = ROOTS.violation("input_uri", uri, "")
    assert violation is not None
    assert violation.rule == RULE


def test_a_named_tenant_has_a_folder_of_its_own() -> None:
    assert ROOTS.violation("input_uri", "/data/batches/a/in", "a") is None
    assert ROOTS.violation("input_uri", "s3://bucket/team/a/in", "a") is None
    for uri in ("/data/batches/b/in", "/data/batches/in", "s3://bucket/team/ab/in"):
        violation = ROOTS.violation("input_uri", uri, "a")
        assert violation is not None
        assert violation.rule == "must lie under /data/batches/a, s3://bucket/team/a"


def test_a_link_out_of_the_root_is_refused(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "secret").mkdir()
    (tmp_path / "root" / "out").symlink_to(tmp_path / "secret")
    (tmp_path / "link").symlink_to(tmp_path / "root")
    roots = BatchRoots([str(tmp_path / "root")])
    assert roots.violation("output_uri", str(tmp_path / "root" / "new"), "") is None
    assert roots.violation("output_uri", str(tmp_path / "root" / "out"), "") is not None
    linked = BatchRoots([str(tmp_path / "link")])
    assert linked.violation("output_uri", str(tmp_path / "link" / "new"), "") is None


def test_a_root_must_be_one() -> None:
    assert not BatchRoots([])
    for uri in ("data", "s3://bucket/../x", ""):
        with pytest.raises(ValueError, match="must be an absolute path or a URI"):
            BatchRoots([uri])
