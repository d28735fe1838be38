"""`BatchService` over real gRPC and a real server: checks, tenants, idempotency, watching."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import pytest

from protos.async_client import AsyncClient
from protos.client import Client, ClientConfig
from protos.errors import (
    BatchesOffError,
    BatchNotFoundError,
    InvalidFieldError,
    UnauthenticatedError,
)
from protos.v1 import batch_pb2
from router.gateway.authentication import ApiKey, Callers
from router.gateway.batch_roots import BatchRoots
from router.gateway.batches import BatchServicer, BatchTerms
from router.gateway.server import GatewayOptions, GatewayThread, batch_service
from router.state.batch_records import BatchProgress, BatchRecord, BatchState
from router.state.batches import BatchStore
from tests.store_servers import StoreServer, running_store

T = TypeVar("T")
KEYS = (ApiKey("key-a", "a"), ApiKey("key-b", "b"), ApiKey("key-plain"))
ONCE = ClientConfig(short_timeout_s=10, max_attempts=1)
TERMS = BatchTerms(model="tiny", roots=BatchRoots(["/batches"]), ttl_s=600)
VALIDATING = batch_pb2.BATCH_STATE_VALIDATING


class Served(NamedTuple):
    server: StoreServer
    address: str
    off: str
    """Address of a router whose service takes no batches."""
    a: Client
    b: Client
    plain: Client

    def drive(self, name: str, call: Callable[[BatchStore, Any], Awaitable[T]]) -> T:
        """Call the store as the process of `serve` does, with a lease on the batch `name`."""

        async def driven() -> T:
            store = BatchStore.connect(self.server.endpoint)
            try:
                [record] = [r for r in await store.waiting("tiny") if r.name == name]
                lease = await store.acquire(record, "serve")
                assert lease is not None
                return await call(store, lease)
            finally:
                await store.close()

        return asyncio.run(driven())


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with running_store() as server:
        gateways = []
        for terms in (TERMS, BatchTerms(model="tiny", roots=BatchRoots([]), ttl_s=600)):
            store = BatchStore.connect(server.endpoint)
            servicer = BatchServicer(store, terms, Callers(KEYS))
            options = GatewayOptions(api_keys=KEYS)
            gateway = GatewayThread([batch_service(servicer)], options)
            gateways.append((gateway, store, gateway.start()))
        (_, _, address), (_, _, off) = gateways
        clients = [Client(address, ONCE, api_key=key.key) for key in KEYS]
        yield Served(server, address, off, *clients)
        for client in clients:
            client.close()
        for gateway, store, _ in gateways:
            gateway.call(store.close())
            gateway.stop()


def test_a_batch_is_made_as_it_was_asked_for(served: Served) -> None:
    made = served.plain.create_batch(
        "/batches/in", "/batches/out", limit=7, temperature=0.1, format="parquet", max_retries=0
    )
    assert made == served.plain.get_batch(made.name)
    assert (made.state, made.model, made.rows_total) == (VALIDATING, "tiny", 0)
    options = made.options
    assert (options.limit, options.temperature, options.format) == (7, 0.1, "parquet")
    assert options.HasField("max_retries")
    assert not options.HasField("part_rows")
    assert made.create_time.seconds > 1_700_000_000
    assert not made.HasField("end_time")


def test_a_service_without_roots_says_which_option_is_missing(served: Served) -> None:
    with Client(served.off, ONCE, api_key="key-a") as client:
        with pytest.raises(BatchesOffError, match="start it with --batch-root URI"):
            client.create_batch("/batches/a/in", "/batches/a/out")
        assert isinstance(list(client.list_batches()), list)


def test_every_violation_is_named_with_rule_and_value(served: Served) -> None:
    with pytest.raises(InvalidFieldError) as caught:
        served.a.create_batch(
            "/batches/a/../b/in",
            "/batches/b/out",
            idempotency_key="a/b",
            part_rows=0,
            max_failure_rate=float("nan"),
            min_clients=3,
            max_clients=2,
            format="csv",  # type: ignore[typeddict-item]
        )
    found = {violation.field: violation for violation in caught.value.violations}
    assert set(found) == {
        *("input_uri", "output_uri", "idempotency_key", "options.part_rows", "options.format"),
        *("options.max_failure_rate", "options.min_clients"),
    }
    assert found["input_uri"].value == "/batches/a/../b/in"
    assert found["output_uri"].rule == "must lie under /batches/a"
    assert found["options.part_rows"].rule == "must be in [1, 65536]"
    assert found["options.min_clients"].rule == "must be at most options.max_clients (2)"


def test_tenants_do_not_meet(served: Served) -> None:
    made = served.a.create_batch("/batches/a/in", "/batches/a/out", idempotency_key="k")
    again = served.a.create_batch("/batches/a/in", "/batches/a/out", idempotency_key="k")
    assert again == made
    for other in (served.b, served.plain):
        assert made.name not in [batch.name for batch in other.list_batches()]
        for call in (other.get_batch, other.cancel_batch):
            with pytest.raises(BatchNotFoundError, match=made.name):
                call(made.name)
        with pytest.raises(BatchNotFoundError, match=made.name):
            next(other.watch_batch(made.name))
    other = served.b.create_batch("/batches/b/in", "/batches/b/out", idempotency_key="k")
    assert other.name != made.name
    with Client(served.address, ONCE) as stranger, pytest.raises(UnauthenticatedError):
        stranger.get_batch(made.name)


def test_pages_hold_every_batch_once(served: Served) -> None:
    made = [served.b.create_batch("/batches/b/in", f"/batches/b/{i}").name for i in range(3)]
    listed = [batch.name for batch in served.b.list_batches(page_size=2)]
    assert [name for name in listed if name in made] == sorted(made, reverse=True)
    with pytest.raises(InvalidFieldError, match="page_size must be at most 1000, got 1001"):
        next(served.b.list_batches(page_size=1001))


def test_a_watcher_sees_every_state_until_the_end(served: Served) -> None:
    name = served.plain.create_batch("/batches/in", "/batches/watched").name
    watch = served.plain.watch_batch(name, 0.1)
    assert next(watch).state == VALIDATING
    progress = BatchProgress(rows_total=9, rows_done=4, tokens_per_s=2.5, eta_ms=1_800_000_000_000)

    async def begin(store: BatchStore, lease: Any) -> None:
        await store.update(lease, BatchState.IN_PROGRESS, progress)
        await store.release(lease)

    async def end(store: BatchStore, lease: Any) -> None:
        await store.update(lease, BatchState.COMPLETED)

    served.drive(name, begin)
    seen = next(watch)
    assert (seen.state, seen.rows_done) == (batch_pb2.BATCH_STATE_IN_PROGRESS, 4)
    assert (seen.output_tokens_per_second, seen.eta.seconds) == (2.5, 1_800_000_000)
    served.drive(name, end)
    last = list(watch)[-1]
    assert last.state == batch_pb2.BATCH_STATE_COMPLETED
    assert last.HasField("end_time")
    assert not last.HasField("eta")
    with pytest.raises(InvalidFieldError, match=r"interval_s must be 0\.1 or more"):
        next(served.plain.watch_batch(name, 0.01))


def test_a_watcher_goes_on_at_another_router(served: Served) -> None:
    store = BatchStore.connect(served.server.endpoint)
    options = GatewayOptions(api_keys=KEYS)
    gateway = GatewayThread([batch_service(BatchServicer(store, TERMS, Callers(KEYS)))], options)
    addresses = [gateway.start(), served.address]
    name = served.plain.create_batch("/batches/in", "/batches/moved").name
    patient = ClientConfig(short_timeout_s=10, max_attempts=2)
    with Client(addresses, patient, api_key="key-plain") as client:
        watch = client.watch_batch(name, 0.1)
        assert next(watch).state == VALIDATING
        gateway.call(gateway.gateway.stop(0))
        gateway.call(store.close())
        gateway.stop()
        served.plain.cancel_batch(name)
        assert list(watch)[-1].state == batch_pb2.BATCH_STATE_CANCELLED


def test_cancelling_twice_is_cancelling_once(served: Served) -> None:
    name = served.plain.create_batch("/batches/in", "/batches/cancelled").name
    first = served.plain.cancel_batch(name)
    assert first.state == batch_pb2.BATCH_STATE_CANCELLED
    assert served.plain.cancel_batch(name) == first
    assert [batch.state for batch in served.plain.watch_batch(name)] == [first.state]


async def test_the_async_client_does_the_same(served: Served) -> None:
    async with AsyncClient(served.address, ONCE, api_key="key-plain") as client:
        made = await client.create_batch("/batches/in", "/batches/async", max_tokens=4)
        assert await client.get_batch(made.name) == made
        assert made.name in [batch.name async for batch in client.list_batches()]
        cancelled = await client.cancel_batch(made.name)
        assert [batch async for batch in client.watch_batch(made.name)] == [cancelled]
        with pytest.raises(BatchNotFoundError):
            await client.get_batch("batch-none")


def test_a_record_keeps_what_its_error_was() -> None:
    """Beside the servicer: a message carries the error of a record as the client gets it."""
    from protos.errors import BatchFailuresError, from_status
    from router.gateway.batches import batch_message

    error = BatchFailuresError(failed=3, total=9, max_failure_rate=0.1)
    record = BatchRecord(
        tenant="",
        name="n",
        model="m",
        state=BatchState.FAILED,
        input_uri="",
        output_uri="",
        options=b"",
        created_ms=1,
        updated_ms=1,
        ended_ms=1,
        progress=BatchProgress(),
        error=error.to_status().SerializeToString(),
        starts=1,
    )
    assert from_status(batch_message(record).error).fields == error.fields
