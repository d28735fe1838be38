"""Sessions longer than the pool go on in another router, from what the first one left on real blob
servers: the tokens are those of one pool that holds everything, and little is computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
import torch

from protos.errors import ColdKvError
from router.engine.chain import CACHE_BLOCK, HashChain
from router.engine.config import EngineConfig
from router.engine.engine import Engine
from router.engine.request import EngineRequest, SamplingParams, SessionHint, StoppingParams
from router.engine.tier import LoadJob, LoadResult
from router.model.decoder import Decoder
from router.model.ops import choose_ops
from router.state.cold import BlobCold, ColdSettings
from router.state.kv_store import KvStore
from router.state.loader import LoaderSettings
from router.state.restore import ValueSizes
from router.state.tier import BlobTier, TierSettings
from tests.eventually import eventually
from tests.parity.oracle import make_decoder
from tests.parity.test_long_contexts import (
    CONTEXT,
    GIB,
    NEW_TOKENS,
    POOL_TOKENS,
    MakeCheckpoint,
    all_local,
    prompt_of,
)
from tests.unit.router.engine_harness import Outputs
from tests.unit.router.test_engine_thread import Waiter
from tests.unit.state.blob_servers import NAMESPACE, BlobServer, blob_server

INTERVAL = 1024
MORE = 20
"""Tokens of the second turn's prompt."""
PATIENT = TierSettings(probe_s=30.0, loader=LoaderSettings(min_load_s=30.0))
FIRST_TOKENS = 40
END = CONTEXT + FIRST_TOKENS - 1
"""Where the first turn leaves its last snapshot."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BlobServer]:
    with blob_server("valkey", tmp_path_factory.mktemp("blob")) as running:
        yield running


@pytest.fixture(scope="module")
def decoder(checkpoint: MakeCheckpoint) -> Decoder:
    """With kernels whose last bit depends on the batch: what is computed again is not what is
    stored, bit for bit. `test_long_contexts` compares the kernels."""
    sizes: dict[str, Any] = {"max_position_embeddings": 2 * CONTEXT, "full_attention_interval": 2}
    ops = choose_ops(torch.float32, device=torch.device("cpu"), name="torch")
    return make_decoder(checkpoint(dense=True, **sizes), ops)


class Router:
    """An engine whose pool is an eighth of the context, its tier and its cold tier."""

    def __init__(
        self, decoder: Decoder, server: BlobServer, *, cold_bytes: int = GIB, has_cold: bool = True
    ) -> None:
        io = decoder.cache_io(decoder.allocate_caches(1, 16, 1))
        self.sizes = ValueSizes(block_bytes=io.kv_block_bytes, state_bytes=io.state_bytes)
        self.store = KvStore([server.endpoint], NAMESPACE, io_s=20.0)
        self.tier = BlobTier(self.store, self.sizes, PATIENT)
        self.tier.note_prefill = lambda *_: None  # type: ignore[method-assign]
        self.cold = BlobCold(self.store, ColdSettings(put_s=20.0, read_s=20.0))
        config = EngineConfig(
            vocab_size=decoder.config.vocab_size,
            max_model_len=2 * CONTEXT,
            num_blocks=POOL_TOKENS // 16,
            num_state_slots=4,
            max_num_seqs=4,
            max_num_batched_tokens=200,
            max_cold_bytes=cold_bytes,
            snapshot_interval=INTERVAL,
            decode_snapshot_interval=0,
            min_load_timeout_s=60.0,
        )
        cold = self.cold if has_cold else None
        self.engine = Engine(decoder, config, tier=self.tier, cold_tier=cold)

    def run_slowly(self, request: EngineRequest) -> list[int]:
        """Run a request; what a step leaves is on the server before the next one begins."""
        outputs = Outputs()
        self.engine.submit(request, outputs)
        while self.engine.num_live:
            self.engine.step()
            eventually(lambda: self.tier.stats().num_queued_bytes == 0, 20, interval_s=0.001)
        return outputs.tokens[request.request_id, 0]

    def run(self, request: EngineRequest) -> Waiter:
        waiter = Waiter(1)
        self.engine.submit(request, waiter)
        self.engine.start()
        assert waiter.done.wait(120)
        return waiter

    def close(self) -> None:
        """End it, with nothing left in use."""
        eventually(lambda: self.engine.stats().reuse.num_writing_blocks == 0, timeout_s=20)
        self.engine.stop()
        self.tier.close()
        self.cold.close()
        stats = self.engine.stats()
        assert (stats.num_running, stats.num_waiting, stats.num_cold_bytes) == (0, 0, 0)
        assert (stats.num_blocks_used, stats.num_state_slots_used) == (0, 0)


class Conversation:
    """Two turns; the first has run on router A, and left what it computed on a server."""

    def __init__(self, decoder: Decoder, server: BlobServer) -> None:
        vocab_size = decoder.config.vocab_size
        first = prompt_of(CONTEXT, vocab_size)
        server.command(b"FLUSHALL")
        router = Router(decoder, server)
        self.positions: list[int] = []
        hint = SessionHint(on_snapshot=lambda position, _: self.positions.append(position))
        answer = router.run_slowly(_request("first", first, hint, FIRST_TOKENS))
        while router.engine.stats().reuse.num_writing_blocks:
            router.engine.step()
        router.close()
        assert router.engine.stats().spilled_blocks >= (CONTEXT - POOL_TOKENS) // CACHE_BLOCK
        assert max(self.positions) == END
        history = [*first, *answer]
        self.second = [*history, *prompt_of(MORE, vocab_size, 7)]
        local = all_local(decoder, self.second)
        self.want = local.tokens["long"]
        self.chain = HashChain("")
        self.chain.extend(self.second)
        with redis.Redis(unix_socket_path=server.endpoint.path) as client:
            self._values = {key: client.get(key) for key in client.scan_iter()}
        self._server = server
        assert len(self._values) >= END // CACHE_BLOCK + len(self.positions)

    def stored(self) -> Conversation:
        """Let the server have what the first turn left, and nothing else."""
        self._server.command(b"FLUSHALL")
        with redis.Redis(unix_socket_path=self._server.endpoint.path) as client:
            for key, value in self._values.items():
                client.set(key, value, ex=3600)
        return self

    def request(self) -> EngineRequest:
        return _request("second", self.second, SessionHint(snapshot_positions=(END,)))

    def key(self, router: Router, index: int) -> bytes:
        return router.store.block_key(self.chain.block_hash(index))


def _request(
    name: str, prompt: list[int], hint: SessionHint, max_tokens: int = NEW_TOKENS
) -> EngineRequest:
    return EngineRequest(
        request_id=name,
        prompt_ids=prompt,
        sampling=SamplingParams(temperature=0.0),
        stopping=StoppingParams(max_tokens=max_tokens, ignore_eos=True),
        session=hint,
    )


@pytest.fixture(scope="module")
def first_turn(decoder: Decoder, server: BlobServer) -> Conversation:
    return Conversation(decoder, server)


@pytest.fixture
def conversation(first_turn: Conversation) -> Conversation:
    return first_turn.stored()


def test_another_router_goes_on_and_computes_only_what_is_new(
    conversation: Conversation, decoder: Decoder, server: BlobServer
) -> None:
    """With the older blocks in memory, or left where they are on the server; or both."""
    for cold_bytes, has_cold in ((GIB, False), (GIB, True), (0, True)):
        router = Router(decoder, server, cold_bytes=cold_bytes, has_cold=has_cold)
        waiter = router.run(conversation.request())
        router.close()
        assert waiter.tokens["second", 0] == conversation.want
        assert waiter.cached["second", 0] == END
        stats = router.engine.stats()
        assert stats.prompt_tokens == MORE + 1
        assert stats.reuse.restored_tokens == END
        assert stats.preemptions == 0


@pytest.mark.parametrize("harm", ["gone", "flipped"])
def test_what_is_missing_or_damaged_is_computed_again_and_nothing_else(
    conversation: Conversation, decoder: Decoder, server: BlobServer, harm: str
) -> None:
    """Block 20 ends at 2,688; the snapshot at 2,048 stands before it."""
    router = Router(decoder, server, cold_bytes=0)
    key = conversation.key(router, 20)
    if harm == "gone":
        assert server.command(b"DEL", key) == b":1"
    else:
        server.command(b"SETRANGE", key, b"1000", b"\xff\x00\xff\x00")
    waiter = router.run(conversation.request())
    router.close()
    assert waiter.tokens["second", 0] == conversation.want
    assert waiter.cached["second", 0] == 2048
    assert router.engine.stats().prompt_tokens == len(conversation.second) - 2048


@pytest.mark.parametrize("harm", ["gone", "flipped", "everything"])
def test_what_goes_between_load_and_use_is_computed_again(
    conversation: Conversation, decoder: Decoder, server: BlobServer, harm: str
) -> None:
    """The older blocks are only known by name when they go; the sequence starts over, once, from
    what is still there."""
    router = Router(decoder, server, cold_bytes=0)
    load = router.tier.load
    results: list[LoadResult] = []

    def harm_then(done: Callable[[LoadResult], None], result: LoadResult) -> None:
        if not results:
            if harm == "gone":
                assert server.command(b"DEL", conversation.key(router, 20)) == b":1"
            elif harm == "flipped":
                server.command(b"SETRANGE", conversation.key(router, 20), b"999", b"\xff\x00\xff")
            else:
                server.command(b"FLUSHALL")
        results.append(result)
        done(result)

    def harmed(job: LoadJob, done: Callable[[LoadResult], None]) -> None:
        load(job, lambda result: harm_then(done, result))

    router.tier.load = harmed  # type: ignore[method-assign]
    waiter = router.run(conversation.request())
    router.close()
    assert waiter.last["second", 0].error is None
    assert waiter.tokens["second", 0] == conversation.want
    assert router.engine.stats().preemptions == 1
    wanted = [END] if harm == "everything" else [END, 2048]
    assert [result.num_tokens for result in results] == wanted


def test_a_tier_that_loses_everything_again_and_again_ends_it_with_a_typed_error(
    conversation: Conversation, decoder: Decoder, server: BlobServer
) -> None:
    router = Router(decoder, server, cold_bytes=0)
    router.cold.read = lambda *_: False  # type: ignore[method-assign]
    waiter = router.run(conversation.request())
    router.close()
    assert isinstance(waiter.last["second", 0].error, ColdKvError)
