"""Snapshots of a turn get into its session's record, whichever comes first, they or the commit."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import numpy as np
import pytest

from protos.v1 import generation_pb2
from router.gateway.open_turn import Turn
from router.gateway.request_reader import RequestReader, ServedModel
from router.gateway.snapshot_names import SnapshotNames
from router.state.session_records import OpenTurn, TurnRecord
from router.state.sessions import SessionStore
from tests.store_servers import StoreServer, running_store
from tests.unit.router.gateway_service import TEXT

MODEL = ServedModel(
    name="m", model_type="qwen3_5", max_model_len=64, vocab_size=260, dtype="float32"
)


@pytest.fixture(scope="module")
def server() -> Iterator[StoreServer]:
    with running_store() as running:
        yield running


async def begin(store: SessionStore, session_id: str) -> Turn:
    """Open a turn with a prompt of four tokens, none generated or saved."""
    await store.create("", session_id, ttl_s=60)
    lease = await store.acquire("", session_id)
    prompt = np.arange(4, dtype=np.uint32)
    await store.open_turn(lease, OpenTurn(request_id="r", prompt_ids=prompt, seed=0, request=b""))
    request = generation_pb2.GenerateRequest(request_id="r")
    history = await store.tokens(lease)
    return Turn(RequestReader(TEXT, MODEL), request, lease, history, prompt, store.settings)


async def named(store: SessionStore, session_id: str) -> dict[int, bytes]:
    return dict((await store.get("", session_id)).snapshots)


async def until(check: object, store: SessionStore, session_id: str) -> None:
    async with asyncio.timeout(10):
        while await named(store, session_id) != check:
            await asyncio.sleep(0.01)


async def test_a_snapshot_is_named_once_its_tokens_are_there(server: StoreServer) -> None:
    store = SessionStore.connect(server.endpoint, engine="a")
    names = SnapshotNames(store)
    turn = await begin(store, "s")
    hint = await names.hint(turn)
    assert hint.snapshot_positions == ()
    assert hint.on_snapshot is not None
    # The tier tells from a thread of its own: the prompt's end, and one beyond what is saved.
    await asyncio.to_thread(hint.on_snapshot, 4, bytes(32))
    await asyncio.to_thread(hint.on_snapshot, 6, bytes([1] * 32))
    await until({4: bytes(32)}, store, "s")
    record = TurnRecord(
        request_id="r",
        first_token=0,
        prompt_tokens=4,
        completion_tokens=3,
        finish_reason="length",
    )
    await store.commit_turn(turn.lease, "r", record, [7, 8, 9])
    turn.is_committed = True
    names.name_behind(turn)
    await until({4: bytes(32), 6: bytes([1] * 32)}, store, "s")
    assert not turn.snapshots
    assert (await names.hint(turn)).snapshot_positions == (4, 6)
    await store.close()


async def test_a_snapshot_of_a_session_that_is_gone_is_forgotten(server: StoreServer) -> None:
    store = SessionStore.connect(server.endpoint, engine="a")
    names = SnapshotNames(store)
    turn = await begin(store, "gone")
    hint = await names.hint(turn)
    await store.delete("", "gone")
    turn.is_committed = True
    assert hint.on_snapshot is not None
    hint.on_snapshot(4, bytes(32))
    async with asyncio.timeout(10):
        await asyncio.sleep(0.01)
        while names._tasks:
            await asyncio.sleep(0.01)
    await store.close()
