"""A client of the batch against real routers: what becomes of good, bad and unlucky rows."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.batch.asker import MAX_LONE_FAILURES, AskerSettings, Fault, _Failures, fault_of
from cluster.batch.ledger import DonePart
from cluster.batch.outcomes import Counts
from cluster.batch.parts import Plan
from cluster.batch.rows import RowDefaults, row_of
from cluster.batch.source import scan
from cluster.batch.storage import Place
from cluster.batch.worker import PartWorker, WorkerSettings
from protos import errors
from protos.tls import Access
from protos.v1 import cluster_pb2, cluster_pb2_grpc
from router.gateway.server import GrpcService
from tests.eventually import eventually
from tests.tcp_proxy import proxied
from tests.unit.router.gateway_service import GatewayService, ScriptModel, running
from tests.unit.router.hash_script import HashScript

ACCESS = Access()


@pytest.fixture(scope="module")
def router() -> Iterator[GatewayService]:
    with running(HashScript()) as service:
        yield service


def line(row_id: str, **body: Any) -> str:
    body.setdefault("prompt", [5, 6, 7, 8])
    body.setdefault("max_tokens", 6)
    return json.dumps({"custom_id": row_id, "body": {"ignore_eos": True, **body}})


def plan_of(folder: Path, lines: list[str], part_rows: int = 100) -> Plan:
    (folder / "in.jsonl").write_text("\n".join(lines))
    place = Place.of(str(folder / "in.jsonl"), "input")
    return scan(place, id_field="custom_id", part_rows=part_rows, limit=None)[1]


@contextmanager
def working(folder: Path, *addresses: str, **asker: Any) -> Iterator[PartWorker]:
    settings = WorkerSettings(
        input_uri=str(folder / "in.jsonl"),
        input_format="jsonl",
        output_uri=str(folder / "out"),
        output_format="jsonl",
        id_field="custom_id",
        defaults=RowDefaults(temperature=0.0),
        asker=AskerSettings(
            addresses=addresses,
            access=ACCESS,
            model="script",
            **{"concurrency": 4, "give_up_s": 20.0, **asker},
        ),
    )
    worker = PartWorker(settings)
    try:
        yield worker
    finally:
        worker.close()


def output(folder: Path) -> list[dict[str, Any]]:
    files = sorted((folder / "out").glob("part-*.jsonl"))
    return [json.loads(text) for file in files for text in file.read_text().splitlines()]


def tokens(row: dict[str, Any]) -> list[int]:
    found: list[int] = row["response"]["body"]["choices"][0]["token_ids"]
    return found


def test_a_bad_row_costs_one_error_row(tmp_path: Path, router: GatewayService) -> None:
    plan = plan_of(
        tmp_path,
        [
            line("a", temperature=0.7),
            line("hot", temperature=-1),
            "{broken",
            json.dumps({"body": {"prompt": "no id"}}),
            line("a"),
            line("other", model="gpt"),
            line("long", max_tokens=9000),
            line("b", prompt=[9, 9], n=2, temperature=1.0, seed=4),
        ],
    )
    with working(tmp_path, router.address) as worker:
        done = worker.run(plan.parts[0])
    rows = output(tmp_path)
    assert [row["row"] for row in rows] == list(range(8))
    assert [row["custom_id"] for row in rows] == ["a", "hot", None, None, "a", "other", "long", "b"]
    reasons = [(row["error"] or {}).get("reason") for row in rows]
    assert reasons == [
        *(None, "INVALID_FIELD", "INVALID_FIELD", "INVALID_FIELD", "INVALID_FIELD"),
        *("UNKNOWN_MODEL", "CONTEXT_LENGTH_EXCEEDED", None),
    ]
    assert "sampling.temperature must be 0 or more, got -1" in rows[1]["error"]["message"]
    assert "custom_id must be unique in the input" in rows[4]["error"]["message"]
    assert [(row["response"] is None) == (row["error"] is not None) for row in rows] == [True] * 8
    assert rows[0]["response"]["body"]["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": 6,
        "total_tokens": 10,
    }
    assert len(rows[7]["response"]["body"]["choices"]) == 2
    assert done.counts == Counts(rows=8, failed=6, prompt_tokens=6, completion_tokens=18)
    assert (
        tokens(rows[0])
        == router.client.complete(
            [5, 6, 7, 8], max_tokens=6, temperature=0.7, seed=_seed("a"), ignore_eos=True
        ).token_ids
    )


def _seed(custom_id: str) -> int:
    document = {"custom_id": custom_id, "prompt": "x"}
    row = row_of(0, document, id_field="custom_id", defaults=RowDefaults())
    return row.request.sampling.seed


def test_tables_go_in_and_come_out(tmp_path: Path, router: GatewayService) -> None:
    columns = {
        "custom_id": ["a", "b", None],
        "messages": [[{"role": "user", "content": "hi"}]] * 3,
        "max_tokens": [4, 0, 4],
    }
    pq.write_table(pa.table(columns), tmp_path / "in.parquet")
    place = Place.of(f"file://{tmp_path}/in.parquet", "input")
    kind, plan = scan(place, id_field="custom_id", part_rows=10, limit=None)
    worker = PartWorker(
        WorkerSettings(
            input_uri=place.uri,
            input_format=kind,
            output_uri=f"file://{tmp_path}/out",
            output_format="parquet",
            id_field="custom_id",
            defaults=RowDefaults(temperature=0.0),
            asker=AskerSettings(
                addresses=(router.address,), access=ACCESS, model="script", concurrency=2
            ),
        )
    )
    worker.run(plan.parts[0])
    worker.close()
    rows = pq.read_table(tmp_path / "out" / "part-00000000.parquet").to_pylist()
    assert [(row["custom_id"], row["error_reason"]) for row in rows] == [
        ("a", None),
        ("b", "INVALID_FIELD"),
        (None, "INVALID_FIELD"),
    ]
    assert rows[0]["completion_tokens"] >= 1
    assert json.loads(rows[0]["response"])["body"]["object"] == "chat.completion"


def test_a_committed_part_is_not_asked_again(tmp_path: Path, router: GatewayService) -> None:
    plan = plan_of(tmp_path, [line(f"r{i}") for i in range(4)], part_rows=2)
    with working(tmp_path, router.address) as worker:
        first = worker.run(plan.parts[1])
        before = router.engine.stats().generation_tokens
        assert worker.run(plan.parts[1]) == first
        assert router.engine.stats().generation_tokens == before
    assert [row["custom_id"] for row in output(tmp_path)] == ["r2", "r3"]


def test_a_full_queue_is_waited_for(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, [line(f"r{i}", max_tokens=2) for i in range(24)])
    with (
        running(ScriptModel(), max_num_seqs=2, max_queued=2) as router,
        working(tmp_path, router.address, concurrency=12) as worker,
    ):
        done = worker.run(plan.parts[0])
    assert (done.counts.rows, done.counts.failed) == (24, 0)


def test_rows_go_on_when_their_router_is_cut_off(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, [line(f"r{i}", max_tokens=40) for i in range(8)])
    with running(HashScript()) as first, running(HashScript()) as second:
        expected = [
            second.client.complete(
                [5, 6, 7, 8], max_tokens=40, temperature=0, ignore_eos=True
            ).token_ids
        ] * 8
        with (
            proxied(first.address) as proxy,
            working(tmp_path, proxy.address, second.address, concurrency=8) as worker,
        ):
            first.model.stop_after(10)
            found: list[DonePart] = []
            thread = threading.Thread(target=lambda: found.append(worker.run(plan.parts[0])))
            thread.start()
            eventually(lambda: first.engine.stats().num_running >= 1)
            proxy.cut()
            first.model.stop_after(None)
            thread.join(30)
            assert [part.counts.failed for part in found] == [0]
        assert [tokens(row) for row in output(tmp_path)] == expected


def test_a_service_that_is_gone_ends_the_batch(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, [line("r0")])
    with (
        working(tmp_path, "127.0.0.1:1", give_up_s=0.5) as worker,
        pytest.raises(errors.UnreachableError),
    ):
        worker.run(plan.parts[0])
    assert output(tmp_path) == []


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (errors.InvalidFieldError("a", "must be b", 1), Fault.ROW),
        (errors.UnknownModelError("a", "b"), Fault.ROW),
        (errors.RequestCancelledError("a"), Fault.ROW),
        (errors.DeadlineExceededError("it"), Fault.WAY),
        (errors.GroupComputeError("g"), Fault.WAY),
        (errors.InternalError("x"), Fault.WAY),
        (errors.NonFiniteError("logits"), Fault.WAY),
        (errors.QueueFullError(1, 1), Fault.SERVICE),
        (errors.GroupLostError("g"), Fault.SERVICE),
        (errors.UnreachableError("x"), Fault.SERVICE),
        (errors.UnauthenticatedError("key"), Fault.BATCH),
    ],
)
def test_whose_fault_it_is(error: errors.ExpertMeshError, fault: Fault) -> None:
    assert fault_of(error) is fault


def failures() -> _Failures:
    settings = AskerSettings(addresses=("x",), access=ACCESS, model="m", concurrency=1)
    return _Failures(settings, 0.0)


def test_retry_info_is_obeyed_and_faults_on_the_way_are_counted() -> None:
    row = failures()
    full = errors.QueueFullError(1, 1, retry_after_s=7.5)
    assert not row.is_last(full, 1.0, 0.0)
    assert row.wait_s(full) == 7.5
    fault = errors.InternalError("x")
    assert [row.is_last(fault, 2.0, 0.0) for _ in range(4)] == [False, False, False, True]


def test_a_row_that_alone_takes_the_service_down_is_refused() -> None:
    gone = errors.UnreachableError("x")
    alone = failures()
    ends = [alone.is_last(gone, float(now), now - 0.5) for now in range(1, MAX_LONE_FAILURES + 1)]
    assert ends == [False] * (MAX_LONE_FAILURES - 1) + [True]
    # With everybody else it waits, until the service is given up.
    together = failures()
    assert not any(together.is_last(gone, float(now), 0.0) for now in range(1, 600, 7))
    with pytest.raises(errors.UnreachableError):
        together.is_last(gone, 601.0, 0.0)


def test_rows_in_flight_are_bounded_over_all_parts(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, [line(f"r{i}") for i in range(12)], part_rows=6)
    most = 0
    with running(HashScript()) as router:

        def note(batch: Any) -> None:
            nonlocal most
            most = max(most, batch.num_sequences)

        router.model.before_forward = note
        with working(tmp_path, router.address, concurrency=3) as worker:

            async def both() -> None:
                await asyncio.gather(*(asyncio.to_thread(worker.run, p) for p in plan.parts))

            asyncio.run(both())
    assert 1 <= most <= 3
    assert len(output(tmp_path)) == 12


def test_routers_that_come_are_asked_too(tmp_path: Path) -> None:
    served = cluster_pb2.ClusterStatus()

    class Cluster(cluster_pb2_grpc.ClusterServiceServicer):
        async def GetStatus(self, request: Any, context: Any) -> cluster_pb2.ClusterStatus:
            return served

    name = cluster_pb2.DESCRIPTOR.services_by_name["ClusterService"].full_name
    extra = GrpcService(name, Cluster(), cluster_pb2_grpc.add_ClusterServiceServicer_to_server)
    plan = plan_of(tmp_path, [line(f"r{i}") for i in range(8)])
    with (
        running(HashScript(), services=(extra,)) as first,
        running(HashScript()) as second,
        working(tmp_path, first.address, concurrency=8) as worker,
    ):
        for address, state in (
            (first.address, "READY"),
            (second.address, "READY"),
            ("127.0.0.1:1", "STARTING"),
        ):
            served.routers.add(router_id=address, grpc_address=address, state=state)
        worker._call(worker._asker.look())
        assert worker.run(plan.parts[0]).counts == Counts(
            rows=8, prompt_tokens=32, completion_tokens=48
        )
        assert [r.engine.stats().generation_tokens for r in (first, second)] == [24, 24]
