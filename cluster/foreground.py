"""`serve` in the foreground: signals, the ready line, and an end that leaves nothing behind.

The first SIGTERM or SIGINT drains, the second ends at once. Stdout carries the ready line and
nothing else; everything that libraries and processes print goes to stderr.
"""

from __future__ import annotations

import sys

from rich.console import Console

from cluster.config import Config
from cluster.console import EXIT_OK, EXIT_PARTIAL, err_console
from cluster.front import StatusPort
from cluster.launch import Service
from cluster.logs import configure_logging
from cluster.stopping import StopRequested, StopSignals
from protos.errors import ExpertMeshError


def run_service(config: Config) -> int:
    """Serve until a signal or the end of a process; return the exit code.

    Raises:
        ExpertMeshError: The service could not start.
    """
    configure_logging("serve", verbose=config.cluster.verbose)
    stdout, sys.stdout = sys.stdout, sys.stderr
    console = err_console()
    signals = StopSignals()
    port = StatusPort(config)

    def progress(sentence: str) -> None:
        port.tell(sentence)
        console.print(sentence, style="dim", markup=False)

    service = Service(config, progress, signals.held)
    try:
        signals.catch()
        port.open()
        service.connect()
        signals.catch()  # Ray has installed a handler of its own
        ready = service.start()
        port.ready(service.addresses)
        print(ready.line(), file=stdout, flush=True)
        ended = service.wait()
        if ended is None:
            console.print("all routers were drained", style="dim")
            return EXIT_OK
        console.print(f"error: {ended}; ending the service", style="bold red", markup=False)
        return EXIT_PARTIAL
    except StopRequested:
        port.stopping()
        if service.is_ready:
            _drain(service, console)
        return EXIT_OK
    finally:
        signals.ignore()
        service.close()
        port.close()
        sys.stdout = stdout


def _drain(service: Service, console: Console) -> None:
    try:
        console.print("draining: running requests finish, a second signal ends them", style="dim")
        left = service.drain()
        console.print(f"drained, {left} requests left" if left else "drained", style="dim")
    except StopRequested:
        console.print("ending now", style="dim")
    except ExpertMeshError as error:  # a router died while it drained; the end goes on
        console.print(f"not drained: {error}", style="bold red", markup=False)
