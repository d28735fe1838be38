"""The device layer: `deepspeed.accelerator`, and nothing else, knows what the experts run on.

deepspeed is imported on first use, not at import of this module: a router imports `experts` and
never computes here. A group without deepspeed cannot start; `require_deepspeed` says so with the
remedy.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from protos.errors import ConfigurationError

DEEPSPEED_VERSION = "0.19.8"


def require_deepspeed() -> None:
    """Import deepspeed's expert module and accelerator.

    Raises:
        ConfigurationError: deepspeed cannot be imported.
    """
    try:
        importlib.import_module("deepspeed.moe.ep_experts")
    except ImportError as error:
        raise ConfigurationError(
            "environment.deepspeed",
            "must be importable: it is the compute core and device layer of an expert group",
            str(error),
            hint=f"install it: pip install deepspeed=={DEEPSPEED_VERSION}",
        ) from error


def accelerator() -> Any:
    """Return deepspeed's accelerator, chosen once per process (`DS_ACCELERATOR` forces it)."""
    require_deepspeed()
    return importlib.import_module("deepspeed.accelerator").get_accelerator()


def current_device() -> torch.device:
    """Return the device that the experts of this process live on.

    Raises:
        ConfigurationError: The accelerator that deepspeed chose does not work here.
    """
    chosen = accelerator()
    if not chosen.is_available():
        raise ConfigurationError(
            "environment.DS_ACCELERATOR",
            "must name an accelerator that works on this node",
            str(chosen.device_name()),
            hint="check the driver, or set DS_ACCELERATOR=cpu",
        )
    return torch.device(chosen.current_device_name())


def synchronize() -> None:
    """Wait for the device's queued work; nothing to wait for on a CPU."""
    accelerator().synchronize()


def available_bytes() -> int:
    """Return the free memory of the device in bytes."""
    return int(accelerator().available_memory())
