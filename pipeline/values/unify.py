"""One type for a column that has several: one that holds every value of each, or none."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pyarrow as pa

_STRINGS = (pa.string(), pa.large_string(), pa.string_view())
_UNITS = ("s", "ms", "us", "ns")
_EXACT_BITS = {16: 11, 32: 24, 64: 53}  # of integers, in floating point numbers of so many bits
_MOST_DIGITS = {32: 9, 64: 18, 128: 38, 256: 76}


def common(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """The type that both become without loss, None where there is none; both `settled`.

    Nulls take any type, numbers the wider one, strings, bytes and lists the large kind; structs are joined by
    the names of their fields, and dictionaries by their values. Times take the finer unit, which has no room
    for the far future and past, and different time zones become UTC.
    """
    if one == other or pa.types.is_null(other):
        return one
    if pa.types.is_null(one):
        return other
    for join in (_extensions, _dictionaries, _texts, _bytes, _numbers, _times, _structs, _maps, _lists):
        joined = join(one, other)
        if joined is not None:
            return joined
    return None


def _extensions(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """Beside plain values an extension's are what it stores; of two extensions neither is the other."""
    extended = [isinstance(kind, pa.BaseExtensionType) for kind in (one, other)]
    if extended == [True, False]:
        return common(one.storage_type, other)
    return common(one, other.storage_type) if extended == [False, True] else None


def _dictionaries(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    encoded = [pa.types.is_dictionary(kind) for kind in (one, other)]
    if encoded == [True, False]:
        return common(one.value_type, other)
    if encoded == [False, True]:
        return common(one, other.value_type)
    if encoded != [True, True]:
        return None
    values = common(one.value_type, other.value_type)
    indices = _integers(one.index_type, other.index_type) or pa.int64()
    if indices.bit_width < 32:
        indices = pa.int32()
    return values and pa.dictionary(indices, values, ordered=one.ordered and other.ordered)


def _texts(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    return pa.large_string() if one in _STRINGS and other in _STRINGS else None


def _bytes(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    def holds_bytes(kind: pa.DataType) -> bool:
        return kind in (pa.binary(), pa.large_binary(), pa.binary_view()) or isinstance(
            kind, pa.FixedSizeBinaryType
        )

    # decimals are a kind of fixed-size bytes to Arrow's classes
    if pa.types.is_decimal(one) or pa.types.is_decimal(other):
        return None
    return pa.large_binary() if holds_bytes(one) and holds_bytes(other) else None


def _numbers(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    if all(map(pa.types.is_integer, (one, other))):
        return _integers(one, other)
    if all(map(pa.types.is_floating, (one, other))):
        return max(one, other, key=lambda kind: kind.bit_width)
    if pa.types.is_integer(one) and pa.types.is_floating(other):
        return _floating(other, one)
    if pa.types.is_floating(one) and pa.types.is_integer(other):
        return _floating(one, other)
    if any(map(pa.types.is_decimal, (one, other))):
        return _decimals(one, other)
    return None


def _integers(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    wider = max(one, other, key=lambda kind: kind.bit_width)
    if pa.types.is_signed_integer(one) == pa.types.is_signed_integer(other):
        return wider
    unsigned = one if pa.types.is_unsigned_integer(one) else other
    bits = max(wider.bit_width, 2 * unsigned.bit_width)
    return {16: pa.int16(), 32: pa.int32(), 64: pa.int64()}.get(bits)


def _floating(floats: pa.DataType, integers: pa.DataType) -> pa.DataType | None:
    """An integer of 64 bits may have more digits than any floating point number."""
    bits = integers.bit_width - pa.types.is_signed_integer(integers)
    fitting = [size for size, exact in _EXACT_BITS.items() if exact >= bits and size >= floats.bit_width]
    sizes = {16: pa.float16(), 32: pa.float32(), 64: pa.float64()}
    return sizes[fitting[0]] if fitting else None


def _decimals(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    digits = [_digits(kind) for kind in (one, other)]
    if None in digits:
        return None
    whole = max(whole for whole, _ in filter(None, digits))
    scale = max(scale for _, scale in filter(None, digits))
    least = max(kind.bit_width for kind in (one, other) if pa.types.is_decimal(kind))
    makers: dict[int, Callable[[int, int], pa.DataType]] = {
        32: pa.decimal32,
        64: pa.decimal64,
        128: pa.decimal128,
        256: pa.decimal256,
    }
    for bits, most in _MOST_DIGITS.items():
        if bits >= least and whole + scale <= most:
            return makers[bits](whole + scale, scale)
    return None


def _digits(kind: pa.DataType) -> tuple[int, int] | None:
    """The digits before and after the point."""
    if pa.types.is_decimal(kind):
        return kind.precision - kind.scale, kind.scale
    if pa.types.is_integer(kind):
        return {8: 3, 16: 5, 32: 10, 64: 20}[kind.bit_width], 0
    return None


def _times(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    if all(map(pa.types.is_timestamp, (one, other))):
        if (one.tz is None) != (other.tz is None):
            return None
        return pa.timestamp(_finer(one, other), one.tz if one.tz == other.tz else "UTC")
    if all(map(pa.types.is_duration, (one, other))):
        return pa.duration(_finer(one, other))
    if all(map(pa.types.is_time, (one, other))):
        unit = _finer(one, other)
        return pa.time32(unit) if unit in ("s", "ms") else pa.time64(unit)
    return pa.date64() if all(map(pa.types.is_date, (one, other))) else None


def _finer(one: pa.DataType, other: pa.DataType) -> str:
    return max(one.unit, other.unit, key=_UNITS.index)


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
