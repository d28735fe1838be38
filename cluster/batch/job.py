"""What a driver process is told, and what it says: one JSON line in, JSON lines out.

in   the job: the options of the batch, and how to reach the routers (so no key is ever in a
     process list); then the pipe stays open for as long as the driver is wanted
out  {"phase": "in_progress", ...the numbers of the progress bar...}, again and again
     {"phase": "finalizing", ...}
     {"end": "completed" | "stopped" | "cancelled" | "interrupted" | "failed", "counts", "error"}
"""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from typing import Any

from google.rpc import status_pb2

from cluster.batch.options import BatchOptions
from cluster.batch.rows import RowDefaults
from cluster.ray_data import Pool
from protos.errors import ExpertMeshError, from_status
from protos.tls import Access, ClientTls
from protos.v1 import batch_pb2
from router.state.batch_records import BatchRecord

MIN_CLIENTS, MAX_CLIENTS = 1, 4
"""Where the batch says nothing; as `batch run`."""
_PEM = ("ca", "certificate", "key")


def options_of(
    record: BatchRecord, addresses: list[str], access: Access, ray_address: str
) -> BatchOptions:
    """Return what a batch of the service is, as `batch run` takes it.

    Args:
        record: The batch.
        addresses: Of the routers.
        access: How they are reached for the batch's tenant.
        ray_address: Of the cluster that the clients are to run in.

    Raises:
        ConfigurationError: An option is out of range.
    """
    message = batch_pb2.BatchOptions.FromString(record.options)
    given: dict[str, Any] = {field.name: value for field, value in message.ListFields()}
    defaults = {
        name: given.pop(name) for name in ("max_tokens", "temperature", "seed") if name in given
    }
    renamed = {"id_column": "id_field", "format": "output_format"}
    fewest = given.pop("min_clients", MIN_CLIENTS)
    pool = {
        "min_clients": fewest,
        "max_clients": given.pop("max_clients", max(MAX_CLIENTS, fewest)),
    }
    if "parts_in_flight" in given:
        pool["parts_in_flight"] = given.pop("parts_in_flight")
    return BatchOptions(
        input_uri=record.input_uri,
        output_uri=record.output_uri,
        url=",".join(addresses),
        access=access,
        pool=Pool(**pool),
        defaults=RowDefaults(**defaults),
        ray_address=ray_address,
        is_submitted=True,
        **{renamed.get(name, name): value for name, value in given.items()},
    )


def job_line(options: BatchOptions) -> bytes:
    """Return what a driver is told."""
    access, tls = options.access, options.access.tls
    document = {
        "options": options.document(),
        "ray_address": options.ray_address,
        "api_key": access.api_key,
        "tls": None
        if tls is None
        else {name: _text(getattr(tls, name)) for name in _PEM} | {"server_name": tls.server_name},
    }
    return json.dumps(document).encode() + b"\n"


def read_job(line: bytes) -> BatchOptions:
    """Return the options that `job_line` wrote."""
    document = json.loads(line)
    tls = document["tls"]
    if tls is not None:
        pem = {name: _bytes(tls[name]) for name in _PEM}
        tls = ClientTls(**pem, server_name=tls["server_name"])
    access = Access(tls=tls, api_key=document["api_key"])
    options = BatchOptions.of(document["options"], access, url=None)
    return replace(options, ray_address=document["ray_address"], is_submitted=True)


def end_line(end: str, counts: dict[str, Any], error: ExpertMeshError | None = None) -> bytes:
    """Return a driver's last line."""
    document: dict[str, Any] = {"end": end, "counts": counts}
    if error is not None:
        document["error"] = _text(error.to_status().SerializeToString())
    return json.dumps(document).encode() + b"\n"


def error_in(line: dict[str, Any]) -> ExpertMeshError | None:
    """Return the error in a driver's last line."""
    payload = _bytes(line.get("error"))
    return None if payload is None else from_status(status_pb2.Status.FromString(payload))


def _text(content: bytes | None) -> str | None:
    return None if content is None else base64.b64encode(content).decode()


def _bytes(text: str | None) -> bytes | None:
    return None if text is None else base64.b64decode(text)
