"""Rows that a program has in memory: mappings, and tables as Arrow hands them over."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sized
from itertools import chain, islice
from typing import Any, Generic, TypeVar

import pyarrow as pa

from pipeline.errors import ConfigError, InputError
from pipeline.inputs.columns import Columns, Keep, parse_keep_columns
from pipeline.inputs.finding import InputFile
from pipeline.inputs.jsonl import type_of
from pipeline.inputs.passthrough import free_name
from pipeline.inputs.readers import Reader
from pipeline.inputs.rows import build, failed
from pipeline.inputs.table_rows import TableReader
from pipeline.records import Record, Row
from pipeline.storage.causes import cause, some
from pipeline.storage.stdin import Once

T = TypeVar("T")
NO_ROWS = "give an iterable of mappings (dicts), or a table of Arrow, pandas or Polars"
NOT_ARROWS = (pa.ArrowException, TypeError, ValueError)  # what is raised for frames that Arrow cannot hold


class Watched(Generic[T]):
    """Iterates as `items` do, but ends where they raise; `failure` is what they raised.

    So what came before is answered first, and the error of who made the items is no error of a row.
    """

    def __init__(self, items: Iterable[T]) -> None:
        self._items = items
        self.failure: BaseException | None = None

    def __iter__(self) -> Iterator[T]:
        try:
            yield from self._items
        except Exception as error:  # noqa: BLE001 - raised again behind the last answer
            self.failure = error


class GivenReader(Reader):
    """Rows that come once, from memory."""

    watched: Watched[Any]

    def place(self, index: int) -> Row:
        return Row(row=self._base + index, id=str(index), place=f"row {index}")

    def as_given(self, table: pa.Table) -> Any:
        """A table of answers as the kind of table that the rows came in."""
        return table


class TableGiven(GivenReader, TableReader):
    """A table, or several of the same columns; `num_rows` as far as it has a length."""

    def __init__(
        self, schema: pa.Schema, batches: Iterable[pa.RecordBatch], num_rows: int | None = None
    ) -> None:
        super().__init__(_no_file("arrow"), schema)
        self.num_rows = num_rows
        self.watched = Watched(batches)

    def _records(self) -> Iterator[Record]:
        for batch in self.watched:
            yield from self._rows_of(batch, self.rows_read)
            self.rows_read += batch.num_rows
            self.fraction = self.rows_read / max(self.num_rows or 0, 1)


class PolarsGiven(TableGiven):
    """A frame of Polars."""

    def as_given(self, table: pa.Table) -> Any:
        return sys.modules["polars"].DataFrame(table)


class PandasGiven(TableGiven):
    """A frame of pandas, whose answers have the index of their rows, or else their numbers."""

    def as_given(self, table: pa.Table) -> Any:
        # in which pandas has said which columns were its index
        metadata = {**(table.schema.metadata or {}), **(self.schema.metadata or {})}
        frame = table.replace_schema_metadata(metadata).to_pandas()
        if not set(self.schema.pandas_metadata["index_columns"]) & set(table.column_names):
            frame.index = frame["row"].to_numpy()
        return frame


class MappingReader(GivenReader):
    """Mappings, whose values are Python's; what is copied of them stays as it is."""

    def __init__(
        self, first: Mapping[str, Any] | None, rows: Iterable[Any], num_rows: int | None, keep: Keep | None
    ) -> None:
        """`first` of all `rows` tells their columns, None if there is none.

        `keep` names the keys that are copied, without types; None: all others. Raises ConfigError for a type.
        """
        super().__init__(_no_file("mappings"))
        typed = next((name for name, kind in (keep or {}).items() if kind is not None), None)
        if typed is not None:
            raise ConfigError(f"keep_columns: {typed!r} keeps the type of its values; name it without one")
        self.num_rows, self._keep, self._first = num_rows, keep, first
        self.watched = Watched(rows)

    def columns_told(self) -> dict[str, str] | None:
        return {str(key): type_of(value) for key, value in (self._first or {}).items()} or None

    def _records(self) -> Iterator[Record]:
        for index, row in enumerate(self.watched):
            self.rows_read = index + 1
            self.fraction = self.rows_read / max(self.num_rows or 0, 1)
            if isinstance(row, Mapping):
                yield build(self._columns, self.place(index), row, copied(row, self._columns, self._keep))
            else:
                yield failed(self.place(index), "not_an_object", f"is {_kind(row)}, not a mapping")


