"""Batches as records: made once, listed, leased to one driver at a time, cancelled, expired."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from protos.errors import BatchFencedError, BatchNotFoundError, InvalidFieldError
from protos.ids import new_batch_name
from router.state.batch_records import BatchProgress, BatchRecord, BatchState
from router.state.batches import BatchStore
from router.state.embedded import EmbeddedServer
from router.state.redis_keys import batch_keys
from tests.unit.state.turns import redis_of

DAY_S = 86400.0
PROGRESS = BatchProgress(
    rows_total=100,
    rows_done=40,
    rows_failed=3,
    prompt_tokens=400,
    completion_tokens=600,
    tokens_per_s=12.5,
    eta_ms=1_800_000_000_000,
)


@pytest.fixture
async def batches(shared_server: EmbeddedServer) -> AsyncIterator[BatchStore]:
    """A store of batches."""
    made = BatchStore.connect(shared_server.endpoint)
    yield made
    await made.close()


async def make(batches: BatchStore, tenant: str, **changed: Any) -> BatchRecord:
    """Make a batch for a model of the tenant's own."""
    values: dict[str, Any] = {
        "model": f"model/{tenant}",
        "input_uri": "/data/in.jsonl",
        "output_uri": "/data/out",
        "options": b"\x00\xff",
        "ttl_s": DAY_S,
    }
    return await batches.create(tenant, new_batch_name(), **{**values, **changed})


async def test_a_batch_is_what_it_was_made_as(batches: BatchStore, tenant: str) -> None:
    made = await make(batches, tenant)
    assert made == await batches.get(tenant, made.name)
    assert (made.state, made.progress, made.error) == (BatchState.VALIDATING, BatchProgress(), b"")
    assert (made.input_uri, made.output_uri, made.options) == (
        *("/data/in.jsonl", "/data/out"),
        b"\x00\xff",
    )
    assert made.created_ms == made.updated_ms
    assert (made.ended_ms, made.starts) == (0, 0)
    with pytest.raises(BatchNotFoundError, match=made.name):
        await batches.get(f"{tenant}x", made.name)


async def test_one_idempotency_key_makes_one_batch(batches: BatchStore, tenant: str) -> None:
    made = await make(batches, tenant, idempotency_key="k1")
    again = await make(batches, tenant, idempotency_key="k1")
    assert again == made
    assert (await make(batches, f"{tenant}x", idempotency_key="k1")).name != made.name
    assert (await make(batches, tenant)).name != made.name
    with pytest.raises(InvalidFieldError) as caught:
        await make(batches, tenant, idempotency_key="k1", output_uri="/data/other")
    [violation] = caught.value.violations
    assert (violation.field, violation.value) == ("idempotency_key", "k1")
    assert made.name in violation.rule


async def test_pages_go_from_the_newest_to_the_oldest(
    batches: BatchStore, tenant: str, shared_server: EmbeddedServer
) -> None:
    made = [(await make(batches, tenant)).name for _ in range(5)]
    made.sort(reverse=True)
    async with redis_of(shared_server) as redis:
        await redis.delete(batch_keys(tenant, made.pop(1)).record)  # as if it had expired
    listed, token = await batches.list(tenant, 2)
    assert [record.name for record in listed] == made[:2]
    rest, end = await batches.list(tenant, 2, token)
    assert ([record.name for record in rest], end) == (made[2:], "")
    assert await batches.list(f"{tenant}x") == ([], "")
    for size, page_token, field in ((0, "", "page_size"), (1, "?", "page_token")):
        with pytest.raises(InvalidFieldError) as caught:
            await batches.list(tenant, size, page_token)
        assert caught.value.violations[0].field == field


async def test_one_driver_at_a_time_and_the_oldest_batch_first(
    batches: BatchStore, tenant: str
) -> None:
    first, second = await make(batches, tenant), await make(batches, tenant)
    assert [r.name for r in await batches.waiting(first.model)] == [first.name, second.name]
    assert await batches.waiting("another") == []
    lease = await batches.acquire(first, "serve-a")
    assert lease is not None
    assert lease.epoch == 1
    assert await batches.acquire(first, "serve-b") is None
    await batches.release(lease)
    taken = await batches.acquire(first, "serve-b")
    assert taken is not None
    assert taken.epoch == 2
    with pytest.raises(BatchFencedError, match=r"serve-b.*in epoch 2"):
        await batches.update(lease, BatchState.IN_PROGRESS, PROGRESS)
    await batches.release(lease)  # changes nothing any more
    assert await batches.update(taken, BatchState.IN_PROGRESS, PROGRESS, starts=1) == "in_progress"
    record = await batches.get(tenant, first.name)
    assert (record.state, record.progress, record.starts) == ("in_progress", PROGRESS, 1)
    assert record.progress.tokens_per_row == 25.0


