"""Reading back an output that this package wrote, group by group and in any order."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.values.jsonvalues import held_text, holds_keys, parse_json

LINES_GROUP_ROWS = 1_000
LINES_GROUP_BYTES = 4 << 20


class _Groups(Protocol):
    schema: pa.Schema
    count: int

    def read(self, number: int, columns: Sequence[str] | None) -> pa.Table: ...

    def row_bytes(self, number: int) -> int: ...


class _Parquet:
    def __init__(self, source: str | pa.Buffer) -> None:
        opened = source if isinstance(source, str) else pa.BufferReader(source)
        self._file = pq.ParquetFile(opened, pre_buffer=False, page_checksum_verification=True)
        self.schema = self._file.schema_arrow
        self.count = self._file.num_row_groups

    def read(self, number: int, columns: Sequence[str] | None) -> pa.Table:
        return self._file.read_row_group(number, None if columns is None else list(columns))

    def row_bytes(self, number: int) -> int:
        group = self._file.metadata.row_group(number)
        return group.total_byte_size // max(group.num_rows, 1)


class _ArrowFile:
    def __init__(self, source: str | pa.Buffer) -> None:
        self._file = pa.ipc.open_file(_mapped(source))
        self.schema = self._file.schema
        self.count = self._file.num_record_batches

    def read(self, number: int, columns: Sequence[str] | None) -> pa.Table:
        table = pa.Table.from_batches([self._file.get_batch(number)])
        return table if columns is None else table.select(list(columns))

    def row_bytes(self, number: int) -> int:
        batch = self._file.get_batch(number)
        return batch.nbytes // max(batch.num_rows, 1)


class _ArrowStream:
    """A stream is read forwards only; passing over mapped batches costs next to nothing."""

    def __init__(self, source: str | pa.Buffer) -> None:
        self._source = source
        self._last: tuple[int, pa.RecordBatch] | None = None
        self._reopen()
        self.schema = self._reader.schema
        self.count = sum(1 for _ in self._reader)
        self._reopen()

    def read(self, number: int, columns: Sequence[str] | None) -> pa.Table:
        table = pa.Table.from_batches([self._batch(number)])
        return table if columns is None else table.select(list(columns))

    def row_bytes(self, number: int) -> int:
        batch = self._batch(number)
        return batch.nbytes // max(batch.num_rows, 1)

    def _reopen(self) -> None:
        self._reader = pa.ipc.open_stream(_mapped(self._source))
        self._next = 0

    def _batch(self, number: int) -> pa.RecordBatch:
        if self._last is not None and self._last[0] == number:
            return self._last[1]
        if number < self._next:
            self._reopen()
        while self._next <= number:
            self._last = self._next, self._reader.read_next_batch()
            self._next += 1
        assert self._last is not None
        return self._last[1]


class _JsonLines:
    """Runs of lines, of which only the offsets are kept."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.schema = schema
        self._keys = [field.name for field in schema if holds_keys(field)]
        self._names = [field.name for field in schema if not holds_keys(field)]
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

    def read(self, number: int, columns: Sequence[str] | None) -> pa.Table:
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
        row = parse_json(line.decode()) if self._keys else json.loads(line)
        if not isinstance(row, dict) or list(row)[: len(self._names)] != self._names:
            raise ValueError("it has other columns than were written")
        rest = {key: row.pop(key) for key in list(row)[len(self._names) :]}
        if rest and not self._keys:
            raise ValueError("it has other columns than were written")
        return row | dict.fromkeys(self._keys, held_text(rest) if rest else None)

    def _end_group(self, rows: int, end: int) -> None:
        self._rows.append(rows)
        self._starts.append(end)


class Published:
    """An output; its groups are Parquet's row groups, Arrow's batches, or runs of JSON lines."""

    def __init__(
        self, path: Path, content: pa.Buffer | None = None, lines_schema: pa.Schema | None = None
    ) -> None:
        """Open the file, or `content` that stands for it; JSON lines do not hold their schema."""
        if lines_schema is not None:
            self._groups: _Groups = _JsonLines(path, lines_schema)
        else:
            self._groups = _opener(path.suffix.lower())(str(path) if content is None else content)
        self.schema = self._groups.schema

    def __iter__(self) -> Iterator[int]:
        return iter(range(self._groups.count))

    def read(self, number: int, columns: Sequence[str] | None = None) -> pa.Table:
        """One group, all of it or some columns."""
        table = self._groups.read(number, columns)
        table.validate(full=True)  # Arrow has no checksums, and unsound offsets could crash the process
        return table

    def row_bytes(self, number: int) -> int:
        """About what a row of the group takes in memory."""
        return self._groups.row_bytes(number)


def _opener(suffix: str) -> type[_Parquet | _ArrowFile | _ArrowStream]:
    if suffix == ".parquet":
        return _Parquet
    return _ArrowStream if suffix == ".arrows" else _ArrowFile


def _mapped(source: str | pa.Buffer) -> pa.NativeFile:
    return pa.memory_map(source) if isinstance(source, str) else pa.BufferReader(source)
