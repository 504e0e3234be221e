"""Arrow values as JSON values, and JSON whose numbers stay as they were written."""

from __future__ import annotations

import base64
import json
import math
import uuid

import pyarrow as pa

from pipeline.values.dictionaries import STRINGS

KEYS = {b"marsinfer": b"keys"}  # metadata of a column whose JSON objects are keys of their own in JSON lines


def holds_keys(field: pa.Field) -> bool:
    """Whether JSON lines have the keys of a column's objects in place of the column."""
    return (field.metadata or {}).items() >= KEYS.items()


class WrittenNumber(float):
    """A number of a JSON text that Python would write in another way; `text` is how it stands there."""

    text: str

    @classmethod
    def of(cls, text: str) -> WrittenNumber:
        number = cls(text)
        number.text = text
        return number


def parse_json(text: str) -> object:
    """What a JSON text says; numbers that could not be written again as they are become `WrittenNumber` ones.

    NaN is not JSON, yet Python writes it: it becomes null, as refusing a document for it would help nobody.
    """
    return json.loads(text, parse_float=_float, parse_int=_integer, parse_constant=lambda _: None)


def json_text(value: object, *, ascii_only: bool = False) -> str:
    """A value that `parse_json` or `json_value` gave, as JSON."""
    if _has_written(value):
        return _written_text(value, ascii_only)
    return json.dumps(value, ensure_ascii=ascii_only, allow_nan=False)


def held_text(value: object) -> str:
    """The same where it can be UTF-8; half of a surrogate pair survives as an escape only."""
    text = json_text(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json_text(value, ascii_only=True)
    return text


def _float(text: str) -> float:
    number = float(text)
    return number if repr(number) == text else WrittenNumber.of(text)


def _integer(text: str) -> float:
    return WrittenNumber.of(text) if text == "-0" else int(text)


def _has_written(value: object) -> bool:
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, WrittenNumber):
            return True
        if isinstance(each, dict):
            waiting.extend(each.values())
        elif isinstance(each, list):
            waiting.extend(each)
    return False


def _written_text(value: object, ascii_only: bool) -> str:
    if isinstance(value, WrittenNumber):
        return value.text
    if isinstance(value, dict):
        pairs = (
            f"{json.dumps(key, ensure_ascii=ascii_only)}: {_written_text(each, ascii_only)}"
            for key, each in value.items()
        )
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, list):
        return f"[{', '.join(_written_text(each, ascii_only) for each in value)}]"
    return json.dumps(value, ensure_ascii=ascii_only, allow_nan=False)


def json_value(scalar: pa.Scalar) -> object:
    """Bytes become base64, times ISO 8601, decimals text, durations counts of a unit, NaN and inf null."""
    if not scalar.is_valid:
        return None
    kind = scalar.type
    if isinstance(kind, pa.BaseExtensionType):
        return _extension(scalar)
    if pa.types.is_nested(kind) or pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return _nested(scalar)
    if pa.types.is_temporal(kind):
        return _temporal(scalar)
    if kind in STRINGS:
        return str(scalar.as_buffer(), "utf-8", "replace")
    return _plain(scalar.as_py())


def same_values(then: pa.Table, now: pa.Table) -> bool:
    """Whether two tables of one schema hold the same values, as far as JSON tells them apart.

    So NaN is as null, and what a dictionary holds counts, not how.
    """
    return all(map(_same_column, then.columns, now.columns))


def _same_column(then: pa.ChunkedArray, now: pa.ChunkedArray) -> bool:
    if then.equals(now):
        return True
    return all(json_value(old) == json_value(new) for old, new in zip(then, now, strict=True))


def _extension(scalar: pa.Scalar) -> object:
    value = scalar.as_py()
    return str(value) if isinstance(value, uuid.UUID) else json_value(scalar.value)


def _nested(scalar: pa.Scalar) -> object:
    kind = scalar.type
    if pa.types.is_struct(kind):
        return {kind.field(i).name: json_value(scalar[i]) for i in range(kind.num_fields)}
    if pa.types.is_map(kind):
        entries = scalar.values
        return [[json_value(entry[0]), json_value(entry[1])] for entry in entries]
    if hasattr(scalar, "values"):
        return [json_value(item) for item in scalar.values]
    return json_value(scalar.value)


def _temporal(scalar: pa.Scalar) -> object:
    kind = scalar.type
    if pa.types.is_duration(kind):
        return scalar.value
    if pa.types.is_interval(kind):
        return list(scalar.as_py())
    # Cast, not as_py: Python's datetime has no nanoseconds.
    if not pa.types.is_timestamp(kind):
        return scalar.cast(pa.string()).as_py()
    try:
        text = scalar.cast(pa.string()).as_py()
    except pa.ArrowInvalid:  # a time zone that is not known here
        text = scalar.cast(pa.timestamp(kind.unit, "UTC")).cast(pa.string()).as_py()
    return text.replace(" ", "T", 1)


def _plain(value: object) -> object:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, bool | int | float | str) else str(value)
