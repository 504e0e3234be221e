"""Answers as Arrow tables: the output's columns, their types, and the copied ones behind them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import Field, asdict, fields
from typing import Any

import pyarrow as pa

from pipeline.records import Answer, PartAnswer

_TYPES = {  # by how `Answer` declares a column
    "str": pa.large_string(),
    "int": pa.int64(),
    "float": pa.float64(),
    "list[int]": pa.list_(pa.int32()),
    "list[bytes]": pa.list_(pa.binary()),
}
_SHORT = ("status", "finish_reason", "error_type", "method", "guard", "row_hash")  # strings
_OF_ANSWER = ("new_tokens", "draft_tokens", "accepted_tokens")
_SMALL = ("question_index", *_OF_ANSWER, "pack_documents", "group_rows", "depth")  # integers


def _type(field: Field[Any]) -> pa.DataType:
    """The type of a column of answers, or of one of their parts."""
    if field.name in (*_SHORT, *_SMALL):
        return pa.string() if field.name in _SHORT else pa.int32()
    return _TYPES[str(field.type).removesuffix(" | None")]


_TYPES["list[PartAnswer]"] = pa.list_(pa.struct([(field.name, _type(field)) for field in fields(PartAnswer)]))

# A field of `Answer` without a type fails here, at import, not at the first write after hours of work.
ANSWER_FIELDS = tuple(
    pa.field(field.name, _type(field), nullable=field.name != "id")
    for field in fields(Answer)
    if field.name != "passthrough"
)
ANSWER_NAMES = tuple(field.name for field in ANSWER_FIELDS)
QUESTION_NAME = "question"  # which outputs of the first version do not have
REASONING_NAME = "reasoning"
# which outputs of earlier versions go on without
LATER_NAMES = (REASONING_NAME, "draft_tokens", "accepted_tokens")
SELECTION_NAMES = ("selection", "prompt_text", "prompt_token_chars", "prompt_spans")  # when asked for


def output_schema(
    passthrough: pa.Schema,
    metadata: Mapping[str, str],
    *,
    save_selection: bool = False,
    lacks: Collection[str] = (),
) -> pa.Schema:
    """The columns of an output file: the answer's own that it does not lack, then those that are copied."""
    left_out = (*(() if save_selection else SELECTION_NAMES), *lacks)
    own = [field for field in ANSWER_FIELDS if field.name not in left_out]
    return pa.schema([*own, *passthrough], metadata=dict(metadata))


def answers_table(answers: Sequence[Answer], schema: pa.Schema) -> pa.Table:
    """One row an answer; answers without copied columns have nulls there."""
    own, copied = halves(schema)
    values = [_column(answers, field) for field in own]
    rows = copied_table([answer.passthrough for answer in answers], copied)
    return pa.Table.from_arrays([*values, *rows.columns], schema=schema)


def halves(schema: pa.Schema) -> tuple[pa.Schema, pa.Schema]:
    """Of an output's columns the answer's own, which stand first, and the copied ones."""
    # by their order, as an output of an earlier version may copy a column of a name that came later
    own: list[pa.Field] = []
    for field in ANSWER_FIELDS:
        if len(own) < len(schema) and schema.field(len(own)).name == field.name:
            own.append(schema.field(len(own)))
    return pa.schema(own), pa.schema(list(schema)[len(own) :])


def _column(answers: Sequence[Answer], field: pa.Field) -> pa.Array:
    values = [getattr(answer, field.name) for answer in answers]
    if field.name == "parts":
        values = [None if parts is None else [asdict(part) for part in parts] for parts in values]
    try:
        return pa.array(values, field.type)
    except UnicodeEncodeError:
        return pa.array([_as_utf8(value) for value in values], field.type)


def _as_utf8(value: Any) -> Any:
    """A value of a column with all its texts, at whatever depth, as UTF-8 can hold them."""
    if isinstance(value, list):
        return [_as_utf8(each) for each in value]
    if isinstance(value, dict):
        return {key: _as_utf8(each) for key, each in value.items()}
    return without_lone_surrogates(value) if isinstance(value, str) else value


def without_lone_surrogates(value: str | None) -> str | None:
    """Text as the output holds it: UTF-8 has no halves of surrogate pairs."""
    return None if value is None else value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def copied_table(rows: Sequence[pa.RecordBatch | None], schema: pa.Schema) -> pa.Table:
    """The copied columns of rows, one batch each; None for a row that has no values."""
    if not schema.names:
        return schema.empty_table()
    empty = pa.RecordBatch.from_arrays([pa.nulls(1, kind) for kind in schema.types], schema=schema)
    table = pa.Table.from_batches([empty if row is None else row for row in rows], schema=schema)
    return pa.Table.from_arrays([combined(column) for column in table.columns], schema=schema)


def combined(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """In one chunk where it fits: dictionaries with small indices may not, which is no reason to fail."""
    try:
        return pa.chunked_array([column.combine_chunks()], column.type)
    except (pa.ArrowException, ValueError):
        return column
