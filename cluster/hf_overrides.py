"""`--hf-overrides`: values that replace those of a checkpoint's `config.json`, as one JSON object.

Nested as in the file and merged into it, so YaRN is switched on by naming what changes:

    {"text_config": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}}

This file only reads the text; which keys a model has is `router.model.config`'s matter.
"""

from __future__ import annotations

import json
from typing import Any

from protos.errors import ConfigurationError

FIELD = "model.hf_overrides"


def parse_hf_overrides(text: str | None) -> dict[str, Any]:
    """Return the overrides; empty where there are none.

    Raises:
        ConfigurationError: No JSON, or not an object.
    """
    if text is None or not text.strip():
        return {}
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigurationError(FIELD, f"must be a JSON object: {error}", text) from None
    if not isinstance(value, dict):
        raise ConfigurationError(FIELD, "must be a JSON object", text)
    return value
