"""Sequences longer than the pool: their tokens are those of a pool that holds them."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from protos.errors import ColdKvError, ExpertMeshError, ResourceError
from router.engine.cold_store import Bytes, ColdTier
from router.engine.config import EngineConfig
from router.engine.engine import Engine
from router.engine.request import (
    EngineRequest,
    FinishReason,
    SamplingParams,
    StepOutput,
    StoppingParams,
)
from router.model.decoder import Decoder
from router.model.ops import Ops
from tests.parity.oracle import make_decoder

MakeOps = Callable[[torch.dtype], Ops]
MakeCheckpoint = Callable[..., Path]

CONTEXT = 4096
POOL_TOKENS = CONTEXT // 8
NEW_TOKENS = 12
GIB = 1 << 30


class MemoryColdTier:
    """The slow twin of the blob servers."""

    def __init__(self) -> None:
        self.values: list[Bytes] = []
        self.takes = self.reads = 1 << 60
        """How many calls succeed before all fail."""
        self.num_reads = 0

    def put(self, key: bytes, parent: bytes, values: Bytes, *, num_tokens: int) -> int | None:
        assert len(key) == len(parent) == 32
        self.takes -= 1
        self.values.append(values.copy())
        return len(self.values) - 1 if self.takes >= 0 else None

    def adopt(self, key: bytes, values: Bytes, *, num_tokens: int) -> int:
        self.values.append(values.copy())
        return len(self.values) - 1

    def read(self, handles: Sequence[Any], layer: int, out: Bytes) -> bool:
        self.num_reads += 1
        self.reads -= 1
        for part, handle in zip(out, handles, strict=True):
            part[:] = self.values[handle][layer]
        return self.reads >= 0


class Run:
    """An engine, and what its sequences gave."""

    def __init__(
        self, decoder: Decoder, *, cold_tier: ColdTier | None = None, **options: Any
    ) -> None:
        sizes: dict[str, Any] = {
            "vocab_size": decoder.config.vocab_size,
            "max_model_len": 2 * CONTEXT,
            "block_size": 16,
            "num_blocks": POOL_TOKENS // 16,
            "num_state_slots": 4,
            "max_num_seqs": 4,
            "max_num_batched_tokens": 200,
            "max_cold_bytes": GIB,
        }
        self.engine = Engine(decoder, EngineConfig(**(sizes | options)), cold_tier=cold_tier)
        self.tokens: dict[str, list[int]] = defaultdict(list)
        self.logprobs: dict[str, list[float]] = defaultdict(list)
        self.ends: dict[str, FinishReason | ExpertMeshError] = {}

    def submit(self, name: str, prompt: list[int], max_tokens: int = NEW_TOKENS) -> None:
        request = EngineRequest(
            request_id=name,
            prompt_ids=prompt,
            sampling=SamplingParams(temperature=0.0),
            stopping=StoppingParams(max_tokens=max_tokens, ignore_eos=True),
            logprobs=0,
        )
        self.engine.submit(request, self)

    def __call__(self, output: StepOutput) -> None:
        self.tokens[output.request_id] += output.token_ids
        if output.logprobs is not None:
            self.logprobs[output.request_id] += output.logprobs.logprobs
        end = output.error or output.finish_reason
        if end is not None:
            self.ends[output.request_id] = end

    def finish(self) -> Run:
        for _ in range(20_000):
            if not self.engine.step() and not self.engine.num_live:
                break
        self.assert_all_free()
        return self

    def assert_all_free(self) -> None:
        stats = self.engine.stats()
        assert (stats.num_running, stats.num_waiting) == (0, 0)
        assert (stats.num_blocks_used, stats.num_state_slots_used) == (0, 0)
        assert stats.num_cold_bytes == 0


def prompt_of(length: int, vocab_size: int, seed: int = 1) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(2, vocab_size) for _ in range(length)]


@pytest.fixture(params=["moe", "dense"])
def decoder(request: pytest.FixtureRequest, make_ops: MakeOps, checkpoint: MakeCheckpoint) -> Any:
    sizes: dict[str, Any] = {"max_position_embeddings": 2 * CONTEXT, "full_attention_interval": 2}
    path = checkpoint(dense=request.param == "dense", **sizes)
    return make_decoder(path, make_ops(torch.float32))


def all_local(decoder: Decoder, prompt: list[int], max_tokens: int = NEW_TOKENS) -> Run:
    run = Run(decoder, num_blocks=(CONTEXT + 1024) // 16, max_cold_bytes=0)
    run.submit("long", prompt, max_tokens)
    return run.finish()


@pytest.mark.parametrize("is_in_tier", [False, True])
def test_a_pool_of_an_eighth_gives_the_same_tokens(decoder: Decoder, is_in_tier: bool) -> None:
    prompt = prompt_of(CONTEXT, decoder.config.vocab_size)
    want = all_local(decoder, prompt)
    tier = MemoryColdTier()
    for chunk, prefix_caching in ((200, True), (64, False), (1000, True)):
        if is_in_tier and not prefix_caching:
            continue
        run = Run(
            decoder,
            max_num_batched_tokens=chunk,
            prefix_caching=prefix_caching,
            cold_tier=tier if is_in_tier else None,
            max_cold_bytes=0 if is_in_tier else GIB,
        )
        run.submit("long", prompt)
        run.finish()
        assert run.tokens == want.tokens
        np.testing.assert_allclose(run.logprobs["long"], want.logprobs["long"], atol=2e-5)
        assert run.engine.stats().spilled_blocks >= (CONTEXT - POOL_TOKENS) // 128
    assert bool(tier.num_reads) == is_in_tier


def test_native_kernels_give_the_same_bits(decoder: Decoder) -> None:
    if decoder.ops.name == "torch" or decoder.config.is_moe:
        return  # torch, and the oracle's experts, sum by the shape of the batch
    prompt = prompt_of(CONTEXT, decoder.config.vocab_size)
    run = Run(decoder)
    run.submit("long", prompt)
    assert run.finish().logprobs == all_local(decoder, prompt).logprobs


def test_a_sequence_that_outgrows_the_pool_goes_on(decoder: Decoder) -> None:
    prompt = prompt_of(POOL_TOKENS - 40, decoder.config.vocab_size)
    want = all_local(decoder, prompt, 300)
    run = Run(decoder)
    run.submit("long", prompt, 300)
    run.finish()
    assert run.tokens == want.tokens
    assert run.engine.stats().spilled_blocks > 0


def test_others_run_in_between_and_nobody_disturbs_anybody(decoder: Decoder) -> None:
    vocab_size = decoder.config.vocab_size
    prompts = {"long": prompt_of(CONTEXT, vocab_size), "second": prompt_of(1500, vocab_size, 2)}
    for i in range(6):
        prompts[f"short{i}"] = prompt_of(30 + 40 * i, vocab_size, 3 + i)
    run = Run(decoder)
    for name, prompt in prompts.items():
        run.submit(name, prompt, 40)
    order: list[str] = []
    for _ in range(20_000):
        before = set(run.ends)
        run.engine.step()
        order += sorted(set(run.ends) - before)
        if not run.engine.num_live:
            break
    run.assert_all_free()
    assert order.index("short3") < order.index("long")  # they need not wait for the long one
    for name, prompt in prompts.items():
        want = Run(decoder, num_blocks=(CONTEXT + 1024) // 16, max_cold_bytes=0)
        want.submit(name, prompt, 40)
        assert run.tokens[name] == want.finish().tokens[name], name


def test_a_cancel_at_any_moment_frees_everything(decoder: Decoder) -> None:
    prompt = prompt_of(1300, decoder.config.vocab_size)
    run = Run(decoder)
    rng = random.Random(5)
    for i in range(12):
        run.submit(f"long{i}", prompt)
        run.submit(f"short{i}", prompt[:50])
        for _ in range(rng.randrange(30)):
            run.engine.step()
        run.engine.cancel(f"long{i}")
        run.finish()
        assert run.ends[f"short{i}"] is FinishReason.LENGTH
        assert isinstance(run.ends[f"long{i}"], FinishReason)


def test_a_lost_cold_block_starts_the_sequence_over(decoder: Decoder) -> None:
    prompt = prompt_of(1500, decoder.config.vocab_size)
    want = all_local(decoder, prompt)
    for reads in (0, 3, 9, 17):
        tier = MemoryColdTier()
        tier.reads = reads
        run = Run(decoder, cold_tier=tier, max_cold_bytes=0)
        run.submit("long", prompt)
        while tier.reads >= 0:
            assert run.engine.step()
        tier.reads = 1 << 60
        run.finish()
        assert run.tokens == want.tokens, reads


def test_a_tier_that_stays_broken_fails_the_sequence_and_no_other(decoder: Decoder) -> None:
    prompt = prompt_of(1500, decoder.config.vocab_size)
    for failing in ("takes", "reads"):
        tier = MemoryColdTier()
        setattr(tier, failing, 2)
        run = Run(decoder, cold_tier=tier, max_cold_bytes=0)
        run.submit("long", prompt)
        run.submit("short", prompt[:60])
        run.finish()
        assert isinstance(run.ends["long"], ColdKvError)
        assert run.ends["short"] is FinishReason.LENGTH


def test_what_fits_nowhere_is_refused_with_the_numbers(decoder: Decoder) -> None:
    prompt = prompt_of(2000, decoder.config.vocab_size)
    for max_cold_bytes in (0, 1 << 20):
        run = Run(decoder, max_cold_bytes=max_cold_bytes)
        with pytest.raises(ResourceError, match=r"need 126, have 32"):
            run.submit("long", prompt)
