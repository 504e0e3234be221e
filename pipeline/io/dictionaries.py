"""Types changed at any depth: each format limits dictionaries, and times, in its own way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow as pa

_STRINGS = (pa.string(), pa.large_string())


def plain(kind: pa.DataType) -> pa.DataType:
    """Values in place of dictionaries, for files that cannot change a dictionary midway."""
    return _changed(kind, lambda dictionary: dictionary.value_type)


def plain_strings(kind: pa.DataType) -> pa.DataType:
    """Strings in place of dictionaries of them, for JSON, from which nothing else comes back."""
    return _changed(
        kind,
        lambda dictionary: dictionary.value_type if dictionary.value_type in _STRINGS else dictionary,
    )


def without_seconds(kind: pa.DataType) -> pa.DataType:
    """Milliseconds in place of seconds, for Parquet, which has none."""
    return _changed(kind, _milliseconds, pa.TimestampType)


def wide(kind: pa.DataType) -> pa.DataType:
    """Indices of at least 32 bits, for what joins dictionaries: together they may exceed small indices."""
    return _changed(kind, _widened)


def _widened(dictionary: pa.DictionaryType) -> pa.DataType:
    if dictionary.index_type.bit_width >= 32:
        return dictionary
    return pa.dictionary(pa.int32(), dictionary.value_type, ordered=dictionary.ordered)


def _milliseconds(time: pa.TimestampType) -> pa.DataType:
    return pa.timestamp("ms", time.tz) if time.unit == "s" else time


def _changed(
    kind: pa.DataType, change: Callable[[Any], pa.DataType], what: type[pa.DataType] = pa.DictionaryType
) -> pa.DataType:
    def inside(field: pa.Field) -> pa.Field:
        return field.with_type(_changed(field.type, change, what))

    if isinstance(kind, what):
        return change(kind)
    if pa.types.is_struct(kind):
        return pa.struct([inside(kind.field(i)) for i in range(kind.num_fields)])
    if pa.types.is_map(kind):
        return pa.map_(inside(kind.key_field), inside(kind.item_field), keys_sorted=kind.keys_sorted)
    if pa.types.is_list(kind):
        return pa.list_(inside(kind.value_field))
    if pa.types.is_large_list(kind):
        return pa.large_list(inside(kind.value_field))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(inside(kind.value_field), kind.list_size)
    return kind
