"""A router dies in the middle of a turn; another process goes on from Redis with the same tokens.

Real processes, SIGKILL, a real store; the routers have a small dense model and no cluster.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import pytest

from protos.client import Client, ClientConfig, build_request
from protos.errors import ExpertMeshError, SessionFencedError
from protos.events import Completion, events_of
from router.state.sessions import SessionStore
from tests.chaos.small_router import SmallRouter
from tests.eventually import eventually
from tests.parity.checkpoints import make_checkpoint
from tests.store_servers import StoreServer, running_store

pytestmark = pytest.mark.timeout(400)

T = TypeVar("T")
TOKENS_A_TURN = 90
CONFIG = ClientConfig(timeout_s=120, max_backoff_s=0.2, resume_timeout_s=60)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny dense model in float32, with a tokeniser."""
    return make_checkpoint(tmp_path_factory.mktemp("chaos"), dense=True, tokenizer=True)


@pytest.fixture
def server() -> Iterator[StoreServer]:
    with running_store() as running:
        yield running


def ask(server: StoreServer, call: Callable[[SessionStore], Awaitable[T]]) -> T:
    async def asked() -> T:
        store = SessionStore.connect(server.endpoint, engine="controller")
        try:
            return await call(store)
        finally:
            await store.close()

    return asyncio.run(asked())


def start(
    stack: ExitStack, checkpoint: Path, server: StoreServer, *names: str, lease_s: float = 15.0
) -> list[SmallRouter]:
    """Start routers side by side."""
    url = f"unix://{server.path}"
    routers = [SmallRouter(checkpoint, url, name, lease_s) for name in names]
    for router in routers:
        stack.callback(router.close)
    return [router.wait_ready() for router in routers]


def options_of(turn: int) -> dict[str, Any]:
    """Drawn tokens, with penalties, so that every part of the state has to go on."""
    return {
        "max_tokens": TOKENS_A_TURN,
        "ignore_eos": True,
        "temperature": 0.8,
        "seed": 40 + turn,
        "repetition_penalty": 1.1,
        "frequency_penalty": 0.2,
    }


def chat_of(turn: int) -> list[dict[str, str]]:
    system = [{"role": "system", "content": "Be brief, é 😀."}] if turn == 0 else []
    return [*system, {"role": "user", "content": f"question {turn}"}]


def kill_at(
    client: Client, session: str, turn: int, at: int, kill: Callable[[], None]
) -> tuple[Completion, list[int]]:
    """Run a turn whose router dies after `at` tokens; return it and the numbers of its messages."""
    request, _ = build_request(chat_of(turn), {"session": session, **options_of(turn)})  # type: ignore[typeddict-item]
    completion, sequences = Completion(), []
    for message in client.messages(request):
        sequences.append(message.sequence)
        for event in events_of(message):
            completion.add(event)
        if len(completion.token_ids) == at:
            kill()
    return completion, sequences


@pytest.mark.parametrize(("is_reported", "num_turns"), [(True, 3), (False, 1)])
def test_a_killed_routers_turn_goes_on_elsewhere(
    checkpoint: Path, server: StoreServer, is_reported: bool, num_turns: int
) -> None:
    """The death is reported, so the lease is free at once; or it is not, and the lease runs out."""
    generator = random.Random(7)
    lease_s = 15.0 if is_reported else 2.0
    with ExitStack() as stack:
        names = ["safe", *(f"doomed-{turn}" for turn in range(num_turns))]
        safe, *doomed = start(stack, checkpoint, server, *names, lease_s=lease_s)
        expected = []
        with Client(safe.address, CONFIG) as client:
            client.create_session("undisturbed")
            for turn in range(num_turns):
                answer = client.chat(chat_of(turn), session="undisturbed", **options_of(turn))
                expected.append((answer.token_ids, answer.text))
            client.create_session("disturbed")
        for turn, router in enumerate(doomed):

            def kill(router: SmallRouter = router) -> None:
                router.kill()
                if is_reported:
                    ask(server, lambda store: store.report_dead(router.name, router.boot))

            at = generator.randrange(1, TOKENS_A_TURN)
            with Client([router.address, safe.address], CONFIG) as client:
                completion, sequences = kill_at(client, "disturbed", turn, at, kill)
            assert (completion.token_ids, completion.text) == expected[turn], f"killed at {at}"
            assert sequences == list(range(1, TOKENS_A_TURN + 2))
        both = [
            ask(server, lambda store, name=name: store.history("", name)).tolist()
            for name in ("undisturbed", "disturbed")
        ]
        assert both[0] == both[1]
        assert len(both[0]) > num_turns * TOKENS_A_TURN


def test_a_router_that_slept_through_its_lease_sends_nothing_more(
    checkpoint: Path, server: StoreServer
) -> None:
    """It wakes up and finds that another has the session: ABORTED, and no token of its own."""
    with ExitStack() as stack:
        sleeper, other = start(stack, checkpoint, server, "sleeper", "other", lease_s=1.5)
        one = ClientConfig(timeout_s=60, max_attempts=1)
        client = stack.enter_context(Client(sleeper.address, one))
        waker = stack.enter_context(Client(other.address, one))
        client.create_session("s")
        stream = client.generate("Once", session="s", **{**options_of(0), "max_tokens": 900})
        completion = Completion()
        while len(completion.token_ids) < 5:
            completion.add(next(stream))
        sleeper.freeze()

        def taken() -> bool:
            try:
                waker.complete("Twice", session="s", max_tokens=3, temperature=0)
            except ExpertMeshError:
                return False
            return True

        assert eventually(taken, 30)
        sleeper.thaw()
        with pytest.raises(SessionFencedError, match="not ours any more"):
            deque(map(completion.add, stream))
        assert len(completion.token_ids) < 900
        turns = ask(server, lambda store: store.turns("", "s"))
        assert [turn.completion_tokens for turn in turns] == [3]
