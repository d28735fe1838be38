"""The real engine in this process, with its experts here or in other processes."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experts.native.kernels import load_kernels
from experts.planner import plan_placement
from experts.runtime import ExpertRuntime
from protos.codec import Combine, dtype_of_torch
from router.engine.batch import Batch
from router.engine.config import EngineConfig
from router.engine.engine import Engine
from router.engine.request import EngineRequest, SamplingParams, StepOutput, StoppingParams
from router.gating.dispatch import ExpertDispatcher
from router.gating.packing import CallOptions
from router.gating.transport.local import LocalTransport
from router.model.config import ModelConfig
from router.model.decoder import Decoder
from router.model.ops import choose_ops

OUTPUT_TIMEOUT_S = 600.0


def local_dispatcher(
    checkpoint: Path | str, dtype: torch.dtype, *, num_threads: int = 1, compute: str = "auto"
) -> ExpertDispatcher:
    """Return a dispatcher whose one group lives in this process."""
    config = ModelConfig.from_checkpoint(checkpoint)
    runtime = ExpertRuntime(
        group_id="local",
        checkpoint=checkpoint,
        dtype=str(dtype).removeprefix("torch."),
        compute=compute,
        num_threads=num_threads,
    )
    placement = plan_placement(config.num_layers, config.num_experts, {"local": 1.0})
    runtime.load(placement)
    options = CallOptions(
        hidden=config.hidden_size,
        top_k=config.top_k,
        wire_dtype=dtype_of_torch(dtype),
        combine=Combine.SLOTS,
        placement_epoch=placement.epoch,
        deadline_ms=0,
    )
    return ExpertDispatcher(placement, [LocalTransport(runtime)], options, load_kernels())


class RecordedLogits:
    """A model that also keeps the logits it returned, by the whole sequence that led to them.

    The engine hands out tokens only. A batch says which state slot a row belongs to and how much of
    its sequence is cached, which is enough to know the tokens.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._histories: dict[int, list[int]] = {}
        self.logits: dict[tuple[int, ...], Tensor] = {}
        """Token ids so far -> float32 `[vocab]` for the next one."""

    def allocate_caches(self, num_blocks: int, block_size: int, num_state_slots: int) -> Any:
        """See `Model.allocate_caches`."""
        return self._decoder.allocate_caches(num_blocks, block_size, num_state_slots)

    def forward(self, batch: Batch, caches: Any) -> Tensor:
        """See `Model.forward`."""
        logits = self._decoder.forward(batch, caches)
        rows = {int(row): index for index, row in enumerate(batch.logit_rows)}
        starts, token_ids = batch.query_start.tolist(), batch.token_ids.tolist()
        for i, slot in enumerate(batch.state_slots.tolist()):
            history = self._histories.get(slot, [])[: int(batch.context_lens[i])]
            for row in range(starts[i], starts[i + 1]):
                history.append(token_ids[row])
                if row in rows:
                    self.logits[tuple(history)] = logits[rows[row]].clone()
            self._histories[slot] = history
        return logits


def load_decoder(
    checkpoint: Path | str,
    dtype: torch.dtype,
    experts: ExpertDispatcher | None,
    *,
    ops: str = "auto",
    num_threads: int = 1,
) -> Decoder:
    """Load the trunk with the kernels named `ops`."""
    kernels = choose_ops(dtype, torch.device("cpu"), ops)
    native = load_kernels()
    if native is not None:
        native.set_num_threads(num_threads)  # one pool a process
    return Decoder.from_checkpoint(checkpoint, dtype=dtype, experts=experts, ops=kernels)


def start_engine(
    decoder: Decoder | RecordedLogits,
    config: ModelConfig,
    *,
    max_num_seqs: int = 16,
    max_num_batched_tokens: int = 2048,
    max_tokens_per_seq: int = 1024,
    block_size: int = 16,
) -> Engine:
    """Start an engine with room for `max_num_seqs` sequences of `max_tokens_per_seq` tokens."""
    engine = Engine(
        decoder,
        EngineConfig(
            vocab_size=config.vocab_size,
            max_model_len=min(max_tokens_per_seq, config.max_position_embeddings),
            num_blocks=max_num_seqs * -(-max_tokens_per_seq // block_size),
            num_state_slots=max_num_seqs,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            prefix_caching=False,  # a repetition is to compute what the first one did
        ),
    )
    engine.start()
    return engine


def greedy(engine: Engine, prompts: Sequence[Sequence[int]], num_new: int) -> list[list[int]]:
    """Generate `num_new` tokens for all prompts at once; returns each prompt's tokens."""
    outputs: queue.SimpleQueue[StepOutput] = queue.SimpleQueue()
    stopping = StoppingParams(max_tokens=num_new, min_tokens=num_new, ignore_eos=True)
    for index, prompt in enumerate(prompts):
        request = EngineRequest(
            request_id=str(index),
            prompt_ids=list(prompt),
            sampling=SamplingParams(temperature=0.0),
            stopping=stopping,
        )
        engine.submit(request, outputs.put)
    tokens: list[list[int]] = [[] for _ in prompts]
    left = len(prompts)
    while left:
        output = outputs.get(timeout=OUTPUT_TIMEOUT_S)
        if output.error is not None:
            raise output.error
        tokens[int(output.request_id)] += output.token_ids
        left -= output.is_last
    return tokens
