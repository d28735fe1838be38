"""Leases and turns: two writers, takeover, fencing, and every write sent twice."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from protos.errors import (
    SessionBusyError,
    SessionFencedError,
    SessionNotFoundError,
    SessionQuotaError,
)
from router.state.control import ControlClient
from router.state.embedded import EmbeddedServer
from router.state.redis_keys import session_keys
from router.state.sessions import SessionStore
from tests.unit.state.conftest import StoreMaker
from tests.unit.state.turns import add_turn, commit, opening, redis_of, turn_record

DAY_S = 86400.0


class Clock:
    """Monotonic seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now_s = 50.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
async def session(store: SessionStore, tenant: str) -> str:
    """An empty session."""
    return (await store.create(tenant, "s", ttl_s=DAY_S)).session_id


async def expire_lease(server: EmbeddedServer, tenant: str) -> None:
    """Let the lease of `s` run out now."""
    async with redis_of(server) as redis:
        assert await redis.delete(session_keys(tenant, "s").lease)


# Who may write


async def test_of_two_writers_one_wins(
    store: SessionStore, other: SessionStore, tenant: str, session: str
) -> None:
    results = await asyncio.gather(
        *(s.acquire(tenant, session) for s in (store, other) * 4), return_exceptions=True
    )
    leases = [r for r in results if not isinstance(r, BaseException)]
    assert len(leases) == 1
    holder = leases[0].engine
    for result in results:
        if isinstance(result, SessionBusyError):
            assert result.code.name == "ABORTED"
            assert result.fields["holder"] == holder
            assert 0 < float(str(result.fields["expires_s"])) <= 15
            assert holder in str(result)
        else:
            assert result is leases[0]
    assert (await store.get(tenant, session)).holder == holder
    assert store.num_leases + other.num_leases == 1


async def test_a_released_session_is_free(
    store: SessionStore, other: SessionStore, tenant: str, session: str
) -> None:
    first = await store.acquire(tenant, session)
    await store.release(first)
    assert (await store.get(tenant, session)).holder is None
    second = await other.acquire(tenant, session)
    assert (first.epoch, second.epoch) == (1, 2)
    await store.release(first)  # again, and too late: it frees nothing
    assert (await store.get(tenant, session)).holder == "r1"


async def test_an_expired_lease_is_taken_over_and_its_holder_is_fenced(
    store: SessionStore, other: SessionStore, tenant: str, shared_server: EmbeddedServer
) -> None:
    await store.create(tenant, "s", ttl_s=DAY_S)
    stale = await store.acquire(tenant, "s")
    await store.open_turn(stale, opening("q1", [1, 2]))
    await expire_lease(shared_server, tenant)
    lease = await other.acquire(tenant, "s")
    for call in (
        store.renew(stale),
        store.open_turn(stale, opening("q2", [1])),
        store.checkpoint(stale, [3]),
        commit(store, stale, [3]),
        store.abandon_turn(stale),
    ):
        with pytest.raises(SessionFencedError, match="held by r1#") as caught:
            await call
        assert caught.value.code.name == "ABORTED"
    assert store.num_leases == 0
    assert (store.num_fenced, store.num_lost) == (5, 1)
    assert (other.num_fenced, other.num_lost) == (0, 0)
    turn = await other.open_turn_of(lease)
    assert turn is not None
    assert turn.prompt_ids.tolist() == [1, 2]
    assert turn.generated_ids.tolist() == []


async def test_a_fenced_writer_stays_fenced_when_the_next_one_is_done(
    store: SessionStore, other: SessionStore, tenant: str, shared_server: EmbeddedServer
) -> None:
    await store.create(tenant, "s", ttl_s=DAY_S)
    stale = await store.acquire(tenant, "s")
    await store.open_turn(stale, opening("q1", [1]))
    await expire_lease(shared_server, tenant)
    await add_turn(other, tenant, "s", [5], [6])
    with pytest.raises(SessionFencedError, match="held by nobody"):
        await commit(store, stale, [2])
    assert (await store.history(tenant, "s")).tolist() == [5, 6]


