"""Runs a batch from its input to its manifest, or goes on where a run was cut off.

1. Ask the service what it serves. 2. Read the input and cut it into parts. 3. Check that the output
folder is empty or was begun with the same. 4. Work on the parts that are not committed, on a pool
of clients. 5. Write the manifest. Every step may be cut off by anything, SIGKILL included: the
next run does steps 1 to 3 again, and then the parts that are missing.

Two runs at once on one output do work twice; what they commit is the same.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

from cluster.batch.asker import AskerSettings
from cluster.batch.identity import Identity, identity_of
from cluster.batch.ledger import DonePart, Ledger
from cluster.batch.options import BatchOptions
from cluster.batch.outcomes import Counts
from cluster.batch.parts import Part, Plan
from cluster.batch.progress import Meter, ProgressReport
from cluster.batch.source import Format, scan
from cluster.batch.storage import Place
from cluster.batch.worker import WorkerSettings
from cluster.console import err_console
from cluster.private_ray import PrivateRay
from cluster.ray_api import RayCluster
from cluster.ray_data import import_ray_data, run_parts
from protos.client import Client, ClientConfig
from protos.errors import ConfigurationError, InternalError
from protos.tls import Access
from protos.v1 import generation_pb2

PATIENCE = ClientConfig(max_attempts=8)
QUIET_CORE = ("RAY_BACKEND_LOG_LEVEL", "fatal")
"""Of this process: Ray's core warns of each actor that Ray Data starts in its way."""


State = Literal["completed", "stopped", "cancelled"]
Report = Callable[[Meter, Client], AbstractContextManager[object]]
"""Tells how far a batch is, from its first row until its last."""


@dataclass(frozen=True, slots=True)
class Result:
    """How a run ended."""

    state: State
    """`stopped`: by too many failures."""
    manifest: dict[str, Any]
    """Of a batch that is not completed only the counts so far."""

    @property
    def has_failures(self) -> bool:
        """Whether not every row was answered."""
        return self.state != "completed" or bool(self.manifest["failed"])


@dataclass(frozen=True, slots=True)
class Prepared:
    """A batch before its first row."""

    model: generation_pb2.Model
    addresses: tuple[str, ...]
    kind: Format
    plan: Plan
    identity: Identity

    @property
    def output_format(self) -> Format:
        """Format of the parts."""
        found: Format = self.identity.values["output.format"]
        return found


def prepare(options: BatchOptions, client: Client) -> Prepared:
    """Ask the service and read the input; writes nothing.

    Raises:
        ExpertMeshError: The service does not answer, or the input cannot be read.
    """
    place = Place.of(options.input_uri, "input")
    _check_apart(place, Place.of(options.output_uri, "output"))
    [model] = client.list_models()
    served = [
        router.grpc_address
        for router in client.status().routers
        if router.state in ("READY", "DRAINING") and router.grpc_address
    ]
    scheme = "grpcs://" if options.url.startswith("grpcs://") else ""
    given = [address.strip() for address in options.url.split(",")]
    addresses = [scheme + address for address in served] or given
    kind, plan = scan(
        place, id_field=options.id_field, part_rows=options.part_rows, limit=options.limit
    )
    identity = identity_of(
        input_digest=plan.digest,
        num_rows=plan.num_rows,
        input_format=kind,
        output_format=options.output_format or kind,
        id_field=options.id_field,
        part_rows=options.part_rows,
        limit=options.limit,
        defaults=options.defaults,
        model=model,
    )
    return Prepared(model, tuple(addresses), kind, plan, identity)


def show_progress(meter: Meter, client: Client) -> ProgressReport:
    """Tell the user on stderr."""
    return ProgressReport(meter, err_console(), client)


def run_batch(
    options: BatchOptions, caught: Callable[[], None], report: Report = show_progress
) -> Result:
    """Run or resume a batch.

    Args:
        options: What to do.
        caught: Called once Ray has installed its signal handlers, to install ours.
        report: Tells how far it is.

    Raises:
        BatchChangedError: The output was begun with something else.
        ExpertMeshError: The service is gone, or the input or output cannot be used.
    """
    options = options.located()
    with Client(options.url, PATIENCE, **_access(options.access)) as client:
        prepared = prepare(options, client)
        ledger = Ledger(Place.of(options.output_uri, "output"), prepared.output_format)
        with _usable(options.output_uri):
            job = _begin(ledger, options, prepared)
        done = ledger.done()
        if (manifest := ledger.manifest()) is not None:
            return Result("completed", manifest)
        ledger.go_on()
        missing = [part for part in prepared.plan.parts if part.number not in done]
        before = sum((part.counts for part in done.values()), Counts())
        meter = Meter(prepared.plan.num_rows, before)
        most_failed = options.max_failure_rate * prepared.plan.num_rows
        with report(meter, client):
            working = _work(missing, options, prepared, caught)
            with closing(working):
                state = take_parts(working, done, meter, most_failed, lambda: ledger.is_cancelled)
        if state != "completed":
            return Result(state, asdict(meter.counts))
        _check_whole(prepared.plan, done)
        return Result("completed", ledger.finish(job, [done[n] for n in sorted(done)]))


