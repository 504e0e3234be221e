"""Answers in JSON, held against schemas; imports jsonschema where there is one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from fractions import Fraction
from functools import lru_cache
from typing import Any
from urllib.parse import unquote

from pipeline.errors import ConfigError
from pipeline.values.schemas import read_schema

Schema = Mapping[str, Any]

MOST_HELD = 64  # validators
_FENCE = re.compile(r"\s*```[ \t]*[\w+-]*[ \t]*\r?\n(.*?)\n?[ \t]*```\s*", re.DOTALL)
_REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")


def schema_in(text: str, flag: str) -> Schema:
    """The JSON schema in a file of this name, or that `text` itself is, as `checked_schema` takes it."""
    is_inline = text.lstrip().startswith("{")
    return checked_schema(read_schema(text, flag), flag if is_inline else f"{flag} {text}")


def checked_schema(schema: Any, what: str) -> Schema:
    """A schema that answers can be held against, without anything outside of it; `what` begins messages.

    Raises ConfigError where it is none, refers to other files, or jsonschema is not installed.
    """
    if not isinstance(schema, dict):
        raise ConfigError(f"{what} is not a JSON schema: it must be an object")
    try:
        schema_text(schema).encode()
        _check_meta(schema, schema, what)
        for inner in _objects_in(schema):
            _check_references(inner, schema, what)
    except (TypeError, ValueError, RecursionError) as error:  # what TOML has beside JSON, or half a character
        raise ConfigError(f"{what} is not a JSON schema: {error}") from error
    return schema


def _check_meta(part: Any, schema: Schema, what: str) -> None:
    """Hold a part against the schema of schemas that the whole one names."""
    try:
        from jsonschema.exceptions import SchemaError
        from jsonschema.validators import Draft202012Validator, validator_for
    except ImportError as error:
        raise ConfigError(f"{what} needs jsonschema: pip install 'marsinfer[structured]'") from error
    try:
        validator_for(schema, default=Draft202012Validator).check_schema(part)
    except SchemaError as error:
        place = "".join(f"/{step}" for step in error.absolute_path)
        at = f" at {place}" if place else ""
        raise ConfigError(f"{what} is not a JSON schema{at}: {' '.join(error.message.split())}") from error


def _objects_in(schema: Any) -> Iterator[Mapping[str, Any]]:
    """All objects within a schema, itself included."""
    waiting = [schema]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict):
            yield each
            waiting.extend(each.values())
        elif isinstance(each, list):
            waiting.extend(each)


def _check_references(inner: Mapping[str, Any], schema: Schema, what: str) -> None:
    """Refuse what leads elsewhere; what a reference leads to is itself a schema."""
    for key in _REFERENCES:
        reference = inner.get(key)
        if not isinstance(reference, str):
            continue
        found = resolved(reference, schema)
        if found is None:
            raise ConfigError(
                f"{what}: {key} {reference!r} leads nowhere in it; a schema refers to its own parts alone, "
                "as #/$defs/NAME does"
            )
        _check_meta(found, schema, f"{what}: {reference}")
    if inner is not schema and isinstance(inner.get("$id"), str):
        raise ConfigError(f"{what}: a part of it has an $id, which is not supported")


def resolved(reference: str, schema: Schema) -> Any:
    """What a JSON pointer, behind #, leads to in a schema; None where it leads nowhere."""
    found: Any = schema
    if reference != "#" and not reference.startswith("#/"):
        return None
    for step in unquote(reference).split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict) and name in found:
            found = found[name]
        elif isinstance(found, list) and name.isdecimal() and int(name) < len(found):
            found = found[int(name)]
        else:
            return None
    return found


def schema_text(schema: Schema) -> str:
    """A schema as JSON that is the same however its file is laid out; the order of keys is kept.

    Raises ValueError for NaN and infinities.
    """
    return json.dumps(schema, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def strict_json(text: str) -> Any:
    """What a JSON text says. Raises ValueError, for NaN and infinities too, or RecursionError."""
    return json.loads(text, parse_constant=_refuse)


def _refuse(word: str) -> Any:
    raise ValueError(f"{word} is not JSON")


def answered_json(text: str) -> Any:
    """What an answer says in JSON, be it by itself or within one Markdown fence.

    Raises ValueError or RecursionError where it is anything else.
    """
    fenced = _FENCE.fullmatch(text)
    return strict_json(fenced[1] if fenced else text)


def is_valid(text: str, schema: str) -> bool:
    """Whether an answer is JSON, as in `answered_json`, that is valid under a schema, given as JSON.

    What `format` says is not checked, which the standard leaves open.
    """
    try:
        return bool(_validator(schema).is_valid(answered_json(text)))
    except (ValueError, RecursionError, ArithmeticError):  # of numbers too large to be compared
        return False


@lru_cache(MOST_HELD)
def _validator(schema: str) -> Any:
    from jsonschema.validators import Draft202012Validator, extend, validator_for
    from referencing import Registry

    rules = json.loads(schema)
    validator = extend(validator_for(rules, default=Draft202012Validator), {"multipleOf": _multiple_of})
    # a registry of its own, lest anything be fetched
    return validator(rules, registry=Registry())


def _multiple_of(validator: Any, divisor: float, value: Any, _: Any) -> Iterator[Exception]:
    """By the numbers as they are written: jsonschema divides floats, of which 35.27 is none of 0.01."""
    from jsonschema.exceptions import ValidationError

    if validator.is_type(value, "number") and Fraction(str(value)) % Fraction(str(divisor)):
        yield ValidationError(f"{value} is not a multiple of {divisor}")
