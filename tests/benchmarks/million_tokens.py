"""A session of a million tokens: one router prefills it, another one goes on with it.

Regime: the smallest member of the family that still has every part (dense, 4 layers, the last one
full attention with 2 query heads over 1 KV head of 16, float32, YaRN factor 4 over 262,144), random
weights, one or more blob servers on this machine, all cores. A first process answers a prompt of
`--tokens` tokens and then a second turn behind it, undisturbed: these are the expected tokens. A
second process, which shares nothing with the first but the servers, is given the second turn: it
finds the prefix in the blob tier, loads it into its pool and generates. Meaning: what moving a
session costs beside computing it again. The prefill is quadratic: at a million tokens 5e11 pairs of
query and key a head, which at 0.7 ns of one core each is 5 to 6 minutes for 2 heads on 2 cores.

Bar: the second process's time to the first token / the first one's prefill <= 0.02, next 16 tokens
equal.

    python -m tests.benchmarks.million_tokens [--tokens 1000000] [--servers 2] [--heads 2]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from router.engine.config import EngineConfig
from router.engine.engine import Engine
from router.engine.request import (
    EngineRequest,
    SamplingParams,
    SessionHint,
    StepOutput,
    StoppingParams,
)
from router.model.config import ModelConfig
from router.model.decoder import Decoder
from router.state.endpoint import Endpoint
from router.state.kv_store import KvStore
from router.state.restore import ValueSizes
from router.state.tier import BlobTier
from tests.benchmarks.harness import ROOT, report
from tests.parity.checkpoints import make_checkpoint
from tests.unit.state.blob_servers import NAMESPACE, blob_server

BAR = 0.02
NEW_TOKENS = 16
MESSAGE_TOKENS = 32
BLOCK_SIZE = 32
SEED = 20261122
SHAPE: dict[str, Any] = {
    "dense": True,
    "text_only": True,
    "num_kv_heads": 1,
    "head_dim": 16,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "max_position_embeddings": 262_144,
    "rope": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 262_144,
        "partial_rotary_factor": 0.5,
    },
}


class Router:
    """An engine over the blob servers, as a router process has it."""

    def __init__(self, checkpoint: Path, servers: list[str], max_tokens: int) -> None:
        decoder = Decoder.from_checkpoint(checkpoint, dtype=torch.float32, experts=None)
        num_blocks = -(-max_tokens // BLOCK_SIZE) + 64
        caches = decoder.allocate_caches(1, BLOCK_SIZE, 1)
        io = decoder.cache_io(caches)
        sizes = ValueSizes(block_bytes=io.kv_block_bytes, state_bytes=io.state_bytes)
        self.tier = BlobTier(KvStore([Endpoint.parse(url) for url in servers], NAMESPACE), sizes)
        self.engine = Engine(
            decoder,
            EngineConfig(
                vocab_size=decoder.config.vocab_size,
                max_model_len=max_tokens,
                num_blocks=num_blocks,
                num_state_slots=2,
                block_size=BLOCK_SIZE,
                max_num_seqs=2,
                namespace=NAMESPACE,
            ),
            tier=self.tier,
        )

    def answer(self, prompt: list[int], positions: tuple[int, ...] = ()) -> dict[str, Any]:
        """Run one turn; return its tokens, seconds and snapshots."""
        outputs: list[StepOutput] = []
        stored: list[int] = []
        request = EngineRequest(
            request_id=f"turn-{len(prompt)}",
            prompt_ids=prompt,
            sampling=SamplingParams(temperature=0.0),
            stopping=StoppingParams(max_tokens=NEW_TOKENS, ignore_eos=True),
            session=SessionHint(
                snapshot_positions=positions, on_snapshot=lambda n, _: stored.append(n)
            ),
        )
        self.engine.submit(request, outputs.append)
        begin = time.perf_counter()
        shown = begin
        while self.engine.num_live:
            if not self.engine.step():
                time.sleep(0.001)
            if time.perf_counter() - shown > 30 and outputs and outputs[-1].prefill:
                shown = time.perf_counter()
                done = outputs[-1].prefill.tokens_done
                print(f"{done} tokens after {shown - begin:.0f} s", file=sys.stderr, flush=True)
        last = outputs[-1]
        if last.error is not None:
            raise last.error
        assert last.timings is not None
        return {
            "token_ids": [token for output in outputs for token in output.token_ids],
            "first_token_s": last.timings.time_to_first_token_s,
            "decode_s": last.timings.decode_s,
            "snapshots": stored,
        }

    def settle(self) -> None:
        """Wait until all that was computed is written."""
        while self.tier.stats().num_queued_bytes or self.engine.stats().reuse.num_writing_blocks:
            self.engine.step()
            time.sleep(0.01)

    def close(self) -> None:
        """End it."""
        self.engine.stop()
        self.tier.close()


def prefill(checkpoint: Path, servers: list[str], num_tokens: int) -> dict[str, Any]:
    """The first process: both turns, undisturbed."""
    prompt, message = texts(num_tokens, checkpoint)
    router = Router(checkpoint, servers, num_tokens + 4 * NEW_TOKENS + 2 * MESSAGE_TOKENS)
    first = router.answer(prompt)
    router.settle()
    stats = router.tier.stats()
    written = {"written_bytes": stats.written_bytes, "dropped_bytes": stats.dropped_bytes}
    second = router.answer(prompt + first["token_ids"] + message)
    router.close()
    return {"first": first, "second": second, **written}


def resume(checkpoint: Path, servers: list[str], num_tokens: int, told: str) -> dict[str, Any]:
    """The second process: the second turn only, with the record of the session."""
    record = json.loads(told)
    prompt, message = texts(num_tokens, checkpoint)
    started = time.perf_counter()
    router = Router(checkpoint, servers, num_tokens + 4 * NEW_TOKENS + 2 * MESSAGE_TOKENS)
    load_s = time.perf_counter() - started
    turn = router.answer(prompt + record["token_ids"] + message, tuple(record["snapshots"]))
    stats, reuse = router.tier.stats(), router.engine.stats().reuse
    router.close()
    return {
        "second": turn,
        "start_s": load_s,
        "restored_tokens": reuse.restored_tokens,
        "read_bytes": stats.read_bytes,
        "read_s": stats.read_s,
    }


def texts(num_tokens: int, checkpoint: Path) -> tuple[list[int], list[int]]:
    """Return the first prompt and the second turn's message."""
    vocab_size = ModelConfig.from_checkpoint(checkpoint).vocab_size
    rng = random.Random(SEED)
    return (
        [rng.randrange(2, vocab_size) for _ in range(num_tokens)],
        [rng.randrange(2, vocab_size) for _ in range(MESSAGE_TOKENS)],
    )


