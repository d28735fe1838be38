"""Going on from Redis against computing again: time to first token, by length of the context.

Regime: two engines in this process with pools of their own (two routers, as far as cached values
    go), one decoder, an embedded Valkey over TCP. Engine A computes a context of `n` tokens and
    writes it; engine B, which never saw it, then takes it with 16 new tokens: once with loading
    forced (`resume`), once a fresh context of the same length, for which there is nothing to load
    (`prefill`). In turn, new tokens each time, one round to warm up.

Meaning: seconds from `submit` to the first token. `ratio` is resume / prefill of the medians.
    `break_even_tokens` is where the two lines cross, interpolated; below the shortest length where
    resuming is already faster there. `picked` counts how often the cost model, asked before the
    measurement, chose what the medians call faster; `picked_share` is over 256 tokens and more.

    With `--mb-per-s` the way back from Redis is as slow as that, so that both answers are right at
    some length; the bar of the ratio is for the local one.

Ceiling: bytes over the raw bandwidth of one connection, and the prefill of the 16 tokens.

    python -m tests.benchmarks.resume_ttft CHECKPOINT [--repeats 5] [--mb-per-s 8]
"""

from __future__ import annotations

import argparse
import math
import queue
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from router.engine.chain import HashChain
from router.engine.config import EngineConfig
from router.engine.engine import Engine
from router.engine.request import (
    EngineRequest,
    SamplingParams,
    SessionHint,
    StepOutput,
    StoppingParams,
)
from router.engine.tier import (
    LoadJob,
    LoadResult,
    Probe,
    ProbeResult,
    Snapshot,
    TierStats,
    TtlClass,
)
from router.model.config import ModelConfig
from router.model.decoder import Decoder
from router.state.embedded import EmbeddedServer, Role
from router.state.endpoint import Endpoint
from router.state.kv_store import KvStore
from router.state.loader import LoaderSettings
from router.state.restore import ValueSizes
from router.state.tier import BlobTier, TierSettings
from tests.benchmarks.engines import load_decoder, local_dispatcher
from tests.benchmarks.harness import OtherCores, Samples, report
from tests.benchmarks.slow_link import SlowLink

LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32704)
NEW_PROMPT = 16
BLOCK = 32
NAMESPACE = "resume-ttft"
PATIENCE = 1e6
"""Times its prediction that a load may take: it is to be measured, not cut."""
RATIO_BAR, RATIO_AT = 0.3, 16384
PICKED_BAR, PICKED_FROM = 0.9, 256


class ForcedTier:
    """A blob tier that always loads what it finds, and remembers what it would have done."""

    def __init__(self, tier: BlobTier) -> None:
        self._tier = tier
        self.last: ProbeResult | None = None
        self.loaded: LoadResult | None = None

    def probe(self, query: Probe, done: Callable[[ProbeResult], None]) -> None:
        """See `Tier.probe`; the decision becomes `load`."""

        def force(result: ProbeResult) -> None:
            self.last = result
            done(replace(result, decision="load") if result.num_tokens else result)

        self._tier.probe(query, force)

    def load(self, job: LoadJob, done: Callable[[LoadResult], None]) -> None:
        """See `Tier.load`."""

        def note(result: LoadResult) -> None:
            self.loaded = result
            done(result)

        self._tier.load(job, note)

    def put_block(self, *arguments: Any, **options: Any) -> bool:
        """Take nothing: only engine A writes."""
        return False

    def put_snapshot(
        self, key: bytes, snapshot: Snapshot, ttl_class: TtlClass, stored: Callable[[bool], None]
    ) -> bool:
        """Take nothing."""
        return False

    def touch(self, chain: HashChain, num_tokens: int, num_shared: int) -> None:
        """See `Tier.touch`."""
        self._tier.touch(chain, num_tokens, num_shared)

    def note_prefill(self, num_tokens: int, context: int, seconds: float) -> None:
        """See `Tier.note_prefill`."""
        self._tier.note_prefill(num_tokens, context, seconds)

    def stats(self) -> TierStats:
        """See `Tier.stats`."""
        return self._tier.stats()

    def close(self) -> None:
        """See `Tier.close`."""
        self._tier.close()


