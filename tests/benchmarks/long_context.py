"""Contexts larger than the router's KV pool: attention streamed from memory and from blob servers.

Regime: a dense float32 model of the family (8 layers, 2 of them full attention with 4 query over 2
KV heads of 64), 16,384 tokens of prompt and 16 more, all cores, the blob server on this machine.
Three sides in turn: all of the KV in the pool; a pool of an eighth, the rest in host memory; the
same with the rest on the blob server, where every step reads all of it. Meaning: what a context
costs that does not fit. Ceiling: a prefill step reads the past once for up to half a pool of
tokens, so it should cost little; a decode step reads it for one token: from memory it packs each
byte once before it multiplies it, from the server it is bound by the socket, 1-2 GB/s.

Bar: tokens of all sides equal; the slowdowns are printed.

    python -m tests.benchmarks.long_context [--tokens 16384] [--repeats 3]
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from router.engine.config import EngineConfig
from router.engine.engine import Engine
from router.engine.request import EngineRequest, SamplingParams, StepOutput, StoppingParams
from router.model.decoder import Decoder
from router.state.cold import BlobCold
from router.state.kv_store import KvStore
from tests.benchmarks.harness import Samples, alternate, report
from tests.parity.checkpoints import make_checkpoint
from tests.unit.state.blob_servers import NAMESPACE, blob_server

NEW_TOKENS = 16
BLOCK_SIZE = 32
POOL_SHARE = 8
GIB = 1 << 30
SEED = 20261122
SHAPE: dict[str, Any] = {
    "dense": True,
    "text_only": True,
    "num_layers": 8,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "max_position_embeddings": 262_144,
}


class Side:
    """One way to hold the KV; each run is an engine of its own."""

    def __init__(
        self, decoder: Decoder, prompt: list[int], pool_tokens: int, cold: BlobCold | None
    ) -> None:
        self.tokens: list[list[int]] = []
        self.decode = Samples()
        self.spilled_blocks = 0
        self._decoder = decoder
        self._prompt = prompt
        self._pool_tokens = pool_tokens
        self._cold = cold

    def run(self) -> float:
        """Answer the prompt; return the seconds of the prefill."""
        config = EngineConfig(
            vocab_size=self._decoder.config.vocab_size,
            max_model_len=len(self._prompt) + NEW_TOKENS,
            num_blocks=self._pool_tokens // BLOCK_SIZE,
            num_state_slots=2,
            block_size=BLOCK_SIZE,
            max_num_seqs=2,
            namespace=NAMESPACE,
            max_cold_bytes=GIB if self._cold is None else 0,
        )
        engine = Engine(self._decoder, config, cold_tier=self._cold)
        outputs: list[StepOutput] = []
        engine.submit(
            EngineRequest(
                request_id="long",
                prompt_ids=self._prompt,
                sampling=SamplingParams(temperature=0.0),
                stopping=StoppingParams(max_tokens=NEW_TOKENS, ignore_eos=True),
            ),
            outputs.append,
        )
        started = time.perf_counter()
        while engine.step():
            pass
        timings = outputs[-1].timings
        if outputs[-1].error is not None:
            raise outputs[-1].error
        assert timings is not None
        self.spilled_blocks = engine.stats().spilled_blocks
        self.tokens.append([token for output in outputs for token in output.token_ids])
        self.decode.add(timings.decode_s / (NEW_TOKENS - 1), 0.0)
        engine.stop()
        return time.perf_counter() - started - timings.decode_s


def main() -> None:
    """Run the three sides in turn."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = make_checkpoint(folder / "model", **SHAPE)
        decoder = Decoder.from_checkpoint(path, dtype=torch.float32, experts=None)
        rng = random.Random(SEED)
        prompt = [rng.randrange(2, decoder.config.vocab_size) for _ in range(options.tokens)]
        eighth = options.tokens // POOL_SHARE // 128 * 128
        with blob_server("valkey", folder) as server:
            cold = BlobCold(KvStore([server.endpoint], NAMESPACE))
            sides = {
                "all_local": Side(decoder, prompt, options.tokens + 1024, None),
                "host": Side(decoder, prompt, eighth, None),
                "blob": Side(decoder, prompt, eighth, cold),
            }
            prefill = alternate({n: side.run for n, side in sides.items()}, options.repeats)
            cold.close()
    answers = {tuple(tokens) for side in sides.values() for tokens in side.tokens}
    local = sides["all_local"]
    report(
        "long_context",
        {"tokens": options.tokens, "pool_tokens": eighth, "ops": decoder.ops.name, "shape": SHAPE},
        {
            "tokens_equal": len(answers) == 1,
            "spilled_blocks": {n: side.spilled_blocks for n, side in sides.items()},
            "prefill_s": {n: samples.to_json() for n, samples in prefill.items()},
            "decode_s_per_token": {n: round(side.decode.median, 5) for n, side in sides.items()},
            "prefill_slowdown": {
                n: round(samples.median / prefill["all_local"].median, 3)
                for n, samples in prefill.items()
            },
            "decode_slowdown": {
                n: round(side.decode.median / local.decode.median, 2) for n, side in sides.items()
            },
        },
    )


if __name__ == "__main__":
    main()
