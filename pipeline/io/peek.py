"""What a file's columns are, from as little of it as tells them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import closing
from itertools import islice
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.io.causes import READ_ERRORS
from pipeline.io.inputs import InputFile
from pipeline.io.jsonl import BOM, open_lines
from pipeline.io.stdin import Stdin

FILE_MAGIC = b"ARROW1"
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


def table_schema(file: InputFile) -> tuple[pa.Schema, bool]:
    """The schema of a Parquet or Arrow file, and whether it may have rows; raises one of `READ_ERRORS`."""
    with closing(file.native()) as source:
        if file.format == "parquet":
            parquet = pq.ParquetFile(source, pre_buffer=False)
            return parquet.schema_arrow, parquet.metadata.num_rows > 0
        magic = source.read(len(FILE_MAGIC))
        source.seek(0)
        if magic == FILE_MAGIC:
            opened = pa.ipc.open_file(source)
            return opened.schema, opened.num_record_batches > 0
        return pa.ipc.open_stream(source).schema, True


def _columns(file: InputFile) -> tuple[dict[str, str] | None, bool]:
    """The columns, and whether there may be rows."""
    if file.format == "text":
        return {"text": "string"}, True
    if file.format != "jsonl":
        schema, has_rows = table_schema(file)
        return {field.name: str(field.type) for field in schema}, has_rows
    if isinstance(file.path, Stdin):
        line = file.path.first_line()
        return (None, True) if line is None else (_keys([line]), True)
    if not file.path.is_file():  # a named pipe, which can be read only once
        return None, True
    with open_lines(file) as lines:
        return _keys(lines), True


def _keys(lines: Iterable[bytes] | BinaryIO) -> dict[str, str] | None:
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
