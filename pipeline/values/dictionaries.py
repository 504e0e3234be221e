"""Types changed at any depth: each format limits dictionaries, and times, in its own way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow as pa

TWINS = "Two fields of a struct have one name, of which JSON keeps one"  # of what `has_twins` finds

STRINGS = (pa.string(), pa.large_string(), pa.string_view())
BYTES = (pa.binary(), pa.large_binary(), pa.binary_view())
_WITHOUT_VIEWS = {pa.string_view(): pa.string(), pa.binary_view(): pa.binary()}


def settled(kind: pa.DataType) -> pa.DataType:
    """The type in which values of a column are copied, which every step up to the output can handle.

    Whatever stands inside may be null, as rows that failed have no values. Runs are decoded, lists by views
    are plain lists, and dictionaries hold no views: no format but IPC streams can write those.
    """
    if pa.types.is_run_end_encoded(kind):
        return settled(_WITHOUT_VIEWS.get(kind.value_type, kind.value_type))
    if pa.types.is_dictionary(kind):
        values = settled(_WITHOUT_VIEWS.get(kind.value_type, kind.value_type))
        return pa.dictionary(kind.index_type, values, ordered=kind.ordered)
    if pa.types.is_list_view(kind):
        kind = pa.list_(kind.value_field)
    elif pa.types.is_large_list_view(kind):
        kind = pa.large_list(kind.value_field)
    return _rebuilt(kind, lambda field: field.with_type(settled(field.type)).with_nullable(True))


def plain(kind: pa.DataType) -> pa.DataType:
    """Values in place of dictionaries, for files that cannot change a dictionary midway."""
    return _changed(kind, lambda dictionary: dictionary.value_type)


def as_in_parquet(kind: pa.DataType) -> pa.DataType:
    """Values in place of dictionaries but those of text and bytes, which alone come back.

    Their indices have at least 32 bits, as readers join the dictionaries of all row groups.
    """
    return _changed(kind, _in_parquet)


def has_null_entries(array: pa.Array) -> bool:
    """Whether a dictionary, at any depth, has a null among its values, where Parquet has null rows alone."""
    if isinstance(array, pa.DictionaryArray):
        return array.dictionary.null_count > 0
    if isinstance(array, pa.StructArray):
        return any(has_null_entries(array.field(i)) for i in range(array.type.num_fields))
    if isinstance(array, pa.MapArray):
        return has_null_entries(array.keys) or has_null_entries(array.items)
    if isinstance(array, pa.ListArray | pa.LargeListArray | pa.FixedSizeListArray):
        return has_null_entries(array.values)
    return False


def has_twins(kind: pa.DataType) -> bool:
    """Whether fields of a struct, at any depth, share a name, of which a JSON object keeps one."""
    if pa.types.is_dictionary(kind):
        return has_twins(kind.value_type)
    inner = [kind.field(i) for i in range(kind.num_fields)]
    is_twin = pa.types.is_struct(kind) and len({field.name for field in inner}) < len(inner)
    return is_twin or any(has_twins(field.type) for field in inner)


def plain_strings(kind: pa.DataType) -> pa.DataType:
    """Strings in place of dictionaries of them, for JSON, from which nothing else comes back."""
    return _changed(
        kind,
        lambda dictionary: dictionary.value_type if dictionary.value_type in STRINGS else dictionary,
    )


def without_seconds(kind: pa.DataType) -> pa.DataType:
    """Milliseconds in place of seconds, for Parquet, which has none."""
    return _changed(
        kind, lambda time: pa.timestamp("ms", time.tz) if time.unit == "s" else time, pa.TimestampType
    )


def _in_parquet(dictionary: pa.DictionaryType) -> pa.DataType:
    values = dictionary.value_type
    if values not in (*STRINGS, *BYTES):
        return dictionary if pa.types.is_nested(values) else values
    if dictionary.index_type.bit_width >= 32:
        return dictionary
    return pa.dictionary(pa.int32(), values, ordered=dictionary.ordered)


def _changed(
    kind: pa.DataType, change: Callable[[Any], pa.DataType], what: type[pa.DataType] = pa.DictionaryType
) -> pa.DataType:
    if isinstance(kind, what):
        return change(kind)
    return _rebuilt(kind, lambda field: field.with_type(_changed(field.type, change, what)))


def _rebuilt(kind: pa.DataType, inside: Callable[[pa.Field], pa.Field]) -> pa.DataType:
    """The type with other fields inside; a type without fields as it is."""
    if pa.types.is_struct(kind):
        return pa.struct([inside(kind.field(i)) for i in range(kind.num_fields)])
    if pa.types.is_map(kind):
        key = inside(kind.key_field).with_nullable(False)
        return pa.map_(key, inside(kind.item_field), keys_sorted=kind.keys_sorted)
    if pa.types.is_list(kind):
        return pa.list_(inside(kind.value_field))
    if pa.types.is_large_list(kind):
        return pa.large_list(inside(kind.value_field))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(inside(kind.value_field), kind.list_size)
    return kind
