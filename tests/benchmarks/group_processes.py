"""Expert groups in processes of their own, behind the real gRPC and lane servers, without Ray.

A pool keeps its processes, so that many checkpoints are served one after the other and torch is
imported once. Each process answers two commands over a pipe: serve a runtime, and drop it.

    with GroupPool(2) as pool:
        groups = pool.serve(checkpoint, dtype="float32")
        dispatcher = groups.connect(dtype=torch.float32)
"""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    import torch

    from experts.placement import Placement
    from experts.runtime import ExpertRuntime
    from router.gating.dispatch import ExpertDispatcher

START_TIMEOUT_S = 300.0
RuntimeFactory = Callable[..., "ExpertRuntime"]


@dataclass(frozen=True, kw_only=True)
class ServedGroups:
    """Groups that answer."""

    placement: Placement
    addresses: Mapping[str, str]
    """group_id -> `host:port` of its gRPC server."""
    hidden: int
    top_k: int

    def connect(
        self, *, dtype: torch.dtype, transport: Any = "auto", **options: Any
    ) -> ExpertDispatcher:
        """Return a dispatcher to them, packing with the native kernels where they are built."""
        from experts.native.kernels import load_kernels
        from router.gating.dispatch import ExpertDispatcher

        return ExpertDispatcher.connect(
            self.placement,
            self.addresses,
            router_id="benchmark",
            hidden=self.hidden,
            top_k=self.top_k,
            dtype=dtype,
            transport=transport,
            **({"kernels": load_kernels()} | options),
        )


def make_runtime(
    group_id: str, placement_json: str, checkpoint: str, dtype: str, compute: str, num_threads: int
) -> ExpertRuntime:
    """Load the real thing: this group's experts of a checkpoint."""
    from experts.placement import Placement
    from experts.runtime import ExpertRuntime

    runtime = ExpertRuntime(
        group_id=group_id,
        checkpoint=checkpoint,
        dtype=dtype,
        compute=compute,
        num_threads=num_threads,
    )
    runtime.load(Placement.from_json(placement_json))
    return runtime


class GroupPool:
    """Processes that serve one expert group each."""

    def __init__(self, num_processes: int) -> None:
        context = multiprocessing.get_context("spawn")  # gRPC does not survive a fork
        self._pipes: list[Connection] = []
        self._processes: list[BaseProcess] = []
        for _ in range(num_processes):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve_commands, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    @property
    def pids(self) -> list[int]:
        """Process ids."""
        return [process.pid for process in self._processes if process.pid is not None]

    def serve(
        self,
        checkpoint: Path | str,
        *,
        dtype: str = "bfloat16",
        capacities: Mapping[str, float] | None = None,
        compute: str = "auto",
        num_threads: int = 1,
    ) -> ServedGroups:
        """Load a checkpoint's experts into the first groups of the pool.

        Args:
            capacities: group_id -> share of the experts; by default one even share per process.
        """
        from experts.planner import plan_placement
        from router.model.config import ModelConfig

        config = ModelConfig.from_checkpoint(checkpoint)
        shares = capacities or {f"group-{i}": 1.0 for i in range(len(self._pipes))}
        placement = plan_placement(config.num_layers, config.num_experts, shares)
        arguments = (str(checkpoint), dtype, compute, num_threads)
        return ServedGroups(
            placement=placement,
            addresses=self.serve_runtimes(placement, make_runtime, *arguments),
            hidden=config.hidden_size,
            top_k=config.top_k,
        )

    def serve_runtimes(
        self, placement: Placement, factory: RuntimeFactory, *arguments: Any
    ) -> dict[str, str]:
        """Serve `factory(group_id, placement_json, *arguments)` for each group of the placement.

        Returns:
            group_id -> address. What was served before is gone.
        """
        self.release()
        placement_json = placement.to_json()
        used = list(zip(placement.groups, self._pipes, strict=False))
        if len(used) < len(placement.groups):
            raise ValueError(f"{len(placement.groups)} groups, but {len(used)} processes")
        for group_id, pipe in used:
            pipe.send((factory, group_id, placement_json, arguments))
        return {group_id: _answer(group_id, pipe) for group_id, pipe in used}

    def release(self) -> None:
        """Stop all servers and forget their experts; the processes stay."""
        for pipe in self._pipes:
            pipe.send(None)
        for pipe in self._pipes:
            _answer("a group", pipe)

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(20)
            if process.is_alive():
                process.kill()
                process.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _answer(name: str, pipe: Connection) -> str:
    if not pipe.poll(START_TIMEOUT_S):
        raise RuntimeError(f"{name} did not answer in {START_TIMEOUT_S:.0f} s")
    ok, text = pipe.recv()
    if not ok:
        raise RuntimeError(f"{name} failed:\n{text}")
    return str(text)


def _serve_commands(pipe: Connection) -> None:
    """Serve what the pipe asks for until it is closed."""
    from experts.service import ExpertServer, start_expert_server

    server: ExpertServer | None = None
    try:
        while True:
            command = pipe.recv()
            if server is not None:
                server.stop(0)
                server = None
            if command is None:
                pipe.send((True, ""))
                continue
            factory, group_id, placement_json, arguments = command
            try:
                runtime = factory(group_id, placement_json, *arguments)
                server = start_expert_server(runtime, "127.0.0.1", 0)
            except Exception:  # the process boundary
                pipe.send((False, traceback.format_exc()))
                continue
            pipe.send((True, server.address))
    except (EOFError, KeyboardInterrupt):
        pass
    finally:
        if server is not None:
            server.stop(0)
