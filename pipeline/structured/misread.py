"""What llguidance takes otherwise than a JSON schema means it, without a word, so that it has to be refused.

It reads numbers as float64, passes over `prefixItems` beside the older `additionalItems`, and counts a name
that an object has twice as two properties.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

BOUNDS = {
    "minimum": 1,
    "exclusiveMinimum": 1,
    "maximum": -1,
    "exclusiveMaximum": -1,
}  # the side that is valid
LARGEST = 2**63 - 1  # integer that the library writes; a bound beyond it is as if it were here
EXACT = 2**53  # up to it float64 has all integers


def misread(schema: Any, library: Any) -> Iterator[str]:
    """Of each part of a schema that would let wrong answers through, what it is; `library` is llguidance."""
    if isinstance(schema, list):
        for each in schema:
            yield from misread(each, library)
    if not isinstance(schema, dict):
        return
    for key, value in schema.items():
        if key in ("const", "enum"):
            yield from (f"{key} has {told}" for told in _changed(value, library))
        elif key in BOUNDS and _rounds_out(value, BOUNDS[key]):
            yield f"{key} {value} is an integer that float64 does not have"
        yield from misread(value, library)
    if "prefixItems" in schema and "additionalItems" in schema:
        yield "prefixItems stands beside additionalItems; say items"
    if _counts_names_twice(schema):
        yield "minProperties asks for names that the schema does not require, and one may be written twice"


def _changed(value: Any, library: Any) -> Iterator[str]:
    """The numbers within a value that would be written as others."""
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _changed(each, library)
    elif isinstance(value, float) and not (math.isfinite(value) and _written(value, library) == value):
        yield f"{value!r}, a number that would be written as another"
    elif isinstance(value, int) and abs(value) > EXACT and _written(value, library) != value:
        yield f"{value}, an integer that would be written as another"


def _written(number: float, library: Any) -> float | None:
    """What an answer that must be this number says; None where the library does not take it."""
    try:
        grammar = library.LLMatcher.grammar_from_json_schema({"const": number})
    except ValueError:
        return None
    text = library.LLMatcher(_bytes(library), grammar, log_level=0).compute_ff_bytes()
    found: float = json.loads(text) if text else math.nan
    return found


@cache
def _bytes(library: Any) -> Any:
    """A tokenizer of single bytes."""
    return library.LLTokenizer("byte")


def _rounds_out(bound: Any, valid_side: int) -> bool:
    """Whether an integer as a bound lets one through that it should not, once it is rounded."""
    if not isinstance(bound, int) or abs(bound) >= LARGEST:
        return False
    return (int(float(bound)) - bound) * valid_side < 0


def _counts_names_twice(part: Mapping[str, Any]) -> bool:
    least, required = part.get("minProperties"), part.get("required", ())
    if not (isinstance(least, int) and isinstance(required, list | tuple)):
        return False
    return least > len(set(map(str, required))) + 1
