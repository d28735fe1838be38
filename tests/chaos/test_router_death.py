"""A router that is killed under streams: the others go on, it comes back, nothing is left behind.

Real Ray, real processes, SIGKILL.
"""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from cluster.status import ask_status
from protos.client import Client, ClientConfig
from protos.errors import UnreachableError
from protos.events import Completion, Delta
from protos.v1 import cluster_pb2
from tests.eventually import eventually
from tests.integration.served import Served
from tests.parity.checkpoints import make_checkpoint

pytestmark = pytest.mark.timeout(400)

NUM_TOKENS = 3000
"""Of a stream that a router's death is to meet: a busy machine may have sent 1200 before a client
that waits for its turn has read two."""
SOME_TOKENS = 100
"""Of one that only shows that a router serves, and what."""
PROMPTS = ([5, 6, 7], [50, 60, 70, 80])
BACK_S = 150.0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny mixture of experts in float32."""
    return make_checkpoint(tmp_path_factory.mktemp("chaos"), tokenizer=True)


class Stream:
    """A greedy generation in a thread of its own."""

    def __init__(self, address: str, prompt: list[int], num_tokens: int = NUM_TOKENS) -> None:
        self._address, self._prompt, self._num_tokens = address, prompt, num_tokens
        self.completion = Completion()
        self.error: Exception | None = None
        self.began = threading.Event()
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            with Client(self._address, ClientConfig(max_attempts=1)) as client:
                for event in client.generate(
                    self._prompt, max_tokens=self._num_tokens, temperature=0.0, ignore_eos=True
                ):
                    self.completion.add(event)
                    if isinstance(event, Delta):
                        self.began.set()
        except UnreachableError as error:
            self.error = error
        finally:
            self.began.set()


def router(address: str, router_id: str) -> cluster_pb2.RouterStatus:
    (found,) = [r for r in ask_status(address).routers if r.router_id == router_id]
    return found


def states(address: str) -> list[str]:
    return [router.state for router in ask_status(address).routers]


def test_a_killed_router_comes_back_and_the_others_do_not_notice(checkpoint: Path) -> None:
    flags = ("--expert-groups", "2", "--routers", "2")
    with Served(checkpoint, *flags) as service:
        doomed = router(service.address, "router-0")
        safe = router(service.address, "router-1").grpc_address
        undisturbed = [Stream(safe, prompt) for prompt in PROMPTS]
        for stream in undisturbed:
            stream.thread.join(120)
        expected = [stream.completion.token_ids for stream in undisturbed]
        assert [len(tokens) for tokens in expected] == [NUM_TOKENS] * 2

        streams = [Stream(safe, prompt) for prompt in PROMPTS]
        cut = Stream(doomed.grpc_address, PROMPTS[0])
        for stream in (*streams, cut):
            assert stream.began.wait(60)
        os.kill(doomed.pid, signal.SIGKILL)
        for stream in streams:
            assert stream.thread.is_alive(), "the stream ended before the router was killed"
        cut.thread.join(30)
        assert cut.error is not None, "its client hears of it"
        assert eventually(lambda: router(safe, "router-0").state == "LOST", 20)
        for stream in streams:
            stream.thread.join(120)
        assert [stream.completion.token_ids for stream in streams] == expected

        back = eventually(lambda: is_back(safe, doomed), BACK_S)
        assert back.grpc_address == doomed.grpc_address, "clients find it where it was"
        again = Stream(back.grpc_address, PROMPTS[0], SOME_TOKENS)
        again.thread.join(120)
        assert again.completion.token_ids == expected[0][:SOME_TOKENS]
        eventually(lambda: states(back.grpc_address) == ["READY", "READY"], 30)
        assert any("router-0 died" in line for line in service.errors)
        service.note_processes()
        service.signal(signal.SIGINT)
        assert service.wait() == 0
        assert service.survivors() == []


def is_back(address: str, before: cluster_pb2.RouterStatus) -> cluster_pb2.RouterStatus | None:
    now = router(address, before.router_id)
    return now if now.state == "READY" and now.pid != before.pid else None
