"""`expertmesh batch submit` and `watch`: batches that the service runs by itself."""

from __future__ import annotations

import sys
from typing import Annotated, Any, Literal

import typer

from cluster.cli_options import (
    DEFAULT_URL,
    ApiKey,
    AsJson,
    TlsCa,
    TlsCert,
    TlsKey,
    Url,
    access_of,
    clients_of,
)
from cluster.console import err_console, errors_exit

_UNSET = "unset: as `batch run`"
Name = Annotated[str, typer.Argument(help="Name of a submitted batch.")]


def batch_submit(
    input_uri: Annotated[
        str,
        typer.Option(
            "-i",
            "--input",
            help="JSONL (OpenAI batch) or Parquet, a file or a folder, under a --batch-root.",
        ),
    ],
    output_uri: Annotated[
        str, typer.Option("-o", "--output", help="Folder of the output, under a --batch-root.")
    ],
    url: Url = DEFAULT_URL,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    api_key: ApiKey = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Show how far it is until it has ended.")
    ] = False,
    id_column: Annotated[str | None, typer.Option(help=f"Field with the ids; {_UNSET}.")] = None,
    output_format: Annotated[
        Literal["jsonl", "parquet"] | None, typer.Option("--format", help="Unset: the input's.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=0, help="Only so many rows.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=0, help="For rows that say none.")] = None,
    temperature: Annotated[float | None, typer.Option(help="For rows that say none.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help=f"Mixed with the ids; {_UNSET}.")] = None,
    clients: Annotated[str | None, typer.Option(help=f"MIN:MAX client actors; {_UNSET}.")] = None,
    concurrency: Annotated[
        int | None, typer.Option(min=0, help=f"Rows of a client; {_UNSET}.")
    ] = None,
    part_rows: Annotated[
        int | None, typer.Option(min=0, help=f"Rows that are committed together; {_UNSET}.")
    ] = None,
    parts_in_flight: Annotated[
        int | None, typer.Option(min=0, help=f"Parts that a client works on; {_UNSET}.")
    ] = None,
    max_retries: Annotated[int | None, typer.Option(min=0, help=f"Of a row; {_UNSET}.")] = None,
    max_failure_rate: Annotated[
        float | None, typer.Option(help=f"Part of all rows that may fail; {_UNSET}.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Have the service run a batch; prints its name. `serve` must have a --batch-root.

    With --wait: exit code 5 when rows failed. Ctrl-C leaves the batch running.
    """
    from cluster.batch.submitted import connect, print_batch, submit

    with errors_exit():
        pool = _clients(clients)
        given: dict[str, Any] = {
            "id_column": id_column,
            "format": output_format,
            "limit": limit,
            "seed": seed,
            "max_tokens": max_tokens,
            "temperature": temperature,
            "part_rows": part_rows,
            "concurrency": concurrency,
            "parts_in_flight": parts_in_flight,
            "max_retries": max_retries,
            "max_failure_rate": max_failure_rate,
            **pool,
        }
        options: Any = {name: value for name, value in given.items() if value is not None}
        with connect(url, access_of(tls_ca, tls_cert, tls_key, api_key)) as client:
            name = submit(client, input_uri, output_uri, options)
            if not wait:
                if as_json:
                    print_batch(client.get_batch(name), as_json=True)
                else:
                    print(name)
                return
            err_console().print(name, markup=False)
            _watch(client, name, as_json=as_json)


def batch_watch(
    name: Name,
    url: Url = DEFAULT_URL,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Show how far a submitted batch is until it has ended; exit code 5 when rows failed."""
    from cluster.batch.submitted import connect

    with errors_exit(), connect(url, access_of(tls_ca, tls_cert, tls_key, api_key)) as client:
        _watch(client, name, as_json=as_json)


def _watch(client: Any, name: str, *, as_json: bool) -> None:
    from cluster.batch.submitted import end_code, print_batch, watch

    try:
        batch = watch(client, name)
    except KeyboardInterrupt:
        err_console().print(f"{name} goes on; `expertmesh batch cancel {name}` stops it")
        sys.exit(130)
    print_batch(batch, as_json=as_json)
    sys.exit(end_code(batch))


def _clients(text: str | None) -> dict[str, int]:
    if text is None:
        return {}
    fewest, most = clients_of(text)
    return {"min_clients": fewest, "max_clients": most}
