"""What tests of the engine share: requests, their sinks, and what must come out of them."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch

from router.engine.config import EngineConfig
from router.engine.engine import Engine
from router.engine.request import (
    EngineRequest,
    FinishReason,
    Logprobs,
    SamplingParams,
    StepOutput,
    StoppingParams,
)
from router.engine.sampler import SamplerState, sample
from tests.unit.router.hash_model import logits_of

VOCAB = 40
EOS = 3
MAX_MODEL_LEN = 48
REQUEST_FIELDS = (
    *("logprobs", "prompt_logprobs", "deadline", "text_stop"),
    *("namespace", "junctions", "forced_ids", "session", "priority"),
)


def config_of(**options: Any) -> EngineConfig:
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "max_model_len": MAX_MODEL_LEN,
        "num_blocks": 60,
        "num_state_slots": 8,
        "block_size": 4,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 32,
        "max_queued": 100,
        "eos_token_ids": (EOS,),
    }
    return EngineConfig(**(sizes | options))


def request_of(request_id: str, prompt: list[int], **options: Any) -> EngineRequest:
    """Build a request; options of sampling and stopping are told apart by name."""
    stopping = {
        key: options.pop(key)
        for key in ("max_tokens", "min_tokens", "stop_token_ids", "ignore_eos")
        if key in options
    }
    others = {key: options.pop(key) for key in REQUEST_FIELDS if key in options}
    options.setdefault("temperature", 0.0)
    return EngineRequest(
        request_id=request_id,
        prompt_ids=prompt,
        sampling=SamplingParams(**options),
        stopping=StoppingParams(**stopping),
        **others,
    )


class Outputs:
    """Collects what sinks receive, and checks each sequence's order of events."""

    def __init__(self) -> None:
        self.tokens: dict[tuple[str, int], list[int]] = defaultdict(list)
        self.logprobs: dict[tuple[str, int], Logprobs] = defaultdict(Logprobs)
        self.last: dict[tuple[str, int], StepOutput] = {}
        self.progress: dict[tuple[str, int], list[int]] = defaultdict(list)
        self.prompt_logprobs: dict[tuple[str, int], Logprobs] = {}
        self.cached: dict[tuple[str, int], int] = {}

    def __call__(self, output: StepOutput) -> None:
        key = (output.request_id, output.index)
        assert key not in self.last, f"{key} went on after its end"
        self.tokens[key] += output.token_ids
        if output.logprobs is not None:
            self.logprobs[key].extend(output.logprobs)
        if output.prefill is not None:
            assert not self.tokens[key] or len(self.tokens[key]) == len(output.token_ids)
            self.progress[key].append(output.prefill.tokens_done)
            cached = output.prefill.tokens_cached
            assert self.cached.setdefault(key, cached) == cached
            assert cached <= output.prefill.tokens_done
            if output.prefill.prompt_logprobs is not None:
                assert key not in self.prompt_logprobs
                self.prompt_logprobs[key] = output.prefill.prompt_logprobs
        if output.is_last:
            assert output.timings is not None
            self.last[key] = output


def run(engine: Engine) -> None:
    for _ in range(5000):
        if not engine.step():
            return
    raise AssertionError("the engine does not come to an end")


def assert_all_free(engine: Engine) -> None:
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting) == (0, 0)
    assert (stats.num_blocks_used, stats.num_state_slots_used) == (0, 0)
    assert engine.num_live == 0


@dataclasses.dataclass
class Expected:
    tokens: list[int]
    logprobs: Logprobs
    prompt_logprobs: Logprobs | None
    reason: FinishReason


def expected_of(request: EngineRequest, index: int, max_model_len: int = MAX_MODEL_LEN) -> Expected:
    """Generate one sequence alone: no batch, no blocks, no steps."""
    stopping = request.stopping
    stop_ids = set(stopping.stop_token_ids) | (set() if stopping.ignore_eos else {EOS})
    tokens = list(request.prompt_ids)
    state = SamplerState(
        request.sampling,
        index=index,
        prompt=np.array(tokens),
        logprobs=request.logprobs,
        banned_ids=frozenset(stop_ids),
        min_tokens=stopping.min_tokens,
    )
    limit = min(stopping.max_tokens or max_model_len, max_model_len - len(tokens))
    logprobs = Logprobs()
    prompt_logprobs = None
    if request.prompt_logprobs is not None:
        prompt_logprobs = Logprobs()
        for position in range(1, len(tokens)):
            row = logits_of(tokens[:position], VOCAB).astype(np.float64)
            values = row - row.max() - np.log(np.exp(row - row.max()).sum())
            best = np.argsort(-row, kind="stable")[: request.prompt_logprobs]
            prompt_logprobs.extend(
                Logprobs(
                    [tokens[position]],
                    [float(values[tokens[position]])],
                    [(best.tolist(), values[best].tolist())],
                )
            )
    generated: list[int] = []
    while True:
        samples = sample(torch.from_numpy(logits_of(tokens, VOCAB))[None], [state])
        token = int(samples.token_ids[0])
        generated.append(token)
        tokens.append(token)
        state.observe(token)
        if 0 in samples.logprobs:
            logprobs.extend(samples.logprobs[0])
        if token in stop_ids:
            return Expected(generated, logprobs, prompt_logprobs, FinishReason.STOP)
        if len(generated) == limit:
            return Expected(generated, logprobs, prompt_logprobs, FinishReason.LENGTH)


def assert_as_expected(
    requests: list[EngineRequest], outputs: Outputs, max_model_len: int = MAX_MODEL_LEN
) -> None:
    for request in requests:
        for index in range(request.sampling.n):
            key = (request.request_id, index)
            expected = expected_of(request, index, max_model_len)
            assert outputs.tokens[key] == expected.tokens
            assert outputs.logprobs[key] == expected.logprobs
            assert outputs.last[key].finish_reason is expected.reason
            assert outputs.last[key].error is None
            progress = outputs.progress[key]
            assert progress == sorted(set(progress))
            assert progress[-1] == len(request.prompt_ids)
            if expected.prompt_logprobs is not None:
                got = outputs.prompt_logprobs[key]
                assert got.token_ids == expected.prompt_logprobs.token_ids
                assert got.logprobs == pytest.approx(expected.prompt_logprobs.logprobs, abs=1e-5)
                for (ids, _), (ids_expected, _) in zip(
                    got.top, expected.prompt_logprobs.top, strict=True
                ):
                    assert ids == ids_expected
