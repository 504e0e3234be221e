"""JSON values as Arrow values, of the types that a JSON schema says.

An object with named properties is a struct of them, an array whose items have a schema a list; all of these,
and whatever stands in them, may be null. What has no one type is a string that holds JSON: a union, an array
of anything, an object whose properties are not named, and a reference to a schema that it stands in itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.values.json_answers import Schema, resolved

NULL, NUMBER = "null", "number"
_NAMES = {str: "string", bool: "boolean", int: "integer", float: NUMBER}
_TYPES = {
    "string": pa.large_string(),
    "boolean": pa.bool_(),
    "integer": pa.int64(),
    NUMBER: pa.float64(),
}
_LEAST, _MOST = -(2**63), 2**63 - 1  # integers that Arrow holds


@dataclass(frozen=True, kw_only=True)
class JsonType:
    """An Arrow type, and how values of JSON become values of it."""

    name: str | None = None  # string, boolean, integer or number; None with all others
    properties: tuple[tuple[str, JsonType], ...] = ()  # of a struct
    items: JsonType | None = None  # of a list

    @property
    def arrow(self) -> pa.DataType:
        if self.properties:
            return pa.struct([(name, inner.arrow) for name, inner in self.properties])
        if self.items is not None:
            return pa.list_(self.items.arrow)
        return _TYPES[self.name or "string"]

    def fit(self, value: Any) -> Any:
        """A value of JSON as pyarrow takes it; null where it has another type, or where Arrow has no room."""
        if value is None:
            return None
        if self.properties:
            return self._fields(value)
        if self.items is not None:
            return [self.items.fit(each) for each in value] if isinstance(value, list) else None
        return _json_text(value) if self.name is None else _simple(self.name, value)

    def _fields(self, value: Any) -> dict[str, Any] | None:
        if not isinstance(value, dict):
            return None
        return {name: inner.fit(value.get(name)) for name, inner in self.properties}


ANY = JsonType()  # a string that holds JSON


def _json_text(value: Any) -> str | None:
    """A value of JSON as such; None where a number in it was beyond float64, which reads it as infinite."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        return None


def _simple(name: str, value: Any) -> Any:
    if isinstance(value, bool) or name in ("boolean", "string"):
        return value if isinstance(value, bool if name == "boolean" else str) else None
    if not isinstance(value, int | float):
        return None
    if name == NUMBER:
        return _finite(value)
    is_whole = isinstance(value, int) or value.is_integer()
    return int(value) if is_whole and _LEAST <= value <= _MOST else None


def _finite(value: float) -> float | None:
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def json_type_of(schema: Schema) -> JsonType:
    """The type that values have which are valid under a schema."""
    return _typed(schema, schema, ())


def _typed(part: Any, schema: Schema, within: tuple[str, ...]) -> JsonType:
    """The type of a part of a schema, which stands within what these references lead to."""
    if not isinstance(part, dict):
        return ANY
    if "$ref" in part:
        reference = part["$ref"]
        recurs = reference in (*within, "#")
        return ANY if recurs else _typed(resolved(reference, schema), schema, (*within, reference))
    for key in ("const", "enum"):
        if key in part:
            return _of_names(map(_name, [part[key]] if key == "const" else part[key]))
    names = _names(part)
    if names == {"object"}:
        return _struct(part, schema, within)
    if names == {"array"}:
        items = part.get("items")
        is_list = isinstance(items, dict) and "prefixItems" not in part
        return JsonType(items=_typed(items, schema, within)) if is_list else ANY
    if names:
        return _of_names(names)
    branches = next((part[key] for key in ("anyOf", "oneOf", "allOf") if key in part), ())
    return _common([_typed(each, schema, within) for each in branches if not _is_null(each)])


def _struct(part: Schema, schema: Schema, within: tuple[str, ...]) -> JsonType:
    named = part.get("properties") or {}
    return JsonType(properties=tuple((name, _typed(each, schema, within)) for name, each in named.items()))


def _names(part: Schema) -> set[str]:
    """The types that a part says by name, without null; those of properties and items where it says none."""
    said = part.get("type")
    if said is None:
        return {"object"} if "properties" in part else {"array"} if "items" in part else set()
    return set([said] if isinstance(said, str) else said) - {NULL}


def _is_null(part: Any) -> bool:
    """Whether null alone is valid."""
    return isinstance(part, dict) and (part.get("type") in (NULL, [NULL]) or part.get("const", "") is None)


def _name(value: Any) -> str:
    return NULL if value is None else _NAMES.get(type(value), "")


def _of_names(names: Iterable[str]) -> JsonType:
    """The one simple type of values with types of these names."""
    found = set(names) - {NULL}
    if found == {"integer", NUMBER}:
        return JsonType(name=NUMBER)
    only = found.pop() if len(found) == 1 else ""
    return JsonType(name=only) if only in _TYPES else ANY


def _common(types: list[JsonType]) -> JsonType:
    """The one type of a union."""
    if len(types) > 1 and all(each.name is not None for each in types):
        return _of_names(str(each.name) for each in types)
    return types[0] if types and all(each == types[0] for each in types) else ANY
