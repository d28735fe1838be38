"""One router without a cluster, in a process that tests may kill: engine, gateway, session store.

    python -m tests.chaos.small_router CHECKPOINT STORE_URL NAME [LEASE_S]

Prints `ready ADDRESS BOOT` when it serves, and ends when its standard input does.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

from router.engine.config import EngineConfig
from router.engine.engine import Engine
from router.gateway.delivery import LoopDelivery
from router.gateway.generation import GenerationServicer
from router.gateway.request_reader import ServedModel
from router.gateway.server import (
    GatewayOptions,
    GatewayThread,
    generation_service,
    session_service,
)
from router.gateway.sessions import SessionServicer
from router.gateway.text import TextProcessor
from router.model.config import ModelConfig
from router.model.decoder import Decoder
from router.state.endpoint import Endpoint
from router.state.leases import StoreSettings
from router.state.sessions import SessionStore

MAX_MODEL_LEN = 1024
ROOT = Path(__file__).resolve().parents[2]


def serve(checkpoint: str, store_url: str, name: str, lease_s: float = 15.0) -> None:
    """Serve until standard input ends."""
    torch.set_num_threads(1)
    config = ModelConfig.from_checkpoint(checkpoint)
    delivery = LoopDelivery()
    engine = Engine(
        Decoder.from_checkpoint(checkpoint, dtype=torch.float32, experts=None),
        EngineConfig(
            vocab_size=config.vocab_size,
            max_model_len=MAX_MODEL_LEN,
            num_blocks=512,
            num_state_slots=8,
            max_num_seqs=8,
            eos_token_ids=config.eos_token_ids,
        ),
        deliver=delivery,
    )
    store = SessionStore.connect(
        Endpoint.parse(store_url),
        engine=name,
        settings=StoreSettings(lease_s=lease_s, margin_s=min(3.0, lease_s / 4)),
    )
    servicer = GenerationServicer(
        engine,
        TextProcessor.from_checkpoint(checkpoint),
        ServedModel(
            name="small",
            model_type=config.model_type,
            max_model_len=MAX_MODEL_LEN,
            vocab_size=config.vocab_size,
            dtype="float32",
        ),
        store=store,
    )
    services = [generation_service(servicer), session_service(SessionServicer(store))]
    gateway = GatewayThread(services, GatewayOptions(), delivery)
    address = gateway.start()
    engine.start()
    print("ready", address, store.boot, flush=True)
    sys.stdin.read()
    engine.stop(drain=False)
    gateway.call(store.close())
    gateway.stop()


class SmallRouter:
    """The process, as a test holds it."""

    def __init__(self, checkpoint: Path, store_url: str, name: str, lease_s: float = 15.0) -> None:
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(checkpoint), store_url, name, str(lease_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        self.address = self.boot = ""

    def wait_ready(self) -> SmallRouter:
        """Wait until it serves."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline().split()
        assert line[:1] == ["ready"], f"router {self.name} did not start: {line}"
        self.address, self.boot = line[1:]
        return self

    def kill(self) -> None:
        """End it as a power cut would."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def freeze(self) -> None:
        """Let it sleep; its connections stay."""
        os.kill(self._process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Wake it."""
        os.kill(self._process.pid, signal.SIGCONT)

    def close(self) -> None:
        """End it, however it is."""
        if self._process.poll() is None:
            self.thaw()
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


if __name__ == "__main__":
    serve(*sys.argv[1:4], *map(float, sys.argv[4:]))
