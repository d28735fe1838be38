"""What 32 sessions with one system prompt hold and compute of it: once, or 32 times.

Regime: one engine in this process, experts included, and a tier on an embedded blob server. All
sessions begin with the same 4,100 tokens (the junction, which the engine rounds down to 4,096), go
on with 50 tokens of their own and generate 16. They come one after the other, or all at once; then
another engine, which has only the blob server, gets a 33rd.

Meaning: `hit_tokens` is the least that any session but the first was spared. `pool_copies` is the
blocks in use while all run, less what each needs of its own, over the blocks of one system prompt;
`blob_copies` the bytes written to the blob server over one copy's. Ceiling: 1.0 copies, 4,096
tokens.

    python -m tests.benchmarks.shared_prefix CHECKPOINT [--sessions 32]
"""

from __future__ import annotations

import argparse
import queue
import random
from pathlib import Path

import torch

from router.engine.chain import CACHE_BLOCK
from router.engine.config import EngineConfig
from router.engine.engine import Engine
from router.engine.request import EngineRequest, SamplingParams, StepOutput, StoppingParams
from router.model.config import ModelConfig
from router.model.decoder import Decoder
from router.state.embedded import EmbeddedServer, Role
from router.state.kv_store import KvStore
from router.state.loader import LoaderSettings
from router.state.restore import ValueSizes
from router.state.tier import BlobTier, TierSettings
from tests.benchmarks.engines import load_decoder, local_dispatcher
from tests.benchmarks.harness import report

COMMON = 4100
JUNCTION = COMMON // CACHE_BLOCK * CACHE_BLOCK
OWN, NEW = 50, 16
BLOCK_SIZE = 16
MOST_COPIES = 1.1
LEAST_HIT = JUNCTION - (CACHE_BLOCK - 1)
TIMEOUT_S = 600.0


class Sessions:
    """Sessions on one fresh engine.

    Args:
        decoder: The trunk.
        config: Its sizes.
        tier: Behind the pool.
        num_sessions: Whose blocks fit the pool even if nothing is shared.
    """

    def __init__(
        self, decoder: Decoder, config: ModelConfig, tier: BlobTier, num_sessions: int
    ) -> None:
        length = COMMON + OWN + NEW
        self.engine = Engine(
            decoder,
            EngineConfig(
                vocab_size=config.vocab_size,
                max_model_len=length,
                num_blocks=num_sessions * (length // BLOCK_SIZE + 2),
                num_state_slots=num_sessions,
                block_size=BLOCK_SIZE,
                max_num_seqs=num_sessions,
            ),
            tier=tier,
        )
        self.engine.start()
        self.most_blocks_used = 0
        self._outputs: queue.SimpleQueue[StepOutput] = queue.SimpleQueue()
        self._generator = random.Random(20261122)
        self._vocab_size = config.vocab_size
        self._common = self.tokens(COMMON)

    def tokens(self, count: int) -> list[int]:
        """Return random tokens."""
        return [self._generator.randrange(16, self._vocab_size) for _ in range(count)]

    def begin(self, name: str) -> None:
        """Submit a session's first turn."""
        request = EngineRequest(
            request_id=name,
            prompt_ids=self._common + self.tokens(OWN),
            sampling=SamplingParams(temperature=0.0),
            stopping=StoppingParams(max_tokens=NEW, ignore_eos=True),
            junctions=(COMMON,),
        )
        self.engine.submit(request, self._outputs.put)

    def wait(self, count: int) -> list[int]:
        """Wait for the end of `count` sessions; return the tokens that each was spared."""
        cached: dict[str, int] = {}
        while count:
            output = self._outputs.get(timeout=TIMEOUT_S)
            if output.error is not None:
                raise output.error
            if output.prefill is not None:
                cached[output.request_id] = output.prefill.tokens_cached
            self.most_blocks_used = max(self.most_blocks_used, self.engine.stats().num_blocks_used)
            count -= output.is_last
        return [cached[name] for name in sorted(cached)]


def main() -> None:
    """Measure, print one JSON line; exit code 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--sessions", type=int, default=32)
    arguments = parser.parse_args()
    num = arguments.sessions
    config = ModelConfig.from_checkpoint(arguments.checkpoint)
    dispatcher = local_dispatcher(arguments.checkpoint, torch.bfloat16)
    decoder = load_decoder(arguments.checkpoint, torch.bfloat16, dispatcher)
    io = decoder.cache_io(decoder.allocate_caches(CACHE_BLOCK // BLOCK_SIZE, BLOCK_SIZE, 1))
    sizes = ValueSizes(block_bytes=io.kv_block_bytes, state_bytes=io.state_bytes)
    own_blocks = -(-(COMMON + OWN + NEW) // BLOCK_SIZE) - JUNCTION // BLOCK_SIZE
    common_bytes = JUNCTION // CACHE_BLOCK * sizes.block_bytes + sizes.state_bytes
    # A session's own snapshots save 69 tokens more than the junction's, so they stay in the router.
    figures: dict[str, object] = {
        "one_copy_mib": round(common_bytes / 2**20, 2),
        "bar": {"copies": MOST_COPIES, "hit_tokens": LEAST_HIT},
    }
    is_met = True
    settings = TierSettings(probe_s=10.0, loader=LoaderSettings(min_load_s=10.0))
    for order in ("in_turn", "at_once"):
        server = EmbeddedServer.start(Role.BLOB)
        store = KvStore([server.endpoint], "shared-prefix")
        tier = BlobTier(store, sizes, settings)
        sessions = Sessions(decoder, config, tier, num)
        cached: list[int] = []
        for i in range(num):
            sessions.begin(f"{i:03d}")
            if order == "in_turn":
                cached += sessions.wait(1)
        cached += sessions.wait(num - len(cached))
        sessions.engine.stop()
        tier.close()
        written = tier.stats().written_bytes
        running = 1 if order == "in_turn" else num
        pool_copies = (sessions.most_blocks_used - running * own_blocks) / (JUNCTION / BLOCK_SIZE)
        other_tier = BlobTier(store, sizes, settings)
        other = Sessions(decoder, config, other_tier, 1)
        other.begin("other")
        (restored,) = other.wait(1)
        other.engine.stop()
        other_tier.close()
        server.close()
        blob_copies = written / common_bytes
        hit = sorted(cached)[1]
        figures[order] = {
            "hit_tokens": hit,
            "pool_copies": round(pool_copies, 3),
            "blob_copies": round(blob_copies, 3),
            "other_router_hit_tokens": restored,
        }
        print(f"{order}: {figures[order]}", flush=True)
        is_met &= max(pool_copies, blob_copies) <= MOST_COPIES and hit >= LEAST_HIT
    figures["is_met"] = is_met
    report("shared_prefix", {"checkpoint": arguments.checkpoint.name, "sessions": num}, figures)
    raise SystemExit(0 if is_met else 1)


if __name__ == "__main__":
    main()
