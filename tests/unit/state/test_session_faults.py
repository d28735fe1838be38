"""Meta in trouble, each row with a real server: bounded calls, one error, nothing half-written.

Bounds are counted in attempts, each of which ends after `connect_s + operation_s` at the latest.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from protos.errors import (
    InternalError,
    SessionBusyError,
    SessionFencedError,
    StateUnavailableError,
)
from router.state.breaker import BreakerSettings, BreakerState, CircuitBreaker
from router.state.control import ControlClient, ControlSettings
from router.state.embedded import EmbeddedServer, answers
from router.state.endpoint import Endpoint
from router.state.redis_keys import session_keys
from router.state.sessions import SessionStore
from tests.eventually import eventually
from tests.ports import free_port
from tests.unit.state.conftest import StartServer, StoreMaker
from tests.unit.state.proxy import Proxy
from tests.unit.state.test_leases import Clock
from tests.unit.state.turns import add_turn, commit, opening, redis_of, turn_record

HOST = "127.0.0.1"
TRIES = 3
HASTY = ControlSettings(connect_s=0.1, operation_s=0.1, tries=TRIES)
"""A frozen server answers nothing, however long one waits; a live one has the usual bounds."""


class Watched:
    """A store whose breaker has a clock of the test, and whose attempts are counted."""

    def __init__(self, endpoint: Endpoint, settings: ControlSettings | None = None) -> None:
        self.clock = Clock()
        self.breaker = CircuitBreaker(
            str(endpoint), BreakerSettings(jitter=0.0), clock=self.clock, generator=random.Random(3)
        )
        self.client = ControlClient(endpoint, settings, breaker=self.breaker)
        self.store = SessionStore(self.client, engine="r0")

    @property
    def attempts(self) -> int:
        """Attempts since the last question."""
        done, self.client.num_attempts = self.client.num_attempts, 0
        return done

    async def __aenter__(self) -> Watched:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.store.close()


async def assert_is_down(watched: Watched, attempts: int = TRIES) -> None:
    """One call fails in so many attempts and opens the breaker; then no call is made at all."""
    with pytest.raises(StateUnavailableError) as caught:
        await watched.store.get("t", "s")
    assert watched.attempts == attempts
    assert caught.value.code.name == "UNAVAILABLE"
    assert caught.value.retry_after_s == 1.0
    assert watched.breaker.state is BreakerState.OPEN
    for _ in range(20):
        with pytest.raises(StateUnavailableError, match="circuit breaker is open"):
            await watched.store.acquire("t", "s")
    assert watched.attempts == 0


async def assert_recovers(watched: Watched) -> None:
    """After a failed probe and twice the wait, a call goes through and closes the breaker."""
    watched.clock.now_s += 1.0
    assert watched.breaker.state is BreakerState.HALF_OPEN
    await watched.store.ping()
    assert watched.attempts == 1
    assert watched.breaker.state is BreakerState.CLOSED


# Refused, frozen


async def test_a_refused_port(start_server: StartServer) -> None:
    port = free_port()
    async with Watched(Endpoint(host=HOST, port=port)) as watched:
        await assert_is_down(watched)
        start_server(extra=f"port {port}\nbind {HOST}\nprotected-mode no")
        await assert_recovers(watched)
        assert (await watched.store.create("t", "s", ttl_s=60)).num_tokens == 0


async def test_a_probe_that_fails_waits_twice_as_long() -> None:
    async with Watched(Endpoint(host="127.0.0.1", port=1)) as watched:
        await assert_is_down(watched)
        for wait_s in (1.0, 2.0, 4.0):
            watched.clock.now_s += wait_s - 0.01
            with pytest.raises(StateUnavailableError, match="breaker is open"):
                await watched.store.ping()
            watched.clock.now_s += 0.01
            with pytest.raises(StateUnavailableError):
                await watched.store.ping()
            assert watched.attempts == 1  # the probe, and no second attempt


async def test_a_frozen_server(start_server: StartServer) -> None:
    server = start_server()
    async with Watched(server.endpoint, HASTY) as watched:
        await watched.store.create("t", "s", ttl_s=60)
        assert watched.attempts > 0
        os.kill(server.pid, signal.SIGSTOP)
        await assert_is_down(watched)
        os.kill(server.pid, signal.SIGCONT)
        await assert_recovers(watched)
        assert (await watched.store.get("t", "s")).num_tokens == 0


async def test_a_frozen_server_is_asked_by_few_of_many(start_server: StartServer) -> None:
    """Those on their way when the breaker opens end with their own attempt; the rest make none."""
    server = start_server()
    settings = ControlSettings(connect_s=0.1, operation_s=0.1, tries=TRIES, max_connections=8)
    async with Watched(server.endpoint, settings) as watched:
        os.kill(server.pid, signal.SIGSTOP)
        results = await asyncio.gather(
            *(watched.store.get("t", "s") for _ in range(100)), return_exceptions=True
        )
        os.kill(server.pid, signal.SIGCONT)
    assert {type(r) for r in results} == {StateUnavailableError}
    assert watched.attempts <= 8 + TRIES


async def test_a_commit_to_a_thawed_server_counts_once(start_server: StartServer) -> None:
    """The frozen server has the first attempt in its socket and runs it when it wakes."""
    server = start_server()
    async with Watched(server.endpoint, HASTY) as watched:
        store = watched.store
        await store.create("t", "s", ttl_s=60)
        lease = await store.acquire("t", "s")
        await store.open_turn(lease, opening("q1", [1]))
        os.kill(server.pid, signal.SIGSTOP)
        with pytest.raises(StateUnavailableError):
            await commit(store, lease, [2])
        os.kill(server.pid, signal.SIGCONT)
        watched.clock.now_s += 1.0
        await commit(store, lease, [2])
        assert (await store.history("t", "s")).tolist() == [1, 2]
        assert len(await store.turns("t", "s")) == 1


async def test_a_server_too_slow_to_write_is_still_read(start_server: StartServer) -> None:
    """CLIENT PAUSE WRITE holds writes back and answers reads, as a disk that does not sync does."""
    server = start_server()
    async with Watched(server.endpoint, HASTY) as watched, redis_of(server) as redis:
        store = watched.store
        await store.create("t", "s", ttl_s=60)
        lease = await store.acquire("t", "s")
        await store.open_turn(lease, opening("q1", [1]))
        await redis.execute_command("CLIENT", "PAUSE", 600_000, "WRITE")
        assert (await store.get("t", "s")).num_tokens == 0
        assert watched.attempts > 0
        with pytest.raises(StateUnavailableError, match="Timeout"):
            await commit(store, lease, [2])
        assert watched.attempts == TRIES
        assert watched.breaker.state is BreakerState.OPEN
        await redis.execute_command("CLIENT", "UNPAUSE")
        watched.clock.now_s += 1.0
        await commit(store, lease, [2])
        assert (await store.history("t", "s")).tolist() == [1, 2]


async def test_a_cancelled_call_leaves_no_answer_behind(start_server: StartServer) -> None:
    """The answer to a cancelled call must not be read as that of the next one."""
    server = start_server()
    async with Watched(server.endpoint) as watched:
        store = watched.store
        for session_id in ("a", "b"):
            await store.create("t", session_id, ttl_s=60, metadata={"name": session_id})
        os.kill(server.pid, signal.SIGSTOP)
        calls = [asyncio.create_task(store.get("t", "a")) for _ in range(4)]
        await asyncio.sleep(0)
        done, _ = await asyncio.wait(calls, timeout=0.05)
        assert not done
        for call in calls:
            call.cancel()
        await asyncio.wait(calls)
        os.kill(server.pid, signal.SIGCONT)
        found = await asyncio.gather(*(store.get("t", "b") for _ in range(8)))
        assert [record.metadata for record in found] == [{"name": "b"}] * 8
        assert all(call.cancelled() for call in calls)


# Full, replica, out of scripts


async def test_a_full_server_ends_what_runs_and_begins_nothing(start_server: StartServer) -> None:
    server = start_server()
    async with Watched(server.endpoint) as watched, redis_of(server) as redis:
        store = watched.store
        await store.create("t", "s", ttl_s=60)
        lease = await add_turn(store, "t", "s", [1], [2], release=False)
        await store.open_turn(lease, opening("q2", [3]))
        await redis.config_set("maxmemory", 1)
        assert (await store.history("t", "s")).tolist() == [1, 2]
        for call in (
            store.create("t", "u", ttl_s=60),
            store.fork("t", "s", "f"),
            store.open_turn(lease, opening("q3", [3])),
            store.attach_snapshot("t", "s", 2, b"h" * 32),
        ):
            with pytest.raises(StateUnavailableError, match="OutOfMemoryError") as caught:
                await call
            assert caught.value.retry_after_s is not None
        assert [r.session_id for r in (await store.list("t"))[0]] == ["s"]
        await store.renew(lease)
        turn = await store.open_turn_of(lease)
        assert turn is not None
        assert (turn.request_id, turn.prompt_ids.tolist()) == ("q2", [3])
        await store.checkpoint(lease, [4])
        await commit(store, lease, [5])
        assert (await store.tokens(lease)).tolist() == [1, 2, 3, 4, 5]
        await store.release(lease)
        assert watched.breaker.state is BreakerState.CLOSED
        await redis.config_set("maxmemory", 0)
        await add_turn(store, "t", "s", [6], [7])
        assert await store.delete("t", "s")


async def test_a_replica_is_not_written_to(pair: Pair) -> None:
    async with Watched(pair[1].endpoint) as watched:
        with pytest.raises(StateUnavailableError, match="ReadOnlyError"):
            await watched.store.create("t", "s", ttl_s=60)
        assert watched.attempts == TRIES
        assert watched.breaker.state is BreakerState.OPEN


async def test_a_server_that_lost_its_scripts_gets_them_again(
    store: SessionStore, tenant: str, shared_server: EmbeddedServer
) -> None:
    await store.create(tenant, "s", ttl_s=60)
    async with redis_of(shared_server) as redis:
        lease = await store.acquire(tenant, "s")
        await redis.script_flush()
        await store.open_turn(lease, opening("q1", [1]))
        await redis.script_flush()
        await commit(store, lease, [2])
    assert (await store.history(tenant, "s")).tolist() == [1, 2]


async def test_a_key_of_another_type_is_our_fault(
    store: SessionStore, tenant: str, shared_server: EmbeddedServer
) -> None:
    async with redis_of(shared_server) as redis:
        await redis.set(session_keys(tenant, "s").meta, b"x", ex=60)
    with pytest.raises(InternalError, match="WRONGTYPE"):
        await store.acquire(tenant, "s")
    assert store.breaker.state is BreakerState.CLOSED


# Cut in mid-reply


@pytest.mark.parametrize("cut_after", [0, 1, 5])
async def test_a_reply_cut_short_is_asked_for_again(
    cut_after: int, shared_server: EmbeddedServer, tenant: str
) -> None:
    """The server has run the script each time; its second answer is as the first was."""
    async with Proxy(shared_server) as proxy, Watched(proxy.endpoint) as watched:
        store = watched.store

        def cut() -> None:
            proxy.cut_after = cut_after

        await store.ping()
        cut()
        await store.create(tenant, "s", ttl_s=60)
        cut()
        lease = await store.acquire(tenant, "s")
        assert lease.epoch == 1
        cut()
        await store.open_turn(lease, opening("q1", [1, 2]))
        cut()
        await store.checkpoint(lease, [3])
        cut()
        turn = await store.open_turn_of(lease)
        assert turn is not None
        assert (turn.prompt_ids.tolist(), turn.generated_ids.tolist()) == ([1, 2], [3])
        cut()
        await store.commit_turn(lease, "q1", turn_record("q1", 0, 2, 2), [4])
        assert (lease.turn, lease.num_tokens) == (1, 4)
        cut()
        assert (await store.tokens(lease)).tolist() == [1, 2, 3, 4]
        cut()
        await store.renew(lease)
        cut()
        await store.release(lease)
        cut()
        assert (await store.fork(tenant, "s", "t", 3)).num_tokens == 3
        assert proxy.num_cuts == 10
        assert watched.breaker.state is BreakerState.CLOSED
    assert watched.breaker.num_opened == 0


async def test_a_server_that_cuts_every_reply_is_down(shared_server: EmbeddedServer) -> None:
    async with Proxy(shared_server) as proxy, Watched(proxy.endpoint) as watched:
        proxy.cut_after, proxy.cuts_always = 0, True
        await assert_is_down(watched)
        assert proxy.num_cuts == TRIES
        proxy.cut_after = None
        await assert_recovers(watched)


# Failing over, restarting


Pair = tuple[EmbeddedServer, EmbeddedServer]


async def in_step(primary: EmbeddedServer) -> None:
    """Wait until the replica has everything that its primary was told until now.

    WAIT is about the writes of its own connection, so one is made. A replica that calls its link up
    may still be a second from the stream: a primary sends nothing before it saw an acknowledgement.
    """
    async with redis_of(primary) as redis, redis.client() as one:
        await one.set("in-step", 1)
        assert await one.wait(1, 8000) == 1  # ms; the client gives up at 10 s


@pytest.fixture
async def pair(start_server: StartServer) -> Pair:
    """A primary and a replica that is in step."""
    port = free_port()
    primary = start_server(
        extra=f"port {port}\nbind {HOST}\nprotected-mode no\nrepl-diskless-sync-delay 0"
    )
    replica = start_server(extra=f"replicaof {HOST} {port}")
    await in_step(primary)
    return primary, replica


async def test_a_failover_that_lost_a_turn_fences_its_writer(
    pair: Pair, make_store: StoreMaker
) -> None:
    primary, replica = pair
    async with Proxy(primary) as proxy, Watched(proxy.endpoint) as watched:
        store = watched.store
        await store.create("t", "s", ttl_s=60)
        lease = await add_turn(store, "t", "s", [1], [2], release=False)
        await in_step(primary)
        async with redis_of(replica) as redis:
            await redis.execute_command("REPLICAOF", "NO", "ONE")  # what follows is lost
        await store.open_turn(lease, opening("q2", [3]))
        await commit(store, lease, [4])
        assert (lease.turn, lease.num_tokens) == (2, 4)
        proxy.lead_to(replica)
        with pytest.raises(SessionFencedError, match="turn 1 with 2 tokens, ours is turn 2 with 4"):
            await store.open_turn(lease, opening("q3", [5]))
        with pytest.raises(SessionFencedError, match="turn 1 with 2 tokens"):
            await commit(store, lease, [6])
        await store.release(lease)
        lease = await add_turn(store, "t", "s", [7], [8], release=False)
        assert (await store.tokens(lease)).tolist() == [1, 2, 7, 8]


async def test_a_failover_that_lost_a_lease_lets_one_writer_go_on(
    pair: Pair, make_store: StoreMaker
) -> None:
    primary, replica = pair
    store = make_store(primary)
    await store.create("t", "s", ttl_s=60)
    await in_step(primary)
    async with redis_of(replica) as redis:
        await redis.execute_command("REPLICAOF", "NO", "ONE")
    lease = await store.acquire("t", "s")  # only the old primary knows
    after = make_store(replica)
    other = make_store(replica, engine="r1")
    taken = await other.acquire("t", "s")
    assert taken.epoch == lease.epoch
    with pytest.raises(SessionFencedError, match="held by r1#"):
        await after.renew(lease)
    await other.release(taken)
    with pytest.raises(SessionFencedError, match="held by nobody"):
        await after.open_turn(lease, opening("q1", [1]))


async def test_durable_writes_wait_for_a_replica(pair: Pair, make_store: StoreMaker) -> None:
    primary, replica = pair
    store = make_store(
        primary, control=ControlSettings(wait_replicas=1, wait_s=5.0, operation_s=8.0)
    )
    await store.create("t", "s", ttl_s=60)
    lease = await add_turn(store, "t", "s", [1], [2], release=False)
    assert (await make_store(replica).history("t", "s")).tolist() == [1, 2]
    await store.open_turn(lease, opening("q2", [3]))
    async with redis_of(replica) as redis:
        await redis.execute_command("REPLICAOF", "NO", "ONE")
    async with redis_of(primary) as redis:
        while (await redis.info("replication"))["connected_slaves"]:
            await asyncio.sleep(0.01)
    hasty = make_store(primary, control=ControlSettings(wait_replicas=1, wait_s=0.1))
    with pytest.raises(StateUnavailableError, match="0 of 1 replicas have the write"):
        await commit(hasty, lease, [4])
    assert (lease.turn, lease.num_tokens) == (1, 2)  # as it was: the commit may be sent again


class Restartable:
    """A server whose folder outlives it."""

    def __init__(self, program: Path, folder: Path, appendfsync: str) -> None:
        self._command = [
            *(str(program), "--port", "0", "--unixsocket", str(folder / "s"), "--save", ""),
            *("--dir", str(folder), "--appendonly", "yes", "--appendfsync", appendfsync),
        ]
        self.endpoint = Endpoint(path=str(folder / "s"), port=0)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        eventually(lambda: answers(self.endpoint), 20)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


@pytest.fixture(params=["everysec", "always"])
def restartable(
    request: pytest.FixtureRequest, server_program: Path, tmp_path: Path
) -> Iterator[Restartable]:
    server = Restartable(server_program, tmp_path, request.param)
    server.start()
    yield server
    server.kill()


async def test_a_killed_server_comes_back_with_everything(restartable: Restartable) -> None:
    """SIGKILL loses nothing under either policy: what was answered is in the kernel's cache."""
    store = SessionStore.connect(restartable.endpoint, engine="r0")
    await store.create("t", "s", ttl_s=60, metadata={"a": "b"})
    lease = await add_turn(store, "t", "s", range(1000), [1], release=False)
    await store.attach_snapshot("t", "s", 1000, b"h" * 32)
    await store.open_turn(lease, opening("q2", [5], seed=9))
    await store.checkpoint(lease, [6])
    before = await store.get("t", "s")
    restartable.kill()
    restartable.start()
    assert await store.get("t", "s") == before
    assert before.holder == "r0"
    other = SessionStore.connect(restartable.endpoint, engine="r1")
    with pytest.raises(SessionBusyError, match="r0"):
        await other.acquire("t", "s")
    turn = await store.open_turn_of(lease)
    assert turn is not None
    assert (turn.seed, turn.generated_ids.tolist()) == (9, [6])
    await store.commit_turn(lease, "q2", turn_record("q2", 1001, 1, 2), [7])
    assert np.array_equal(await store.tokens(lease), [*range(1000), 1, 5, 6, 7])
    assert [r.session_id for r in (await store.list("t"))[0]] == ["s"]
    await store.close()
    await other.close()
