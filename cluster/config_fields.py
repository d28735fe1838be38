"""What the fields of a configuration are: their types, rules, sentences and secrets.

Reads them from the dataclasses of `cluster.config`, so that a field is described once, where it
stands. Knows no field by name.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import itertools
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from router.state.endpoint import masked

MASK = "***"
_KIND_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
_SCHEMA_NAMES = {int: "integer", float: "number", bool: "boolean", str: "string"}


def number(default: Any, *, minimum: float | None = None, maximum: float | None = None) -> Any:
    """A field whose value lies in `[minimum, maximum]`; None passes where the type has it."""
    return field(default=default, metadata={"minimum": minimum, "maximum": maximum})


def secret(default: Any, *, kind: Literal["all", "url"] = "all") -> Any:
    """A field that is never shown: all of it, or the credentials of a URL in it."""
    return field(default=default, repr=False, metadata={"secret": kind})


@dataclass(frozen=True, slots=True)
class Field:
    """One setting."""

    doc: str
    kind: Any
    """One of int, float, bool, str; of the items, where it is a list."""
    optional: bool
    is_list: bool
    choices: tuple[str, ...]
    minimum: float | None
    maximum: float | None
    secret: Literal["", "all", "url"]
    default: Any

    @property
    def rule(self) -> str:
        """Return what a value must be, beside its type; empty: anything."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        if self.minimum is not None and self.maximum is not None:
            return f"{self.minimum:g} to {self.maximum:g}"
        if self.minimum is not None:
            return f"{self.minimum:g} or more"
        return ""

    def shown(self, value: Any) -> Any:
        """Return a value as it may be shown: secrets are masked, lists are JSON's."""
        if isinstance(value, list | tuple):
            return [self.shown(item) for item in value]
        if not self.secret or value in (None, ""):
            return value
        return masked(str(value)) if self.secret == "url" else MASK


def fields_of(config: type[Any]) -> dict[str, Field]:
    """Return dotted path -> field of a dataclass of sections, in the order of the source.

    The sections are classes of the same module.
    """
    found = {}
    sections = typing.get_type_hints(config)
    attribute_docs = _attribute_docs(config.__module__)
    for section in dataclasses.fields(config):
        cls = sections[section.name]
        hints = typing.get_type_hints(cls)
        docs = attribute_docs[cls.__name__]
        for item in dataclasses.fields(cls):
            kinds = [hints[item.name]]
            if typing.get_origin(kinds[0]) in (types.UnionType, typing.Union):
                kinds = list(typing.get_args(kinds[0]))
            plain = [kind for kind in kinds if kind is not type(None)]
            is_list = typing.get_origin(plain[0]) is tuple
            kind = typing.get_args(plain[0])[0] if is_list else plain[0]
            choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
            found[f"{section.name}.{item.name}"] = Field(
                doc=docs[item.name],
                kind=str if choices else kind,
                optional=len(plain) < len(kinds),
                is_list=is_list,
                choices=choices,
                minimum=item.metadata.get("minimum"),
                maximum=item.metadata.get("maximum"),
                secret=item.metadata.get("secret", ""),
                default=item.default,
            )
    return found


def coerce(raw: Any, spec: Field, *, from_text: bool) -> Any:
    """Return `raw` as the field's type.

    Args:
        raw: From the command line, a file or the environment.
        spec: The field.
        from_text: The environment's: everything is text, a list is separated by commas.

    Raises:
        ValueError: The text says what the value must be.
    """
    if not spec.is_list:
        return _coerce_one(raw, spec, from_text=from_text)
    if from_text:
        raw = [part.strip() for part in raw.split(",") if part.strip()]
    if not isinstance(raw, list | tuple):
        raise ValueError("must be a list")
    return tuple(_coerce_one(item, spec, from_text=from_text) for item in raw)


def type_schema(spec: Field) -> dict[str, Any]:
    """Return the JSON Schema of a field's value."""
    name = _SCHEMA_NAMES[spec.kind]
    if spec.is_list:
        return {"type": "array", "items": {"type": name}}
    schema: dict[str, Any] = {"type": [name, "null"] if spec.optional else name}
    if spec.choices:
        schema["enum"] = [*spec.choices, *([None] if spec.optional else [])]
    if spec.minimum is not None:
        schema["minimum"] = spec.minimum
    if spec.maximum is not None:
        schema["maximum"] = spec.maximum
    return schema


def json_schema(config: type[Any], fields: Mapping[str, Field]) -> dict[str, Any]:
    """Return the JSON Schema of a configuration file."""
    sections = typing.get_type_hints(config)
    properties: dict[str, Any] = {}
    for section in dataclasses.fields(config):
        cls = sections[section.name]
        fields_schema = {}
        for item in dataclasses.fields(cls):
            spec = fields[f"{section.name}.{item.name}"]
            fields_schema[item.name] = {
                "description": spec.doc,
                "default": list(spec.default) if spec.is_list else spec.default,
                **type_schema(spec),
            }
        properties[section.name] = {
            "type": "object",
            "description": inspect.getdoc(cls),
            "additionalProperties": False,
            "properties": fields_schema,
        }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "ExpertMesh configuration",
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
    }


def _attribute_docs(module: str) -> dict[str, dict[str, str]]:
    """Return class -> field -> the docstring that stands under it, of a module's classes."""
    # Once for all classes: `inspect.getsource` of a class parses the whole module.
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {node.name: _docs_in(node) for node in tree.body if isinstance(node, ast.ClassDef)}


def _docs_in(node: ast.ClassDef) -> dict[str, str]:
    docs = {}
    for statement, below in itertools.pairwise(node.body):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
        ):
            docs[statement.target.id] = " ".join(str(below.value.value).split())
    return docs


def _coerce_one(raw: Any, spec: Field, *, from_text: bool) -> Any:
    """Return `raw` as the field's type.

    Raises:
        ValueError: The text says what the value must be.
    """
    if raw is None or (from_text and spec.optional and raw.lower() in ("", "none")):
        if spec.optional:
            return None
        raise ValueError("must be set")
    if from_text:
        raw = _parse_text(raw, spec.kind)
    if spec.choices:
        if raw not in spec.choices:
            near = difflib.get_close_matches(str(raw), spec.choices, n=1)
            more = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"must be one of {', '.join(spec.choices)}{more}")
        return raw
    if spec.kind is float and isinstance(raw, int) and not isinstance(raw, bool):
        raw = float(raw)
    if spec.kind is str and isinstance(raw, int) and not isinstance(raw, bool):
        raw = str(raw)  # `groups = 2` in a file
    if type(raw) is not spec.kind:
        raise ValueError(f"must be {_KIND_NAMES[spec.kind]}")
    if spec.minimum is not None and not raw >= spec.minimum:
        raise ValueError(f"must be {spec.rule}")
    if spec.maximum is not None and not raw <= spec.maximum:
        raise ValueError(f"must be {spec.rule}")
    return raw


def _parse_text(text: str, kind: Any) -> Any:
    if kind is bool:
        known = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
        if text.lower() not in known:
            raise ValueError("must be true or false")
        return known[text.lower()]
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"must be {_KIND_NAMES[kind]}") from None