async def test_a_lease_that_ran_out_is_free_and_fences_its_holder(
    batches: BatchStore, tenant: str, shared_server: EmbeddedServer
) -> None:
    record = await make(batches, tenant)
    lost = await batches.acquire(record, "serve-a")
    assert lost is not None
    async with redis_of(shared_server) as redis:
        await redis.hset(batch_keys(tenant, record.name).record, "until_ms", 1)  # long ago
    assert await batches.acquire(record, "serve-b") is not None
    with pytest.raises(BatchFencedError):
        await batches.update(lost, BatchState.COMPLETED)
    assert (await batches.get(tenant, record.name)).state is BatchState.VALIDATING


async def test_an_end_is_final(batches: BatchStore, tenant: str) -> None:
    record = await make(batches, tenant)
    lease = await batches.acquire(record, "serve-a")
    assert lease is not None
    assert await batches.update(lease, BatchState.FAILED, error=b"why") == "failed"
    ended = await batches.get(tenant, record.name)
    assert (ended.error, ended.ended_ms) == (b"why", ended.updated_ms)
    with pytest.raises(BatchFencedError, match="failed"):
        await batches.update(lease, BatchState.IN_PROGRESS)
    assert await batches.waiting(record.model) == []
    assert await batches.acquire(record, "serve-a") is None
    assert (await batches.cancel(tenant, record.name)).state is BatchState.FAILED


async def test_cancel_ends_what_nobody_drives_and_asks_who_drives(
    batches: BatchStore, tenant: str
) -> None:
    idle, driven = await make(batches, tenant), await make(batches, tenant)
    assert (await batches.cancel(tenant, idle.name)).state is BatchState.CANCELLED
    lease = await batches.acquire(driven, "serve-a")
    assert lease is not None
    assert (await batches.cancel(tenant, driven.name)).state is BatchState.CANCELLING
    # The driver's word comes later: it does not undo the wish.
    assert await batches.update(lease, BatchState.IN_PROGRESS) is BatchState.CANCELLING
    assert await batches.update(lease, BatchState.CANCELLED) is BatchState.CANCELLED
    assert await batches.waiting(driven.model) == []
    with pytest.raises(BatchNotFoundError):
        await batches.cancel(f"{tenant}x", driven.name)


async def test_a_batch_expires_after_its_last_change(
    batches: BatchStore, tenant: str, shared_server: EmbeddedServer
) -> None:
    record = await make(batches, tenant, ttl_s=100, idempotency_key="k")
    async with redis_of(shared_server) as redis:
        keys = batch_keys(tenant, record.name, record.model, "k")
        await redis.pexpire(keys.record, 1000)
        lease = await batches.acquire(record, "serve-a")
        assert lease is not None
        for key in (keys.record, keys.of_tenant, keys.known):
            assert 90_000 < await redis.pttl(key) <= 100_000
        await redis.delete(keys.record)
    with pytest.raises(BatchNotFoundError):
        await batches.update(lease, BatchState.IN_PROGRESS)
    assert await batches.waiting(record.model) == []


async def test_pages_of_many_batches_hold_each_that_lives_once(
    batches: BatchStore, tenant: str, shared_server: EmbeddedServer
) -> None:
    names = [(await make(batches, tenant)).name for _ in range(130)]
    expired = {names[n] for n in (0, 1, 2, 50, 51, 100)}
    async with redis_of(shared_server) as redis:
        await redis.delete(*(batch_keys(tenant, name).record for name in expired))
        listed: list[str] = []
        sizes, token = [], ""
        while token or not sizes:
            page, token = await batches.list(tenant, 50, token)
            sizes.append(len(page))
            listed += [record.name for record in page]
        assert sizes == [50, 50, 24]
        assert listed == sorted(set(names) - expired, reverse=True)
        assert await redis.zcard(batch_keys(tenant, "-").of_tenant) == 124


async def test_an_index_that_nobody_lists_forgets_what_expired(
    batches: BatchStore, tenant: str, shared_server: EmbeddedServer
) -> None:
    async with redis_of(shared_server) as redis:
        for _ in range(20):  # each is gone before the next is made
            made = await make(batches, tenant)
            await redis.delete(batch_keys(tenant, made.name).record)
        left = await redis.zrange(batch_keys(tenant, "-").of_tenant, 0, -1)
    assert left == [made.name.encode()]