def run_process(role: str, *arguments: str) -> dict[str, Any]:
    """Run one role in a process of its own; return the JSON of its last line."""
    command = [sys.executable, "-m", "tests.benchmarks.million_tokens", "--role", role, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, check=True)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def main() -> None:
    """Run both processes, one after the other."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--servers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--role", default="")
    parser.add_argument("--checkpoint", type=Path, default=Path())
    parser.add_argument("--urls", default="")
    parser.add_argument("--record", default="{}")
    options = parser.parse_args()
    if options.role == "prefill":
        answer = prefill(options.checkpoint, options.urls.split(","), options.tokens)
        print(json.dumps(answer))
        return
    if options.role == "resume":
        urls = options.urls.split(",")
        print(json.dumps(resume(options.checkpoint, urls, options.tokens, options.record)))
        return
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        shape = {**SHAPE, "num_heads": options.heads}
        checkpoint = make_checkpoint(folder / "tiny", **shape)
        urls = []
        for index in range(options.servers):
            (folder / str(index)).mkdir()
            server = stack.enter_context(blob_server("valkey", folder / str(index)))
            urls.append(str(server.endpoint))
        common = ["--checkpoint", str(checkpoint), "--urls", ",".join(urls)]
        common += ["--tokens", str(options.tokens)]
        one = run_process("prefill", *common)
        record = {key: one["first"][key] for key in ("token_ids", "snapshots")}
        other = run_process("resume", *common, "--record", json.dumps(record))
    is_equal = one["second"]["token_ids"] == other["second"]["token_ids"]
    prefill_s, resume_s = one["first"]["first_token_s"], other["second"]["first_token_s"]
    report(
        "million_tokens",
        {"tokens": options.tokens, "servers": options.servers, "shape": shape, "bar": BAR},
        {
            "prefill_s": round(prefill_s, 2),
            "resume_s": round(resume_s, 3),
            "ratio": round(resume_s / prefill_s, 5),
            "next_16_tokens_equal": is_equal,
            "restored_tokens": other["restored_tokens"],
            "read_bytes": other["read_bytes"],
            "written_bytes": one["written_bytes"],
            "dropped_bytes": one["dropped_bytes"],
            "second_turn_here_s": round(one["second"]["first_token_s"], 3),
            "process_start_s": round(other["start_s"], 2),
        },
    )


if __name__ == "__main__":
    main()
