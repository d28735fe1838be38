"""What a driver is told is what it reads; what a batch says nothing of is as `batch run` has it."""

from __future__ import annotations

import json
from typing import Any

from cluster.batch.job import end_line, error_in, job_line, options_of, read_job
from cluster.batch.options import BatchOptions
from cluster.batch.rows import RowDefaults
from cluster.ray_data import Pool
from protos.errors import BatchChangedError
from protos.tls import Access, ClientTls
from protos.v1 import batch_pb2
from router.state.batch_records import BatchProgress, BatchRecord, BatchState

ACCESS = Access(tls=ClientTls(ca=b"ca", server_name="router"), api_key="key")


def record(**options: Any) -> BatchRecord:
    return BatchRecord(
        tenant="a",
        name="batch-7",
        model="tiny",
        state=BatchState.VALIDATING,
        input_uri="/in",
        output_uri="/out",
        options=batch_pb2.BatchOptions(**options).SerializeToString(),
        created_ms=0,
        updated_ms=0,
        ended_ms=0,
        progress=BatchProgress(),
        error=b"",
        starts=0,
    )


def test_options_that_are_not_set_are_those_of_batch_run() -> None:
    assert options_of(record(), ["a:1", "b:2"], ACCESS, "head:6379") == BatchOptions(
        input_uri="/in",
        output_uri="/out",
        url="a:1,b:2",
        access=ACCESS,
        pool=Pool(min_clients=1, max_clients=4),
        defaults=RowDefaults(),
        ray_address="head:6379",
        is_submitted=True,
    )


def test_every_option_arrives_at_the_driver() -> None:
    given: dict[str, Any] = {
        "id_column": "id",
        "format": "parquet",
        "limit": 9,
        "max_tokens": 8,
        "seed": 7,
        "temperature": 0.1,
        "min_clients": 6,
        "concurrency": 5,
        "part_rows": 4,
        "parts_in_flight": 3,
        "max_retries": 0,
        "max_failure_rate": 0.0,
    }
    options = options_of(record(**given), ["a:1"], ACCESS, "auto")
    expected = BatchOptions(
        input_uri="/in",
        output_uri="/out",
        url="a:1",
        access=ACCESS,
        id_field="id",
        output_format="parquet",
        limit=9,
        part_rows=4,
        concurrency=5,
        pool=Pool(min_clients=6, max_clients=6, parts_in_flight=3),
        max_retries=0,
        max_failure_rate=0.0,
        defaults=RowDefaults(max_tokens=8, temperature=0.1, seed=7),
        ray_address="auto",
        is_submitted=True,
    )
    assert options == expected
    line = job_line(options)
    assert line.count(b"\n") == 1
    assert read_job(line) == expected
    # `batch resume` on its folder has no way into the service's Ray.
    assert BatchOptions.of(options.document(), ACCESS, None).ray_address is None


def test_an_error_arrives_as_what_it_was() -> None:
    error = BatchChangedError("/out", ("model.weights: begun with 1, now 2",))
    found = error_in(json.loads(end_line("failed", {}, error)))
    assert isinstance(found, BatchChangedError)
    assert found.fields == error.fields
    assert error_in(json.loads(end_line("completed", {"rows": 1}))) is None
