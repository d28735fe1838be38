"""Restoring a session: verified bytes/s through the tier into the pool, over a raw GET's bytes/s.

Regime: the caches of a 35B-A3B router (10 full-attention layers of 2 x 256 KV, 30 Gated DeltaNet
layers, bfloat16 KV, float32 state; no weights), one blob server on this machine, nothing else
running. One side is the tier as the engine uses it: snapshot stripes and 2.5 MiB blocks over one
connection (two on hosts of more than 4 cores), each value checked (header, key, xxh3) and unpacked
into KV blocks and a state slot, the time from `load` to `done`. The other is a bare socket that
GETs values of 2 MiB - 64 B one after the other into one reused buffer, as many bytes, and looks at
nothing. Both run in turn, in one process against one server, after a round that does not count.
Meaning: what the tier costs beside the bytes; 1.0 is a tier that costs nothing.
Ceiling: CPU. The client receives at 0.15-0.2 seconds/GB, checks at 0.03 and unpacks at 0.04, the
server sends at 0.15-0.2; where others leave less than two cores, the ratio is that of the CPU
seconds. Cycles with more than a quarter of a core used by others count only if there is no other.

Bar: median of the ratios >= 0.7, aim 0.9.

    python -m tests.benchmarks.restore_frac [--server valkey|redis] [--unix] [--tokens 16384]
        [--cycles 9] [--connections 1]
"""

from __future__ import annotations

import argparse
import contextlib
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from router.engine.chain import CACHE_BLOCK, HashChain
from router.engine.tier import LoadJob, LoadResult, Snapshot, TtlClass
from router.model.cache_io import DecoderCacheIo
from router.model.config import ModelConfig
from router.model.ops import GdnState, KvLayer, choose_ops
from router.state.bulk import Bulk
from router.state.endpoint import Endpoint
from router.state.kv_store import KvStore
from router.state.loader import LoaderSettings
from router.state.restore import ValueSizes
from router.state.tier import BlobTier, TierSettings
from router.state.writer import WriterSettings
from tests.benchmarks.harness import OtherCores, Samples, report
from tests.unit.state.blob_servers import KINDS, blob_server

BAR = 0.7
SEED = 20261122
BLOCK_SIZE = 16
PER_CACHE_BLOCK = CACHE_BLOCK // BLOCK_SIZE
RAW_BYTES = (2 << 20) - 64
NUM_RAW = 64
CONFIG_35B = {
    "model_type": "qwen3_5_moe_text",
    "hidden_size": 2048,
    "num_hidden_layers": 40,
    "full_attention_interval": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "vocab_size": 248_320,
    "max_position_embeddings": 262_144,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
}


