"""The seam to Ray Data: runs the parts of a batch on an autoscaling pool of client actors.

A client that dies is started again by Ray Data and its parts are given out again; a client's error
ends the run. Imports Ray late, as `cluster.ray_api` does, which makes the connection.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.batch.ledger import DonePart
from cluster.batch.parts import Part
from cluster.batch.worker import PartWorker, WorkerSettings
from cluster.logs import configure_logging
from protos.errors import ExpertMeshError, InternalError

CLIENT_CPUS = 0.25
"""Of a node, for each client: it waits for routers most of its time."""
MAX_BLOCKS = 10_000
"""Of the dataset of parts; beyond, a block has several parts, one after the other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """How many clients work."""

    min_clients: int
    max_clients: int
    parts_in_flight: int = 2
    """Of each client, so that its rows in flight do not run dry at the end of a part."""


class PartClient:
    """What an actor of the pool is."""

    def __init__(self, settings: WorkerSettings) -> None:
        configure_logging("batch-client", verbose=False)
        self._worker = PartWorker(settings)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Work on the parts of a block; Ray Data calls from several threads."""
        done = [self._worker.run(Part.from_json(str(text))) for text in batch["part"]]
        return {"done": [json.dumps(part.document()) for part in done]}


def import_ray_data() -> None:
    """Import Ray Data before it is needed, a second that passes while Ray starts."""
    import ray.data  # noqa: F401


def run_parts(parts: Sequence[Part], settings: WorkerSettings, pool: Pool) -> Iterator[DonePart]:
    """Yield parts as they are committed, in any order.

    Raises:
        ExpertMeshError: What a client raised.
        InternalError: Ray Data failed.
    """
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    strategy = ActorPoolStrategy(
        min_size=pool.min_clients,
        max_size=pool.max_clients,
        max_tasks_in_flight_per_actor=pool.parts_in_flight,
        max_concurrent_calls_per_actor=pool.parts_in_flight,
        enable_true_multi_threading=True,
    )
    items = [{"part": part.to_json()} for part in parts]
    dataset = ray.data.from_items(items, override_num_blocks=min(len(items), MAX_BLOCKS))
    committed = dataset.map_batches(
        PartClient,
        fn_constructor_args=(settings,),
        batch_size=1,
        compute=strategy,
        num_cpus=CLIENT_CPUS,
    )
    try:
        for block in committed.iter_batches(batch_size=None, prefetch_batches=0):
            for text in block["done"]:
                yield DonePart.of(json.loads(str(text)))
    except ray.exceptions.RayError as error:
        raise _ours(error) from error


def _ours(error: BaseException) -> ExpertMeshError:
    """Return our error inside one of Ray's, which wrap each other."""
    seen: list[BaseException] = []
    pending: list[BaseException | None] = [error]
    while pending:
        one = pending.pop()
        if one is None or one in seen:
            continue
        if isinstance(one, ExpertMeshError):
            return one
        seen.append(one)
        pending += [one.__cause__, one.__context__, getattr(one, "cause", None)]
        pending += list(getattr(one, "exceptions", ()))
    return InternalError(f"Ray Data: {str(error).strip().splitlines()[-1][:300]}")
