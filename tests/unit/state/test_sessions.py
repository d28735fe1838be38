"""Sessions as records: made, read, listed, forked, deleted, expired; the directory of routers."""

from __future__ import annotations

import random

import numpy as np
import pytest

from protos.errors import (
    InvalidFieldError,
    SessionExistsError,
    SessionFencedError,
    SessionNotFoundError,
    SessionQuotaError,
)
from router.state.embedded import EmbeddedServer
from router.state.redis_keys import SessionKeys, session_keys
from router.state.session_records import EngineRecord, OpenTurn, SessionRecord, TurnRecord
from router.state.sessions import SessionStore
from tests.unit.state.conftest import StartServer, StoreMaker
from tests.unit.state.turns import add_turn, redis_of, turn_record

DAY_S = 86400.0


async def test_a_session_is_what_it_was_made_as(store: SessionStore, tenant: str) -> None:
    made = await store.create(
        tenant, "s", ttl_s=DAY_S, quota_tokens=100, metadata={"title": "Grüße"}, namespace="ab12"
    )
    assert made == await store.get(tenant, "s")
    assert (made.num_tokens, made.num_turns, made.holder, made.open_turn) == (0, 0, None, None)
    assert (made.ttl_s, made.quota_tokens, made.namespace) == (DAY_S, 100, "ab12")
    assert made.metadata == {"title": "Grüße"}
    assert made.created_ms == made.updated_ms
    assert made.created_ms > 1.7e12
    assert (await store.history(tenant, "s")).tolist() == []
    assert await store.turns(tenant, "s") == []


async def test_a_session_without_an_id_gets_one(store: SessionStore, tenant: str) -> None:
    made = {(await store.create(tenant, ttl_s=DAY_S)).session_id for _ in range(3)}
    assert len(made) == 3
    assert {record.session_id for record in (await store.list(tenant))[0]} == made


async def test_a_second_session_of_an_id_is_refused(store: SessionStore, tenant: str) -> None:
    await store.create(tenant, "s", ttl_s=DAY_S)
    with pytest.raises(SessionExistsError, match="'s'"):
        await store.create(tenant, "s", ttl_s=DAY_S)
    await store.create(f"{tenant}x", "s", ttl_s=DAY_S)


@pytest.mark.parametrize("session_id", ["", " ", "a/b", "a}b", "a" * 129, "ü", "a\n"])
async def test_an_id_that_is_no_key_is_refused(session_id: str, store: SessionStore) -> None:
    for call in (store.get("", session_id), store.acquire("", session_id)):
        with pytest.raises(InvalidFieldError, match="session_id must be 1 to 128 of"):
            await call
    if session_id:
        with pytest.raises(InvalidFieldError, match="tenant must be 1 to 128 of"):
            await store.get(session_id, "s")


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"ttl_s": 0.5}, "ttl"),
        ({"ttl_s": float("nan")}, "ttl"),
        ({"ttl_s": 1e12}, "ttl"),
        ({"ttl_s": 60, "quota_tokens": -1}, "quota_tokens"),
        ({"ttl_s": 60, "metadata": {"a": "x" * 20_000}}, "metadata"),
    ],
)
async def test_fields_out_of_range_are_refused(
    arguments: dict[str, object], field: str, store: SessionStore, tenant: str
) -> None:
    with pytest.raises(InvalidFieldError) as caught:
        await store.create(tenant, "s", **arguments)  # type: ignore[arg-type]
    assert caught.value.violations[0].field == field


async def test_what_is_not_there_is_not_found(store: SessionStore, tenant: str) -> None:
    with pytest.raises(SessionNotFoundError, match="'s'"):
        await store.get(tenant, "s")
    with pytest.raises(SessionNotFoundError):
        await store.acquire(tenant, "s")
    with pytest.raises(SessionNotFoundError):
        await store.history(tenant, "s")
    with pytest.raises(SessionNotFoundError):
        await store.fork(tenant, "s", "t")
    assert not await store.delete(tenant, "s")
    assert not await store.attach_snapshot(tenant, "s", 0, b"h" * 32)
    assert await store.turns(tenant, "s") == []


