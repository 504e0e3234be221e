"""The formats an output can have, each as a sink that writes tables to an open file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import ConfigError
from pipeline.values import dictionaries
from pipeline.values.jsonvalues import holds_keys, json_value


class Sink(Protocol):
    """Writes tables; `finish` ends the file but leaves it open, `schema` is what the file holds."""

    schema: pa.Schema

    def write(self, table: pa.Table) -> None: ...

    def finish(self) -> None: ...


class ParquetSink:
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

    def finish(self) -> None:
        self._writer.close()


class ArrowStreamSink:
    """An Arrow IPC stream, each table one batch."""

    def __init__(self, handle: BinaryIO, schema: pa.Schema) -> None:
        self.schema = schema
        self._writer = pa.ipc.new_stream(handle, schema)

    def write(self, table: pa.Table) -> None:
        self._writer.write_table(table)

    def finish(self) -> None:
        self._writer.close()


class ArrowFileSink:
    """An Arrow IPC file; dictionary columns become plain, as a file cannot change a dictionary midway."""

    def __init__(self, handle: BinaryIO, schema: pa.Schema) -> None:
        self.schema = _with_types(schema, dictionaries.plain)
        self._writer = pa.ipc.new_file(handle, self.schema)

    def write(self, table: pa.Table) -> None:
        self._writer.write_table(table.cast(self.schema).combine_chunks())

    def finish(self) -> None:
        self._writer.close()


class JsonlSink:
    """JSON lines, one object a row; the schema has no place in them (see sidecar.py)."""

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
                line = json.dumps(values, ensure_ascii=False, allow_nan=False)
                for text in keys:  # as it was written
                    line = line if text == "{}" else f"{line[:-1]}, {text[1:]}"
                self._handle.write(line.encode() + b"\n")

    def finish(self) -> None:
        """Nothing ends JSON lines."""


SINKS: dict[str, type[ParquetSink | ArrowStreamSink | ArrowFileSink | JsonlSink]] = {
    ".parquet": ParquetSink,
    ".arrow": ArrowFileSink,
    ".feather": ArrowFileSink,
    ".ipc": ArrowFileSink,
    ".arrows": ArrowStreamSink,
    ".jsonl": JsonlSink,
}


def sink_type(path: Path) -> type[ParquetSink | ArrowStreamSink | ArrowFileSink | JsonlSink]:
    """The sink that an output's extension asks for."""
    try:
        return SINKS[path.suffix.lower()]
    except KeyError:
        raise ConfigError(
            f"{path} has an extension that is not known; outputs are {', '.join(SINKS)}"
        ) from None


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
