"""A whole gateway for tests: real gRPC, real engine, and a model that recites a script."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from protos.client import Client, ClientConfig
from router.engine.batch import Batch
from router.engine.config import EngineConfig
from router.engine.engine import Engine
from router.gateway.authentication import Callers
from router.gateway.delivery import LoopDelivery
from router.gateway.generation import GenerationServicer
from router.gateway.request_reader import ServedModel
from router.gateway.server import (
    GatewayOptions,
    GatewayThread,
    GrpcService,
    generation_service,
    session_service,
)
from router.gateway.sessions import SessionServicer
from router.gateway.text import TextProcessor
from router.state.sessions import SessionStore
from tests.unit.router.test_text import TEMPLATE, TOKENIZER

VOCAB = 260
EOS = 259
PROMPT = "Once"
"""Four tokens: what follows them is the script's first."""
PROMPT_IDS = TOKENIZER.encode(PROMPT).ids
MAX_MODEL_LEN = 8192
TEXT = TextProcessor(TOKENIZER, TEMPLATE, {"eos_token": "<|im_end|>"})


class ScriptModel:
    """The token at position `p` is `script[p - 4]`, whatever came before; then it repeats."""

    def __init__(self, script: str | list[int] = "x") -> None:
        ids = TOKENIZER.encode(script).ids if isinstance(script, str) else script
        self._script = np.array(ids)
        self.runs = threading.Event()
        """Cleared: the next step waits."""
        self.runs.set()
        self.before_forward: Callable[[Batch], None] = lambda batch: None

    def allocate_caches(self, num_blocks: int, block_size: int, num_state_slots: int) -> None:
        """Keep nothing."""

    def forward(self, batch: Batch, caches: None) -> Tensor:
        assert self.runs.wait(30)
        self.before_forward(batch)
        rows = batch.logit_rows.numpy()
        next_positions = batch.positions.numpy()[rows] + 1 - len(PROMPT_IDS)
        logits = np.zeros((len(rows), VOCAB), dtype=np.float32)
        logits[np.arange(len(rows)), self._script[next_positions % len(self._script)]] = 20.0
        return torch.from_numpy(logits)


@dataclass
class GatewayService:
    """What runs, for tests to look at."""

    model: Any
    engine: Engine
    thread: GatewayThread
    address: str
    client: Client
    servicer: GenerationServicer

    def is_idle(self) -> bool:
        """Whether the engine holds nothing any more."""
        stats = self.engine.stats()
        used = stats.num_blocks_used + stats.num_state_slots_used
        return stats.num_running + stats.num_waiting + used == 0


@contextmanager
def running(
    model: Any = None,
    *,
    text: TextProcessor = TEXT,
    services: tuple[GrpcService, ...] = (),
    options: GatewayOptions | None = None,
    max_num_seqs: int = 256,
    max_queued: int = 64,
    max_prompt_tokens: int = 2048,
    store: SessionStore | None = None,
    callers: Callers | None = None,
    **servicer_options: Any,
) -> Iterator[GatewayService]:
    """Run a gateway; everything is stopped at the end."""
    model = model or ScriptModel()
    delivery = LoopDelivery()
    engine = Engine(
        model,
        EngineConfig(
            vocab_size=VOCAB,
            max_model_len=MAX_MODEL_LEN,
            num_blocks=4096,
            num_state_slots=max_num_seqs,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_prompt_tokens,
            max_queued=max_queued,
            eos_token_ids=(EOS,),
        ),
        deliver=delivery,
    )
    served = ServedModel(
        name="script",
        model_type="qwen3_5_moe",
        max_model_len=MAX_MODEL_LEN,
        vocab_size=VOCAB,
        dtype="float32",
    )
    servicer = GenerationServicer(
        engine, text, served, store=store, callers=callers, **servicer_options
    )
    if store is not None:
        services = (*services, session_service(SessionServicer(store, callers=callers)))
    thread = GatewayThread(
        [generation_service(servicer), *services], options or GatewayOptions(), delivery
    )
    address = thread.start()
    engine.start()
    client = Client(address, ClientConfig(timeout_s=30, short_timeout_s=10, max_attempts=1))
    try:
        yield GatewayService(model, engine, thread, address, client, servicer)
    finally:
        model.runs.set()
        client.close()
        engine.stop(drain=False)
        if store is not None:
            thread.call(store.close())
        thread.stop()