async def test_an_expired_lease_that_nobody_took_is_still_ours(
    store: SessionStore, other: SessionStore, tenant: str, shared_server: EmbeddedServer
) -> None:
    await store.create(tenant, "s", ttl_s=DAY_S)
    lease = await store.acquire(tenant, "s")
    await store.open_turn(lease, opening("q1", [1]))
    await expire_lease(shared_server, tenant)
    await commit(store, lease, [2])
    with pytest.raises(SessionBusyError):
        await other.acquire(tenant, "s")  # the commit renewed it
    await expire_lease(shared_server, tenant)
    await store.renew(lease)
    with pytest.raises(SessionBusyError):
        await other.acquire(tenant, "s")


async def test_a_dead_holder_is_taken_over_at_once(
    store: SessionStore, other: SessionStore, tenant: str, session: str
) -> None:
    lease = await store.acquire(tenant, session)
    await other.report_dead("r0", "another-boot")
    await other.report_dead("r", store.boot)
    with pytest.raises(SessionBusyError, match="r0"):
        await other.acquire(tenant, session)
    await other.report_dead("r0", store.boot)
    assert (await other.acquire(tenant, session)).epoch == lease.epoch + 1
    with pytest.raises(SessionFencedError):
        await store.renew(lease)


async def test_a_lease_that_its_own_process_forgot_is_taken_back(
    store: SessionStore, tenant: str, session: str
) -> None:
    """A release that got lost must not lock the process out; one in use must."""
    forgotten = await store.acquire(tenant, session)
    with pytest.raises(SessionBusyError, match="r0"):
        await store.acquire(tenant, session)
    store._held.clear()  # what `release` does before it calls the server
    lease = await store.acquire(tenant, session)
    assert lease.epoch == forgotten.epoch + 1
    with pytest.raises(SessionFencedError):
        await store.renew(forgotten)
    await store.renew(lease)


async def test_a_lease_may_emit_until_a_margin_before_it_runs_out(
    shared_server: EmbeddedServer, tenant: str, make_store: StoreMaker
) -> None:
    """TTL 15 s, margin 3 s: 12 s after the last renewal was *sent* it is over."""
    clock = Clock()
    client = ControlClient(shared_server.endpoint)
    store = SessionStore(client, engine="r0", clock=clock)
    await store.create(tenant, "s", ttl_s=DAY_S)
    lease = await store.acquire(tenant, "s")
    assert lease.may_emit(61.9)
    assert not lease.may_emit(62.0)
    clock.now_s = 55.0
    assert await store.renew(lease) is lease
    assert lease.may_emit(66.9)
    clock.now_s = 60.0
    await store.open_turn(lease, opening("q1", [1]))
    assert lease.may_emit(71.9)
    assert not lease.may_emit(72.0)
    await store.close()


# A turn


async def test_a_turn_becomes_history_when_it_is_committed(
    store: SessionStore, other: SessionStore, tenant: str, session: str
) -> None:
    lease = await store.acquire(tenant, session)
    assert (await store.tokens(lease)).tolist() == []
    await store.open_turn(lease, opening("q1", [10, 11], seed=2**64 - 1))
    assert lease.open_tokens == 2
    await store.checkpoint(lease, [12, 13])
    assert lease.open_tokens == 4
    record = await other.get(tenant, session)
    assert record.open_turn is not None
    assert (record.open_turn.request_id, record.open_turn.prompt_tokens) == ("q1", 2)
    assert (record.num_tokens, record.open_turn.num_tokens) == (0, 4)
    turn = await store.open_turn_of(lease)
    assert turn is not None
    assert (turn.request_id, turn.seed, turn.request) == ("q1", 2**64 - 1, b"request")
    assert (turn.prompt_ids.tolist(), turn.generated_ids.tolist()) == ([10, 11], [12, 13])
    assert turn.started_ms > 1.7e12
    await store.commit_turn(lease, "q1", turn_record("q1", 0, 2, 3), [14])
    assert (lease.turn, lease.num_tokens, lease.open_tokens) == (1, 5, 0)
    assert (await store.tokens(lease)).tolist() == [10, 11, 12, 13, 14]
    assert await store.open_turn_of(lease) is None
    record = await other.get(tenant, session)
    assert (record.num_tokens, record.num_turns, record.open_turn) == (5, 1, None)
    assert record.updated_ms >= record.created_ms
    await store.open_turn(lease, opening("q2", [20]))
    await commit(store, lease, [21])
    assert (await store.tokens(lease)).tolist() == [10, 11, 12, 13, 14, 20, 21]
    assert [(t.turn, t.request_id, t.num_tokens) for t in await other.turns(tenant, session)] == [
        (1, "q1", 5),
        (2, "q2", 7),
    ]