def take_parts(
    committed: Iterable[DonePart],
    done: dict[int, DonePart],
    meter: Meter,
    most_failed: float,
    is_cancelled: Callable[[], bool],
) -> State:
    """Take parts as they are committed; return how that ended.

    Args:
        committed: What the clients commit.
        done: Gets them by number.
        meter: Counts them.
        most_failed: Stop once more rows have failed.
        is_cancelled: Asked after each part.
    """
    if meter.counts.failed > most_failed:
        return "stopped"
    for part in committed:
        done[part.number] = part
        meter.add(part.counts)
        if meter.counts.failed > most_failed:
            return "stopped"
        if is_cancelled():
            return "cancelled"
    return "completed"


def _check_apart(source: Place, output: Place) -> None:
    """Refuse an output that would become input, or that is a file.

    Raises:
        ConfigurationError: It is so.
    """
    if source.holds(output):
        rule = (
            f"must not be the input ({source.uri}) nor lie in it: the parts would be read as rows"
        )
        raise ConfigurationError("output", rule, output.uri)
    if output.is_file:
        raise ConfigurationError("output", "must be a folder, not a file", output.uri)


def _check_whole(plan: Plan, done: Mapping[int, DonePart]) -> None:
    """Check that every row of the input is in exactly one part of the output.

    Raises:
        InternalError: One is missing.
    """
    for part in plan.parts:
        rows = done[part.number].counts.rows if part.number in done else 0
        if rows != part.num_rows:
            raise InternalError(f"part {part.number} has {rows} rows, {part.num_rows} are due")


def _begin(ledger: Ledger, options: BatchOptions, prepared: Prepared) -> dict[str, Any]:
    """Return what the output was begun with; begin it if nothing was."""
    found = ledger.begun_with()
    if found is not None:
        prepared.identity.check_same(found["identity"], options.output_uri)
        return found
    job = {
        "input": options.input_uri,
        "config_hash": prepared.identity.config_hash,
        "identity": dict(prepared.identity.values),
        "options": options.document(),
        "begun_unix_s": round(time.time(), 3),
        "num_parts": len(prepared.plan.parts),
    }
    if not ledger.begin(job):  # another run began between the two
        return _begin(ledger, options, prepared)
    return job


@contextmanager
def _usable(output_uri: str) -> Iterator[None]:
    """Say of an output that can never be written what is wrong with it.

    Raises:
        ConfigurationError: It cannot be a folder, or not be written.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, _UNUSABLE) or error.errno == errno.EROFS:
            rule = f"must be a folder that can be written ({error})"
            raise ConfigurationError("output", rule, output_uri) from error
        raise


_UNUSABLE = (PermissionError, NotADirectoryError, FileExistsError, FileNotFoundError)


def _work(
    parts: Sequence[Part], options: BatchOptions, prepared: Prepared, caught: Callable[[], None]
) -> Generator[DonePart, None, None]:
    """Yield the parts as they are committed."""
    if not parts:
        return
    settings = WorkerSettings(
        input_uri=options.input_uri,
        input_format=prepared.kind,
        output_uri=options.output_uri,
        output_format=prepared.output_format,
        id_field=options.id_field,
        defaults=options.defaults,
        asker=AskerSettings(
            addresses=prepared.addresses,
            access=options.access,
            model=prepared.model.name,
            concurrency=options.concurrency,
            max_retries=options.max_retries,
        ),
    )
    with _ray(options):
        caught()
        yield from run_parts(parts, settings, options.pool)


@contextmanager
def _ray(options: BatchOptions) -> Iterator[None]:
    """Connect to Ray, a private one unless an address is given; nothing is left at the end."""
    namespace = "expertmesh-batch"
    if options.ray_address is not None:
        os.environ.setdefault(*QUIET_CORE)
        cluster = RayCluster.join(options.ray_address, namespace=namespace, verbose=False)
        try:
            yield
        finally:
            cluster.close()
        return
    private = PrivateRay(
        num_actors=options.pool.max_clients + 1, namespace=namespace, verbose=False
    )
    try:
        os.environ.setdefault(*QUIET_CORE)
        import_ray_data()
        address = private.address()
        cluster = RayCluster.connect_private(address, namespace=namespace, verbose=False)
        try:
            yield
        finally:
            cluster.close()
    finally:
        private.close()


def _access(access: Access) -> dict[str, Any]:
    return {"tls": access.tls, "api_key": access.api_key}