async def test_delete_removes_every_key(
    store: SessionStore, tenant: str, shared_server: EmbeddedServer
) -> None:
    await store.create(tenant, "s", ttl_s=DAY_S)
    lease = await add_turn(store, tenant, "s", [1, 2], [3], release=False)
    await store.open_turn(
        lease, OpenTurn(request_id="q9", prompt_ids=np.array([4]), seed=1, request=b"")
    )
    keys = session_keys(tenant, "s")
    async with redis_of(shared_server) as redis:
        assert await redis.exists(*keys) == len(SessionKeys._fields)
        assert await store.delete(tenant, "s")
        assert await redis.exists(*keys) == 0
    assert (await store.list(tenant)) == ([], "")
    assert not await store.delete(tenant, "s")
    with pytest.raises(SessionNotFoundError):
        await store.checkpoint(lease, [5])


async def test_a_writer_of_a_deleted_session_cannot_write_the_next_of_its_id(
    store: SessionStore, tenant: str
) -> None:
    await store.create(tenant, "s", ttl_s=DAY_S)
    lease = await store.acquire(tenant, "s")
    await store.delete(tenant, "s")
    await store.create(tenant, "s", ttl_s=DAY_S)
    with pytest.raises(SessionFencedError, match="held by nobody"):
        await store.renew(lease)
    assert (await store.get(tenant, "s")).holder is None


async def test_pages_cover_all_sessions_once_in_order(store: SessionStore, tenant: str) -> None:
    ids = [f"s{i:02d}" for i in range(23)]
    for session_id in random.Random(5).sample(ids, len(ids)):
        await store.create(tenant, session_id, ttl_s=DAY_S)
    await store.create(f"{tenant}b", "foreign", ttl_s=DAY_S)
    found: list[SessionRecord] = []
    sizes, token = [], ""
    while True:
        records, token = await store.list(tenant, 7, token)
        sizes.append(len(records))
        found += records
        if not token:
            break
    assert sizes == [7, 7, 7, 2]
    assert [record.session_id for record in found] == ids


async def test_a_page_that_is_just_full_is_the_last(store: SessionStore, tenant: str) -> None:
    for session_id in ("a", "b"):
        await store.create(tenant, session_id, ttl_s=DAY_S)
    assert (await store.list(tenant, 2))[1] == ""


async def test_pages_pass_over_what_expired(
    store: SessionStore, tenant: str, shared_server: EmbeddedServer
) -> None:
    for session_id in "abcdefg":
        await store.create(tenant, session_id, ttl_s=DAY_S)
    async with redis_of(shared_server) as redis:
        for session_id in "abdg":
            await redis.delete(session_keys(tenant, session_id).meta)
        first, token = await store.list(tenant, 2)
        rest, end = await store.list(tenant, 2, token)
        assert [r.session_id for r in first + rest] == ["c", "e", "f"]
        assert end == ""
        assert await redis.zcard(session_keys(tenant, "x").of_tenant) == 3


async def test_making_sessions_keeps_an_unread_index_small(
    store: SessionStore, tenant: str, shared_server: EmbeddedServer
) -> None:
    """A create looks at four ids, so when all older ones have expired the index stays small."""
    index = session_keys(tenant, "x").of_tenant
    async with redis_of(shared_server) as redis:
        for number in range(60):
            await store.create(tenant, f"s{number}", ttl_s=DAY_S)
            await redis.delete(session_keys(tenant, f"s{number}").meta)
        assert await redis.zcard(index) < 10


@pytest.mark.parametrize("token", ["x", "%%%", "YQ", "ü"])
async def test_a_foreign_page_token_is_refused(
    token: str, store: SessionStore, tenant: str
) -> None:
    with pytest.raises(InvalidFieldError, match="page_token must be one that a page gave out"):
        await store.list(tenant, 10, token)


@pytest.mark.parametrize("size", [0, 1001])
async def test_a_page_has_1_to_1000_records(size: int, store: SessionStore, tenant: str) -> None:
    with pytest.raises(InvalidFieldError, match=r"page_size must be in \[1, 1000\]"):
        await store.list(tenant, size)


