"""A real trunk and every prompt length: what is restored is what can be, and equals recomputing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from router.engine.batch import Chunk, build_batch
from router.engine.config import EngineConfig
from router.engine.engine import Engine
from router.engine.request import EngineRequest, SamplingParams, StepOutput, StoppingParams
from router.model.decoder import Decoder
from router.model.ops import choose_ops
from tests.parity.checkpoints import make_checkpoint
from tests.parity.conftest import available_ops
from tests.parity.oracle import make_decoder

VOCAB = 64
LONGEST = 520
NUM_NEW = 3
JUNCTION = 300
GAIN = 32
"""Tokens that a snapshot must save: the default of `EngineConfig.min_snapshot_gain`."""
IDS = np.random.default_rng(20261122).integers(4, VOCAB, LONGEST + NUM_NEW).tolist()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(
        tmp_path_factory.mktemp("checkpoint"),
        dense=True,
        text_only=True,
        vocab_size=VOCAB,
        hidden_size=32,
        num_heads=2,
        head_dim=16,
        intermediate_size=32,
    )


def decoder_of(path: Path, ops: str) -> Decoder:
    return make_decoder(path, choose_ops(torch.float32, torch.device("cpu"), ops))


def engine_of(decoder: Decoder, block_size: int, budget: int, *, is_reusing: bool = True) -> Engine:
    config = EngineConfig(
        vocab_size=VOCAB,
        max_model_len=640,
        num_blocks=1024 // block_size,
        num_state_slots=2,
        block_size=block_size,
        max_num_seqs=2,
        max_num_batched_tokens=budget,
        prefix_caching=is_reusing,
    )
    return Engine(decoder, config)


class Answer:
    """One request's tokens, their log-probabilities over the vocabulary, and what was reused."""

    def __init__(
        self, engine: Engine, prompt: list[int], max_tokens: int, junctions: tuple[int, ...] = ()
    ) -> None:
        self.ids: list[int] = []
        self.logprobs: list[list[float]] = []
        self.num_cached = 0
        request = EngineRequest(
            request_id="r",
            prompt_ids=prompt,
            sampling=SamplingParams(temperature=0.0),
            stopping=StoppingParams(max_tokens=max_tokens, ignore_eos=True),
            logprobs=VOCAB,
            junctions=junctions,
        )
        engine.submit(request, self)
        while engine.step():
            pass

    def __call__(self, output: StepOutput) -> None:
        assert output.error is None
        self.ids += output.token_ids
        if output.prefill is not None:
            self.num_cached = output.prefill.tokens_cached
        if output.logprobs is not None:
            for ids, values in output.logprobs.top:
                by_id = dict(zip(ids, values, strict=True))
                self.logprobs.append([by_id[i] for i in range(VOCAB)])


def provable(length: int, limit: int) -> int:
    """Deepest snapshot that a prompt of `length` tokens has left at or below `limit`.

    One at the junction, which is rounded down to 256, and one at the prompt's end if it saves
    enough beyond that.
    """
    junction = JUNCTION // 128 * 128
    found = {0}
    if length >= junction:
        found.add(junction)
    if length - max(found) >= GAIN:
        found.add(length)
    return max(position for position in found if position <= limit)


@pytest.mark.parametrize(
    ("ops", "block_size", "budget", "stride"),
    [
        ("native", 16, 2048, 1),
        ("native", 32, 100, 1),
        ("native", 128, 37, 3),
        ("native", 8, 129, 3),
        ("torch", 16, 2048, 7),
        ("torch", 8, 61, 17),
    ],
)
def test_every_length_is_restored_as_far_as_it_can_be_and_no_further(
    ops: str, block_size: int, budget: int, stride: int, path: Path
) -> None:
    """Prefill n tokens; then n + 3, in the same engine: what comes back equals a prefill of all.

    Native kernels give the same bits however a prefill is cut.
    """
    assert ops in available_ops(), "the kernels are not built"
    decoder = decoder_of(path, ops)
    whole = Chunk(
        token_ids=IDS,
        context_len=0,
        block_table=list(range(640 // block_size)),
        state_slot=0,
        num_logits=len(IDS),
    )
    caches = decoder.allocate_caches(640 // block_size, block_size, 1)
    expected = decoder.forward(build_batch([whole]), caches)
    logprobs = expected.double().log_softmax(1).numpy()
    for length in range(1, LONGEST + 1, stride):
        engine = engine_of(decoder, block_size, budget)
        first = Answer(engine, IDS[:length], 1, (JUNCTION,))
        longer = IDS[: length + NUM_NEW]
        second = Answer(engine, longer, 1, (JUNCTION,))
        assert first.num_cached == 0
        assert second.num_cached == provable(length, len(longer) - 1), f"length {length}"
        for answer, position in ((first, length - 1), (second, len(longer) - 1)):
            assert answer.ids == [int(logprobs[position].argmax())], f"length {length}"
            error = np.abs(np.array(answer.logprobs[0]) - logprobs[position]).max()
            # Equal logits: what is left is the rounding of the log-probabilities.
            assert error <= (2e-6 if ops == "native" else 1e-4), f"length {length}"
        assert engine.stats().num_blocks_used == 0


@pytest.mark.parametrize("ops", available_ops())
def test_turns_equal_an_engine_that_reuses_nothing(ops: str, path: Path) -> None:
    """Conversations of four turns, answers included, whose turns end at odd positions."""
    decoder = decoder_of(path, ops)
    rng = np.random.default_rng(7)
    for conversation in range(3):
        engine = engine_of(decoder, 16, 96)
        slow = engine_of(decoder, 16, 96, is_reusing=False)
        history: list[int] = []
        reused = []
        for turn in range(4):
            history += rng.integers(4, VOCAB, int(rng.integers(30, 90))).tolist()
            ours, expected = Answer(engine, history, 40), Answer(slow, history, 40)
            assert ours.ids == expected.ids, f"conversation {conversation} turn {turn}"
            difference = np.abs(np.array(ours.logprobs) - np.array(expected.logprobs)).max()
            assert difference <= (0.0 if ops == "native" else 1e-4)
            assert ours.num_cached < len(history)
            reused.append(ours.num_cached)
            history += ours.ids
        assert reused[0] == 0
        assert min(reused[1:]) > 0
        assert expected.num_cached == 0
