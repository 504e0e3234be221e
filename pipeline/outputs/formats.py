"""The formats an output can have: sinks write tables to an open file (`published` reads them back)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import ConfigError
from pipeline.outputs.batch_lines import OWN, TOLD_THERE, Responses, is_of_requests
from pipeline.outputs.layout import RowLayout, layout_in
from pipeline.storage.remote import Place
from pipeline.values import dictionaries
from pipeline.values.jsonvalues import holds_keys, json_value


class Sink:
    """Writes tables; `finish` ends the file but leaves it open, `schema` is that of the rows in it."""

    schema: pa.Schema
    _writer: Any  # of Arrow

    @property
    def file_schema(self) -> pa.Schema:
        """The columns as they stand in the file."""
        return self.schema

    def write(self, table: pa.Table) -> None:
        self._writer.write_table(table)

    def finish(self) -> None:
        self._writer.close()


class ParquetSink(Sink):
    """Parquet, each table one row group."""

    def __init__(self, handle: BinaryIO, schema: pa.Schema) -> None:
        self.schema = _with_types(schema, dictionaries.as_in_parquet)
        self._writer = pq.ParquetWriter(handle, self.schema, compression="zstd", write_page_checksum=True)

    def write(self, table: pa.Table) -> None:
        columns = [
            _without_null_entries(column, field.type)
            for column, field in zip(table.columns, self.schema, strict=True)
        ]
        table = pa.Table.from_arrays(columns, schema=self.schema)
        self._writer.write_table(table, row_group_size=max(table.num_rows, 1))


class ArrowStreamSink(Sink):
    """An Arrow IPC stream, each table one batch."""

    def __init__(self, handle: BinaryIO, schema: pa.Schema) -> None:
        self.schema = schema
        self._writer = pa.ipc.new_stream(handle, schema)


class ArrowFileSink(Sink):
    """An Arrow IPC file; dictionary columns become plain, as a file cannot change a dictionary midway."""

    def __init__(self, handle: BinaryIO, schema: pa.Schema) -> None:
        self.schema = _with_types(schema, dictionaries.plain)
        self._writer = pa.ipc.new_file(handle, self.schema)

    def write(self, table: pa.Table) -> None:
        self._writer.write_table(table.cast(self.schema).combine_chunks())


class JsonlSink(Sink):
    """JSON lines, one object a row; the schema has no place in them (see sidecar.py)."""

    _handle: BinaryIO

    def __init__(self, handle: BinaryIO, schema: pa.Schema) -> None:
        self.schema = _with_types(schema, dictionaries.plain_strings)
        self._handle = handle
        self._holds_keys = [holds_keys(field) for field in schema]

    def write(self, table: pa.Table) -> None:
        for batch in table.to_batches():
            for row in zip(*batch.columns, strict=True):
                values, keys = {}, []
                for name, value, is_object in zip(table.column_names, row, self._holds_keys, strict=True):
                    if is_object:
                        keys.append(value.as_py() or "{}")
                    else:
                        values[name] = json_value(value)
                self._write_row(values, keys)

    def _write_row(self, values: dict[str, Any], keys: Sequence[str]) -> None:
        """A row of these columns, beside which the objects `keys`, as JSON, have more."""
        self._handle.write(_object(values, keys).encode() + b"\n")

    def finish(self) -> None:
        """Nothing ends JSON lines."""


class BatchSink(JsonlSink):
    """JSON lines in the form of the Batch API; rows without an answer go to `errors`, or else beside them."""

    def __init__(self, handle: BinaryIO, schema: pa.Schema) -> None:
        super().__init__(handle, schema)
        self.errors = handle
        self._responses = Responses(schema)

    def _write_row(self, values: dict[str, Any], keys: Sequence[str]) -> None:
        own = {name: value for name, value in values.items() if name not in TOLD_THERE}
        line = json.dumps(self._responses.of(values), ensure_ascii=False, allow_nan=False)
        handle = self._handle if values["status"] == "ok" else self.errors
        handle.write(f'{line[:-1]}, "{OWN}": {_object(own, keys)}}}\n'.encode())


class LaidOutSink(Sink):
    """Rows that stand otherwise in the file that another sink writes."""

    def __init__(self, open_file: OpenSink, layout: RowLayout, handle: BinaryIO, schema: pa.Schema) -> None:
        self._layout = layout
        self._file = open_file(handle, layout.file_schema(schema))
        self.schema = layout.rows_schema(self._file.schema)
        self._waiting = self.schema.empty_table()  # of the last document, of which more rows may come

    @property
    def file_schema(self) -> pa.Schema:
        return self._file.schema

    def write(self, table: pa.Table) -> None:
        new = pa.Table.from_arrays(table.columns, schema=self.schema)
        rows = pa.concat_tables([self._waiting, new])
        whole = self._layout.whole(rows)
        self._waiting = rows.slice(whole)
        self._write(rows.slice(0, whole))

    def finish(self) -> None:
        waiting, self._waiting = self._waiting, self.schema.empty_table()
        self._write(waiting)
        self._file.finish()

    def _write(self, rows: pa.Table) -> None:
        if rows.num_rows:
            self._file.write(self._layout.laid_out(rows, self.file_schema))


def _object(values: dict[str, Any], others: Sequence[str]) -> str:
    """A JSON object of these values, and of what the JSON objects `others` have, as it was written."""
    line = json.dumps(values, ensure_ascii=False, allow_nan=False)
    for text in others:
        line = line if text == "{}" else f"{line[:-1]}, {text[1:]}"
    return line


def lines_sink(handle: BinaryIO, schema: pa.Schema) -> JsonlSink:
    """What writes JSON lines of this schema."""
    return (BatchSink if is_of_requests(schema) else JsonlSink)(handle, schema)


OpenSink = Callable[[BinaryIO, pa.Schema], Sink]

SINKS: dict[str, OpenSink] = {
    ".parquet": ParquetSink,
    ".arrow": ArrowFileSink,
    ".feather": ArrowFileSink,
    ".ipc": ArrowFileSink,
    ".arrows": ArrowStreamSink,
    ".jsonl": lines_sink,
}


def sink_type(path: Place) -> OpenSink:
    """The sink that an output's extension asks for."""
    try:
        return partial(open_sink, SINKS[path.suffix.lower()])
    except KeyError:
        raise ConfigError(
            f"{path} has an extension that is not known; outputs are {', '.join(SINKS)}"
        ) from None


def open_sink(of_file: OpenSink, handle: BinaryIO, schema: pa.Schema) -> Sink:
    """A sink for rows of this schema, which the file's own may hold otherwise."""
    layout = layout_in(schema)
    return of_file(handle, schema) if layout.is_usual else LaidOutSink(of_file, layout, handle, schema)


def type_held(path: Path, kind: pa.DataType) -> pa.DataType:
    """The type in which an output holds values of `kind`, where some of them may not fit."""
    return dictionaries.without_seconds(kind) if path.suffix.lower() == ".parquet" else kind


def _with_types(schema: pa.Schema, change: Callable[[pa.DataType], pa.DataType]) -> pa.Schema:
    return pa.schema([field.with_type(change(field.type)) for field in schema], metadata=schema.metadata)


def _without_null_entries(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    """The column as `kind`; dictionaries with nulls among their values are made anew."""
    if any(map(dictionaries.has_null_entries, column.chunks)):
        column = column.cast(dictionaries.plain(column.type))
    return column.cast(kind)
