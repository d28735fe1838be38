"""`expertmesh batch ...`: parses, calls `cluster.batch`, and no more."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cluster.cli_batch_submit import batch_submit, batch_watch
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
from cluster.console import EXIT_PARTIAL, err_console, errors_exit

if TYPE_CHECKING:
    from cluster.batch.options import BatchOptions

batch_app = typer.Typer(
    help="Ask very many rows of a file, each exactly once in the output.", no_args_is_help=True
)
Output = Annotated[str, typer.Option("-o", "--output", help="Folder of the output; path or URI.")]


Folder = Annotated[str, typer.Argument(help="Folder of a batch's output; path or URI.")]
Target = Annotated[
    str,
    typer.Argument(help="Name of a submitted batch (at --url), or the output folder of any batch."),
]
batch_app.command("submit")(batch_submit)
batch_app.command("watch")(batch_watch)


@batch_app.command("run")
def batch_run(
    input_uri: Annotated[
        str,
        typer.Option(
            "-i",
            "--input",
            help="JSONL (OpenAI batch) or Parquet, a file or a folder; path or URI.",
        ),
    ],
    output_uri: Output,
    url: Url = DEFAULT_URL,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    api_key: ApiKey = None,
    id_column: Annotated[str, typer.Option(help="Field with the rows' ids.")] = "custom_id",
    output_format: Annotated[
        Literal["jsonl", "parquet"] | None, typer.Option("--format", help="Unset: the input's.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only so many rows.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="For rows that say none.")] = None,
    temperature: Annotated[float | None, typer.Option(help="For rows that say none.")] = None,
    seed: Annotated[int, typer.Option(help="Mixed with the ids of rows that say none.")] = 0,
    clients: Annotated[
        str, typer.Option(help="MIN:MAX client actors; Ray Data scales between them.")
    ] = "1:4",
    concurrency: Annotated[int, typer.Option(help="Rows that a client asks at a time.")] = 32,
    part_rows: Annotated[
        int, typer.Option(help="Rows that are committed, and after a crash repeated, together.")
    ] = 256,
    parts_in_flight: Annotated[int, typer.Option(help="Parts that a client works on.")] = 2,
    max_retries: Annotated[
        int, typer.Option(help="Of a row, after faults that are not the row's.")
    ] = 3,
    max_failure_rate: Annotated[
        float, typer.Option(help="Stop once more than this part of all rows has failed.")
    ] = 1.0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Count tokens, estimate time and cost, and stop.")
    ] = False,
    price_per_million: Annotated[
        float | None, typer.Option(help="Price of a million tokens, for --dry-run.")
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(
            envvar="RAY_ADDRESS",
            help="host:port or auto of a Ray cluster; unset: a Ray of its own on this machine.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run a batch, or go on where it was cut off: the same command again.

    Exit code 5 when rows failed.
    """
    from cluster.batch.console import print_estimate
    from cluster.batch.dry_run import estimate
    from cluster.batch.options import BatchOptions
    from cluster.batch.rows import RowDefaults
    from cluster.ray_data import Pool

    with errors_exit():
        fewest, most = clients_of(clients)
        options = BatchOptions(
            input_uri=input_uri,
            output_uri=output_uri,
            url=url,
            access=access_of(tls_ca, tls_cert, tls_key, api_key),
            id_field=id_column,
            output_format=output_format,
            limit=limit,
            part_rows=part_rows,
            concurrency=concurrency,
            pool=Pool(min_clients=fewest, max_clients=most, parts_in_flight=parts_in_flight),
            max_retries=max_retries,
            max_failure_rate=max_failure_rate,
            defaults=RowDefaults(max_tokens=max_tokens, temperature=temperature, seed=seed),
            ray_address=ray_address,
        )
        if dry_run:
            print_estimate(estimate(options), price_per_million, as_json=as_json)
            return
    _run(options, as_json=as_json)


@batch_app.command("resume")
def batch_resume(
    output_uri: Folder,
    url: Annotated[
        str | None, typer.Option(help="Of a router now; unset: as it was begun.")
    ] = None,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Go on with a batch where it was cut off or cancelled, with the options it was begun with."""
    from cluster.batch.options import BatchOptions
    from cluster.batch.status import open_folder

    with errors_exit():
        _, job = open_folder(output_uri)
        access = access_of(tls_ca, tls_cert, tls_key, api_key)
        options = BatchOptions.of(job["options"], access, url, output_uri)
    _run(options, as_json=as_json)


@batch_app.command("cancel")
def batch_cancel(
    target: Target,
    url: Url = DEFAULT_URL,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Stop a batch, wherever it runs; `resume FOLDER` goes on.

    One that was submitted, by its name, at once; any other, by its folder, after its next part.
    """
    from protos.ids import is_batch_name

    with errors_exit():
        if is_batch_name(target):
            from cluster.batch.submitted import connect, print_batch

            with connect(url, access_of(tls_ca, tls_cert, tls_key, api_key)) as client:
                print_batch(client.cancel_batch(target), as_json=as_json)
            return
        from cluster.batch.status import open_folder

        ledger, _ = open_folder(target)
        ledger.cancel()


@batch_app.command("list")
def batch_list(
    uri: Annotated[
        str | None,
        typer.Argument(
            help="Folder with output folders; path or URI; unset: what was submitted at --url."
        ),
    ] = None,
    url: Url = DEFAULT_URL,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """List the batches that were submitted, or those whose outputs are in a folder."""
    with errors_exit():
        if uri is None:
            from cluster.batch.submitted import connect, print_batches

            with connect(url, access_of(tls_ca, tls_cert, tls_key, api_key)) as client:
                print_batches(client.list_batches(), as_json=as_json)
            return
        from cluster.batch.console import print_folders
        from cluster.batch.status import list_folders

        print_folders(list_folders(uri), as_json=as_json)


@batch_app.command("status")
def batch_status(
    target: Target,
    url: Url = DEFAULT_URL,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Show how far a batch is, by its name or by its output folder."""
    from protos.ids import is_batch_name

    with errors_exit():
        if is_batch_name(target):
            from cluster.batch.submitted import connect, print_batch

            with connect(url, access_of(tls_ca, tls_cert, tls_key, api_key)) as client:
                print_batch(client.get_batch(target), as_json=as_json)
            return
        from cluster.batch.console import print_folder
        from cluster.batch.status import folder_status

        print_folder(folder_status(target), as_json=as_json)


def _run(options: BatchOptions, *, as_json: bool) -> None:
    from cluster.batch.console import print_result, run_in_foreground

    with errors_exit():
        result = run_in_foreground(options)
        if result is None:
            err_console().print("stopped; the same command goes on from here", style="dim")
            sys.exit(EXIT_PARTIAL)
        print_result(result, options, as_json=as_json)
    if result.has_failures:
        sys.exit(EXIT_PARTIAL)