async def test_another_router_goes_on_with_an_open_turn(
    store: SessionStore, other: SessionStore, tenant: str, session: str
) -> None:
    first = await store.acquire(tenant, session)
    await store.open_turn(first, opening("q1", [1, 2, 3]))
    await store.checkpoint(first, [4, 5])
    await other.report_dead("r0", store.boot)
    lease = await other.acquire(tenant, session)
    turn = await other.open_turn_of(lease)
    assert turn is not None
    assert turn.generated_ids.tolist() == [4, 5]
    await other.checkpoint(lease, [6])
    await commit(other, lease, [7], prompt=3)
    assert (await other.tokens(lease)).tolist() == [1, 2, 3, 4, 5, 6, 7]


async def test_an_empty_turn_is_a_turn(store: SessionStore, tenant: str, session: str) -> None:
    lease = await store.acquire(tenant, session)
    await store.open_turn(lease, opening("q1", []))
    turn = await store.open_turn_of(lease)
    assert turn is not None
    assert len(turn.prompt_ids) == 0
    await store.commit_turn(lease, "q1", turn_record("q1", 0, 0, 0))
    assert (lease.turn, lease.num_tokens) == (1, 0)
    await store.open_turn(lease, opening("q2", [1]))
    await commit(store, lease, [2])
    await store.open_turn(lease, opening("q3", []))
    await store.commit_turn(lease, "q3", turn_record("q3", 2, 0, 0))
    assert (lease.turn, lease.num_tokens) == (3, 2)
    assert (await store.tokens(lease)).tolist() == [1, 2]


async def test_a_new_request_gives_up_the_open_turn(
    store: SessionStore, tenant: str, session: str
) -> None:
    lease = await store.acquire(tenant, session)
    await store.open_turn(lease, opening("q1", [1, 2]))
    await store.checkpoint(lease, [3])
    await store.open_turn(lease, opening("q2", [9]))
    turn = await store.open_turn_of(lease)
    assert turn is not None
    assert (turn.request_id, turn.prompt_ids.tolist(), len(turn.generated_ids)) == ("q2", [9], 0)
    with pytest.raises(SessionFencedError, match="the turn is not open"):
        await store.commit_turn(lease, "q1", turn_record("q1", 0, 2, 1))


async def test_an_abandoned_turn_leaves_no_trace(
    store: SessionStore, tenant: str, session: str
) -> None:
    lease = await add_turn(store, tenant, session, [1], [2], release=False)
    await store.open_turn(lease, opening("q9", [3, 4]))
    for position in (2, 3, 4):
        assert await store.attach_snapshot(tenant, session, position, bytes(32))
    await store.abandon_turn(lease)
    await store.abandon_turn(lease)
    record = await store.get(tenant, session)
    assert (record.num_tokens, record.open_turn, list(record.snapshots)) == (2, None, [2])
    assert await store.open_turn_of(lease) is None
    with pytest.raises(SessionFencedError, match="the turn is not open"):
        await store.checkpoint(lease, [5])


