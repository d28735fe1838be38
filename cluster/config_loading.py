"""From command line, environment, file and defaults to one checked configuration.

A value is looked up in this order: command line, environment (`EXPERTMESH_SECTION__FIELD`), file
(TOML or JSON, one table per section), default. `cluster.config` says what there is to set.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cluster.config import Config, fields, parse_groups
from cluster.config_fields import coerce
from cluster.hf_overrides import parse_hf_overrides
from protos.errors import ConfigurationError, Violation
from router.gateway.batch_roots import BatchRoots

ENV_PREFIX = "EXPERTMESH_"

Origin = Literal["command line", "environment", "file", "default"]


@dataclass(frozen=True, slots=True)
class Loaded:
    """A checked configuration, and where each value came from."""

    config: Config
    origins: Mapping[str, Origin]
    """Dotted path of every field -> origin."""


def load_config(
    cli: Mapping[str, Any] | None = None,
    env: Mapping[str, str] | None = None,
    file: Path | None = None,
) -> Loaded:
    """Merge command line, environment and file over the defaults, and check every value.

    Args:
        cli: Dotted path -> value; None means "not given".
        env: The environment; only `EXPERTMESH_SECTION__FIELD` names are looked at.
        file: A `.toml` or `.json` file.

    Raises:
        ConfigurationError: Unknown keys and values against their rule, all of them in one error.
    """
    violations: list[Violation] = []
    values: dict[str, Any] = {}
    origins: dict[str, Origin] = dict.fromkeys(fields(), "default")
    sources: tuple[tuple[Origin, Mapping[str, Any]], ...] = (
        ("file", _read_file(file) if file else {}),
        ("environment", _from_env(env or {})),
        ("command line", {k: v for k, v in (cli or {}).items() if v is not None}),
    )
    for origin, found in sources:
        for path, raw in found.items():
            spec = fields().get(path)
            if spec is None:
                violations.append(_unknown(path, raw, origin))
                continue
            try:
                values[path] = coerce(raw, spec, from_text=origin == "environment")
                origins[path] = origin
            except ValueError as error:
                seen = spec.shown(raw)
                seen = seen if _is_plain(seen) else repr(seen)
                violations.append(Violation(path, str(error), seen))
    if violations:
        raise ConfigurationError(violations=violations)
    sections = {
        section.name: _section_type(section.name)(
            **{
                name.split(".", 1)[1]: value
                for name, value in values.items()
                if name.startswith(section.name + ".")
            }
        )
        for section in dataclasses.fields(Config)
    }
    config = Config(**sections)
    _check_as_a_whole(config)
    return Loaded(config, origins)


def _check_as_a_whole(config: Config) -> None:
    """Refuse values that their own rule allows, but not what they say or what stands beside."""
    parse_groups(config.experts.groups)
    parse_hf_overrides(config.model.hf_overrides)
    if config.engine.max_num_batched_tokens < config.engine.max_num_seqs:
        raise ConfigurationError(
            "engine.max_num_batched_tokens",
            f"must be at least engine.max_num_seqs ({config.engine.max_num_seqs})",
            config.engine.max_num_batched_tokens,
        )
    state = config.state
    if state.wait_replicas and state.enabled and not (state.redis_url or state.blob_urls):
        raise ConfigurationError(
            "state.wait_replicas",
            "must be 0 without state.redis_url: the embedded Valkey has no replicas",
            state.wait_replicas,
        )
    _check_batch_roots(config)


def _check_batch_roots(config: Config) -> None:
    """Refuse folders that are none, and batches without a place for their records."""
    roots = config.batch.roots
    if roots and not config.state.enabled:
        raise ConfigurationError(
            "batch.roots", "must be empty with --no-state: batches are kept there", list(roots)
        )
    for root in roots:
        try:
            BatchRoots([root])
        except ValueError as error:
            raise ConfigurationError("batch.roots", str(error), root) from None


def _section_type(name: str) -> type[Any]:
    kind: type[Any] = typing.get_type_hints(Config)[name]
    return kind


def _read_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigurationError(
            "--config", f"must be a readable file ({why})", str(path)
        ) from None
    try:
        if path.suffix == ".json":
            document = json.loads(text)
        elif path.suffix == ".toml":
            document = tomllib.loads(text)
        else:
            raise ConfigurationError("--config", "must end in .toml or .json", str(path))
    except ValueError as error:  # JSONDecodeError and TOMLDecodeError
        raise ConfigurationError(
            "--config", f"must be valid {path.suffix[1:]}: {error}", str(path)
        ) from None
    if not isinstance(document, dict):
        raise ConfigurationError("--config", "must hold one table per section", str(path))
    flat: dict[str, Any] = {}
    for section, content in document.items():
        if isinstance(content, dict):
            flat.update({f"{section}.{name}": value for name, value in content.items()})
        else:
            flat[section] = content
    return flat


def _from_env(env: Mapping[str, str]) -> dict[str, str]:
    return {
        name.removeprefix(ENV_PREFIX).lower().replace("__", ".", 1): value
        for name, value in env.items()
        if name.startswith(ENV_PREFIX) and "__" in name
    }


def _unknown(path: str, raw: Any, origin: Origin) -> Violation:
    tail = path.rsplit(".", 1)[-1]
    near = [known for known in fields() if known.rsplit(".", 1)[-1] == tail][:1]
    near = near or difflib.get_close_matches(path, fields(), n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else f"; sections: {', '.join(_sections())}"
    return Violation(
        path, f"is not a known setting ({origin}){hint}", raw if _is_plain(raw) else ""
    )


def _sections() -> list[str]:
    return [section.name for section in dataclasses.fields(Config)]


def _is_plain(raw: Any) -> bool:
    return isinstance(raw, str | int | float | bool)
