"""The one place where logging is configured: one line an event, `event key=value`, on stderr."""

from __future__ import annotations

import logging
import sys
import time

_LIBRARIES = ("ray", "deepspeed", "DeepSpeed", "grpc", "asyncio", "filelock", "urllib3")


def configure_logging(process: str, *, verbose: bool) -> None:
    """Send this process's log to stderr; WARNING and above, or INFO when `verbose`.

    Args:
        process: Name that stands in every line: `serve`, `router-0`, `group-a`.
        verbose: Show INFO of our own packages; libraries stay at WARNING.
    """
    handler = logging.StreamHandler(sys.stderr)
    formatter = logging.Formatter(
        f"%(asctime)s.%(msecs)03dZ %(levelname)s {process} %(name)s %(message)s",
        "%Y-%m-%dT%H:%M:%S",
    )
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.INFO if verbose else logging.WARNING)
    for name in _LIBRARIES:
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("DeepSpeed").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    """Drop deepspeed's warning that there is no GPU: on a CPU that is no news."""
    return not record.getMessage().startswith("Setting accelerator to CPU")