async def test_a_history_that_is_not_what_was_read_is_a_conflict(
    store: SessionStore, tenant: str, shared_server: EmbeddedServer
) -> None:
    """As after a failover with a lost tail: lease and epoch are right, the tokens are not."""
    await store.create(tenant, "s", ttl_s=DAY_S)
    lease = await add_turn(store, tenant, "s", [1], [2, 3], release=False)
    keys = session_keys(tenant, "s")
    async with redis_of(shared_server) as redis:
        await redis.hset(keys.meta, mapping={"turn": 0, "ntok": 0})
        with pytest.raises(SessionFencedError, match="turn 0 with 0 tokens, ours is turn 1 with 3"):
            await store.open_turn(lease, opening("q2", [4]))
        await redis.hset(keys.meta, mapping={"turn": 1, "ntok": 3})
        await redis.set(keys.tokens, b"\0" * 8)
        with pytest.raises(SessionFencedError):
            await store.open_turn(lease, opening("q2", [4]))
        with pytest.raises(SessionFencedError, match="has no 3 tokens"):
            await store.tokens(lease)


async def test_a_checkpoint_must_follow_what_is_saved(
    store: SessionStore, tenant: str, session: str
) -> None:
    lease = await store.acquire(tenant, session)
    await store.open_turn(lease, opening("q1", [1, 2]))
    with pytest.raises(SessionFencedError, match="the open turn has 2 tokens, not 3"):
        await store.checkpoint(lease, [5], start=3)
    await store.checkpoint(lease, [3, 4])
    with pytest.raises(SessionFencedError, match="the open turn has other tokens"):
        await store.checkpoint(lease, [3, 5], start=2)
    with pytest.raises(SessionFencedError, match="the open turn has other tokens"):
        await store.checkpoint(lease, [9], start=1)
    turn = await store.open_turn_of(lease)
    assert turn is not None
    assert turn.generated_ids.tolist() == [3, 4]


# Everything may be sent twice


async def test_every_write_may_be_sent_twice(
    store: SessionStore, tenant: str, session: str
) -> None:
    lease = await store.acquire(tenant, session)
    for _ in range(2):
        await store.open_turn(lease, opening("q1", [1, 2]))
        assert lease.open_tokens == 2
    for _ in range(2):
        await store.checkpoint(lease, [3, 4], start=2)
        assert lease.open_tokens == 4
    await store.checkpoint(lease, [3], start=2)  # an older one, late
    assert lease.open_tokens == 4
    await store.checkpoint(lease, [3, 4, 5], start=2)  # the same and more
    assert lease.open_tokens == 5
    await store.commit_turn(lease, "q1", turn_record("q1", 0, 2, 4), [6])
    lease.turn, lease.num_tokens, lease.open_tokens = 0, 0, 5  # as if the answer had been lost
    await store.commit_turn(lease, "q1", turn_record("q1", 0, 2, 4), [6])
    assert (lease.turn, lease.num_tokens) == (1, 6)
    assert (await store.tokens(lease)).tolist() == [1, 2, 3, 4, 5, 6]
    assert len(await store.turns(tenant, session)) == 1
    await store.release(lease)
    await store.release(lease)


async def test_a_commit_sent_again_under_a_lost_lease_is_known(
    store: SessionStore, other: SessionStore, tenant: str, shared_server: EmbeddedServer
) -> None:
    await store.create(tenant, "s", ttl_s=DAY_S)
    lease = await store.acquire(tenant, "s")
    await store.open_turn(lease, opening("q1", [1]))
    await commit(store, lease, [2])
    await expire_lease(shared_server, tenant)
    await add_turn(other, tenant, "s", [3], [4])
    lease.turn, lease.num_tokens, lease.open_tokens = 0, 0, 1
    await store.commit_turn(lease, "q1", turn_record("q1", 0, 1, 1), [2])
    assert (await store.history(tenant, "s")).tolist() == [1, 2, 3, 4]
    assert (await other.get(tenant, "s")).holder is None  # and took nothing