class Pair:
    """Engine A, which writes, and engine B, which resumes."""

    def __init__(
        self, decoder: Decoder, config: ModelConfig, server: Endpoint, reading: Endpoint
    ) -> None:
        io = decoder.cache_io(decoder.allocate_caches(1, BLOCK, 1))
        self.sizes = ValueSizes(block_bytes=io.kv_block_bytes, state_bytes=io.state_bytes)
        self.writing = BlobTier(KvStore([server], NAMESPACE), self.sizes)
        patient = TierSettings(loader=LoaderSettings(lateness=PATIENCE))
        self.forced = ForcedTier(BlobTier(KvStore([reading], NAMESPACE), self.sizes, patient))
        self.a = self._engine(decoder, config, self.writing)
        self.b = self._engine(decoder, config, self.forced)
        self._rng = np.random.default_rng(1)
        self._vocab_size = config.vocab_size

    @staticmethod
    def _engine(decoder: Decoder, config: ModelConfig, tier: BlobTier | ForcedTier) -> Engine:
        most = config.max_position_embeddings
        engine = Engine(
            decoder,
            EngineConfig(
                vocab_size=config.vocab_size,
                max_model_len=most,
                num_blocks=2 * most // BLOCK,
                num_state_slots=4,
                block_size=BLOCK,
                max_num_seqs=4,
                namespace=NAMESPACE,
                min_load_timeout_s=60.0,  # a load that was not predicted gets its time, too
            ),
            tier=tier,
        )
        engine.start()
        return engine

    def tokens(self, count: int) -> list[int]:
        """Return new random tokens."""
        return self._rng.integers(16, self._vocab_size, count).tolist()

    def write(self, context: list[int]) -> tuple[int, ...]:
        """Let A compute a context; return the positions of its snapshots once all is written."""
        positions: list[int] = []
        hint = SessionHint(on_snapshot=lambda n, _: positions.append(n))
        first_token_s(self.a, context, hint)
        while self.writing.stats().num_queued_bytes or len(context) not in positions:
            time.sleep(0.01)
        return tuple(positions)

    def resume(self, context: list[int], positions: tuple[int, ...]) -> tuple[float, ProbeResult]:
        """Let B go on from what A wrote; return seconds, and what the cost model wanted."""
        self.forced.last = None
        hint = SessionHint(snapshot_positions=positions)
        before = self.b.stats().reuse.restored_tokens
        seconds = first_token_s(self.b, context + self.tokens(NEW_PROMPT), hint)
        restored = self.b.stats().reuse.restored_tokens - before
        if restored != len(context) or self.forced.last is None:
            why = f"{self.forced.last}, {self.forced.loaded}"
            raise RuntimeError(f"{restored} of {len(context)} tokens were restored: {why}")
        return seconds, self.forced.last

    def close(self) -> None:
        """End engines and tiers."""
        for engine in (self.a, self.b):
            engine.stop(drain=False)
        self.writing.close()
        self.forced.close()


def first_token_s(engine: Engine, prompt: list[int], hint: SessionHint | None) -> float:
    """Return the seconds to a prompt's first token; waits until the request is over."""
    outputs: queue.SimpleQueue[tuple[float, StepOutput]] = queue.SimpleQueue()
    request = EngineRequest(
        request_id=f"r{time.monotonic_ns()}",
        prompt_ids=prompt,
        sampling=SamplingParams(temperature=0.0),
        stopping=StoppingParams(max_tokens=1, ignore_eos=True),
        session=hint,
    )
    started = time.perf_counter()
    engine.submit(request, lambda output: outputs.put((time.perf_counter(), output)))
    first = 0.0
    while True:
        at, output = outputs.get(timeout=600)
        if output.error is not None:
            raise output.error
        if output.token_ids and not first:
            first = at - started
        if output.is_last:
            return first


def break_even(lengths: list[int], resume: list[float], prefill: list[float]) -> float | None:
    """Return the length from which on resuming is faster; None where it never is."""
    gains = [p - r for r, p in zip(resume, prefill, strict=True)]
    if gains[0] > 0:
        return float(lengths[0])
    for i in range(1, len(gains)):
        if gains[i] > 0:
            share = -gains[i - 1] / (gains[i] - gains[i - 1])
            return round(lengths[i - 1] + share * (lengths[i] - lengths[i - 1]))
    return None


