"""The store of batches that the service runs: what there is, how far it is, and who drives it.

Routers make, read, list and cancel; the process of `serve` acquires, updates and releases. What a
batch reads and writes are files, and never here.
"""

from __future__ import annotations

import secrets

from protos.errors import BatchFencedError, BatchNotFoundError, InternalError, InvalidFieldError
from router.state import batch_scripts as scripts
from router.state.batch_records import (
    RECORD_VERSION,
    BatchLease,
    BatchProgress,
    BatchRecord,
    BatchState,
    progress_fields,
    record_of,
)
from router.state.control import Argument, ControlClient, ControlSettings
from router.state.endpoint import Endpoint
from router.state.paging import PRUNED_AT_ONCE, page_of
from router.state.redis_keys import BatchKeys, batch_keys

Records = list[BatchRecord]
Arguments = list[Argument]

KNOWN_MS = 86_400_000
"""How long an idempotency key is known."""
LEASE_S = 10.0
"""A driver's holder that is silent for so long has lost the batch."""


class BatchStore:
    """Batches in Redis; use it from one event loop.

    All methods raise `StateUnavailableError` when the server does not answer in time or refuses.

    Args:
        client: Calls to the server of sessions.
        owns_client: `close` closes it.
    """

    def __init__(self, client: ControlClient, *, owns_client: bool = False) -> None:
        self._client = client
        self._owns_client = owns_client

    @classmethod
    def connect(cls, endpoint: Endpoint, control: ControlSettings | None = None) -> BatchStore:
        """Return a store with a client of its own; nothing is sent yet."""
        return cls(ControlClient(endpoint, control), owns_client=True)

    async def close(self) -> None:
        """Close the connections, where they are its own."""
        if self._owns_client:
            await self._client.close()

    # What routers do.

    async def create(
        self,
        tenant: str,
        name: str,
        *,
        model: str,
        input_uri: str,
        output_uri: str,
        options: bytes,
        ttl_s: float,
        idempotency_key: str = "",
    ) -> BatchRecord:
        """Make a batch that waits to be driven.

        Args:
            tenant: Whose it is.
            name: Of `protos.ids.new_batch_name`.
            model: That it is for.
            input_uri: What it reads.
            output_uri: Where it writes.
            options: The serialised `BatchOptions`.
            ttl_s: Seconds that it is kept after its last change.
            idempotency_key: A batch that was made under it within a day is returned instead.

        Raises:
            InvalidFieldError: The key was used with another request.
        """
        keys = batch_keys(tenant, name, model, idempotency_key)
        ttl_ms = round(1000 * ttl_s)
        known_ms = min(KNOWN_MS, ttl_ms) if idempotency_key else 0
        arguments: Arguments = [
            *(name, _member(tenant, name), RECORD_VERSION, ttl_ms, known_ms, "model", model),
            *("input", input_uri, "output", output_uri, "options", options),
        ]
        reply = await self._client.script(scripts.CREATE, keys, arguments, durable=True)
        if reply[0] == b"OK":
            await self._forget_expired(tenant)
            return await self.get(tenant, name)
        record = await self.get(tenant, reply[1].decode())
        asked = (model, input_uri, output_uri, options)
        if (record.model, record.input_uri, record.output_uri, record.options) != asked:
            rule = f"must not be that of another request: {record.name} was made under it"
            raise InvalidFieldError("idempotency_key", rule, idempotency_key)
        return record

    async def get(self, tenant: str, name: str) -> BatchRecord:
        """Return a batch as it is now.

        Raises:
            BatchNotFoundError: There is none.
        """
        record = await self._read(tenant, name)
        if record is None:
            raise BatchNotFoundError(name)
        return record

    async def list(
        self, tenant: str, page_size: int = 100, page_token: str = ""
    ) -> tuple[Records, str]:
        """Return one page of a tenant's batches, the newest first.

        Returns:
            At most `page_size` records, and the token of the next page; empty after the last.

        Raises:
            InvalidFieldError: The size is not in [1, 1000], or no page gave out the token.
        """
        index = _keys(tenant).of_tenant
        return await page_of(
            self._client,
            index,
            lambda name: self._read(tenant, name),
            lambda name: self._client.command("ZREM", index, name),
            page_size,
            page_token,
            is_descending=True,
        )

    async def cancel(self, tenant: str, name: str) -> BatchRecord:
        """End a batch, or ask who drives it to do so; return it as it is then.

        Raises:
            BatchNotFoundError: There is none.
        """
        record = await self.get(tenant, name)
        keys = batch_keys(tenant, name, record.model)
        reply = await self._client.script(scripts.CANCEL, keys, [_member(tenant, name)])
        if reply[0] == b"MISSING":
            raise BatchNotFoundError(name)
        return await self.get(tenant, name)

    # What the process of `serve` does.

    async def waiting(self, model: str) -> Records:
        """Return the batches of a model that have not ended, the oldest first, of all tenants."""
        found = []
        waiting = batch_keys("", "-", model).waiting
        for raw in await self._client.command("ZRANGE", waiting, 0, -1):
            tenant, _, name = raw.decode().partition("/")
            record = await self._read(tenant, name)
            if record is None:  # it has expired
                await self._client.command("ZREM", waiting, raw)
            else:
                found.append(record)
        return found

    async def acquire(
        self, record: BatchRecord, holder: str, lease_s: float = LEASE_S
    ) -> BatchLease | None:
        """Take the right to drive a batch; None: another has it, or it has ended.

        Args:
            record: The batch.
            holder: Who asks, for others to read.
            lease_s: Seconds until it is free again, unless it is updated.
        """
        token = f"{holder}#{secrets.token_hex(8)}".encode()
        keys = batch_keys(record.tenant, record.name, record.model)
        arguments: Arguments = [_member(record.tenant, record.name), token, round(1000 * lease_s)]
        reply = await self._client.script(scripts.ACQUIRE, keys, arguments)
        if reply[0] != b"OK":
            return None
        return BatchLease(
            tenant=record.tenant,
            name=record.name,
            model=record.model,
            token=token,
            epoch=reply[1],
            lease_s=lease_s,
        )

    async def update(
        self,
        lease: BatchLease,
        state: BatchState | None = None,
        progress: BatchProgress | None = None,
        *,
        error: bytes | None = None,
        starts: int | None = None,
    ) -> BatchState:
        """Write how far a batch is and renew the lease; an end gives the lease back.

        Args:
            lease: Ours.
            state: None: as it is. A batch that is to be cancelled only takes an end.
            progress: None: as it is.
            error: A serialised `google.rpc.Status`; None: as it is.
            starts: Of its driver; None: as many as before.

        Returns:
            The state now.

        Raises:
            BatchFencedError: Another drives it, or it has ended.
            BatchNotFoundError: It is gone.
        """
        pairs: Arguments = [] if progress is None else [*progress_fields(progress)]
        if error is not None:
            pairs += ["error", error]
        if starts is not None:
            pairs += ["starts", starts]
        keys = batch_keys(lease.tenant, lease.name, lease.model)
        arguments: Arguments = [
            *(_member(lease.tenant, lease.name), lease.token, lease.epoch),
            *(round(1000 * lease.lease_s), "" if state is None else state.value),
        ]
        reply = await self._client.script(scripts.UPDATE, keys, [*arguments, *pairs])
        if reply[0] == b"MISSING":
            raise BatchNotFoundError(lease.name)
        if reply[0] == b"FENCED":
            raise BatchFencedError(lease.name, reply[1].decode("utf-8", "replace"))
        if reply[0] != b"OK":
            raise InternalError(f"a batch script answered {reply[0]!r}")
        return BatchState(reply[1].decode())

    async def release(self, lease: BatchLease) -> None:
        """Let another drive the batch at once."""
        keys = batch_keys(lease.tenant, lease.name, lease.model)
        await self._client.script(scripts.RELEASE, keys, [lease.token])

    async def _forget_expired(self, tenant: str) -> None:
        """Take expired ones of the tenant's oldest batches out of its index.

        A batch is made once and at most so many leave for it: an index that nobody lists does not
        outgrow what is kept.
        """
        index = _keys(tenant).of_tenant
        for raw in await self._client.command("ZRANGE", index, 0, PRUNED_AT_ONCE - 1):
            if not await self._client.command("EXISTS", batch_keys(tenant, raw.decode()).record):
                await self._client.command("ZREM", index, raw)

    async def _read(self, tenant: str, name: str) -> BatchRecord | None:
        key = batch_keys(tenant, name).record
        flat = await self._client.command("HGETALL", key)
        return record_of(tenant, name, flat)


def _keys(tenant: str) -> BatchKeys:
    return batch_keys(tenant, "-")


def _member(tenant: str, name: str) -> str:
    return f"{tenant}/{name}"
