"""One type for a column that has several: one that holds every value of each, or none."""

from __future__ import annotations

from collections.abc import Iterable

import pyarrow as pa

from pipeline.values.dictionaries import BYTES, STRINGS

_AS_DECIMAL = {  # with all digits that an integer may have
    **dict.fromkeys((pa.int8(), pa.uint8()), pa.decimal32(3)),
    **dict.fromkeys((pa.int16(), pa.uint16()), pa.decimal32(5)),
    **dict.fromkeys((pa.int32(), pa.uint32()), pa.decimal64(10)),
    **dict.fromkeys((pa.int64(), pa.uint64()), pa.decimal128(20)),
}


def common(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """The type that both become without loss, None where there is none; both `settled`.

    Nulls take any type, numbers the wider one, strings, bytes and lists the large kind; structs are joined by
    the names of their fields, and dictionaries by their values. What only one of the two is, a dictionary or
    an extension, gives way to its values or to what it stores. Times take the finer unit, which has no room
    for the far future and past, and different time zones become UTC.
    """
    if one == other or pa.types.is_null(other):
        return one
    if pa.types.is_null(one):
        return other
    for outer, inside in ((pa.BaseExtensionType, "storage_type"), (pa.DictionaryType, "value_type")):
        if isinstance(one, outer) and not isinstance(other, outer):
            return common(getattr(one, inside), other)
        if isinstance(other, outer) and not isinstance(one, outer):
            return common(one, getattr(other, inside))
    for join in (_dictionaries, _texts, _bytes, _numbers, _times, _structs, _maps, _lists):
        joined = join(one, other)
        if joined is not None:
            return joined
    return None


def _dictionaries(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    if not (pa.types.is_dictionary(one) and pa.types.is_dictionary(other)):
        return None
    values = common(one.value_type, other.value_type)
    indices = _numbers(one.index_type, other.index_type) or pa.int64()
    if indices.bit_width < 32:
        indices = pa.int32()
    return values and pa.dictionary(indices, values, ordered=one.ordered and other.ordered)


def _texts(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    return pa.large_string() if one in STRINGS and other in STRINGS else None


def _bytes(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    def holds_bytes(kind: pa.DataType) -> bool:
        return kind in BYTES or isinstance(kind, pa.FixedSizeBinaryType)

    # decimals are a kind of fixed-size bytes to Arrow's classes
    if pa.types.is_decimal(one) or pa.types.is_decimal(other):
        return None
    return pa.large_binary() if holds_bytes(one) and holds_bytes(other) else None


def _numbers(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    kinds = [one, other]
    if any(map(pa.types.is_decimal, kinds)):
        kinds = [_AS_DECIMAL.get(kind, kind) for kind in kinds]
        return _as_arrow_joins(kinds) if all(map(pa.types.is_decimal, kinds)) else None
    if not all(pa.types.is_integer(kind) or pa.types.is_floating(kind) for kind in kinds):
        return None
    joined = _as_arrow_joins(kinds)
    # Arrow also takes types that do not hold all integers of 64 bits
    return joined if all(kind == joined for kind in kinds if kind in (pa.int64(), pa.uint64())) else None


def _times(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    kinds = [one, other]
    if not all(map(pa.types.is_temporal, kinds)):
        return None
    if all(pa.types.is_timestamp(kind) and kind.tz for kind in kinds) and one.tz != other.tz:
        kinds = [pa.timestamp(kind.unit, "UTC") for kind in kinds]
    return _as_arrow_joins(kinds)


def _as_arrow_joins(kinds: Iterable[pa.DataType]) -> pa.DataType | None:
    """The type that Arrow knows for two of one sort, None where it knows none."""
    schemas = [pa.schema([("value", kind)]) for kind in kinds]
    try:
        return pa.unify_schemas(schemas, promote_options="permissive").field("value").type
    except pa.ArrowException:
        return None


def _structs(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    if not (pa.types.is_struct(one) and pa.types.is_struct(other)):
        return None
    ours, theirs = ({field.name: field for field in kind} for kind in (one, other))
    if len(ours) != one.num_fields or len(theirs) != other.num_fields:
        return None
    return _joined_fields([*ours.values(), *(theirs[name] for name in theirs if name not in ours)], theirs)


def _joined_fields(fields: Iterable[pa.Field], others: dict[str, pa.Field]) -> pa.DataType | None:
    joined = []
    for field in fields:
        kind = common(field.type, others[field.name].type) if field.name in others else field.type
        if kind is None:
            return None
        joined.append(field.with_type(kind))
    return pa.struct(joined)


def _maps(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    if not (pa.types.is_map(one) and pa.types.is_map(other)):
        return None
    keys = common(one.key_type, other.key_type)
    items = common(one.item_type, other.item_type)
    return keys and items and pa.map_(keys, items, keys_sorted=one.keys_sorted and other.keys_sorted)


def _lists(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    kinds = (pa.ListType, pa.LargeListType, pa.FixedSizeListType)
    if not (isinstance(one, kinds) and isinstance(other, kinds)):
        return None
    values = common(one.value_type, other.value_type)
    if values is None:
        return None
    if type(one) is type(other) is pa.ListType:
        return pa.list_(values)
    if type(one) is type(other) is pa.FixedSizeListType and one.list_size == other.list_size:
        return pa.list_(values, one.list_size)
    return pa.large_list(values)
