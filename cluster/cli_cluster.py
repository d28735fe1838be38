"""`expertmesh up`, `down` and `doctor`: a cluster file, machines, and the service on them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from cluster.cli_options import ApiKey, AsJson, TlsCa, TlsCert, TlsKey, access_of
from cluster.console import err_console, errors_exit, print_json

ClusterYaml = Annotated[
    Path, typer.Argument(metavar="FILE", help="Cluster file, see infra/ray/*.yaml.")
]


def up(
    file: ClusterYaml,
    restart: Annotated[
        bool, typer.Option("--restart", help="Start Ray and a service that runs anew.")
    ] = False,
    wait: Annotated[
        float, typer.Option(min=0, help="Seconds to wait until the service is ready.")
    ] = 1800.0,
    check: Annotated[
        bool, typer.Option("--check", help="Check file, secret and machines; start nothing.")
    ] = False,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    api_key: ApiKey = None,
) -> None:
    """Start a cluster and its service (`ray up`), or add what the file has more."""
    from cluster import ray_up
    from cluster.cluster_file import ensure_token, read_cluster_file
    from cluster.status import print_status

    with errors_exit():
        cluster = read_cluster_file(file)
        if ensure_token(cluster):
            _say(f"made the cluster's secret: {cluster.token}")
        if check:
            ray_up.check_machines(cluster)
            print("ok")
            return
        access = access_of(tls_ca, tls_cert, tls_key, api_key)
        status = ray_up.up(cluster, access, _say, restart=restart, wait_s=wait)
        if status is not None:
            print_status(status)


def down(file: ClusterYaml) -> None:
    """End the service, Ray, and the machines that were started for it (`ray down`)."""
    from cluster import ray_up
    from cluster.cluster_file import read_cluster_file

    with errors_exit():
        ray_up.down(read_cluster_file(file), _say)


def doctor(
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="Cluster file: look at its machines.")
    ] = None,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Check this machine, or a cluster's: what is missing, and what to do about it."""
    from cluster.doctor import FAIL, examine_machine, print_checks

    with errors_exit():
        if file is None:
            checks = examine_machine()
        else:
            from cluster.cluster_file import read_cluster_file
            from cluster.doctor_cluster import examine_cluster

            access = access_of(tls_ca, tls_cert, tls_key, api_key)
            checks = examine_cluster(read_cluster_file(file), access)
    if as_json:
        print_json([check.document() for check in checks])
    else:
        print_checks(checks)
    sys.exit(3 if any(check.state == FAIL for check in checks) else 0)


def _say(sentence: str) -> None:
    err_console().print(sentence, style="dim", markup=False)