def main() -> None:
    """Measure every length, one after the other, again and again."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--mb-per-s", type=float, help="slow the way from Redis to engine B down")
    arguments = parser.parse_args()
    dtype: torch.dtype = getattr(torch, arguments.dtype)
    config = ModelConfig.from_checkpoint(arguments.checkpoint)
    dispatcher = local_dispatcher(arguments.checkpoint, dtype, num_threads=arguments.threads)
    decoder = load_decoder(arguments.checkpoint, dtype, dispatcher, num_threads=arguments.threads)
    resume = {n: Samples() for n in arguments.lengths}
    prefill = {n: Samples() for n in arguments.lengths}
    decisions: dict[int, list[ProbeResult]] = {n: [] for n in arguments.lengths}
    with EmbeddedServer.start(Role.BLOB, maxmemory_bytes=2 << 30, tcp=True) as server:
        endpoint = reading = server.endpoint
        if arguments.mb_per_s:
            link = SlowLink(endpoint.host, endpoint.port, arguments.mb_per_s * 1e6)
            reading = replace(endpoint, port=link.port)
        pair = Pair(decoder, config, endpoint, reading)
        for round_index in range(1 + arguments.repeats):
            for n in arguments.lengths:
                context = pair.tokens(n)
                positions = pair.write(context)
                others = OtherCores([])
                prefill_s = first_token_s(pair.b, pair.tokens(n + NEW_PROMPT), None)
                resume_s, result = pair.resume(context, positions)
                if round_index:
                    load = others.cores()
                    prefill[n].add(prefill_s, load)
                    resume[n].add(resume_s, load)
                    decisions[n].append(result)
            print(f"round {round_index} done, {threading.active_count()} threads", flush=True)
        sizes, bandwidth = pair.sizes, pair.forced.stats().gauges["bandwidth_bytes_per_s"]
        pair.close()
    figures: dict[str, object] = {}
    num_right = num_asked = 0
    for n in arguments.lengths:
        fast = "load" if resume[n].median < prefill[n].median else "prefill"
        right = sum(result.decision == fast for result in decisions[n])
        if n >= PICKED_FROM:
            num_right, num_asked = num_right + right, num_asked + len(decisions[n])
        ratio = resume[n].median / prefill[n].median
        predicted = decisions[n][-1]
        figures[str(n)] = {
            "resume_s": resume[n].to_json(),
            "prefill_s": prefill[n].to_json(),
            "ratio": round(ratio, 4),
            "mib": round(sizes.load_bytes(0, n) / (1 << 20), 1),
            "picked": f"{right}/{len(decisions[n])} {fast}",
            "predicted_load_s": round(predicted.predicted_load_s, 4),
            "predicted_prefill_s": round(predicted.predicted_prefill_s, 4),
        }
        print(
            f"{n:6} tokens: resume {resume[n].median:.3f} s, prefill {prefill[n].median:.3f} s,"
            f" ratio {ratio:.3f}, picked {right}/{len(decisions[n])}",
            flush=True,
        )
    medians = [
        [statistics.median(side[n].values) for n in arguments.lengths] for side in (resume, prefill)
    ]
    picked = num_right / num_asked
    at_bar = RATIO_AT if RATIO_AT in resume else arguments.lengths[-1]
    ratio = resume[at_bar].median / prefill[at_bar].median
    is_met = picked >= PICKED_BAR and (ratio <= RATIO_BAR or arguments.mb_per_s is not None)
    figures |= {
        "ratio_at": {str(at_bar): round(ratio, 4)},
        "break_even_tokens": break_even(arguments.lengths, *medians),
        "picked_share": round(picked, 3),
        "fitted_mb_s": round(bandwidth / 1e6, 1) if math.isfinite(bandwidth) else None,
        "is_met": is_met,
    }
    names = ("repeats", "dtype", "threads", "mb_per_s")
    settings = {name: getattr(arguments, name) for name in names}
    report("resume_ttft", {"checkpoint": arguments.checkpoint.name, **settings}, figures)
    raise SystemExit(0 if is_met else 1)


if __name__ == "__main__":
    main()
