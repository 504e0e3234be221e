"""Arrays as other types, where Arrow's own cast knows no way or a wrong one."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.storage.causes import can_be_read
from pipeline.values.dictionaries import STRINGS, TWINS, has_twins, settled
from pipeline.values.jsonvalues import json_text, json_value


def converted(array: pa.Array, kind: pa.DataType) -> pa.Array:
    """The values as `kind`; what has no text becomes JSON. Raises an `ArrowException` for a misfit."""
    if array.type == kind:
        return array
    if pa.types.is_null(array.type):
        return pa.nulls(len(array), kind)
    array = _settled(array)
    if array.type == kind:
        return array
    if kind in STRINGS and _has_no_text(array.type):
        if has_twins(array.type):
            raise pa.ArrowInvalid(TWINS)
        return pa.array([_as_text(value) for value in array], kind)
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if isinstance(array, pa.DictionaryArray) and pa.types.is_nested(array.type.value_type):
        array = array.dictionary.take(array.indices)
    if array.type == pa.string_view():  # which Arrow casts to few types
        array = array.cast(pa.large_string())
    if pa.types.is_boolean(kind) and not _are_flags(array):
        raise pa.ArrowInvalid("of numbers only 0 and 1 are booleans")
    return array.cast(kind)


def _are_flags(array: pa.Array) -> bool:
    """Whether no number is neither 0 nor 1; Arrow takes any other as true."""
    if not (pa.types.is_integer(array.type) or pa.types.is_floating(array.type)):
        return True
    return pc.all(pc.or_(pc.equal(array, 0), pc.equal(array, 1))).as_py() is not False


def converts(own: pa.DataType, kind: pa.DataType) -> bool:
    """Whether values of one type can become another, by trying with a null."""
    return can_be_read(lambda: converted(pa.nulls(1, own), kind))


def _has_no_text(kind: pa.DataType) -> bool:
    """Whether Arrow knows no text for such values, or none that one could read."""
    if pa.types.is_dictionary(kind):
        return _has_no_text(kind.value_type)
    if isinstance(kind, pa.BaseExtensionType):
        return kind.storage_type not in STRINGS
    return pa.types.is_nested(kind) or pa.types.is_interval(kind)


def _as_text(scalar: pa.Scalar) -> str | None:
    value = json_value(scalar)
    return value if value is None or isinstance(value, str) else json_text(value)


def _settled(array: pa.Array) -> pa.Array:
    """As the type that `settled` names; values of the layouts that it replaces are taken apart here."""
    kind = array.type
    if settled(kind) == kind:
        return array
    if pa.types.is_run_end_encoded(kind):
        runs = np.searchsorted(array.run_ends, np.arange(len(array)) + array.offset, side="right")
        return _values(array.values, settled(kind)).take(pa.array(runs))
    if pa.types.is_dictionary(kind):
        values = _values(array.dictionary, settled(kind).value_type)
        return pa.DictionaryArray.from_arrays(array.indices, values, ordered=kind.ordered)
    if pa.types.is_struct(kind) and kind.num_fields:
        columns = [_settled(column) for column in array.flatten()]
        return pa.StructArray.from_arrays(columns, fields=list(settled(kind)), mask=array.is_null())
    if isinstance(settled(kind), pa.ListType | pa.LargeListType):
        return _listed(array, settled(kind))
    return array.cast(settled(kind))


def _values(values: pa.Array, kind: pa.DataType) -> pa.Array:
    """The values of runs or of a dictionary, without views, of which Arrow can take none."""
    is_view = pa.types.is_string_view(values.type) or pa.types.is_binary_view(values.type)
    return values.cast(kind) if is_view else _settled(values)


def _listed(array: pa.Array, kind: pa.ListType | pa.LargeListType) -> pa.Array:
    """A list of any layout as one that holds its values in their order, without gaps."""
    made, offset = (
        (pa.LargeListArray, pa.int64()) if pa.types.is_large_list(kind) else (pa.ListArray, pa.int32())
    )
    lengths = pc.fill_null(pc.list_value_length(array), 0)
    ends = pc.cumulative_sum(lengths.cast(pa.int64()))
    offsets = pa.concat_arrays([pa.array([0], pa.int64()), ends]).cast(offset)
    return made.from_arrays(offsets, _settled(array.flatten()), type=kind, mask=array.is_null())
