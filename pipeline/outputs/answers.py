"""Answers as Arrow tables: the output's columns, their types, and the copied ones behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

import pyarrow as pa

from pipeline.records import Answer, PartAnswer

_INT_LISTS = pa.list_(pa.int32())

_TYPES = {
    "id": pa.large_string(),
    "row": pa.int64(),
    "question_index": pa.int32(),
    "question": pa.large_string(),
    "status": pa.string(),
    "answer": pa.large_string(),
    "finish_reason": pa.string(),
    "error_type": pa.string(),
    "error_message": pa.large_string(),
    "document_tokens": pa.int64(),
    "prompt_tokens": pa.int64(),
    "truncated_tokens": pa.int64(),
    "new_tokens": pa.int32(),
    "queue_ms": pa.float64(),
    "tokenize_ms": pa.float64(),
    "prefill_ms": pa.float64(),
    "ttft_ms": pa.float64(),
    "decode_ms": pa.float64(),
    "pack_documents": pa.int32(),
    "pack_tokens": pa.int64(),
    "shared_ms": pa.float64(),
    "group_rows": pa.int32(),
    "method": pa.string(),
    "kept_tokens": _INT_LISTS,
    "ffn_tokens": _INT_LISTS,
    "ffn_fp8_tokens": _INT_LISTS,
    "kept_ratio": pa.float64(),
    "ffn_ratio": pa.float64(),
    "attention_ratio": pa.float64(),
    "flops_ratio": pa.float64(),
    "kv_bytes": pa.int64(),
    "kv_host_bytes": pa.int64(),
    "kv_swapped_bytes": pa.int64(),
    "guard": pa.string(),
    "row_hash": pa.string(),
    "selection": pa.list_(pa.binary()),
    "prompt_text": pa.large_string(),
    "prompt_token_chars": _INT_LISTS,
    "prompt_spans": _INT_LISTS,
}

_PART_TYPES = {**_TYPES, "depth": pa.int32(), "start": pa.int64(), "end": pa.int64()}
_TYPES["parts"] = pa.list_(pa.struct([(field.name, _PART_TYPES[field.name]) for field in fields(PartAnswer)]))

# A field of `Answer` without a type fails here, at import, not at the first write after hours of work.
ANSWER_FIELDS = tuple(
    pa.field(field.name, _TYPES[field.name], nullable=field.name != "id")
    for field in fields(Answer)
    if field.name != "passthrough"
)
ANSWER_NAMES = tuple(field.name for field in ANSWER_FIELDS)
QUESTION_NAME = "question"  # which outputs of the first version do not have
SELECTION_NAMES = ("selection", "prompt_text", "prompt_token_chars", "prompt_spans")  # when asked for


def output_schema(
    passthrough: pa.Schema,
    metadata: Mapping[str, str],
    *,
    save_selection: bool = False,
    holds_question: bool = True,
) -> pa.Schema:
    """The columns of an output file: the answer's own, then those copied from the input."""
    left_out = (*(() if save_selection else SELECTION_NAMES), *(() if holds_question else (QUESTION_NAME,)))
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
    # by their order, as an output without a question of its own may copy a column of that name
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
