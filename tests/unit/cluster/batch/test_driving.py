"""A batch under a lease, with real driver processes that find no service, or die.

The drivers are given an address where nobody listens, or a job that is none: what they say and how
they end is what `serve` has to live with.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from cluster.batch import driving
from cluster.batch.driver_process import DriverProcess
from cluster.batch.driving import BatchDrive
from cluster.batch.job import job_line, options_of
from protos.errors import InvalidFieldError, NotReadyError, from_status_bytes
from protos.ids import new_batch_name
from protos.tls import Access
from router.state.batch_records import BatchProgress, BatchRecord, BatchState
from router.state.batches import BatchStore
from tests.store_servers import running_store
from tests.unit.cluster.batch.test_job import record

NOBODY = "127.0.0.1:1"


@pytest.fixture
async def store() -> AsyncIterator[BatchStore]:
    with running_store() as server:
        made = BatchStore.connect(server.endpoint)
        yield made
        await made.close()


async def drive_of(
    store: BatchStore, out: Path, make_job: Callable[[BatchRecord], bytes]
) -> tuple[BatchRecord, BatchDrive]:
    made = await store.create(
        "",
        new_batch_name(),
        model="tiny",
        input_uri="/in",
        output_uri=str(out),
        options=b"",
        ttl_s=600,
    )
    lease = await store.acquire(made, "serve")
    assert lease is not None
    return made, BatchDrive(store, made, lease, make_job)


async def until(store: BatchStore, name: str, holds: Callable[[BatchRecord], bool]) -> BatchRecord:
    """Return the record once it is so."""
    async with asyncio.timeout(60):
        while not holds(found := await store.get("", name)):
            await asyncio.sleep(0)
    return found


async def test_a_driver_without_a_service_is_tried_again_until_it_is_cancelled(
    store: BatchStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driving, "FIRST_BACKOFF_S", 0.01)
    monkeypatch.setattr(driving, "MAX_IDLE", 1)
    asked = []

    def make_job(record: BatchRecord) -> bytes:
        asked.append(record.name)
        raise NotReadyError("no router is up")

    made, drive = await drive_of(store, tmp_path, make_job)
    running = asyncio.create_task(drive.run())
    found = await until(store, made.name, lambda record: bool(record.error) and len(asked) > 2)
    assert not found.state.has_ended
    assert isinstance(from_status_bytes(found.error), NotReadyError)
    assert (await store.cancel("", made.name)).state is BatchState.CANCELLING
    await running
    assert (await store.get("", made.name)).state is BatchState.CANCELLED


async def test_a_batch_that_kills_its_drivers_fails_with_their_end(
    store: BatchStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driving, "FIRST_BACKOFF_S", 0.01)
    monkeypatch.setattr(driving, "MAX_IDLE", 2)
    made, drive = await drive_of(store, tmp_path, lambda _: b"no job\n")
    await drive.run()
    found = await store.get("", made.name)
    assert (found.state, found.starts) == (BatchState.FAILED, 2)
    assert "JSONDecodeError" in from_status_bytes(found.error).message


async def test_a_batch_that_cannot_be_told_fails_at_once(store: BatchStore, tmp_path: Path) -> None:
    def make_job(record: BatchRecord) -> bytes:
        raise InvalidFieldError("input_uri", "must lie under /batches", "/etc")

    made, drive = await drive_of(store, tmp_path, make_job)
    await drive.run()
    found = await store.get("", made.name)
    assert (found.state, found.starts) == (BatchState.FAILED, 0)
    assert isinstance(from_status_bytes(found.error), InvalidFieldError)


async def test_a_drive_that_lost_its_lease_leaves_the_batch_alone(
    store: BatchStore, tmp_path: Path
) -> None:
    made, drive = await drive_of(store, tmp_path, lambda _: b"")
    await store.cancel("", made.name)
    lease = drive._lease
    await store.update(lease, BatchState.CANCELLED)
    await drive.run()
    assert (await store.get("", made.name)).starts == 0


async def test_a_driver_ends_with_who_started_it(tmp_path: Path) -> None:
    options = options_of(record(), [NOBODY], Access(), "127.0.0.1:1")
    driver = await DriverProcess.start(job_line(options), BatchProgress())
    await driver.close()
    ended = await driver.read()
    assert ended.how in ("died", "interrupted")
