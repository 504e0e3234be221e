"""What rows should have been answered, where their input told it and the output has copied it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from pipeline.errors import ConfigError
from pipeline.inputs.passthrough import EXTRA
from pipeline.suites.samples import references_of

REFERENCE = "reference"  # the column, or the key of JSON lines
TYPE = pa.list_(pa.large_string())


def holder(names: Sequence[str]) -> str | None:
    """The column of an output in which references stand, or may stand among the keys of JSON lines."""
    return next((name for name in (REFERENCE, EXTRA) if name in names), None)


def references_in(table: pa.Table) -> pa.Array:
    """(rows) of each row what is right, one answer or several; null where nothing is known."""
    name = holder(table.column_names)
    if name is None:
        return pa.nulls(table.num_rows, TYPE)
    values = table[name].to_pylist()
    found = (references_of(value if name == REFERENCE else _of_keys(value)) for value in values)
    return pa.array([list(texts) or None for texts in found], TYPE)


def _of_keys(text: str | None) -> Any:
    """The value of the key in an object of JSON."""
    if text is None or f'"{REFERENCE}"' not in text:
        return None
    try:
        keys = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"the column {EXTRA!r} holds no JSON: {error}") from error
    return keys.get(REFERENCE) if isinstance(keys, dict) else None