def copied(row: Mapping[str, Any], columns: Columns, keep: Keep | None) -> dict[str, Any]:
    """What goes to a row's answer: the keys that are read for nothing else, or those to keep.

    A key with the name of a column of answers is followed by `_input`, as in files.
    """
    names = [name for name in row if name not in columns.roles] if keep is None else list(keep)
    return {free_name(name, columns.names_of_answers, row): row.get(name) for name in names}


def open_given(rows: Any, keep_columns: str | None) -> GivenReader:
    """A reader of what a program has: mappings, a table that Arrow can take over, or an iterable of such.

    Of an iterable the first item is taken, which tells the columns. Raises InputError for what is none of
    them; `keep_columns` as the setting.
    """
    if isinstance(rows, str | bytes | os.PathLike):
        raise InputError(f"rows are {_kind(rows)}: run_batch reads files; here {NO_ROWS}")
    if _is_table(rows):
        return _table_given(rows)
    if isinstance(rows, Mapping) or not isinstance(rows, Iterable) or _package(rows) == "polars":
        hint = "collect() it first, or " if hasattr(rows, "collect") else ""
        raise InputError(f"rows are {_kind(rows)}: {hint}{NO_ROWS}")
    rest = iter(rows)
    first = list(islice(rest, 1))
    again = chain(first, rest)
    if first and _is_table(first[0]):
        schema = _stream(first[0]).schema
        return TableGiven(schema, _batches(again, schema))
    if first and not isinstance(first[0], Mapping):
        raise InputError(f"the first row is {_kind(first[0])}, not a mapping; {NO_ROWS}")
    keep = None if keep_columns is None else parse_keep_columns(keep_columns)
    length = len(rows) if isinstance(rows, Sized) else None
    return MappingReader(first[0] if first else None, again, length, keep)


def _is_table(rows: Any) -> bool:
    """Whether Arrow can take it over, as a stream of batches or as one batch."""
    return hasattr(rows, "__arrow_c_stream__") or hasattr(rows, "__arrow_c_array__")


def _table_given(rows: Any) -> TableGiven:
    package, length = _package(rows), len(rows) if isinstance(rows, Sized) else None
    if package == "pandas" and hasattr(rows, "columns"):
        with_index = _with_index(rows)
        return PandasGiven(with_index.schema, with_index.to_reader(), length)
    stream = _stream(rows)
    return (PolarsGiven if package == "polars" else TableGiven)(stream.schema, stream, length)


def _with_index(frame: Any) -> pa.Table:
    """A frame of pandas, with its index as a column unless that has no name and counts the rows."""
    is_named = any(name is not None for name in frame.index.names)
    counts = not is_named and frame.index.equals(sys.modules["pandas"].RangeIndex(len(frame)))
    try:
        return pa.Table.from_pandas(frame, preserve_index=not counts)
    except NOT_ARROWS as error:
        raise _no_table(frame, error) from error


def _stream(rows: Any) -> pa.RecordBatchReader:
    try:
        if hasattr(rows, "__arrow_c_stream__"):
            return pa.RecordBatchReader.from_stream(rows)
        return pa.Table.from_batches([pa.record_batch(rows)]).to_reader()
    except NOT_ARROWS as error:
        raise _no_table(rows, error) from error


def _no_table(rows: Any, error: Exception) -> InputError:
    return InputError(f"rows are {_kind(rows)}, which Arrow cannot take over as a table: {cause(error)}")


def _batches(tables: Iterable[Any], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """The batches of tables, which must all have the columns of the first one."""
    for index, table in enumerate(tables):
        if not _is_table(table):
            raise InputError(f"item {index} of the rows is {_kind(table)}, while those before are tables")
        stream = _stream(table)
        if not stream.schema.equals(schema):
            told = some([f"{field.name}: {field.type}" for field in stream.schema])
            raise InputError(f"table {index} of the rows has other columns than the first: {told}")
        yield from stream


def _package(rows: Any) -> str:
    return type(rows).__module__.partition(".")[0]


def _kind(value: object) -> str:
    return "null" if value is None else f"of type {type(value).__name__}"


def _no_file(format: str) -> InputFile:
    return InputFile(path=Once(), name="rows", format=format, compression=None, size=0, label="the table")
