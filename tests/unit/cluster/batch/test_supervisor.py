"""The thread of `serve` that takes batches: so many at a time, the oldest first, and given back.

There is no router, so what it takes waits for one; drivers are in `test_driving` and in
`tests/integration/test_batch_service.py`.
"""

from __future__ import annotations

import asyncio
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from cluster.autoscale_batches import BatchWork
from cluster.batch.supervisor import BatchSite, BatchSupervisor
from cluster.config import BatchSection, Config
from cluster.security import load_security
from protos.errors import NotReadyError, from_status_bytes
from protos.ids import new_batch_name
from router.state.batch_records import BatchRecord, BatchState
from router.state.batches import BatchStore
from tests.eventually import eventually as eventually_within
from tests.store_servers import StoreServer, running_store

T = TypeVar("T")


@pytest.fixture
def server() -> Iterator[StoreServer]:
    with running_store() as started:
        yield started


def eventually(check: Callable[[], T]) -> T:
    """Wait as long as a busy machine may need."""
    return eventually_within(check, timeout_s=60)


def ask(server: StoreServer, call: Callable[[BatchStore], Awaitable[T]]) -> T:
    async def asked() -> T:
        store = BatchStore.connect(server.endpoint)
        try:
            return await call(store)
        finally:
            await store.close()

    return asyncio.run(asked())


def submit(server: StoreServer, root: Path, model: str = "tiny") -> BatchRecord:
    return ask(
        server,
        lambda store: store.create(
            "",
            new_batch_name(),
            model=model,
            input_uri=str(root / "in"),
            output_uri=str(root / "out"),
            options=b"",
            ttl_s=600,
        ),
    )


def supervisor(server: StoreServer, root: Path) -> BatchSupervisor:
    site = BatchSite(
        model="tiny",
        section=BatchSection(roots=(str(root),), max_running=1, metrics_port=0),
        security=load_security(Config()),
        meta=server.endpoint,
        ray_address="auto",
        routers=dict,
        holder="serve.test",
    )
    return BatchSupervisor(site)


def scrape(taker: BatchSupervisor) -> dict[str, float]:
    """Return the metrics as Prometheus gets them, without their prefix."""
    with urllib.request.urlopen(
        f"http://127.0.0.1:{taker.metrics_port}/metrics", timeout=10
    ) as answer:
        lines = answer.read().decode().splitlines()
    found = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name.removeprefix("expertmesh_"): float(value) for name, value in found}


def test_one_batch_at_a_time_of_our_model_and_given_back_at_the_end(
    server: StoreServer, tmp_path: Path
) -> None:
    other = submit(server, tmp_path, model="another")
    first, second = submit(server, tmp_path), submit(server, tmp_path)

    def read(record: BatchRecord) -> BatchRecord:
        return ask(server, lambda store: store.get("", record.name))

    taker = supervisor(server, tmp_path)
    taker.start()
    try:
        taken = eventually(lambda: read(first) if read(first).error else None)
        assert isinstance(from_status_bytes(taken.error), NotReadyError)
        assert eventually(lambda: taker.work) == BatchWork(tokens_left=2.0, tokens_done=0), (
            "two batches of unknown size"
        )
        eventually(lambda: taker.figures.driver_starts == 0 and taker.figures.running == 1)
        found = scrape(taker)
        assert found['batches{model_name="tiny",state="running"}'] == 1
        assert found['batches{model_name="tiny",state="waiting"}'] == 1
        assert ask(server, lambda store: store.acquire(first, "serve.other")) is None
        assert (read(second).error, read(other).error) == (b"", b"")
        ask(server, lambda store: store.cancel("", first.name))
        eventually(lambda: read(first).state is BatchState.CANCELLED)
        eventually(lambda: read(second).error)
        ended = 'batches_ended_total{model_name="tiny",state="cancelled"}'
        assert eventually(lambda: scrape(taker).get(ended)) == 1
    finally:
        taker.close()
    assert read(other).updated_ms == other.updated_ms
    assert ask(server, lambda store: store.acquire(second, "serve.other")) is not None


def test_a_batch_outside_of_the_roots_of_now_fails(server: StoreServer, tmp_path: Path) -> None:
    record = submit(server, tmp_path)
    taker = supervisor(server, tmp_path / "elsewhere")
    taker.start()
    try:
        ended = eventually(
            lambda: next(
                (
                    found
                    for found in [ask(server, lambda store: store.get("", record.name))]
                    if found.state.has_ended
                ),
                None,
            )
        )
    finally:
        taker.close()
    assert ended.state is BatchState.FAILED
    assert "input_uri must lie under" in from_status_bytes(ended.error).message


def test_a_store_that_is_away_for_a_while_loses_nothing(
    server: StoreServer, tmp_path: Path
) -> None:
    record = submit(server, tmp_path)
    taker = supervisor(server, tmp_path)
    taker.start()
    try:
        eventually(lambda: ask(server, lambda store: store.get("", record.name)).error)
        server.kill()
        server.start()
        cancelled = ask(server, lambda store: store.cancel("", record.name))
        assert cancelled.state in (BatchState.CANCELLING, BatchState.CANCELLED)
        eventually(lambda: ask(server, lambda store: store.get("", record.name)).state.has_ended)
    finally:
        taker.close()
