"""Reading CSV, plain or compressed, one row in memory at a time; columns are text, as no types are told."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import BinaryIO, NamedTuple

import pyarrow as pa

from pipeline.errors import InputError
from pipeline.inputs.finding import InputFile
from pipeline.inputs.lines import BOM, PASSED_BYTES, check_magic, open_lines
from pipeline.inputs.readers import long_line
from pipeline.inputs.rows import failed, rest_lost, until_fault
from pipeline.inputs.table_rows import BATCH_ROWS, TableReader
from pipeline.records import Record, Row, RowError
from pipeline.storage.causes import READ_ERRORS, changed, told

BATCH_BYTES = 16 << 20
DELIMITERS = ",;\t"
HEADER_BYTES = 1 << 20
LONGEST_NAME = 200  # characters of a column's name; a longer one is a row's text
# delimiters, quotes and line ends are one byte each in UTF-8, so that cells can be cut without being decoded
_BYTES = "latin-1"
# what the csv module says, in words that name no argument of a function
_FAULTS = {
    "new-line": "has a carriage return outside quotes",
    "expected after": "has text behind a closing quote; a quote within a cell is written twice",
}
_UNCLOSED = "it opens a quote that is never closed"


class Parsed(NamedTuple):
    """One row of a file: its cells, or why there are none."""

    line: int  # of the file, from 1, that it begins on
    cells: Sequence[str] | RowError


class CsvReader(TableReader):
    """One CSV file, whose first row names the columns; how many rows it has is known only at its end.

    The delimiter is the one of comma, semicolon and tab that the first line has most often outside quotes.
    A cell without a character is null.
    """

    def __init__(self, file: InputFile) -> None:
        if not file.path.is_file():
            raise InputError(f"{file.path} is a pipe, and CSV is read from files alone; save it to a file")
        if file.compression is not None:
            check_magic(file)
        faults_told = told(f"{file.path} is not a readable CSV file", kind=InputError, of=READ_ERRORS)
        with faults_told, open_lines(file) as (_, stream):
            self._header = CsvRows(stream, HEADER_BYTES).header()
        names = _names(file, self._header)
        super().__init__(file, pa.schema([pa.field(name, pa.large_string()) for name in names]))
        self._lines: list[int] = []  # on which the rows of the batch at hand begin
        self._first = 0  # the number of its first row

    def place(self, index: int) -> Row:
        """As of any file, with the line that the row begins on, where that is known."""
        row = super().place(index)
        at = index - self._first
        if not 0 <= at < len(self._lines):
            return row
        return replace(row, place=f"{self.file.label} line {self._lines[at]}")

    def _records(self) -> Iterator[Record]:
        """Those of all rows but blank lines."""
        self._lines, self._first = [], 0
        waiting: list[Sequence[str]] = []
        size = 0
        for parsed in until_fault(self._parsed()):
            is_end = isinstance(parsed, RowError)
            cells = parsed if isinstance(parsed, RowError) else parsed.cells
            if isinstance(cells, RowError) or len(waiting) == BATCH_ROWS or size > BATCH_BYTES:
                yield from self._given(waiting)
                waiting, size = [], 0
            if isinstance(parsed, Parsed):
                self._lines.append(parsed.line)
            if isinstance(cells, RowError):
                yield self._failure(cells, is_end=is_end)
            else:
                waiting.append(cells)
                size += sum(map(len, cells))
        yield from self._given(waiting)

    def _given(self, rows: Sequence[Sequence[str]]) -> Iterator[Record]:
        """The records of sound rows, as one batch of the columns that are used."""
        if rows:
            wanted = {*self._columns.read, *self._plan.sources}
            columns = {
                name: _as_text([row[i] for row in rows])
                for i, name in enumerate(self.schema.names)
                if name in wanted
            }
            yield from self._rows_of(pa.RecordBatch.from_pydict(columns), self._first)
        self._pass_on(len(rows))

    def _failure(self, fault: RowError, *, is_end: bool) -> RowError:
        row = self.place(self._first)
        self._pass_on(1)
        if is_end or fault.is_fault:
            return rest_lost(row, fault)
        return failed(row, fault.kind, str(fault))

    def _pass_on(self, count: int) -> None:
        self._first += count
        self.rows_read = self._first
        self._lines = self._lines[count:]

    def _parsed(self) -> Iterator[Parsed]:
        with open_lines(self.file) as (raw, stream):
            rows = CsvRows(stream, self._columns.longest_line)
            if rows.header() != self._header:
                raise changed()
            for parsed in rows:
                if self.file.size:
                    self.fraction = min(raw.tell() / self.file.size, 1.0)
                yield parsed


class CsvRows:
    """The rows of an open file, of which none has more than `longest` bytes."""

    def __init__(self, stream: BinaryIO, longest: int) -> None:
        self._stream = stream
        self._longest = longest
        self._left = longest  # bytes that the row at hand may still have
        self._quotes = 0  # in it so far
        self._line = 0  # lines read
        self._width = 0
        self._held = ""  # the first line, which was looked at before it is parsed
        csv.field_size_limit(max(csv.field_size_limit(), longest))

    def header(self) -> list[str]:
        """The cells of the first row that is not blank; none if there is none.

        Raises ValueError for one that is no CSV.
        """
        self._left = HEADER_BYTES
        try:
            self._held = self._first_line()
            plain = re.sub('"[^"]*"', "", self._held)
            delimiter = max(DELIMITERS, key=plain.count)
            self._reader = csv.reader(iter(self._row_line, ""), delimiter=delimiter, strict=True)
            cells = self._cells() if self._held else []
            if isinstance(cells, RowError):
                raise cells
        except RowError as error:
            is_long = error.kind == "long_line"
            fault = f"has more than {HEADER_BYTES:,} bytes" if is_long else str(error).removeprefix("it ")
            raise ValueError(f"its first line {fault}") from None
        self._width = len(cells)
        return cells

    def __iter__(self) -> Iterator[Parsed]:
        while True:
            self._left, self._quotes = self._longest, 0
            first = self._line + 1
            try:
                cells = self._cells()
            except StopIteration:
                return
            if isinstance(cells, list) and len(cells) not in (0, self._width):
                found, wanted = len(cells), self._width
                cells = RowError("bad_csv", f"has {found} cells, where the first line names {wanted} columns")
            if cells != []:
                yield Parsed(first, cells)

    def _cells(self) -> list[str] | RowError:
        """The cells of the next row, none of a blank line; raises StopIteration behind the last."""
        try:
            return next(self._reader)
        except RowError as error:
            return error
        except csv.Error as error:
            if "unexpected end" in str(error):
                return RowError("bad_csv", _UNCLOSED, is_fault=True)
            known = next((words for part, words in _FAULTS.items() if part in str(error)), None)
            return RowError("bad_csv", known or f"is no CSV: {error}")

    def _first_line(self) -> str:
        """The first line that is not blank, without a mark in front of it; empty if there is none."""
        line = self._next_line().removeprefix(BOM.decode(_BYTES))
        while line and not line.strip():
            line = self._next_line()
        return line

    def _row_line(self) -> str:
        held, self._held = self._held, ""
        return held or self._next_line()

    def _next_line(self) -> str:
        """One more line of the row at hand, empty at the end; a row that gets too long is passed over."""
        line = self._stream.readline(self._left + 1)
        self._line += line.endswith(b"\n")
        self._quotes += line.count(b'"')
        if len(line) <= self._left:
            self._left -= len(line)
            return line.decode(_BYTES)
        while line and (self._quotes % 2 or not line.endswith(b"\n")):
            line = self._stream.readline(PASSED_BYTES)
            self._line += line.endswith(b"\n")
            self._quotes += line.count(b'"')
        raise long_line(self._longest)


def _as_text(cells: Sequence[str]) -> pa.Array:
    """(rows,) texts that may not be UTF-8, which their reader finds out; an empty cell is null."""
    values = [cell.encode(_BYTES) if cell else None for cell in cells]
    return pa.array(values, pa.large_binary()).view(pa.large_string())


def _names(file: InputFile, header: Sequence[str]) -> list[str]:
    """The names of the columns; one without a name is called by its place, from 1."""
    raw = [cell.encode(_BYTES) for cell in header]
    try:
        names = [name.decode() or f"column {place}" for place, name in enumerate(raw, start=1)]
    except UnicodeDecodeError:
        raise InputError(
            f"{file.label} has a column name that is not UTF-8; convert the file, as by iconv -f "
            "WINDOWS-1252 -t UTF-8"
        ) from None
    if not names:
        raise InputError(f"{file.label} has blank lines alone, and no names of columns in the first")
    long = next((name for name in names if len(name) > LONGEST_NAME), None)
    if long is not None:
        raise InputError(
            f"{file.label} names no columns in its first line: {long[:40]!r}... has {len(long):,} characters"
        )
    return names
