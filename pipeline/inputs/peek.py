"""What a file's columns are, from as little of it as tells them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import islice

import pyarrow as pa

from pipeline.inputs.finding import InputFile
from pipeline.inputs.jsonl import BOM, open_lines
from pipeline.inputs.lines import bounded_lines
from pipeline.inputs.partitions import KIND
from pipeline.outputs.own import is_own_table
from pipeline.storage.causes import READ_ERRORS
from pipeline.storage.stdin import Stdin

LINES_TRIED = 100  # until one is an object


def first_columns(files: Iterable[InputFile]) -> dict[str, str] | None:
    """Names and Arrow types of the columns of the first file with rows, else of the first that says them.

    None if no file says them. Of JSON lines they are the keys of the first object, of a text document `text`.
    """
    empty: dict[str, str] | None = None
    for file in files:
        try:
            columns, has_rows = _columns(file)
        except READ_ERRORS:  # which opening it will tell
            continue
        if columns is not None and has_rows:
            return columns
        if empty is None:
            empty = columns
    return empty


def _columns(file: InputFile) -> tuple[dict[str, str] | None, bool]:
    """The columns, those that folders say included, and whether there may be rows."""
    columns, has_rows = _own_columns(file)
    said = {key: str(KIND) for key in file.partitions}
    return (None if columns is None else {**said, **columns}), has_rows


def _own_columns(file: InputFile) -> tuple[dict[str, str] | None, bool]:
    if file.is_empty:
        return None, False
    if file.format == "text":
        return {"text": "string"}, True
    if file.format != "jsonl":
        schema, has_rows = file.schema()
        if file.origin != "named" and is_own_table(schema):
            return None, False
        return {field.name: str(field.type) for field in schema}, has_rows
    if isinstance(file.path, Stdin):
        line = file.path.first_line()
        return (None, True) if line is None else (_keys([line]), True)
    if not file.path.is_file():  # a named pipe, which can be read only once
        return None, True
    with open_lines(file) as lines:
        return _keys(line for line in bounded_lines(lines) if isinstance(line, bytes)), True


def _keys(lines: Iterable[bytes]) -> dict[str, str] | None:
    for line in islice(lines, LINES_TRIED):
        try:
            row = json.loads(line.removeprefix(BOM).decode())
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            return {key: _type_of(value) for key, value in row.items()}
    return None


def _type_of(value: object) -> str:
    try:
        return str(pa.infer_type([value]))
    except (pa.ArrowException, ValueError, OverflowError, TypeError):
        return "null"
