"""The formats an output can have: sinks write tables to an open file, and groups of rows are read back."""

from __future__ import annotations

import json
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import ConfigError
from pipeline.outputs.batch_lines import OWN, TOLD_THERE, Responses, errors_path, is_of_requests, told_there
from pipeline.storage.remote import Place
from pipeline.values import dictionaries
from pipeline.values.jsonvalues import held_text, holds_keys, json_value, parse_json

LINES_GROUP_ROWS = 1_000
LINES_GROUP_BYTES = 4 << 20


class Sink:
    """Writes tables; `finish` ends the file but leaves it open, `schema` is what the file holds."""

    schema: pa.Schema
    _writer: Any  # of Arrow

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


class _Parquet:
    """Row groups."""

    def __init__(self, path: Path, content: pa.Buffer | None) -> None:
        source = str(path) if content is None else pa.BufferReader(content)
        self._file = pq.ParquetFile(source, pre_buffer=False, page_checksum_verification=True)
        self.schema = self._file.schema_arrow
        self.count = self._file.num_row_groups

    def read(self, number: int, columns: list[str] | None) -> pa.Table:
        return self._file.read_row_group(number, columns)

    def row_bytes(self, number: int) -> int:
        group = self._file.metadata.row_group(number)
        return group.total_byte_size // max(group.num_rows, 1)


class _Arrow:
    """Batches of a file or a stream, mapped into memory, so that to hold them all costs next to nothing."""

    def __init__(self, path: Path, content: pa.Buffer | None) -> None:
        source = pa.memory_map(str(path)) if content is None else pa.BufferReader(content)
        if path.suffix.lower() == ".arrows":
            stream = pa.ipc.open_stream(source)
            self.schema, self._batches = stream.schema, list(stream)
        else:
            file = pa.ipc.open_file(source)
            self.schema = file.schema
            self._batches = [file.get_batch(number) for number in range(file.num_record_batches)]
        self.count = len(self._batches)

    def read(self, number: int, columns: list[str] | None) -> pa.Table:
        table = pa.Table.from_batches([self._batches[number]])
        return table if columns is None else table.select(columns)

    def row_bytes(self, number: int) -> int:
        batch = self._batches[number]
        return batch.nbytes // max(batch.num_rows, 1)


class _JsonLines:
    """Runs of lines, of which only the offsets are kept."""

    _told_elsewhere: Sequence[str] = ()  # columns that a line has no key for

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.schema = schema
        self._keys = [field.name for field in schema if holds_keys(field)]
        told = (*self._keys, *self._told_elsewhere)
        self._names = [field.name for field in schema if field.name not in told]
        self._path = path
        self._starts = array("q", [0])
        self._rows = array("q")
        rows = end = 0
        with path.open("rb") as file:
            for line in file:
                rows, end = rows + 1, end + len(line)
                if rows == LINES_GROUP_ROWS or end - self._starts[-1] >= LINES_GROUP_BYTES:
                    self._end_group(rows, end)
                    rows = 0
        if rows:
            self._end_group(rows, end)
        self.count = len(self._rows)

    def read(self, number: int, columns: list[str] | None) -> pa.Table:
        schema = self.schema if columns is None else pa.schema([self.schema.field(name) for name in columns])
        with self._path.open("rb") as file:
            file.seek(self._starts[number])
            rows = [self._row(file.readline()) for _ in range(self._rows[number])]
        values = [pa.array([row[field.name] for row in rows], field.type) for field in schema]
        return pa.Table.from_arrays(values, schema=schema)

    def row_bytes(self, number: int) -> int:
        return (self._starts[number + 1] - self._starts[number]) // self._rows[number]

    def _row(self, line: bytes) -> dict[str, Any]:
        """The columns of a line, its other keys as JSON in the column that holds them."""
        return self._columns(parse_json(line.decode()) if self._keys else json.loads(line))

    def _columns(self, row: Any) -> dict[str, Any]:
        if not isinstance(row, dict) or list(row)[: len(self._names)] != self._names:
            raise ValueError("it has other columns than were written")
        rest = {key: row.pop(key) for key in list(row)[len(self._names) :]}
        if rest and not self._keys:
            raise ValueError("it has other columns than were written")
        return row | dict.fromkeys(self._keys, held_text(rest) if rest else None)

    def _end_group(self, rows: int, end: int) -> None:
        self._rows.append(rows)
        self._starts.append(end)


class _BatchLines(_JsonLines):
    """Lines in the form of the Batch API, of one file."""

    _told_elsewhere = TOLD_THERE

    def _row(self, line: bytes) -> dict[str, Any]:
        whole: Any = parse_json(line.decode())
        try:
            return self._columns(whole[OWN]) | told_there(whole)
        except (LookupError, TypeError) as error:
            raise ValueError("it is no line of the Batch API that marsinfer wrote") from error


class _BatchFiles:
    """An output in the form of the Batch API, behind its rows without an answer, which are in another file.

    Where a run was killed between the two a row may stand in both: that of the output comes last, and counts.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.schema = schema
        self._files = [_BatchLines(file, schema) for file in (errors_path(path), path) if file.exists()]
        self.firsts = [0, *accumulate(file.count for file in self._files)]
        self.count = self.firsts.pop()

    def read(self, number: int, columns: list[str] | None) -> pa.Table:
        file, within = self._at(number)
        return file.read(within, columns)

    def row_bytes(self, number: int) -> int:
        file, within = self._at(number)
        return file.row_bytes(within)

    def _at(self, number: int) -> tuple[_BatchLines, int]:
        """The file of a group, and which of its groups it is."""
        file = bisect_right(self.firsts, number) - 1
        return self._files[file], number - self.firsts[file]


class Published:
    """An output; its groups are Parquet's row groups, Arrow's batches, or runs of JSON lines."""

    def __init__(
        self, path: Path, content: pa.Buffer | None = None, lines_schema: pa.Schema | None = None
    ) -> None:
        """Open the file, or `content` that stands for it; JSON lines do not hold their schema."""
        self._groups: _Parquet | _Arrow | _JsonLines | _BatchFiles
        self.firsts: Sequence[int] = (0,)  # groups with which a file begins
        if lines_schema is not None and is_of_requests(lines_schema):
            self._groups = files = _BatchFiles(path, lines_schema)
            self.firsts = files.firsts
        elif lines_schema is not None:
            self._groups = _JsonLines(path, lines_schema)
        else:
            self._groups = (_Parquet if path.suffix.lower() == ".parquet" else _Arrow)(path, content)
        self.schema = self._groups.schema

    def __iter__(self) -> Iterator[int]:
        return iter(range(self._groups.count))

    def read(self, number: int, columns: Sequence[str] | None = None) -> pa.Table:
        """One group, all of it or some columns."""
        table = self._groups.read(number, None if columns is None else list(columns))
        table.validate(full=True)  # Arrow has no checksums, and unsound offsets could crash the process
        return table

    def row_bytes(self, number: int) -> int:
        """About what a row of the group takes in memory."""
        return self._groups.row_bytes(number)
