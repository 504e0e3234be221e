"""Rows that a program has in memory: mappings, and tables as Arrow hands them over."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sized
from itertools import chain, islice
from typing import Any, Generic, TypeVar, cast

import pyarrow as pa

from pipeline.errors import ConfigError, InputError
from pipeline.inputs.columns import Columns, Keep, parse_keep_columns
from pipeline.inputs.finding import InputFile
from pipeline.inputs.jsonl import type_of
from pipeline.inputs.passthrough import free_name
from pipeline.inputs.readers import Reader
from pipeline.inputs.rows import build, failed
from pipeline.inputs.table_rows import TableReader
from pipeline.outputs.answers import ANSWER_NAMES
from pipeline.records import Record, Row
from pipeline.storage.stdin import Once

T = TypeVar("T")
NO_ROWS = "give an iterable of mappings (dicts), or a table of Arrow, pandas or Polars"


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


class TableGiven(GivenReader, TableReader):
    """A table, or a stream of batches; `num_rows` as far as it has a length."""

    def __init__(self, batches: pa.RecordBatchReader, num_rows: int | None) -> None:
        super().__init__(_no_file("arrow"), batches.schema)
        self.num_rows = num_rows
        self.watched = Watched(batches)

    def _records(self) -> Iterator[Record]:
        for batch in self.watched:
            yield from self._rows_of(batch, self.rows_read)
            self.rows_read += batch.num_rows
            self.fraction = self.rows_read / max(self.num_rows or 0, 1)


class MappingReader(GivenReader):
    """Mappings, whose values are Python's; what is copied of them stays as it is."""

    def __init__(self, rows: Iterable[Any], num_rows: int | None, keep: Keep | None) -> None:
        """`keep` names the keys that are copied, without types; None: all others. Reads the first row.

        Raises InputError where that is no mapping, ConfigError for a type in `keep`.
        """
        super().__init__(_no_file("mappings"))
        typed = next((name for name, kind in (keep or {}).items() if kind is not None), None)
        if typed is not None:
            raise ConfigError(f"keep_columns: {typed!r} keeps the type of its values; name it without one")
        self.num_rows, self._keep = num_rows, keep
        rest = iter(rows)
        self._first = list(islice(rest, 1))
        if self._first and not isinstance(self._first[0], Mapping):
            raise InputError(f"the first row is {_kind(self._first[0])}, not a mapping; {NO_ROWS}")
        self.watched = Watched(chain(self._first, rest))

    def columns_told(self) -> dict[str, str] | None:
        return {str(key): type_of(value) for row in self._first for key, value in row.items()} or None

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
    return {free_name(name, ANSWER_NAMES, row): row.get(name) for name in names}


def open_given(rows: Any, keep_columns: str | None) -> GivenReader:
    """A reader of what a program has: a table that Arrow can take over, or an iterable of mappings.

    Raises InputError for what is neither; `keep_columns` as the setting.
    """
    if isinstance(rows, pa.RecordBatch):
        rows = pa.Table.from_batches([rows])
    length = len(rows) if isinstance(rows, Sized) else None
    if hasattr(rows, "__arrow_c_stream__"):
        return TableGiven(pa.RecordBatchReader.from_stream(rows), length)
    if isinstance(rows, str | bytes | os.PathLike):
        raise InputError(f"rows are {_kind(rows)}: run_batch reads files; here {NO_ROWS}")
    if isinstance(rows, Mapping) or not isinstance(rows, Iterable):
        raise InputError(f"rows are {_kind(rows)}: {NO_ROWS}")
    keep = None if keep_columns is None else parse_keep_columns(keep_columns)
    return MappingReader(cast(Iterable[Any], rows), length, keep)


def _kind(value: object) -> str:
    return "null" if value is None else f"of type {type(value).__name__}"


def _no_file(format: str) -> InputFile:
    return InputFile(path=Once(), name="rows", format=format, compression=None, size=0, label="the table")
