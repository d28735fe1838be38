"""Any interleaving of two writers' steps, lost answers and takeovers keeps what a simple model has.

The model is a list of tokens, a list of turns, at most one open turn and at most one holder. Every
step is made on a real server by one of two routers; some answers are lost and the call made again.
"""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass, field

import hypothesis.strategies as st
from hypothesis import HealthCheck, Phase, given, settings

from protos.errors import SessionBusyError, SessionFencedError
from router.state.embedded import EmbeddedServer
from router.state.redis_keys import session_keys
from router.state.session_records import Lease
from router.state.sessions import SessionStore
from tests.unit.state.turns import opening, redis_of, turn_record

_numbers = itertools.count(1)

tokens = st.lists(st.integers(0, 9), max_size=4)
steps = st.lists(
    st.tuples(
        st.sampled_from(
            ["acquire", "open", "checkpoint", "commit", "expire"] * 3
            + ["renew", "release", "die", "give up"]
        ),
        st.integers(0, 1),  # which router
        st.integers(0, 2),  # which request
        tokens,
        st.booleans(),  # whether the answer is lost and the call made again
    ),
    min_size=4,
    max_size=30,
)


@dataclass
class Model:
    """What a session must be."""

    history: list[int] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    open_request: str = ""
    open_tokens: list[int] = field(default_factory=list)
    owner: int | None = None
    """The router whose lease was the last to be given; it may have run out."""
    is_leased: bool = False
    is_dead: bool = False
    """Whether the holder of the lease was reported dead, so that anybody may take it."""


class Router:
    """One router with its lease, and what it believes of the open turn."""

    def __init__(self, server: EmbeddedServer, name: str) -> None:
        self.store = SessionStore.connect(server.endpoint, engine=name)
        self.lease: Lease | None = None


async def run(server: EmbeddedServer, todo: list[tuple[str, int, int, list[int], bool]]) -> None:
    tenant = f"m{next(_numbers)}"
    routers = [Router(server, "r0"), Router(server, "r1")]
    model = Model()
    await routers[0].store.create(tenant, "s", ttl_s=600)
    async with redis_of(server) as redis:
        for what, number, request_number, ids, is_lost in todo:
            router, request = routers[number], f"q{request_number}"
            store, lease = router.store, router.lease
            if what == "expire":
                await redis.delete(session_keys(tenant, "s").lease)
                model.is_leased = False
            elif what == "die":  # the process comes back under another boot id
                await store.report_dead(store.engine, store.boot)
                await store.close()
                routers[number] = Router(server, store.engine)
                if model.owner == number:
                    model.is_dead = True
            elif what == "acquire":
                holder = None
                try:
                    router.lease = await store.acquire(tenant, "s")
                except SessionBusyError as error:
                    holder = error.fields["holder"]
                is_free = not model.is_leased or model.is_dead
                assert holder == (None if is_free else f"r{model.owner}")
                if holder is None:
                    assert router.lease is not None
                    model.is_leased, model.owner, model.is_dead = True, number, False
                    turn = await store.open_turn_of(router.lease)
                    found = (
                        ("", [])
                        if turn is None
                        else (turn.request_id, [*turn.prompt_ids, *turn.generated_ids])
                    )
                    assert found == (model.open_request, model.open_tokens)
            elif lease is not None:
                before = (lease.turn, lease.num_tokens, lease.request_id, lease.open_tokens)
                for attempt in range(1 + is_lost):
                    if attempt:
                        (lease.turn, lease.num_tokens, lease.request_id, lease.open_tokens) = before
                    await step(what, router, tenant, request, ids, model, number, bool(attempt))
            await check(routers[0].store, tenant, model)
    for router in routers:
        await router.store.close()


async def step(
    what: str,
    router: Router,
    tenant: str,
    request: str,
    ids: list[int],
    model: Model,
    number: int,
    is_again: bool,
) -> None:
    """Make one step under the router's lease and in the model."""
    store, lease = router.store, router.lease
    assert lease is not None
    if what == "release":
        await store.release(lease)
        if model.owner == number and not model.is_dead:
            model.is_leased, model.owner = False, None
        return
    is_ours = model.owner == number and not model.is_dead
    mine = lease.request_id
    fenced = ""
    try:
        if what == "renew":
            await store.renew(lease)
        elif what == "open":
            await store.open_turn(lease, opening(request, ids))
            if is_ours and model.open_request != request:
                model.open_request, model.open_tokens = request, list(ids)
        elif what == "checkpoint":
            await store.checkpoint(lease, ids)
            if not is_again:
                model.open_tokens += ids
        elif what == "give up":
            await store.abandon_turn(lease)
            model.open_request, model.open_tokens = "", []
        elif what == "commit":
            turn = turn_record(mine, lease.num_tokens, 0, lease.open_tokens + len(ids))
            is_known = lease.turn < len(model.requests) and model.requests[lease.turn] == mine
            await store.commit_turn(lease, mine, turn, ids)
            if not is_known:
                assert is_ours
                model.history += model.open_tokens + ids
                model.requests.append(mine)
                model.open_request, model.open_tokens, model.is_leased = "", [], True
            return
    except SessionFencedError as error:
        fenced = str(error)
    if is_ours:
        model.is_leased = True
    if fenced and is_ours:  # then only because there is no such open turn
        assert what in ("checkpoint", "commit"), fenced
        assert "the turn is not open" in fenced
        assert model.open_request != mine or not mine
    assert is_ours or fenced, f"{what} went through without the lease"


async def check(store: SessionStore, tenant: str, model: Model) -> None:
    """The session is what the model says."""
    record = await store.get(tenant, "s")
    assert (await store.history(tenant, "s")).tolist() == model.history
    assert [t.request_id for t in await store.turns(tenant, "s")] == model.requests
    assert (record.num_tokens, record.num_turns) == (len(model.history), len(model.requests))
    opened = record.open_turn
    assert (opened.request_id if opened else "") == model.open_request
    assert (opened.num_tokens if opened else 0) == len(model.open_tokens)
    assert record.holder == (f"r{model.owner}" if model.is_leased else None)


@settings(
    max_examples=60,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking takes longer than a test may
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(todo=steps)
def test_any_interleaving_keeps_the_model(
    todo: list[tuple[str, int, int, list[int], bool]], shared_server: EmbeddedServer
) -> None:
    asyncio.run(run(shared_server, todo))
