"""Outputs read back: groups of their rows, whatever the format and the layout of the file."""

from __future__ import annotations

import json
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.outputs.batch_lines import OWN, TOLD_THERE, errors_path, is_of_requests, told_there
from pipeline.outputs.layout import RowLayout, layout_in
from pipeline.values.jsonvalues import held_text, holds_keys, parse_json

LINES_GROUP_ROWS = 1_000
LINES_GROUP_BYTES = 4 << 20


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


class _LaidOut:
    """The rows of a file in which they stand otherwise."""

    def __init__(self, file: _Parquet | _Arrow | _JsonLines, layout: RowLayout) -> None:
        self._file, self._layout = file, layout
        self.schema = layout.rows_schema(file.schema)
        self.count = file.count

    def read(self, number: int, columns: list[str] | None) -> pa.Table:
        stored = None if columns is None else self._layout.stored_in(self._file.schema, columns)
        table = self._file.read(number, stored)
        table.validate(full=True)
        rows = self._layout.restored(table)
        return rows if columns is None else rows.select(columns)

    def row_bytes(self, number: int) -> int:
        return self._file.row_bytes(number) // self._layout.answers_a_row


class Published:
    """An output; its groups are Parquet's row groups, Arrow's batches, or runs of JSON lines.

    It has a row an answer, whatever the layout of the file.
    """

    def __init__(
        self, path: Path, content: pa.Buffer | None = None, lines_schema: pa.Schema | None = None
    ) -> None:
        """Open the file, or `content` that stands for it; JSON lines do not hold their schema."""
        self._groups: _Parquet | _Arrow | _JsonLines | _BatchFiles | _LaidOut
        self.firsts: Sequence[int] = (0,)  # groups with which a file begins
        if lines_schema is not None and is_of_requests(lines_schema):
            self._groups = files = _BatchFiles(path, lines_schema)
            self.firsts = files.firsts
        else:
            file = _opened(path, content, lines_schema)
            layout = layout_in(file.schema)
            self._groups = file if layout.is_usual or not file.schema.names else _LaidOut(file, layout)
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


def _opened(
    path: Path, content: pa.Buffer | None, lines_schema: pa.Schema | None
) -> _Parquet | _Arrow | _JsonLines:
    """One file, as its extension says."""
    if lines_schema is not None:
        return _JsonLines(path, lines_schema)
    return (_Parquet if path.suffix.lower() == ".parquet" else _Arrow)(path, content)