async def test_a_fork_at_any_token(store: SessionStore, tenant: str) -> None:
    """Turns [10, 11 | 12] and [13 | 14, 15], first token of each 0 and 3."""
    await store.create(tenant, "s", ttl_s=DAY_S, quota_tokens=50, metadata={"a": "b"})
    await add_turn(store, tenant, "s", [10, 11], [12])
    await add_turn(store, tenant, "s", [13], [14, 15])
    for position in (2, 3, 6):
        assert await store.attach_snapshot(tenant, "s", position, bytes([position]) * 32)
    whole = [10, 11, 12, 13, 14, 15]
    shapes = {
        0: [],
        1: [(0, 1, 0, "fork")],
        2: [(0, 2, 0, "fork")],
        3: [(0, 2, 1, "stop")],
        4: [(0, 2, 1, "stop"), (3, 1, 0, "fork")],
        5: [(0, 2, 1, "stop"), (3, 1, 1, "fork")],
        6: [(0, 2, 1, "stop"), (3, 1, 2, "stop")],
    }
    for at, shape in shapes.items():
        made = await store.fork(tenant, "s", f"f{at}", at)
        turns = await store.turns(tenant, f"f{at}")
        assert [
            (t.first_token, t.prompt_tokens, t.completion_tokens, t.finish_reason) for t in turns
        ] == shape
        assert [t.turn for t in turns] == list(range(1, len(shape) + 1))
        assert (await store.history(tenant, f"f{at}")).tolist() == whole[:at]
        assert (made.num_tokens, made.num_turns) == (at, len(shape))
        assert list(made.snapshots) == [n for n in (2, 3, 6) if n <= at]
        assert (made.ttl_s, made.quota_tokens, made.metadata) == (DAY_S, 50, {"a": "b"})
        lease = await add_turn(store, tenant, f"f{at}", [7], [8])  # it goes on by itself
        assert (await store.tokens(lease)).tolist() == [*whole[:at], 7, 8]
    assert (await store.history(tenant, "s")).tolist() == whole


async def test_a_fork_may_have_its_own_terms(store: SessionStore, tenant: str) -> None:
    await store.create(tenant, "s", ttl_s=DAY_S, quota_tokens=50, metadata={"a": "b"})
    await add_turn(store, tenant, "s", [1, 2], [3])
    made = await store.fork(tenant, "s", ttl_s=60, quota_tokens=0, metadata={})
    assert (made.num_tokens, made.ttl_s, made.quota_tokens, made.metadata) == (3, 60, 0, {})
    with pytest.raises(SessionQuotaError, match="would have 3 tokens, its quota is 2"):
        await store.fork(tenant, "s", quota_tokens=2)


async def test_a_fork_beyond_the_history_or_onto_a_session_is_refused(
    store: SessionStore, tenant: str
) -> None:
    await store.create(tenant, "s", ttl_s=DAY_S)
    await add_turn(store, tenant, "s", [1], [2])
    for at in (-1, 3):
        with pytest.raises(InvalidFieldError, match=r"at_tokens must be in \[0, 2\]"):
            await store.fork(tenant, "s", "t", at)
    await store.create(tenant, "t", ttl_s=DAY_S)
    with pytest.raises(SessionExistsError, match="'t'"):
        await store.fork(tenant, "s", "t")
    with pytest.raises(SessionExistsError, match="'s'"):
        await store.fork(tenant, "s", "s")


async def test_a_fork_takes_no_open_turn(store: SessionStore, tenant: str) -> None:
    await store.create(tenant, "s", ttl_s=DAY_S)
    lease = await add_turn(store, tenant, "s", [1], [2], release=False)
    await store.open_turn(
        lease, OpenTurn(request_id="q2", prompt_ids=np.array([3]), seed=0, request=b"")
    )
    made = await store.fork(tenant, "s", "t")
    assert (made.num_tokens, made.open_turn, made.holder) == (2, None, None)