async def test_an_acquire_sent_twice_is_one_lease(
    store: SessionStore, tenant: str, session: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ControlClient.script

    async def twice(self: ControlClient, *arguments: object, **more: object) -> list[object]:
        await real(self, *arguments, **more)  # type: ignore[arg-type]
        return await real(self, *arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(ControlClient, "script", twice)
    lease = await store.acquire(tenant, session)
    assert lease.epoch == 1
    await store.open_turn(lease, opening("q1", [1]))
    await commit(store, lease, [2])
    made = await store.create(tenant, "t", ttl_s=DAY_S)
    forked = await store.fork(tenant, session, "u", 1)
    assert (lease.turn, lease.num_tokens, made.num_tokens, forked.num_tokens) == (1, 2, 0, 1)


# Quota


async def test_a_prompt_that_leaves_no_room_is_refused(store: SessionStore, tenant: str) -> None:
    await store.create(tenant, "s", ttl_s=DAY_S, quota_tokens=10)
    lease = await add_turn(store, tenant, "s", range(4), [4], release=False)
    assert (lease.quota_tokens, lease.num_tokens) == (10, 5)
    with pytest.raises(SessionQuotaError, match="would have 11 tokens, its quota is 10"):
        await store.open_turn(lease, opening("q2", range(5)))
    assert (await store.get(tenant, "s")).open_turn is None
    await store.open_turn(lease, opening("q2", range(4)))
    assert lease.open_tokens == 4


async def test_tokens_beyond_the_quota_are_refused(store: SessionStore, tenant: str) -> None:
    await store.create(tenant, "s", ttl_s=DAY_S, quota_tokens=5)
    lease = await store.acquire(tenant, "s")
    await store.open_turn(lease, opening("q1", [1, 2]))
    await store.checkpoint(lease, [3, 4])
    for call in (store.checkpoint(lease, [5, 6]), commit(store, lease, [5, 6], prompt=2)):
        with pytest.raises(SessionQuotaError, match="would have 6 tokens, its quota is 5"):
            await call
    assert (await store.get(tenant, "s")).num_tokens == 0
    await commit(store, lease, [5], prompt=2)
    assert lease.num_tokens == 5


async def test_without_a_quota_there_is_room(store: SessionStore, tenant: str) -> None:
    await store.create(tenant, "s", ttl_s=DAY_S)
    lease = await store.acquire(tenant, "s")
    await store.open_turn(lease, opening("q1", range(1000)))
    assert lease.open_tokens == 1000


async def test_ids_that_do_not_fit_are_refused(
    store: SessionStore, tenant: str, session: str
) -> None:
    lease = await store.acquire(tenant, session)
    for ids in ([-1], [1 << 32]):
        with pytest.raises(ValueError, match=r"token ids must be in \[0, 2\*\*32\)"):
            await store.open_turn(lease, opening("q1", ids))
    await store.open_turn(lease, opening("q1", np.array([(1 << 32) - 1], dtype=np.uint32)))
    turn = await store.open_turn_of(lease)
    assert turn is not None
    assert turn.prompt_ids.tolist() == [(1 << 32) - 1]


async def test_tenants_do_not_meet(store: SessionStore, other: SessionStore, tenant: str) -> None:
    await store.create(tenant, "s", ttl_s=DAY_S)
    await store.create(f"{tenant}.b", "s", ttl_s=DAY_S)
    await add_turn(store, tenant, "s", [1], [2], release=False)
    await add_turn(other, f"{tenant}.b", "s", [3], [4], release=False)
    assert (await store.history(tenant, "s")).tolist() == [1, 2]
    assert (await store.history(f"{tenant}.b", "s")).tolist() == [3, 4]
    with pytest.raises(SessionNotFoundError):
        await store.get(f"{tenant}.c", "s")