class Pool:
    """The caches of two sequences of `num_tokens`: one to write from, one to restore into."""

    def __init__(self, num_tokens: int) -> None:
        config = ModelConfig.from_dict(CONFIG_35B)
        ops = choose_ops(torch.bfloat16, torch.device("cpu"))
        self.num_blocks = num_tokens // CACHE_BLOCK
        engine_blocks = 2 * self.num_blocks * PER_CACHE_BLOCK
        layers: list[KvLayer | GdnState] = []
        for kind in config.layer_types:
            if kind == "full_attention":
                layers.append(
                    ops.allocate_kv(
                        engine_blocks,
                        BLOCK_SIZE,
                        config.num_kv_heads,
                        config.head_dim,
                        torch.bfloat16,
                    )
                )
                continue
            conv = torch.zeros(2, config.conv_dim, config.conv_kernel - 1)
            heads, key_dim = config.linear_num_value_heads, config.linear_key_head_dim
            recurrent = torch.zeros(2, heads, key_dim, config.linear_value_head_dim)
            layers.append(GdnState(conv=conv.to(ops.activation_dtype), recurrent=recurrent))
        self.ops_name = ops.name
        self.io = DecoderCacheIo(config, ops, torch.bfloat16, layers)
        # Sequence 0 and 1 lie in each other's gaps, and neither in order.
        order = np.random.default_rng(SEED).permutation(engine_blocks).astype(np.int32)
        self._blocks = order.reshape(2, self.num_blocks, PER_CACHE_BLOCK)

    def blocks(self, sequence: int, index: int) -> list[int]:
        """The engine's blocks of one cache block."""
        return [int(block) for block in self._blocks[sequence, index]]

    def fill(self) -> None:
        """Write random values into sequence 0, and touch all memory of sequence 1."""
        generator = np.random.default_rng(SEED)
        zeros = np.zeros(self.io.kv_block_bytes, dtype=np.uint8)
        for index in range(self.num_blocks):
            values = np.frombuffer(generator.bytes(self.io.kv_block_bytes), dtype=np.uint8)
            self.io.write_blocks(self.blocks(0, index), values)
            self.io.write_blocks(self.blocks(1, index), zeros)
        state = generator.standard_normal(self.io.state_bytes // 4, dtype=np.float32)
        self.io.write_state(0, state.view(np.uint8))
        self.io.write_state(1, np.zeros(self.io.state_bytes, dtype=np.uint8))

    def assert_restored(self) -> None:
        """Compare both sequences bit by bit."""
        one, other = (np.empty(self.io.kv_block_bytes, dtype=np.uint8) for _ in range(2))
        for index in range(self.num_blocks):
            self.io.read_blocks(self.blocks(0, index), one)
            self.io.read_blocks(self.blocks(1, index), other)
            assert np.array_equal(one, other), f"block {index}"
        one, other = (np.empty(self.io.state_bytes, dtype=np.uint8) for _ in range(2))
        self.io.read_state(0, one)
        self.io.read_state(1, other)
        assert np.array_equal(one, other), "state"


def store_all(tier: BlobTier, pool: Pool, chain: HashChain) -> float:
    """Write sequence 0 through the tier; returns bytes/s."""
    started = time.perf_counter()
    for index in range(pool.num_blocks):
        blocks = pool.blocks(0, index)

        def read(out: memoryview, blocks: list[int] = blocks) -> None:
            pool.io.read_blocks(blocks, out)

        assert tier.put_block(
            chain.block_hash(index),
            chain.position_hash(index * CACHE_BLOCK),
            read,
            pool.io.kv_block_bytes,
            lambda: None,
            TtlClass.SESSION,
            num_tokens=(index + 1) * CACHE_BLOCK,
        )
    state = np.empty(pool.io.state_bytes, dtype=np.uint8)
    pool.io.read_state(0, state)
    num_tokens = pool.num_blocks * CACHE_BLOCK
    snapshot = Snapshot(num_tokens=num_tokens, values=state, state_bytes=len(state))
    stored = threading.Event()
    outcome: list[bool] = []
    tier.put_snapshot(
        chain.position_hash(num_tokens),
        snapshot,
        TtlClass.SESSION,
        lambda is_stored: (outcome.append(is_stored), stored.set())[1],
    )
    while tier.stats().num_queued_bytes:
        time.sleep(0.005)
    assert stored.wait(60)
    assert outcome == [True]
    return tier.stats().written_bytes / (time.perf_counter() - started)


def restore(tier: BlobTier, pool: Pool, chain: HashChain) -> tuple[int, float]:
    """Restore into sequence 1; returns verified bytes and seconds."""
    results: list[LoadResult] = []
    done = threading.Event()

    def finish(result: LoadResult) -> None:
        results.append(result)
        done.set()

    started = time.perf_counter()
    tier.load(
        LoadJob(
            chain=chain,
            start=0,
            num_tokens=pool.num_blocks * CACHE_BLOCK,
            snapshot_positions=(),
            block_sink=lambda index, values: pool.io.write_blocks(pool.blocks(1, index), values),
            state_sink=lambda _, state, tail: pool.io.write_state(1, state),
            cancelled=threading.Event(),
            deadline_s=600.0,
        ),
        finish,
    )
    assert done.wait(600)
    seconds = time.perf_counter() - started
    assert results[0].num_tokens == pool.num_blocks * CACHE_BLOCK, results
    return results[0].num_bytes, seconds


class RawGet:
    """A bare socket that reads values into one buffer, and looks at nothing."""

    def __init__(self, endpoint: Endpoint) -> None:
        if endpoint.path:
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.connect(endpoint.path)
        else:
            self._socket = socket.create_connection((endpoint.host, endpoint.port))
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # "$2097088\r\n" + value + "\r\n", whatever it says.
        self._buffer = memoryview(bytearray(len(b"$%d\r\n" % RAW_BYTES) + RAW_BYTES + 2))

    def run(self, num_bytes: int) -> tuple[int, float]:
        """Get values until `num_bytes` have come; returns bytes and seconds."""
        num_values = -(-num_bytes // RAW_BYTES)
        started = time.perf_counter()
        for number in range(num_values):
            key = b"raw:%d" % (number % NUM_RAW)
            self._socket.sendall(b"*2\r\n$3\r\nGET\r\n$%d\r\n%s\r\n" % (len(key), key))
            received = 0
            while received < len(self._buffer):
                received += self._socket.recv_into(self._buffer[received:], 0, socket.MSG_WAITALL)
        seconds = time.perf_counter() - started
        assert self._buffer[:10] == b"$%d\r\n" % RAW_BYTES
        return num_values * RAW_BYTES, seconds


class CpuSeconds:
    """CPU time of this process and of the server since construction."""

    def __init__(self, server: psutil.Process) -> None:
        self._processes = (psutil.Process(), server)
        self._start = self._read()

    def _read(self) -> list[float]:
        times = [process.cpu_times() for process in self._processes]
        return [t.user + t.system for t in times]

    def per_gb(self, num_bytes: int) -> list[float]:
        """Client's and server's CPU seconds for 1e9 bytes."""
        now = self._read()
        return [(n - s) / num_bytes * 1e9 for n, s in zip(now, self._start, strict=True)]


@contextlib.contextmanager
def tier_over(endpoint: Endpoint, pool: Pool, connections: int) -> Iterator[BlobTier]:
    """A tier that nothing hurries."""
    settings = TierSettings(
        loader=LoaderSettings(connections_per_server=connections, min_load_s=600.0),
        writer=WriterSettings(max_queue_bytes=16 << 30),
    )
    sizes = ValueSizes(block_bytes=pool.io.kv_block_bytes, state_bytes=pool.io.state_bytes)
    tier = BlobTier(KvStore([endpoint], "bench"), sizes, settings)
    with contextlib.closing(tier):
        yield tier


def main() -> None:
    """Measure, print the cycles, the medians and the closing JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", choices=KINDS, default="valkey")
    parser.add_argument("--unix", action="store_true", help="a Unix socket instead of TCP")
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--cycles", type=int, default=9)
    parser.add_argument("--connections", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    pool = Pool(args.tokens)
    pool.fill()
    chain = HashChain("bench")
    chain.extend(np.random.default_rng(SEED).integers(0, 150_000, args.tokens))
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(blob_server(args.server, folder, tcp=not args.unix))
        tier = stack.enter_context(tier_over(server.endpoint, pool, args.connections))
        written = store_all(tier, pool, chain)
        with contextlib.closing(Bulk(server.endpoint)) as bulk:
            value = np.random.default_rng(SEED).bytes(RAW_BYTES)
            for number in range(NUM_RAW):
                assert bulk.set(b"raw:%d" % number, [value], 86_400) == "OK"
        raw = RawGet(server.endpoint)
        process = psutil.Process(server.process.pid)
        num_bytes = pool.num_blocks * pool.io.kv_block_bytes + pool.io.state_bytes
        rows = []
        for cycle in range(args.cycles + 1):
            others = OtherCores([psutil.Process().pid, process.pid])
            cpu = CpuSeconds(process)
            raw_bytes, raw_s = raw.run(num_bytes)
            raw_cpu = cpu.per_gb(raw_bytes)
            cpu = CpuSeconds(process)
            restored, seconds = restore(tier, pool, chain)
            row: dict[str, Any] = {
                "raw_gbps": raw_bytes / raw_s / 1e9,
                "restore_gbps": restored / seconds / 1e9,
                "ratio": restored / seconds / (raw_bytes / raw_s),
                "raw_cpu_s_per_gb": raw_cpu,
                "restore_cpu_s_per_gb": cpu.per_gb(restored),
                "others": others.cores(),
            }
            if cycle:
                rows.append(row)
                print(
                    f"cycle {cycle}: raw {row['raw_gbps']:.2f} GB/s, "
                    f"restore {row['restore_gbps']:.2f} GB/s, ratio {row['ratio']:.2f}, "
                    f"client {raw_cpu[0]:.2f} -> {row['restore_cpu_s_per_gb'][0]:.2f} s/GB, "
                    f"server {raw_cpu[1]:.2f} -> {row['restore_cpu_s_per_gb'][1]:.2f}, "
                    f"others {row['others']:.1f} cores",
                    flush=True,
                )
        pool.assert_restored()
        stats = tier.stats()
    ratios = Samples()
    for row in rows:
        ratios.add(float(row["ratio"]), float(row["others"]))
    loaded = stats.read_bytes
    figures = {
        "restore_frac": round(ratios.median, 3),
        "is_met": ratios.median >= BAR,
        "bar": BAR,
        "aim": 0.9,
        "ratio": ratios.to_json(),
        "raw_gbps": round(statistics.median(float(row["raw_gbps"]) for row in rows), 3),
        "restore_gbps": round(statistics.median(float(row["restore_gbps"]) for row in rows), 3),
        "write_gbps": round(written / 1e9, 3),
        "raw_cpu_s_per_gb": _medians([row["raw_cpu_s_per_gb"] for row in rows]),
        "restore_cpu_s_per_gb": _medians([row["restore_cpu_s_per_gb"] for row in rows]),
        "verify_s_per_gb": round(stats.counters["restore_seconds_verify"] / loaded * 1e9, 4),
        "scatter_s_per_gb": round(stats.counters["restore_seconds_scatter"] / loaded * 1e9, 4),
        "bytes": num_bytes,
    }
    print(f"restore_frac {figures['restore_frac']} (bar {BAR}, aim 0.9)")
    config = {**vars(args), "block_bytes": pool.io.kv_block_bytes, "ops": pool.ops_name}
    report("restore_frac", {**config, "state_bytes": pool.io.state_bytes, "seed": SEED}, figures)


def _medians(pairs: list[list[float]]) -> dict[str, float]:
    client, server = zip(*pairs, strict=True)
    return {
        "client": round(statistics.median(client), 3),
        "server": round(statistics.median(server), 3),
    }


if __name__ == "__main__":
    main()