async def test_all_keys_expire_together(
    store: SessionStore, tenant: str, shared_server: EmbeddedServer
) -> None:
    await store.create(tenant, "s", ttl_s=DAY_S)
    keys = session_keys(tenant, "s")
    async with redis_of(shared_server) as redis:

        async def ttls() -> list[int]:
            lasting = [k for k in keys if k != keys.lease and await redis.exists(k)]
            return [await redis.pttl(key) for key in lasting]

        lease = await add_turn(store, tenant, "s", [1], [2], release=False)
        await store.open_turn(
            lease, OpenTurn(request_id="q2", prompt_ids=np.array([3]), seed=0, request=b"")
        )
        for key in keys:  # as if most of the day had passed
            await redis.pexpire(key, 60_000)
        await store.checkpoint(lease, [4])
        left = await ttls()
        assert len(left) == 6
        assert min(left) > (DAY_S - 60) * 1000
        assert max(left) - min(left) < 1000
        assert 0 < await redis.pttl(keys.lease) <= 15_000


async def test_an_expired_session_is_gone(
    store: SessionStore, tenant: str, shared_server: EmbeddedServer
) -> None:
    await store.create(tenant, "s", ttl_s=DAY_S)
    lease = await add_turn(store, tenant, "s", [1], [2], release=False)
    async with redis_of(shared_server) as redis:
        for key in session_keys(tenant, "s"):
            await redis.pexpireat(key, 1)
    with pytest.raises(SessionNotFoundError):
        await store.get(tenant, "s")
    with pytest.raises(SessionNotFoundError):
        await store.renew(lease)
    assert (await store.create(tenant, "s", ttl_s=DAY_S)).num_tokens == 0


async def test_an_index_outlives_the_longest_of_its_sessions(
    store: SessionStore, tenant: str, shared_server: EmbeddedServer
) -> None:
    await store.create(tenant, "long", ttl_s=DAY_S)
    await store.create(tenant, "short", ttl_s=60)
    async with redis_of(shared_server) as redis:
        assert await redis.pttl(session_keys(tenant, "x").of_tenant) > (DAY_S - 60) * 1000


async def test_only_the_highest_snapshots_are_kept(
    tenant: str, shared_server: EmbeddedServer, store: SessionStore
) -> None:
    await store.create(tenant, "s", ttl_s=DAY_S)
    await add_turn(store, tenant, "s", range(100), [7])
    for position in (100, *range(10, 60)):
        assert await store.attach_snapshot(tenant, "s", position, position.to_bytes(32, "big"))
    assert not await store.attach_snapshot(tenant, "s", 102, b"h" * 32)
    record = await store.get(tenant, "s")
    assert list(record.snapshots) == [*range(29, 60), 100]
    assert record.snapshots[100] == (100).to_bytes(32, "big")


async def test_a_million_tokens(store: SessionStore, tenant: str) -> None:
    ids = np.random.default_rng(3).integers(0, 1 << 32, 1 << 20, dtype=np.uint32)
    await store.create(tenant, "s", ttl_s=60)
    lease = await add_turn(store, tenant, "s", ids, [1], release=False)
    assert np.array_equal((await store.tokens(lease))[:-1], ids)
    assert (await store.fork(tenant, "s", "t", 1_000_000)).num_tokens == 1_000_000
    assert np.array_equal(await store.history(tenant, "t"), ids[:1_000_000])


def test_a_turn_record_survives_bytes() -> None:
    record = turn_record("q", 5, 3, 2, details={"stop": "\n", "usage": {"cached": 4}})
    assert TurnRecord.from_bytes(0, "q", record.to_bytes()) == record
    assert record.num_tokens == 10


async def test_heartbeats_list_the_living_routers(
    start_server: StartServer, make_store: StoreMaker
) -> None:
    server = start_server()
    store = make_store(server)
    assert await store.engines() == []
    beats = [
        EngineRecord(
            engine=f"r{i}", boot=f"b{i}", address=f"h:{i}", namespace="ab", load=i / 3, warm=b
        )
        for i, b in enumerate([b"", bytes(range(16)), b"\r\n12345678"])
    ]
    for beat in reversed(beats):
        await store.heartbeat(beat)
    assert await store.engines() == beats
    async with redis_of(server) as redis:
        assert 0 < await redis.ttl(b"qs1:e:r1") <= 10
        await redis.delete(b"qs1:e:r1")  # as it does by itself
    assert await store.engines() == [beats[0], beats[2]]
