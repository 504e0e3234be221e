"""Answers as Arrow tables: the output's columns, their types, and the copied ones behind them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import Field, asdict, fields
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.outputs.own_columns import (
    ADDED_NAMES,
    ANSWERS,
    OWN_NAMES,
    SELECTION_NAMES,
    STATISTICS,
    STATS,
    left_out,
    own_prefix,
)
from pipeline.records import Answer, ChoiceLogprob, OneOfSeveral, PartAnswer
from pipeline.storage.causes import some

_TYPES = {  # by how `Answer` declares a column
    "str": pa.large_string(),
    "int": pa.int64(),
    "float": pa.float64(),
    "bool": pa.bool_(),
    "list[int]": pa.list_(pa.int32()),
    "list[bytes]": pa.list_(pa.binary()),
}
_SHORT = ("status", "finish_reason", "error_type", "method", "guard", "row_hash")  # strings
_OF_ANSWER = ("new_tokens", "draft_tokens", "accepted_tokens")
_SMALL = ("question_index", "tries", *_OF_ANSWER, "pack_documents", "group_rows", "depth")  # integers


def _type(field: Field[Any]) -> pa.DataType:
    """The type of a column of answers, or of one of their parts."""
    if field.name in (*_SHORT, *_SMALL):
        return pa.string() if field.name in _SHORT else pa.int32()
    return _TYPES[str(field.type).removesuffix(" | None")]


for _item in (PartAnswer, OneOfSeveral, ChoiceLogprob):
    _struct = pa.struct([(each.name, _type(each)) for each in fields(_item)])
    _TYPES[f"list[{_item.__name__}]"] = pa.list_(_struct)

# A field of `Answer` without a type fails here, at import, not at the first write after hours of work.
TYPES = {field.name: _type(field) for field in fields(Answer) if field.name != "passthrough"}
TYPES[STATS] = pa.struct([(name, TYPES[name]) for name in STATISTICS])
ANSWER_FIELDS = tuple(pa.field(name, TYPES[name], nullable=name != "id") for name in OWN_NAMES)
QUESTION_NAME = "question"  # which outputs of the first version do not have
REASONING_NAME = "reasoning"
# which outputs of earlier versions go on without
LATER_NAMES = (REASONING_NAME, "draft_tokens", "accepted_tokens")

OF_OBJECTS = ("parts", ANSWERS, "choice_logprobs")  # lists of them
MOST_TOLD = 5


def output_schema(
    passthrough: pa.Schema,
    metadata: Mapping[str, str],
    *,
    save_selection: bool = False,
    lacks: Collection[str] = left_out(None),
    added: Collection[str] = (),
) -> pa.Schema:
    """The columns of an output's rows: the answer's own that it does not lack, then those that are copied.

    `added` are those that only some settings add.
    """
    without = {*(() if save_selection else SELECTION_NAMES), *ADDED_NAMES, *lacks} - set(added)
    own = [field for field in ANSWER_FIELDS if field.name not in without]
    return pa.schema([*own, *passthrough], metadata=dict(metadata))


def answers_table(answers: Sequence[Answer], schema: pa.Schema) -> pa.Table:
    """One row an answer; answers without copied columns have nulls there."""
    own, copied = halves(schema)
    values = [_column(answers, field) for field in own]
    rows = copied_table([answer.passthrough for answer in answers], copied)
    return pa.Table.from_arrays([*values, *rows.columns], schema=schema)


def halves(schema: pa.Schema) -> tuple[pa.Schema, pa.Schema]:
    """Of an output's columns the answer's own, which stand first, and the copied ones."""
    own = len(own_prefix(schema.names))
    return pa.schema(list(schema)[:own]), pa.schema(list(schema)[own:])


def stored_in(schema: pa.Schema, names: Collection[str]) -> list[str]:
    """The columns of an output that hold values of these columns of the answer's own."""
    own = own_prefix(schema.names)
    in_struct = any(name in STATISTICS and name not in own for name in names)
    return [name for name in own if name in names or (name == STATS and in_struct)]


def lacking_told(held: Sequence[str], wanted: Iterable[str]) -> str | None:
    """That an output of the columns `held` lacks some of those wanted, in a line; None where it has all.

    What stands in the struct of statistics is there.
    """
    own = own_prefix(held)
    gone = [name for name in wanted if name not in own and not (STATS in own and name in STATISTICS)]
    return f"the output has no {some(gone, MOST_TOLD)} (--columns)" if gone else None


def own_columns(table: pa.Table, names: Sequence[str]) -> pa.Table:
    """These of the answer's own columns, be they in the struct; null where the table lacks them.

    The table need not have all columns of its output.
    """
    arrays = [_own_column(table, name) for name in names]
    return pa.table(arrays, schema=pa.schema([(name, TYPES[name]) for name in names]))


def _own_column(table: pa.Table, name: str) -> pa.ChunkedArray | pa.Array:
    if name in table.column_names:
        return table[name].cast(TYPES[name])
    if name in STATISTICS and STATS in table.column_names:
        return pc.struct_field(table[STATS], name).cast(TYPES[name])
    return pa.nulls(table.num_rows, TYPES[name])


def _column(answers: Sequence[Answer], field: pa.Field) -> pa.Array:
    if field.name == STATS:
        columns = [_column(answers, each) for each in field.type]
        return pa.StructArray.from_arrays(columns, fields=[*field.type])
    values = [_value(answer, field.name) for answer in answers]
    try:
        return pa.array(values, field.type)
    except UnicodeEncodeError:
        return pa.array([as_utf8(value) for value in values], field.type)


def plain(answer: Answer, names: Iterable[str]) -> dict[str, Any]:
    """These of an answer's own columns, the struct among them, as Python's values."""
    return {name: _value(answer, name) for name in names}


def _value(answer: Answer, name: str) -> Any:
    if name == STATS:
        return plain(answer, STATISTICS)
    value = getattr(answer, name)
    return [asdict(each) for each in value] if name in OF_OBJECTS and value is not None else value


def as_utf8(value: Any) -> Any:
    """A value of a column with all its texts, at whatever depth, as UTF-8 can hold them."""
    if isinstance(value, list):
        return [as_utf8(each) for each in value]
    if isinstance(value, dict):
        return {key: as_utf8(each) for key, each in value.items()}
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
